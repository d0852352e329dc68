"""Seconds of the operators of a group, for every choice of its sharding.

Heavy groups are priced by their operator (contraction, gather, scatter ...). Light groups are fused
loops: in each region they read what other groups or regions hand them, write what others read, and
execute vector instructions; the longer of the two counts.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from cost_model.compute import SUSTAINED_MEMORY, memory_bound_time_s
from cost_model.contraction import contraction_time_s
from cost_model.device import Device
from cost_model.fitted import load_calibration
from cost_model.fusion import CONTRACTIONS, Chain, Fusion
from cost_model.gpu_loops import gpu_loop_seconds
from cost_model.loops import loop_seconds
from cost_model.matmul import matmul_time_s
from cost_model.pricing import Pricing
from cost_model.product import Product
from cost_model.rows import distinct_rows
from graphs.choices import Choices
from graphs.groups import COPY, HEAVY, Group, Grouping
from graphs.rules import WHOLE
from graphs.rules.kernel import grid_steps, kernel_bytes

_GATHER_EFFICIENCY = 0.5
_CONV_EFFICIENCY = 0.5
_KERNEL_EFFICIENCY = 0.5
_KERNEL_STEP_S = 0.5e-6
"""Of hand-written kernels, whose cycles no compiler states. Assumed: their share of the matrix unit's
peak, and the cost of a step of the grid."""


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


def compute_events(
    grouping: Grouping,
    g: int,
    choices: Choices,
    pricing: Pricing,
    fusion: Fusion,
) -> list[ComputeEvent]:
    """What group g computes."""
    item = grouping.groups[g]
    if item.kind == HEAVY:
        return [_heavy(grouping, item, choices, pricing, fusion)]
    if item.kind == COPY:
        return []
    loops = gpu_loop_seconds if pricing.timed else loop_seconds
    return [
        ComputeEvent(op=op, region=region, seconds=seconds, kind="vector")
        for op, region, seconds in loops(grouping, item, choices, pricing, fusion)
    ]


def roles_of(grouping: Grouping, item: Group) -> tuple[int, dict[str, set[int]]]:
    """(op, its factors that are batches, rows of the left, rows of the right or summed over) of a
    contraction group: ``b``, ``m``, ``n``, ``k``."""
    index = next(o for o in item.ops if not grouping.rules[o].light)
    rule = grouping.rules[index]
    left, right = (set(f for f in rule.operands[i] if f != WHOLE) for i in (0, 1))
    out = set(f for f in rule.results[0] if f != WHOLE)
    return index, {
        "b": left & right & out,
        "k": (left & right) - out,
        "m": (left & out) - right,
        "n": (right & out) - left,
    }


def local_contraction(
    grouping: Grouping, item: Group, choices: Choices, pricing: Pricing
) -> tuple[int, dict[str, np.ndarray], dict[str, set[int]]]:
    """(op, local batch / m / k / n of each choice, classes of each) of a contraction group."""
    index, roles = roles_of(grouping, item)
    op, rule = grouping.graph.ops[index], grouping.rules[index]
    sizes = np.array(pricing.axis_sizes, np.float64)
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
    pricing: Pricing,
    x: dict[str, np.ndarray],
    dtype: str,
    out_dtype: str | None = None,
    operands: tuple[Chain, Chain] | None = None,
    turned: tuple[bool, bool] = (False, False),
) -> np.ndarray:
    """[S] seconds; choices repeat few local shapes, and each is priced once per Pricing.

    With ``operands`` as it runs inside a program, where they are computed or read; else alone, its
    operands in memory as ``turned`` says (:class:`cost_model.product.Product`).
    """
    kind = f"{dtype} {out_dtype} {operands} {turned}"
    shapes = np.stack([x["b"], x["m"], x["k"], x["n"]], axis=1)
    rows, inverse = distinct_rows(shapes)
    known = pricing.contractions
    missing = [r for r in rows.tolist() if (kind, *r) not in known]
    if missing:
        b, m, k, n = np.array(missing).T
        if operands is None:
            seconds = matmul_time_s(pricing.device, b, m, k, n, dtype, out_dtype, turned)
        else:
            product = Product.of(b, m, k, n, dtype, out_dtype)
            seconds = contraction_time_s(pricing.device, product, *operands, dtype)
        for r, t in zip(missing, seconds):
            known[(kind, *r)] = float(t)
    return np.array([known[(kind, *r)] for r in rows.tolist()])[inverse]


def contracts(grouping: Grouping, g: int) -> bool:
    """Whether group g is a contraction."""
    item = grouping.groups[g]
    return item.kind == HEAVY and any(
        grouping.graph.ops[o].primitive in CONTRACTIONS for o in item.ops
    )


def _heavy(
    grouping: Grouping, item: Group, choices: Choices, pricing: Pricing, fusion: Fusion
) -> ComputeEvent:
    graph = grouping.graph
    index = next(o for o in item.ops if not grouping.rules[o].light)
    op, rule = graph.ops[index], grouping.rules[index]
    device = pricing.device
    shapes = [graph.tensors[t].shape if t >= 0 else () for t in op.inputs]
    if op.primitive in CONTRACTIONS:
        _, x, _ = local_contraction(grouping, item, choices, pricing)
        dtype = graph.tensors[op.inputs[0]].dtype
        constants = load_calibration(device.calibration).constants
        out, turned = "float32" if op.outputs[0] in fusion.wide else None, (False, False)
        if pricing.timed:
            out, turned = graph.tensors[op.outputs[0]].dtype, _turned(op.params, shapes)
        operands = fusion.chains[index] if pricing.fuses else None
        seconds = contraction_s(pricing, x, dtype, out, operands, turned)
        if operands is None:
            seconds = constants["program"]["matmul"] * seconds
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


def _turned(params, shapes) -> tuple[bool, bool]:
    """Whether the operands of a dot lie [k, m] and [n, k]: by the last dimension of each."""
    if "dimension_numbers" not in params:
        return False, False
    contracting, _ = params["dimension_numbers"]
    ends = [len(shape) - 1 in dims for shape, dims in zip(shapes, contracting)]
    return not ends[0], ends[1]


def _kernel_s(params, flops: float, device: Device) -> float:
    """Seconds of a hand-written kernel on one device: its products, its bytes or its grid."""
    products = flops / (device.peak("bfloat16") * _KERNEL_EFFICIENCY)
    moved = kernel_bytes(params) / (device.hbm_bandwidth_bytes_per_s * SUSTAINED_MEMORY)
    return max(products, moved) + grid_steps(params) * _KERNEL_STEP_S
