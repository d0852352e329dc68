"""Live ranges: which bytes each choice keeps in memory, and when.

Time is the position of ops in program order. Inputs that are donated hold their memory throughout,
and the results that take their place add nothing. Values stacked by a loop exist from the start of
the loop to their last use; a value made outside a loop and read inside lives to the loop's end.
Weights cast inside a loop are cast as a whole before it (XLA hoists the cast), and weights gathered
for an op exist around that op.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence, Set

import numpy as np

from cost_model.device import Device
from cost_model.fusion import CONTRACTIONS, TRANSCENDENTAL
from graphs.choices import Choices
from graphs.graph import Graph, Op
from graphs.groups import COPY, HEAVY, LEAF, LIGHT, Grouping


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lifetime:
    """A tensor that is in memory during an interval, held as its group shards it."""

    group: int
    tensor: int
    dims: tuple[int, ...]
    """Class of each dimension in the group."""
    interval: tuple[int, int]
    """Half-open, in op positions."""
    label: str
    """state | gradients | activations | weights | other."""
    times: float = 1.0
    """How many of it are held at once."""
    result: bool = False
    """Whether it is the combined result of a heavy group."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Usage:
    """Bytes that a node's choice keeps during an interval."""

    node: int
    interval: tuple[int, int]
    """Half-open, in op positions."""
    n_bytes: np.ndarray
    """[S]."""
    label: str
    """As of :class:`Lifetime`."""


def last_uses(graph: Graph) -> np.ndarray:
    """[tensors] position after the last use, loops counted to their end; -1 if unused."""
    last = np.full(len(graph.tensors), -1, np.int64)
    ends = _Ends(graph)
    for i, op in enumerate(graph.ops):
        for t in op.inputs:
            if t >= 0:
                last[t] = max(last[t], ends.after(t, i))
    for t in graph.outputs:
        if t >= 0:
            last[t] = len(graph.ops) + 1
    return last


class _Ends:
    """Until when a use keeps a value: the op itself, or the end of the loop that it is in."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.stop: dict[tuple[int, int], int] = {}  # (home of a value, region of its use)
        self.chain: dict[int, list[int]] = {}
        for r in range(len(graph.regions)):
            up, at = [], r
            while at >= 0:
                up.append(at)
                at = graph.regions[at].parent
            self.chain[r] = up

    def after(self, t: int, i: int) -> int:
        """Position after the use of tensor t by op i."""
        home, region = self.graph.tensors[t].region, self.graph.ops[i].region
        if home == region:
            return i + 1
        if (home, region) not in self.stop:
            around = [self.graph.regions[r] for r in self.chain[region]]
            self.stop[home, region] = max((r.stop for r in around if r.parent == home), default=0)
        return max(i + 1, self.stop[home, region])


_COSTLY = frozenset("tanh erf erfc logistic pow sin cos log1p".split())
"""Functions that XLA keeps the results of rather than compute them in a second fused loop."""
_LOOP = frozenset("scan_slice scan_stack carry_in carry_out".split())
_RECOMPUTED = frozenset(
    "broadcast_in_dim iota convert_element_type reshape transpose squeeze expand_dims copy slice "
    "split concatenate pad select_n eq ne lt le gt ge not and or is_finite literal".split()
)
"""Primitives that XLA computes again in each reader rather than keep."""


def held_across(grouping: Grouping, stored: Set[int]) -> set[int]:
    """Values of fused loops that are made before a heavy op and read after it: they stay in memory
    though no other group reads them. So do results of costly functions that are read before and
    after a reduction over them."""
    graph = grouping.graph
    heavy: dict[int, list[int]] = {}
    passes: dict[int, list[int]] = {}
    for item in grouping.groups:
        for o in item.ops:
            op = graph.ops[o]
            if item.kind == HEAVY:
                heavy.setdefault(op.region, []).append(o)
            elif op.primitive.startswith("reduce_"):
                passes.setdefault(op.region, []).append(o)
    at = {r: np.array(sorted(o)) for r, o in heavy.items()}
    last = last_uses(graph)
    found = set()
    for t, tensor in enumerate(graph.tensors):
        if t in stored or tensor.producer < 0 or len(tensor.shape) < 2:
            continue
        op = graph.ops[tensor.producer]
        if op.primitive in _RECOMPUTED or op.region not in at or last[t] < 0:
            continue
        ops = at[op.region]
        if op.primitive in _COSTLY:
            over = [
                o
                for o in passes.get(op.region, ())
                if _size(graph, graph.ops[o].inputs[0]) >= _size(graph, t)
            ]
            ops = np.sort(np.concatenate([ops, over]))
        if np.searchsorted(ops, tensor.producer) < np.searchsorted(ops, last[t] - 1):
            found.add(t)
    return found


def made_in_readers(grouping: Grouping, held: Set[int]) -> set[int]:
    """Results of light loops that XLA:TPU makes again inside each contraction that reads them, so
    that they are never in memory (read from compiled programs).

    It does so for any single reader; for several where no costly function is in the chain of
    element-wise ops that leads to the value.
    """
    graph = grouping.graph
    readers: dict[int, list[int]] = {}
    for o, op in enumerate(graph.ops):
        for t in op.inputs:
            readers.setdefault(t, []).append(o)
    kept_out = {t for t in graph.outputs if t >= 0}
    costly: dict[int, bool] = {}
    found: set[int] = set()
    for op in graph.ops:
        for t in op.outputs:
            size = _size(graph, t)
            dear = op.primitive in TRANSCENDENTAL and not _by_rows(graph, op)
            costly[t] = dear or any(
                costly.get(i, False)
                for i in op.inputs
                if i >= 0 and (i not in held or i in found) and _size(graph, i) >= size
            )  # fmt: skip
            light = grouping.groups[grouping.group_of[t]].kind == LIGHT
            uses = readers.get(t, [])
            if light and t in held and t not in kept_out and op.primitive not in _LOOP and uses:
                inside = all(
                    graph.ops[o].primitive in CONTRACTIONS and graph.ops[o].region == op.region
                    for o in uses
                )
                if inside and (len(uses) == 1 or not costly[t]):
                    found.add(t)
    return found


def spread_in_readers(grouping: Grouping) -> set[int]:
    """Broadcasts and counters that only light loops read: each reader makes them for itself."""
    graph = grouping.graph
    found = {
        op.outputs[0]
        for op in graph.ops
        if op.primitive == "iota"
        or (
            op.primitive == "broadcast_in_dim"
            and (op.inputs[0] < 0 or _size(graph, op.inputs[0]) < _size(graph, op.outputs[0]))
        )
    }
    for o, op in enumerate(graph.ops):
        if op.primitive in _LOOP or not grouping.rules[o].light:
            found -= set(op.inputs)
    return found - {t for t in graph.outputs if t >= 0}


def _size(graph: Graph, t: int) -> int:
    return graph.tensors[t].n_elements


def _by_rows(graph: Graph, op: Op) -> bool:
    """Whether it divides by fewer numbers than it makes, so that XLA multiplies by inverses."""
    divisor = op.inputs[-1]
    return op.primitive == "div" and (
        divisor < 0 or _size(graph, divisor) < _size(graph, op.outputs[0])
    )


def read_until(grouping: Grouping, held: Set[int], replaced: set[int]) -> np.ndarray:
    """[tensors] as :func:`last_uses`, uses through values that are kept nowhere included.

    A fused loop that needs such a value computes it again from what is in memory, so that this
    stays there until then: the logits, for one, until the gradient of the loss is made from them.
    A reduction ends the chain, for its result is kept. A value in ``replaced`` takes the place of
    one of the same size that it is made from (XLA keeps either and computes the other).
    """
    graph = grouping.graph
    ends = _Ends(graph)
    until = np.full(len(graph.tensors), -1, np.int64)
    until[[t for t in graph.outputs if t >= 0]] = len(graph.ops) + 1
    for i in range(len(graph.ops) - 1, -1, -1):
        op = graph.ops[i]
        for t in op.inputs:
            if t < 0:
                continue
            end = ends.after(t, i)
            if op.primitive not in _LOOP and graph.tensors[t].region == op.region:
                for u in op.outputs:
                    if u in replaced and graph.tensors[u].n_bytes == graph.tensors[t].n_bytes:
                        end = i
                    elif u not in held and _size(graph, t) <= _size(graph, u):
                        end = int(until[u])
            until[t] = max(until[t], end)
    return until


def usage_entries(
    held: Iterable[Lifetime],
    graph: Graph,
    node_of: np.ndarray,
    choices: Sequence[Choices],
    axis_sizes: tuple[int, ...],
) -> list[Usage]:
    """What each node's choices keep on a mesh; entries of one node and one interval are added up."""
    found: dict[tuple[int, tuple[int, int], str], Usage] = {}
    for x in held:
        node = int(node_of[x.group])
        shards = choices[node].shards(x.dims, axis_sizes, result=x.result)
        n_bytes = x.times * graph.tensors[x.tensor].n_bytes / shards
        key = (node, x.interval, x.label)
        if key in found:
            n_bytes = found[key].n_bytes + n_bytes
        found[key] = Usage(node=node, interval=x.interval, n_bytes=n_bytes, label=x.label)
    return list(found.values())


def lifetimes(grouping: Grouping, stored: Set[int], device: Device) -> tuple[Lifetime, ...]:
    """Everything that a program keeps in memory, and when.

    ``stored`` are the tensors that are in memory at all (:class:`cost_model.fusion.Fusion`).
    """
    graph = grouping.graph
    last = last_uses(graph)
    end = len(graph.ops) + 1
    aliased = {graph.outputs[b] for _, b in graph.aliases}
    kept_inputs = {graph.inputs[a] for a, _ in graph.aliases}
    found: list[Lifetime] = []

    def add(group, t, dims, interval, label, times=1.0, result=False):
        if interval[1] > interval[0]:
            found.append(
                Lifetime(
                    group=group, tensor=t, dims=tuple(dims), interval=interval, label=label,
                    times=times, result=result,
                )
            )  # fmt: skip

    inputs = set(graph.inputs)
    across = held_across(grouping, stored)
    held = stored | across
    held -= spread_in_readers(grouping)
    if device.family == "tpu":
        held -= made_in_readers(grouping, held)
    until = read_until(grouping, held, across)
    all_readers = readers_of(grouping)
    for g, item in enumerate(grouping.groups):
        if item.kind == COPY:
            if grouping.groups[grouping.group_of[item.source]].kind == LEAF:
                readers = all_readers[(item.source, item.views[0].region)]
                add(g, item.source, item.views[0].dims,
                    (min(readers), max(readers) + 1), "weights")  # fmt: skip
            continue
        for t, dims in item.tensors.items():
            tensor = graph.tensors[t]
            if t not in held or tensor.n_bytes < 64:
                continue
            result = item.kind == HEAVY
            if t in inputs:
                label = "state" if t in kept_inputs else "other"
                add(g, t, dims, (0, end), label, result=result)
                continue
            if t in aliased or last[t] < 0:
                continue
            producer = tensor.producer
            if producer < 0:
                continue
            op = graph.ops[producer]
            if op.primitive == "carry_out":
                continue  # same memory as the loop's value
            start = producer
            if op.primitive == "scan_stack":
                start = graph.regions[op.region].start
            label = (
                "gradients"
                if op.primitive == "scan_stack" and _is_state(grouping, g, aliased)
                else "activations"
            )
            stop = int(until[t])
            if op.primitive == "carry_in":
                stop = max(stop, graph.regions[tensor.region].stop)
            add(g, t, dims, (start, stop), label, result=result)
        if item.kind == LEAF:
            _hoisted_casts(grouping, g, add)
        if item.kind == HEAVY:
            for view in item.views:
                source = grouping.source_group(g, view)
                if grouping.groups[source].kind == LEAF and view.ops:
                    at = view.ops[0]
                    add(g, view.tensor, view.dims, (at, at + 1), "weights")
    return tuple(found)


def _is_state(grouping: Grouping, g: int, aliased: set[int]) -> bool:
    return any(t in aliased for t in grouping.groups[g].tensors)


def readers_of(grouping: Grouping) -> dict[tuple[int, int], list[int]]:
    """(tensor, region) -> the heavy ops that read it there."""
    found: dict[tuple[int, int], list[int]] = {}
    for item in grouping.groups:
        if item.kind == HEAVY:
            for view in item.views:
                found.setdefault((view.tensor, view.region), []).extend(view.ops)
    return found


def _hoisted_casts(grouping: Grouping, g: int, add) -> None:
    """A cast of a scanned weight is done for the whole stack before the loop."""
    graph = grouping.graph
    item = grouping.groups[g]
    sliced = {graph.ops[o].outputs[0] for o in item.ops if graph.ops[o].primitive == "scan_slice"}
    for o in item.ops:
        op = graph.ops[o]
        if op.primitive == "convert_element_type" and op.inputs[0] in sliced:
            region = graph.regions[op.region]
            t = op.outputs[0]
            add(g, t, item.tensors[t], (region.start, region.stop), "weights", region.trips)
