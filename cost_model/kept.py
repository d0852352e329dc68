"""Which values XLA keeps in memory, in which type, and until when they are read.

What is not kept is computed again in the kernels that read it, from values that are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Set

import numpy as np

from cost_model.device import Device
from cost_model.fusion import REDUCTIONS, Fusion
from graphs.graph import Graph
from graphs.groups import HEAVY, Grouping

_KEPT = frozenset("exp exp2".split())
"""Functions whose results XLA keeps over a heavy op, as the weights of a softmax; chains without
them it computes again in each reader, gated and other activations included (compiled programs)."""
_COSTLY = frozenset("tanh erf erfc logistic pow sin cos log1p".split())
"""Functions that XLA:GPU keeps the results of over a reduction as well."""
_RECOMPUTED = frozenset(
    "broadcast_in_dim iota convert_element_type reshape transpose squeeze expand_dims copy slice "
    "split concatenate pad select_n eq ne lt le gt ge not and or is_finite literal".split()
)
"""Primitives that XLA:GPU computes again in each reader."""
_STORES_WEIGHTS = frozenset({"v5p"})
"""Devices whose compiler stores the quotients of a softmax for the two contractions that read them;
those of v4, v5e and v6e make them in each (compiled programs of eleven small models)."""
_LOOP = frozenset("scan_slice scan_stack carry_in carry_out".split())
_PASSED_ON = frozenset(
    "concatenate convert_element_type reduce_precision reshape transpose squeeze expand_dims".split()
)
"""Primitives behind which a value is stored, where one alone reads it: in their type, if smaller."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kept:
    """What a program keeps in memory on a kind of device."""

    held: frozenset[int]
    """Tensors that are in memory."""
    made: frozenset[int]
    """Operands that contractions make in their kernels instead."""
    across: frozenset[int]
    """Of those held, what is kept for later readers in its group alone."""
    until: np.ndarray
    """[tensors] position after which one is needed no more; -1 if never."""
    itemsizes: np.ndarray
    """[tensors] bytes of an element where one is stored."""

    @classmethod
    def of(cls, grouping: Grouping, fusion: Fusion, device: Device) -> Kept:
        graph = grouping.graph
        tpu = device.family == "tpu"
        across = held_across(grouping, fusion.stored, tpu=tpu)
        held = (fusion.stored | across) - spread_in_readers(grouping)
        made = set[int]()
        if tpu:  # XLA:GPU leaves contractions to libraries, which make nothing
            made = {graph.ops[o].outputs[0] for o in fusion.inside}
            if device.name in _STORES_WEIGHTS:
                made -= quotients(graph, across)
            held -= made | made_in_reductions(grouping)
        until = read_until(grouping, held, across, early=tpu)
        return cls(
            held=frozenset(held),
            made=frozenset(made),
            across=frozenset(across),
            until=np.where(last_uses(graph) < 0, -1, until),
            itemsizes=itemsizes(graph) if tpu else np.array([t.itemsize for t in graph.tensors]),
        )


def last_uses(graph: Graph) -> np.ndarray:
    """[tensors] position after the last use, loops counted to their end; -1 if unused."""
    last = np.full(len(graph.tensors), -1, np.int64)
    ends = _Ends(graph, early=False)
    for i, op in enumerate(graph.ops):
        for t in op.inputs:
            if t >= 0:
                last[t] = max(last[t], ends.after(t, i))
    for t in graph.outputs:
        if t >= 0:
            last[t] = len(graph.ops) + 1
    return last


class _Ends:
    """Until when a use keeps a value: the op itself, or the end of the loop that it is in.

    ``early``: what a loop stacks is stacked as soon as it is made.
    """

    def __init__(self, graph: Graph, *, early: bool) -> None:
        self.graph, self.early = graph, early
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
            stacked = self.early and self.graph.ops[i].primitive == "scan_stack"
            return max(self.graph.tensors[t].producer, 0) + 1 if stacked else i + 1
        if (home, region) not in self.stop:
            around = [self.graph.regions[r] for r in self.chain[region]]
            self.stop[home, region] = max((r.stop for r in around if r.parent == home), default=0)
        return max(i + 1, self.stop[home, region])


def held_across(grouping: Grouping, stored: Set[int], *, tpu: bool) -> set[int]:
    """Values of fused loops that are made before a heavy op and read after it and stay in memory
    though no other group reads them.

    On TPUs these are exponentials. XLA:GPU keeps whatever takes arithmetic, and results of costly
    functions also where they are read before and after a reduction over them.
    """
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
        again = op.primitive not in _KEPT if tpu else op.primitive in _RECOMPUTED
        if again or op.region not in at or last[t] < 0:
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


def made_in_reductions(grouping: Grouping) -> set[int]:
    """Results of light loops that nothing but reductions of their region read: each makes them."""
    graph = grouping.graph
    found = {
        op.outputs[0]
        for o, op in enumerate(graph.ops)
        if grouping.rules[o].light and op.primitive not in _LOOP and len(op.outputs) == 1
    } - {t for t in graph.outputs if t >= 0}
    read = set()
    for op in graph.ops:
        for t in op.inputs:
            if t >= 0 and (op.primitive not in REDUCTIONS or graph.tensors[t].region != op.region):
                found.discard(t)
        read.update(op.inputs)
    return found & read


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


def quotients(graph: Graph, exponentials: Set[int]) -> set[int]:
    """Exponentials over their sums, and these in another type or shape."""
    found = set()
    for op in graph.ops:
        if op.primitive == "div" and op.inputs[0] in exponentials:
            found.add(op.outputs[0])
        elif op.primitive in _PASSED_ON and op.inputs[0] in found:
            found.add(op.outputs[0])
    return found


def itemsizes(graph: Graph) -> np.ndarray:
    """[tensors] bytes of an element where it is stored: a value that one op alone reads, to change
    its type, is stored in the new one if that is smaller."""
    readers: dict[int, list[int]] = {}
    for o, op in enumerate(graph.ops):
        for t in op.inputs:
            readers.setdefault(t, []).append(o)
    found = np.array([t.itemsize for t in graph.tensors], np.int64)
    for o in range(len(graph.ops) - 1, -1, -1):
        op = graph.ops[o]
        if op.primitive in _PASSED_ON:
            for t in op.inputs:
                if t >= 0 and len(readers[t]) == 1:
                    found[t] = min(found[t], found[op.outputs[0]])
    return found


def read_until(
    grouping: Grouping, held: Set[int], replaced: Set[int], *, early: bool
) -> np.ndarray:
    """[tensors] as :func:`last_uses`, uses through values that are kept nowhere included.

    A fused loop that needs such a value computes it again from what is in memory, so that this
    stays there until then: the logits, for one, until the gradient of the loss is made from them.
    A reduction ends the chain, for its result is kept. A value in ``replaced`` takes the place of
    one of the same size that it is made from (XLA keeps either and computes the other). ``early``:
    what a loop stacks is stacked when it is made, as XLA:TPU does.
    """
    graph = grouping.graph
    ends = _Ends(graph, early=early)
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
