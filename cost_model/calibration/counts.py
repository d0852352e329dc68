"""What a profiled case moves and computes: hardware-free counts behind its cycles.

Registers hold 8 x 128 elements: the last dimension rounds up to 128, the one before to 8.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from cost_model.calibration.programs import Case
from cost_model.compute import Work
from cost_model.device import item_bytes

VECTOR_KINDS = ("attention", "elementwise", "reduce", "move", "index", "sort", "ragged_dot")
VECTOR_KINDS += ("optimizer",)
"""Kinds whose cycles follow kernel_cycles."""

_INPUTS = {"add": 2, "add3": 3, "silu_mul": 2, "where": 2, "chain4": 2, "concatenate": 2}
_INSTRUCTIONS = {
    "scale": 1,
    "add": 1,
    "add3": 2,
    "silu_mul": 8,
    "gelu": 14,
    "exp": 6,
    "tanh": 6,
    "to_f32": 1,
    "where": 3,
    "chain4": 16,
    "adamw": 28,
    "lion": 10,
    "sgd": 2,
    "sum_row": 1,
    "sum_column": 1,
    "square_sum": 2,
    "rms_norm": 5,
    "layer_norm": 7,
    "softmax": 16,
    "log_softmax": 10,
    "cross_entropy": 9,
    "rms_norm_grad": 12,
}
"""Vector instructions of an element, six for a transcendental, as the tables count them."""
_PASSES = {
    "rms_norm": 2,
    "layer_norm": 3,
    "softmax": 3,
    "log_softmax": 3,
    "cross_entropy": 2,
    "rms_norm_grad": 3,
}
"""Passes over the operand: one, and one more for each reduction whose result is used again."""
_STATES = {"adamw": 3, "lion": 2, "sgd": 1}


def counts(items: Sequence[Case]) -> list[Work]:
    """Work of each case."""
    return [_COUNTS[c.kind](c) for c in items]


def vector_instructions(c: Case) -> float:
    """Vector instructions of an element-wise or optimizer case, on whole registers."""
    d = dict(c.dims)
    return 1024 * _registers(d["r"], d["c"]) * _INSTRUCTIONS[c.variant]


def pass_elements(c: Case) -> float:
    """Elements of whole registers that pass through the vector unit."""
    d = dict(c.dims)
    return 1024 * _registers(d["r"], d["c"]) * _PASSES.get(c.variant, 1)


def _registers(*shape: int) -> float:
    *outer, rows, columns = (1, *shape)
    return math.prod(outer) * (-(-rows // 8)) * (-(-columns // 128))


def _elementwise(c: Case) -> Work:
    d = dict(c.dims)
    size, elements = item_bytes(c.dtype), d["r"] * d["c"]
    inputs = _INPUTS.get(c.variant, 1)
    result = {"to_f32": 4, "to_bf16": 2}.get(c.variant, size)
    return Work(
        n_bytes=elements * (inputs * size + result),
        registers=_registers(d["r"], d["c"]),
        narrow=size < 4 or result < 4,
    )


def _reduce(c: Case) -> Work:
    d = dict(c.dims)
    size, elements = item_bytes(c.dtype), d["r"] * d["c"]
    moved = {
        "rms_norm": 2 * size,
        "layer_norm": 2 * size,
        "softmax": 2 * size,
        "rms_norm_grad": 3 * size,
        "log_softmax": size + 4,
        "cumsum": size + 4,
    }.get(c.variant, size)
    return Work(
        n_bytes=elements * moved,
        registers=_registers(d["r"], d["c"]),
        pieces=d["r"] / 8,
        narrow=size < 4,
    )


def _move(c: Case) -> Work:
    d = dict(c.dims)
    size, elements = item_bytes(c.dtype), d["r"] * d["c"]
    passes = {
        "concatenate": 4.0,
        "broadcast": 1.0,
        "dynamic_slice": 0.5,
        "dynamic_update_slice": 2.5,
    }.get(c.variant, 2.0)
    return Work(
        n_bytes=passes * elements * size, registers=_registers(d["r"], d["c"]), narrow=size < 4
    )


def _index(c: Case) -> Work:
    d = dict(c.dims)
    size = item_bytes(c.dtype)
    rows, table = d["r"] * d["c"] * size, d["v"] * d["c"] * size
    if c.variant == "one_hot":
        flops = 2.0 * d["r"] * d["v"] * d["c"]
        spill = float(size * d["r"] * d["v"])
        registers = _registers(d["r"], d["v"])
        return Work(n_bytes=table + rows, registers=registers, flops=flops, spill_bytes=spill)
    moved = 2 * rows + (2 * table if c.variant == "scatter_add" else 0)
    return Work(n_bytes=moved, registers=_registers(d["r"], d["c"]), pieces=d["r"], narrow=size < 4)


def _sort(c: Case) -> Work:
    d = dict(c.dims)
    depth = math.log2(max(2, d["c"]))
    network = depth * (depth + 1) / 2 if c.variant != "top_k" else 1.0
    registers = _registers(d["r"], d["c"])
    return Work(n_bytes=8.0 * d["r"] * d["c"], registers=registers * network, pieces=d["r"] / 8)


def _ragged(c: Case) -> Work:
    d = dict(c.dims)
    size = item_bytes(c.dtype)
    moved = size * (d["m"] * d["k"] + d["g"] * d["k"] * d["n"] + d["m"] * d["n"])
    # the compiler multiplies every group by every row and masks
    flops = 2.0 * d["m"] * d["k"] * d["n"] * d["g"]
    return Work(n_bytes=moved, registers=_registers(d["m"], d["n"]), flops=flops, pieces=d["g"])


def _attention(c: Case) -> Work:
    d = dict(c.dims)
    size, pairs = item_bytes(c.dtype), d["b"] * d["h"]
    scores = _registers(pairs, d["q"], d["k"])
    products = 5 if c.variant.startswith("grad") else 2
    flops = 2.0 * products * scores * 1024 * max(128, -(-d["d"] // 128) * 128)
    moved = pairs * (d["q"] + d["k"]) * d["d"] * size * products
    spill = 4.0 * pairs * d["q"] * d["k"]
    return Work(n_bytes=moved, registers=scores, flops=flops, pieces=pairs, spill_bytes=spill)


def _optimizer(c: Case) -> Work:
    d = dict(c.dims)
    elements = d["r"] * d["c"]
    moved = elements * (8 * _STATES[c.variant] + item_bytes(c.dtype))
    narrow = item_bytes(c.dtype) < 4
    return Work(n_bytes=moved, registers=_registers(d["r"], d["c"]), narrow=narrow)


_COUNTS = {
    "elementwise": _elementwise,
    "reduce": _reduce,
    "move": _move,
    "index": _index,
    "sort": _sort,
    "ragged_dot": _ragged,
    "attention": _attention,
    "optimizer": _optimizer,
}
