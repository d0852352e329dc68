"""Seconds of the operators of a group, for every choice of its sharding.

Heavy groups are priced by their operator (contraction, gather, scatter ...). Light groups are fused
loops: in each region they read what other groups or regions hand them, write what others read, and
execute vector instructions; the longer of the two counts.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from cost_model.compute import elementwise_time_s, matmul_time_s, memory_bound_time_s
from cost_model.pricing import Pricing
from graphs.choices import Choices
from graphs.graph import Graph
from graphs.groups import COPY, HEAVY, Group, Grouping
from graphs.rules import WHOLE

TRANSCENDENTAL = frozenset(
    "cbrt cos cosh digamma erf erf_inv erfc exp exp2 expm1 lgamma log log1p logistic pow rsqrt sin "
    "sinh sqrt tan tanh div".split()
)
"""Vector primitives that take several instructions."""
_TRANSCENDENTAL_COST = 6.0
_VIEWS = frozenset(
    "reshape transpose squeeze expand_dims broadcast_in_dim slice split scan_slice scan_stack "
    "carry_in carry_out merge copy stop_gradient concatenate pad literal iota".split()
)
_GATHER_EFFICIENCY = 0.5
_CONV_EFFICIENCY = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeEvent:
    """Work on one device, once per trip of a region."""

    op: int
    """Position: the op it is scheduled at."""
    region: int
    seconds: np.ndarray
    """[S]."""
    kind: str
    """matmul | vector | gather | other: the class it is reported under."""


def materialised(grouping: Grouping) -> set[int]:
    """Tensors that live in memory: read by another group or region, or results of the program."""
    graph = grouping.graph
    found = {t for t in graph.outputs if t >= 0} | set(graph.inputs)
    for g, item in enumerate(grouping.groups):
        for view in item.views:
            found.add(view.tensor)
        if item.kind == HEAVY:
            found |= set(item.tensors)
    for i, op in enumerate(graph.ops):
        if op.primitive in ("scan_stack", "carry_out", "carry_in"):
            found |= set(op.outputs)
            continue
        for t in op.inputs:
            if t >= 0 and graph.tensors[t].region != op.region:
                found.add(t)
    return found


def compute_events(
    grouping: Grouping, g: int, choices: Choices, pricing: Pricing, stored: set[int]
) -> list[ComputeEvent]:
    """What group g computes."""
    item = grouping.groups[g]
    if item.kind == HEAVY:
        return [_heavy(grouping, item, choices, pricing)]
    if item.kind == COPY:
        return []
    return _light(grouping, item, choices, pricing, stored)


def _heavy(grouping: Grouping, item: Group, choices: Choices, pricing: Pricing) -> ComputeEvent:
    graph = grouping.graph
    index = next(o for o in item.ops if not grouping.rules[o].light)
    op, rule = graph.ops[index], grouping.rules[index]
    device = pricing.device
    shapes = [graph.tensors[t].shape if t >= 0 else () for t in op.inputs]
    sizes = np.array(pricing.axis_sizes, np.float64)

    def split(factors) -> np.ndarray:
        classes = [item.factors[f] for f in factors if item.factors[f] != WHOLE]
        on = np.isin(choices.place, classes)
        return np.where(on, sizes, 1.0).prod(-1)

    if op.primitive in ("dot_general", "ragged_dot", "ragged_dot_general"):
        left, right = (set(f for f in rule.operands[i] if f != WHOLE) for i in (0, 1))
        out = set(f for f in rule.results[0] if f != WHOLE)
        batch, inner = left & right & out, (left & right) - out
        rows, columns = (left & out) - right, (right & out) - left
        n = {
            name: math.prod(rule.sizes[f] for f in fs)
            for name, fs in zip("bkmn", (batch, inner, rows, columns))
        }
        if op.primitive != "dot_general":  # rows are whole: groups are data
            n["m"] = max(1.0, rule.flops / (2.0 * n["b"] * n["k"] * n["n"]))
        seconds = matmul_time_s(
            device,
            n["b"] / split(batch),
            n["m"] / split(rows),
            n["k"] / split(inner),
            n["n"] / split(columns),
            graph.tensors[op.inputs[0]].dtype,
        )
        return ComputeEvent(op=index, region=op.region, seconds=seconds, kind="matmul")
    if op.primitive == "conv_general_dilated":
        peak = device.peak(graph.tensors[op.inputs[0]].dtype) * _CONV_EFFICIENCY
        shards = split(range(len(rule.sizes)))
        return ComputeEvent(
            op=index, region=op.region, seconds=rule.flops / shards / peak, kind="matmul"
        )
    moved = np.zeros(len(choices))
    for t, dims in item.tensors.items():
        specs = choices.specs(dims, result=True)
        moved += graph.tensors[t].n_bytes / pricing.shards(specs)
    for view in item.views:
        if op.primitive == "gather" and graph.tensors[view.tensor].shape == shapes[0]:
            continue  # only the looked-up rows are read
        moved += graph.tensors[view.tensor].n_bytes / pricing.shards(choices.specs(view.dims))
    seconds = memory_bound_time_s(device, 2.0 * moved / _GATHER_EFFICIENCY)
    return ComputeEvent(op=index, region=op.region, seconds=seconds, kind="gather")


def _light(
    grouping: Grouping, item: Group, choices: Choices, pricing: Pricing, stored: set[int]
) -> list[ComputeEvent]:
    graph = grouping.graph
    moved: dict[int, np.ndarray] = {}
    work: dict[int, np.ndarray] = {}
    last: dict[int, int] = {}
    cache: dict[tuple[int, ...], np.ndarray] = {}

    def local(t: int, dims) -> np.ndarray:
        if dims not in cache:
            cache[dims] = 1.0 / pricing.shards(choices.specs(dims))
        return math.prod(graph.tensors[t].shape) * cache[dims]

    def add(table, region, amount):
        table[region] = table.get(region, 0.0) + amount

    for view in item.views:
        add(moved, view.region, local(view.tensor, view.dims) * graph.tensors[view.tensor].itemsize)
    seen: set[tuple[int, int]] = set()
    for o in item.ops:
        op = graph.ops[o]
        last[op.region] = o
        out = op.outputs[0]
        if op.primitive == "scan_stack":
            t = op.inputs[0]
            dims = item.tensors[out][1:]
            add(moved, op.region, local(t, dims) * graph.tensors[t].itemsize)
            continue
        for t in op.inputs:
            if t in item.tensors and (t, op.region) not in seen:
                tensor = graph.tensors[t]
                outside = tensor.producer < 0 or graph.ops[tensor.producer].region != op.region
                if outside and op.primitive not in ("carry_in", "carry_out", "scan_slice"):
                    seen.add((t, op.region))
                    add(moved, op.region, local(t, item.tensors[t]) * tensor.itemsize)
        if op.primitive == "scan_slice":
            add(moved, op.region, local(out, item.tensors[out]) * graph.tensors[out].itemsize)
            continue
        for t in op.outputs:
            tensor = graph.tensors[t]
            if t in stored and op.primitive not in ("carry_in", "carry_out"):
                add(moved, op.region, local(t, item.tensors[t]) * tensor.itemsize)
            if op.primitive not in _VIEWS:
                cost = _TRANSCENDENTAL_COST if op.primitive in TRANSCENDENTAL else 1.0
                add(work, op.region, cost * local(t, item.tensors[t]))
    events = []
    for region in sorted(set(moved) | set(work)):
        n_bytes = moved.get(region, 0.0)
        flops = work.get(region, 0.0)
        seconds = elementwise_time_s(pricing.device, n_bytes, flops) + np.zeros(len(choices))
        position = last.get(region)
        if position is None:
            position = min(o for v in item.views if v.region == region for o in v.ops)
        events.append(ComputeEvent(op=position, region=region, seconds=seconds, kind="vector"))
    return events


def combine_events(
    grouping: Grouping, g: int, choices: Choices, pricing: Pricing
) -> list[tuple[int, int, np.ndarray, np.ndarray]]:
    """Combining partial results of group g: (op, region, seconds [S], bytes [kinds, S])."""
    graph: Graph = grouping.graph
    item = grouping.groups[g]
    by_op: dict[tuple[int, int], list[int]] = {}
    for r in item.reductions:
        by_op.setdefault((r.op, r.result), []).append(r.cls)
    events = []
    for (o, result), classes in by_op.items():
        op = graph.ops[o]
        on = np.isin(choices.place, classes)
        if not on.any():
            continue
        tensor = graph.tensors[result]
        final = pricing.shards(choices.specs(item.tensors[result], result=True))
        scattered = on & (choices.scatter >= 0)
        sizes = np.array(pricing.axis_sizes, np.float64)
        scatter_ways = np.where(scattered, sizes, 1.0).prod(-1)
        after = tensor.n_bytes / final
        scatter_mask = pricing.masks(scattered)
        reduce_mask = pricing.masks(on & ~scattered)
        n_bytes = np.zeros((5, len(choices)))
        n_bytes[1] = np.where(scatter_mask > 0, after * scatter_ways, 0.0)
        n_bytes[2] = np.where(reduce_mask > 0, after, 0.0)
        seconds = pricing.collective_s(1, scatter_mask, n_bytes[1])
        if tensor.n_bytes > 8:  # scalars are combined together
            seconds = seconds + pricing.collective_s(2, reduce_mask, n_bytes[2])
        events.append((o, op.region, seconds, n_bytes))
    return events
