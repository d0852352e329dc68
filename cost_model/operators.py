"""Seconds of the operators of a group, for every choice of its sharding.

Heavy groups are priced by their operator (contraction, gather, scatter ...). Light groups are fused
loops: in each region they read what other groups or regions hand them, write what others read, and
execute vector instructions; the longer of the two counts.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from cost_model.compute import memory_bound_time_s
from cost_model.device import Device
from cost_model.fitted import load_calibration
from cost_model.matmul import matmul_time_s
from cost_model.pricing import Pricing
from cost_model.rows import distinct_rows
from graphs.choices import Choices
from graphs.groups import COPY, HEAVY, LEAF, Group, Grouping
from graphs.rules import WHOLE
from graphs.rules.kernel import grid_steps, kernel_bytes

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
_REDUCTIONS = frozenset(
    "reduce_sum reduce_max reduce_min reduce_prod argmax argmin cumsum cumlogsumexp cummax".split()
)
"""Vector primitives whose operand has to pass before their result is there."""
CONTRACTIONS = ("dot_general", "ragged_dot", "ragged_dot_general")
_SUSTAINED_MEMORY = 0.85
_GATHER_EFFICIENCY = 0.5
_CONV_EFFICIENCY = 0.5
_KERNEL_EFFICIENCY = 0.5
_KERNEL_STEP_S = 0.5e-6
"""Of hand-written kernels, whose cycles no compiler states. Assumed: their share of the matrix unit's
peak, and the cost of a step of the grid."""


def vector_cost(primitive: str) -> float:
    """Vector instructions of an element of a primitive's result; 0 for views."""
    if primitive in _VIEWS:
        return 0.0
    return _TRANSCENDENTAL_COST if primitive in TRANSCENDENTAL else 1.0


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
    for item in grouping.groups:
        for view in item.views:
            found.add(view.tensor)
        if item.kind == HEAVY:
            found |= set(item.tensors)
    for op in graph.ops:
        if op.primitive in ("scan_stack", "carry_out", "carry_in"):
            found |= set(op.outputs)
            continue
        for t in op.inputs:
            if t >= 0 and graph.tensors[t].region != op.region:
                found.add(t)
    return found


def widened(grouping: Grouping) -> set[int]:
    """Results of contractions that are only read as float32: XLA leaves them in that type."""
    graph = grouping.graph
    readers: dict[int, list[int]] = {}
    for o, op in enumerate(graph.ops):
        for t in op.inputs:
            readers.setdefault(t, []).append(o)

    def casts(t: int) -> bool:
        found = readers.get(t, ())
        return bool(found) and all(
            graph.tensors[graph.ops[o].outputs[0]].dtype == "float32"
            if graph.ops[o].primitive == "convert_element_type"
            else graph.ops[o].primitive in ("transpose", "reshape")
            and casts(graph.ops[o].outputs[0])
            for o in found
        )

    return {
        op.outputs[0] for op in graph.ops if op.primitive in CONTRACTIONS and casts(op.outputs[0])
    }


def compute_events(
    grouping: Grouping,
    g: int,
    choices: Choices,
    pricing: Pricing,
    stored: set[int],
    wide: set[int],
) -> list[ComputeEvent]:
    """What group g computes; ``stored`` and ``wide`` as :func:`materialised`, :func:`widened`."""
    item = grouping.groups[g]
    if item.kind == HEAVY:
        return [_heavy(grouping, item, choices, pricing, wide)]
    if item.kind == COPY:
        return []
    return _light(grouping, item, choices, pricing, stored)


def local_contraction(
    grouping: Grouping, item: Group, choices: Choices, pricing: Pricing
) -> tuple[int, dict[str, np.ndarray], dict[str, set[int]]]:
    """(op, local batch / m / k / n of each choice, classes of each) of a contraction group."""
    index = next(o for o in item.ops if not grouping.rules[o].light)
    op, rule = grouping.graph.ops[index], grouping.rules[index]
    sizes = np.array(pricing.axis_sizes, np.float64)
    left, right = (set(f for f in rule.operands[i] if f != WHOLE) for i in (0, 1))
    out = set(f for f in rule.results[0] if f != WHOLE)
    roles = {
        "b": left & right & out,
        "k": (left & right) - out,
        "m": (left & out) - right,
        "n": (right & out) - left,
    }
    full: dict[str, float] = {
        name: math.prod(rule.sizes[f] for f in fs) for name, fs in roles.items()
    }
    if op.primitive != "dot_general":  # ragged rows are whole: their groups are data
        full["m"] = max(1.0, rule.flops / (2.0 * full["b"] * full["k"] * full["n"]))
    classes = {
        name: {item.factors[f] for f in fs if item.factors[f] != WHOLE}
        for name, fs in roles.items()
    }
    local = {}
    for name, found in classes.items():
        on = choices.sharding(found)
        local[name] = full[name] / np.where(on, sizes, 1.0).prod(-1)
    return index, local, classes


def contraction_s(
    pricing: Pricing, x: dict[str, np.ndarray], dtype: str, out_dtype: str | None = None
) -> np.ndarray:
    """[S] seconds; choices repeat few local shapes, and each is priced once per Pricing."""
    kind = f"{dtype} {out_dtype}"
    shapes = np.stack([x["b"], x["m"], x["k"], x["n"]], axis=1)
    rows, inverse = distinct_rows(shapes)
    known = pricing.contractions
    missing = [r for r in rows.tolist() if (kind, *r) not in known]
    if missing:
        b, m, k, n = np.array(missing).T
        for r, t in zip(missing, matmul_time_s(pricing.device, b, m, k, n, dtype, out_dtype)):
            known[(kind, *r)] = float(t)
    return np.array([known[(kind, *r)] for r in rows.tolist()])[inverse]


def contracts(grouping: Grouping, g: int) -> bool:
    """Whether group g is a contraction."""
    item = grouping.groups[g]
    return item.kind == HEAVY and any(
        grouping.graph.ops[o].primitive in CONTRACTIONS for o in item.ops
    )


def _heavy(
    grouping: Grouping, item: Group, choices: Choices, pricing: Pricing, wide: set[int]
) -> ComputeEvent:
    graph = grouping.graph
    index = next(o for o in item.ops if not grouping.rules[o].light)
    op, rule = graph.ops[index], grouping.rules[index]
    device = pricing.device
    shapes = [graph.tensors[t].shape if t >= 0 else () for t in op.inputs]
    if op.primitive in CONTRACTIONS:
        _, x, _ = local_contraction(grouping, item, choices, pricing)
        dtype = graph.tensors[op.inputs[0]].dtype
        program = load_calibration(device.calibration).constants["program"]
        out = "float32" if op.outputs[0] in wide else None
        seconds = program["matmul"] * contraction_s(pricing, x, dtype, out)
        return ComputeEvent(op=index, region=op.region, seconds=seconds, kind="matmul")
    sizes = np.array(pricing.axis_sizes, np.float64)
    if rule.pins or op.primitive == "sharding_constraint":
        return ComputeEvent(
            op=index, region=op.region, seconds=np.zeros(len(choices)), kind="other"
        )
    if op.primitive in ("conv_general_dilated", "pallas_call"):
        classes = [c for c in item.factors if c != WHOLE]
        shards = np.where(choices.sharding(classes), sizes, 1.0).prod(-1)
        if op.primitive == "pallas_call":
            seconds = _kernel_s(op.params, rule.flops, device) / shards
            return ComputeEvent(op=index, region=op.region, seconds=seconds, kind="matmul")
        peak = device.peak(graph.tensors[op.inputs[0]].dtype) * _CONV_EFFICIENCY
        return ComputeEvent(
            op=index, region=op.region, seconds=rule.flops / shards / peak, kind="matmul"
        )
    moved = np.zeros(len(choices))
    for t, dims in item.tensors.items():
        moved += graph.tensors[t].n_bytes / choices.shards(dims, pricing.axis_sizes, result=True)
    for view in item.views:
        if op.primitive == "gather" and graph.tensors[view.tensor].shape == shapes[0]:
            continue  # only the looked-up rows are read
        shards = choices.shards(view.dims, pricing.axis_sizes)
        moved += graph.tensors[view.tensor].n_bytes / shards
    seconds = memory_bound_time_s(device, 2.0 * moved / _GATHER_EFFICIENCY)
    return ComputeEvent(op=index, region=op.region, seconds=seconds, kind="gather")


def _kernel_s(params, flops: float, device: Device) -> float:
    """Seconds of a hand-written kernel on one device: its products, its bytes or its grid."""
    products = flops / (device.peak("bfloat16") * _KERNEL_EFFICIENCY)
    moved = kernel_bytes(params) / (device.hbm_bandwidth_bytes_per_s * _SUSTAINED_MEMORY)
    return max(products, moved) + grid_steps(params) * _KERNEL_STEP_S


def _light(
    grouping: Grouping, item: Group, choices: Choices, pricing: Pricing, stored: set[int]
) -> list[ComputeEvent]:
    graph = grouping.graph
    batches = set(graph.inputs) - {graph.inputs[a] for a, _ in graph.aliases}
    state = {graph.outputs[b] for _, b in graph.aliases}
    updates = any(t in state for t in item.tensors)
    moved: dict[int, np.ndarray] = {}
    work: dict[int, np.ndarray] = {}
    passes: dict[int, np.ndarray] = {}
    widest: dict[int, np.ndarray] = {}
    bare: dict[int, np.ndarray] = {}
    last: dict[int, int] = {}
    cache: dict[tuple[int, ...], np.ndarray] = {}

    def local(t: int, dims) -> np.ndarray:
        if dims not in cache:
            cache[dims] = 1.0 / choices.shards(dims, pricing.axis_sizes)
        return graph.tensors[t].n_elements * cache[dims]

    def add(table, region, amount):
        table[region] = table.get(region, 0.0) + amount

    for view in item.views:
        add(moved, view.region, local(view.tensor, view.dims) * graph.tensors[view.tensor].itemsize)
    for t in item.tensors:
        if t in batches:  # an argument that is no state is brought in once a step
            add(moved, 0, local(t, item.tensors[t]) * graph.tensors[t].itemsize)
    seen: set[tuple[int, int]] = set()
    cast: set[int] = set()
    again: set[int] = set()
    for o in item.ops:
        op = graph.ops[o]
        last[op.region] = o
        out = op.outputs[0]
        if op.primitive == "scan_stack":
            t = op.inputs[0]
            dims = item.tensors[out][1:]
            add(moved, op.region, local(t, dims) * graph.tensors[t].itemsize)
            if updates:  # the stack that gradients are put into is filled first
                home = graph.regions[op.region].parent
                add(bare, home, local(out, item.tensors[out]))
                last.setdefault(home, o)
            continue
        if item.kind == LEAF and op.primitive in ("scan_slice", "convert_element_type"):
            # casts of weights are hoisted out of loops and made once, by kernels of their own
            source = op.inputs[0]
            if source in again or source in cast:
                again.update(op.outputs)
                continue
            cast.add(source)
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
        if op.primitive in _REDUCTIONS and op.inputs[0] in item.tensors:
            add(passes, op.region, local(op.inputs[0], item.tensors[op.inputs[0]]))
        if item.kind == LEAF and op.primitive == "convert_element_type":
            add(bare, op.region, local(out, item.tensors[out]))
        for t in op.outputs:
            tensor = graph.tensors[t]
            if t in stored and op.primitive not in ("carry_in", "carry_out"):
                add(moved, op.region, local(t, item.tensors[t]) * tensor.itemsize)
            cost = vector_cost(op.primitive)
            if cost:
                elements = local(t, item.tensors[t])
                add(work, op.region, cost * elements)
                widest[op.region] = np.maximum(widest.get(op.region, 0.0), elements)
    events = []
    program = load_calibration(pricing.device.calibration).constants["program"]
    clock = pricing.device.core_clock_hz
    for region in sorted({*moved, *work, *bare}):
        n_bytes = moved.get(region, 0.0)
        flops = work.get(region, 0.0)
        # in whole programs XLA fuses these loops into their neighbours, so that they share their
        # start and part of their passes
        vector = flops / pricing.device.vector_flops_per_s
        cycles = program["pass_cycles"] * widest.get(region, 0.0)
        cycles = cycles + program["reduce_cycles"] * passes.get(region, 0.0)
        vector = np.maximum(vector, cycles / 1024 / clock)
        vector = np.maximum(vector, program["bare_cycles"] * bare.get(region, 0.0) / 1024 / clock)
        seconds = np.maximum(fused_bytes_s(pricing.device, n_bytes), vector)
        seconds = seconds + np.zeros(len(choices))
        position = last.get(region)
        if position is None:
            readers = [o for v in item.views if v.region == region for o in v.ops]
            position = min(readers, default=0)
        events.append(ComputeEvent(op=position, region=region, seconds=seconds, kind="vector"))
    return events


def fused_bytes_s(device: Device, n_bytes) -> np.ndarray:
    """Seconds to move bytes inside fused loops: at the sustained share of memory bandwidth, or at
    the cache's where all of them fit into it."""
    moved = np.asarray(n_bytes)
    seconds = moved / (device.hbm_bandwidth_bytes_per_s * _SUSTAINED_MEMORY)
    if device.cache_bytes:
        cached = moved / device.cache_bandwidth_bytes_per_s
        seconds = np.where(moved <= device.cache_bytes, cached, seconds)
    return seconds
