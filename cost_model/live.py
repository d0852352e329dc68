"""Live ranges: which bytes each choice keeps in memory, and when.

Time is the position of ops in program order. Inputs that are donated hold their memory throughout,
and the results that take their place add nothing. Values stacked by a loop exist from the start of
the loop to their last use; a value made outside a loop and read inside lives to the loop's end.
Weights cast inside a loop are cast as a whole before it (XLA hoists the cast), and weights gathered
for an op exist around that op.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence, Set

import numpy as np

from cost_model.device import Device
from cost_model.fusion import Fusion
from cost_model.kept import Kept
from cost_model.operators import roles_of
from cost_model.partial_sums import passes_sums_on
from cost_model.state_copies import RELAID_SHARE
from graphs.choices import Choices
from graphs.groups import COPY, HEAVY, LEAF, Grouping

ALWAYS, WINDOWED, SHARDED, GROUPED, SLICED = "always windowed sharded grouped sliced".split()

_FRAGMENTATION = 1.15
"""Size of XLA:TPU's heap over the most bytes that are alive in it at once, those that outlive a loop
left out: they are packed. Set so that peaks of the compiled steps of all cases are right in the
mean."""
_STORES_SCORES = frozenset({"v5e", "v5p"})
"""Devices whose compiler stores scores that :func:`in_groups` tells of; that of v6e does not."""


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
    """Bytes of memory that it takes over its own."""
    result: bool = False
    """Whether it is the combined result of a heavy group."""
    where: str = ALWAYS
    """The choices under which it is there: ALWAYS, WINDOWED (the group's contraction is made a loop
    that passes sums on), SHARDED (over all devices), GROUPED (:func:`in_groups`) or SLICED (combined,
    and waiting for a reader who may take slices: an :class:`cost_model.operands.Operand`)."""


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


def fragmentation(device: Device) -> float:
    """Bytes of memory over those that are alive in it for a while."""
    return _FRAGMENTATION if device.family == "tpu" else 1.0


def usage_entries(
    held: Iterable[Lifetime],
    grouping: Grouping,
    node_of: np.ndarray,
    choices: Sequence[Choices],
    axis_sizes: tuple[int, ...],
) -> list[Usage]:
    """What each node's choices keep on a mesh; entries of one node and one interval are added up."""
    found: dict[tuple[int, tuple[int, int], str], Usage] = {}
    for x in held:
        if x.where == SLICED:
            continue
        node = int(node_of[x.group])
        shards = choices[node].shards(x.dims, axis_sizes, result=x.result)
        n_bytes = x.times * grouping.graph.tensors[x.tensor].n_bytes / shards
        if x.where == WINDOWED:
            n_bytes = n_bytes * passes_sums_on(grouping, x.group, choices[node], axis_sizes)
        elif x.where == SHARDED:
            n_bytes = n_bytes * (shards >= math.prod(axis_sizes))
        elif x.where == GROUPED:
            n_bytes = n_bytes * in_groups(grouping, x.group, choices[node], axis_sizes)
        if not n_bytes.any():
            continue
        key = (node, x.interval, x.label)
        if key in found:
            n_bytes = found[key].n_bytes + n_bytes
        found[key] = Usage(node=node, interval=x.interval, n_bytes=n_bytes, label=x.label)
    return list(found.values())


def in_groups(
    grouping: Grouping, g: int, choices: Choices, axis_sizes: tuple[int, ...]
) -> np.ndarray:
    """[S] whether a contraction has two batches and two rows or columns on a device, as the scores of
    grouped queries: XLA:TPU stores its result rather than end the kernel with the exponential."""
    item = grouping.groups[g]
    op, roles = roles_of(grouping, item)
    rule = grouping.rules[op]

    def several(factors):
        local = [
            rule.sizes[f] / choices.shards((item.factors[f],), axis_sizes) > 1 for f in factors
        ]
        return np.sum(local, axis=0) >= 2 if local else np.zeros(len(choices), bool)

    return (several(roles["m"]) | several(roles["n"])) & several(roles["b"])


def lifetimes(
    grouping: Grouping,
    fusion: Fusion,
    device: Device,
    *,
    sliced: Set[int],
    relaid: Set[int],
) -> tuple[Lifetime, ...]:
    """Everything that a program keeps in memory, and when.

    ``sliced``: groups of gradients as of :class:`cost_model.partial_sums.Sums`; ``relaid``: tensors of
    :func:`cost_model.state_copies.relaid_state`.
    """
    graph = grouping.graph
    end = len(graph.ops) + 1
    aliased = {graph.outputs[b] for _, b in graph.aliases}
    kept_inputs = {graph.inputs[a] for a, _ in graph.aliases}
    found: list[Lifetime] = []
    spread = fragmentation(device)
    loops = [r for r in graph.regions if r.parent >= 0]

    def add(group, t, dims, interval, label, times=1.0, result=False, where=ALWAYS):
        if not any(interval[0] <= r.start and r.stop <= interval[1] for r in loops):
            times = times * (1.0 if label in ("state", "other") else spread)
        if interval[1] > interval[0]:
            found.append(
                Lifetime(
                    group=group, tensor=t, dims=tuple(dims), interval=interval, label=label,
                    times=times, result=result, where=where,
                )
            )  # fmt: skip

    inputs = set(graph.inputs)
    kept = Kept.of(grouping, fusion, device)
    all_readers = readers_of(grouping)
    weighed = set[int]()
    if device.name in _STORES_SCORES:
        weighed = {graph.tensors[t].producer for t in kept.across}
    for g, item in enumerate(grouping.groups):
        if item.kind == COPY:
            if grouping.leaf_of(g) >= 0:
                readers = all_readers[(item.source, item.views[0].region)]
                add(g, item.source, item.views[0].dims,
                    (min(readers), max(readers) + 1), "weights")  # fmt: skip
            continue
        for t, dims in item.tensors.items():
            tensor = graph.tensors[t]
            if t not in kept.held or tensor.n_bytes < 64:
                continue
            result = item.kind == HEAVY
            if t in inputs:
                label = "state" if t in kept_inputs else "other"
                add(g, t, dims, (0, end), label, result=result)
                if t in relaid:
                    add(g, t, dims, (0, end), "weights", RELAID_SHARE, result, SHARDED)
                continue
            if t in aliased or kept.until[t] < 0:
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
            stop = int(kept.until[t])
            if op.primitive == "carry_in":
                stop = max(stop, graph.regions[tensor.region].stop)
            narrower = kept.itemsizes[t] / tensor.itemsize
            if g in sliced and result:
                add(g, t, dims, (start + 1, stop), label, result=result, where=SLICED)
                stop = start + 1
            add(g, t, dims, (start, stop), label, narrower, result=result)
            if op.primitive == "dot_general" and stop in weighed:
                add(g, t, dims, (stop, stop + 1), label, result=result, where=GROUPED)
        if item.kind == LEAF:
            _hoisted_casts(grouping, g, add)
        if item.kind == HEAVY:
            for view in item.views:
                source = grouping.source_group(g, view)
                if grouping.groups[source].kind == LEAF and view.ops:
                    at = view.ops[0]
                    add(g, view.tensor, view.dims, (at, at + 1), "weights")
                elif view.tensor in kept.made:
                    ops = all_readers[(view.tensor, view.region)]
                    span = (min(ops), max(ops) + 1)
                    add(g, view.tensor, view.dims, span, "activations", where=WINDOWED)
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
