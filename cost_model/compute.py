"""Seconds of an operator on one device, vectorised over shapes.

Matrix multiplications are in :mod:`cost_model.matmul`.
Everything else moves data and works on vectors: per class of operator (element-wise, reductions,
moves, gathers, ...) ``start + (memory^p + vector^p)^(1/p) + per_piece pieces``: vector is
``register_cycles`` per register of the widest operand (``narrow_cycles`` more with 16-bit types),
plus ``compute_factor`` times the peak cycles of multiply-adds inside (attention, ragged dots). What
passes between the kernels of one operator (scores of attention) goes through device memory, written
and read, only where it exceeds ``resident_bytes``. Of loops known only by bytes, instructions and
elements (``elementwise_time_s``), a register costs ``pass_cycles`` in every pass, however narrow
its type, and ``vector_factor`` times its instructions at the vector unit's peak.

Kernels of GPUs find up to ``cache_bytes`` in the second-level cache, at ``cached_factor`` in place of
``memory_factor``, and take up to ``spread`` cycles more to reach all multiprocessors and pages, half
of it at ``spread_bytes``. Their registers are 1024 elements, without padding.

Constants are those of :mod:`cost_model.fitted`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cost_model.device import Device, item_bytes
from cost_model.fitted import (
    Calibration,
    load_calibration,
    nearby_residuals,
    soft_max,
    start_cycles,
)
from cost_model.matmul import matmul_cycles, matmul_time_s
from cost_model.product import Product

SUSTAINED_MEMORY = 0.85
"""Share of the memory bandwidth that kernels without a profile are taken to reach."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What an operator moves and computes; scalars or arrays of one shape."""

    n_bytes: Any
    """bytes between device memory and the core, reads and writes."""
    registers: Any
    """registers of 8 x 128 elements of the widest operand."""
    flops: Any = 0.0
    """on the matrix unit."""
    pieces: Any = 0.0
    """rows looked up, groups, heads: what starts something of its own."""
    narrow: Any = False
    """whether 16-bit types are packed or unpacked."""
    spill_bytes: Any = 0.0
    """size of what passes between kernels of the operator."""


def kernel_cycles(
    device: Device, fit: Calibration, group: str, work: Work, fallback: str = "vector"
) -> np.ndarray:
    """Cycles of vector kernels of the class ``group`` (of ``fallback`` where it has no fit)."""
    c = fit.constants.get(group)
    if c is None:
        return class_cycles(device, fit.constants[fallback], work)
    cycles = class_cycles(device, c, work)
    if group in fit.neighbours:
        cycles = cycles * np.exp(nearby_residuals(*fit.neighbours[group], work_features(work)))
    return cycles


def class_cycles(device: Device, c: Mapping[str, float], work: Work) -> np.ndarray:
    """The second formula of the module docstring."""
    hz = device.core_clock_hz
    spilled = np.where(work.spill_bytes > c.get("resident_bytes", 0.0), 2 * work.spill_bytes, 0.0)
    moved = work.n_bytes + spilled
    memory = memory_cycles(device, c, moved)
    each = c.get("register_cycles", 0.0) + c.get("narrow_cycles", 0.0) * np.asarray(work.narrow)
    flops = c.get("compute_factor", 1.1) * work.flops / (device.peak("bfloat16") / hz)
    vector = each * work.registers + flops
    start = start_cycles(device, c) + spread_cycles(c, moved)
    pieces = c.get("per_piece", 0.0) * np.asarray(work.pieces)
    return start + soft_max(c["sharpness"], np.asarray(memory), np.asarray(vector)) + pieces


def work_features(work: Work) -> np.ndarray:
    """[..., F] coordinates in which near operators of one class have near residuals."""
    columns = (work.n_bytes, work.registers, work.pieces)
    shape = np.broadcast_shapes(*(np.shape(x) for x in columns))
    logs = [np.broadcast_to(np.log2(np.maximum(x, 1.0)), shape) for x in columns]
    return np.stack([*logs, np.broadcast_to(1.0 * np.asarray(work.narrow), shape)], axis=-1)


def memory_bound_time_s(device: Device, n_bytes: ArrayLike) -> np.ndarray:
    """Seconds to move n_bytes (reads plus writes) through device memory in one kernel."""
    return elementwise_time_s(device, n_bytes, 0.0)


def elementwise_time_s(
    device: Device, n_bytes: ArrayLike, vector_flops: ArrayLike, pass_elements: ArrayLike = 0.0
) -> np.ndarray:
    """Seconds of fused element-wise kernels: the longer of their bytes and their vector work.

    ``pass_elements`` are the elements that pass through the vector unit, whatever their width: the
    widest operand of each kernel, and once more for every reduction whose result is used again (a
    softmax passes three times, a root-mean-square norm twice).
    """
    n_bytes, work = np.asarray(n_bytes, dtype=np.float64), np.asarray(vector_flops, np.float64)
    passes = np.asarray(pass_elements, dtype=np.float64)
    c = load_calibration(device.calibration).constants["vector"]
    cycles = loop_cycles(device, c, n_bytes, work, passes)
    return np.where(n_bytes + work + passes > 0, cycles / device.core_clock_hz, 0.0)


def loop_cycles(
    device: Device, c: Mapping[str, float], n_bytes: Any, vector_flops: Any, pass_elements: Any
) -> np.ndarray:
    """start + softmax(memory, pass_cycles per register + vector_factor at the vector peak)."""
    hz = device.core_clock_hz
    memory = memory_cycles(device, c, n_bytes)
    vector = c["vector_factor"] * vector_flops / (device.vector_flops_per_s / hz)
    vector = vector + c["pass_cycles"] * pass_elements / 1024
    start = start_cycles(device, c) + spread_cycles(c, n_bytes)
    return start + soft_max(c["sharpness"], memory, vector)


def memory_cycles(device: Device, c: Mapping[str, float], n_bytes: Any) -> np.ndarray:
    """Cycles to move bytes, of which ``cache_bytes`` at most are found in a cache."""
    near = np.minimum(n_bytes, c.get("cache_bytes", 0.0))
    scaled = c["memory_factor"] * (n_bytes - near) + c.get("cached_factor", 0.0) * near
    return scaled / (device.hbm_bandwidth_bytes_per_s / device.core_clock_hz)


def spread_cycles(c: Mapping[str, float], n_bytes: Any) -> Any:
    """Cycles that a kernel takes to get going on as many bytes; 0 without such constants."""
    if "spread" not in c:
        return 0.0
    return c["spread"] * n_bytes / (n_bytes + c["spread_bytes"])


def registers(device: Device, rows: Any, columns: Any) -> np.ndarray:
    """Registers of 8 x 128 elements of an array [rows, columns]."""
    if device.multiprocessors:
        return rows * columns / 1024
    return np.ceil(rows / 8) * np.ceil(columns / 128)


def attention_time_s(
    device: Device,
    batch: ArrayLike,
    heads: ArrayLike,
    q_len: ArrayLike,
    kv_len: ArrayLike,
    head_dim: ArrayLike,
    dtype: str = "bfloat16",
) -> np.ndarray:
    """Seconds of unfused attention: scores, softmax over [batch, heads, q, kv], values."""
    pairs = np.asarray(batch, dtype=np.float64) * np.asarray(heads, dtype=np.float64)
    q, kv = np.asarray(q_len, dtype=np.float64), np.asarray(kv_len, dtype=np.float64)
    d = np.asarray(head_dim, dtype=np.float64)
    fit = load_calibration(device.calibration)
    if "attention.full" not in fit.constants:
        inner = matmul_time_s(device, pairs, q, d, kv, dtype)
        outer = matmul_time_s(device, pairs, q, kv, d, dtype)
        moved = 2 * item_bytes(dtype) * pairs * q * kv
        return inner + outer + elementwise_time_s(device, moved, 12 * pairs * q * kv)
    work = Work(
        n_bytes=2 * pairs * (q + kv) * d * item_bytes(dtype),
        registers=pairs * registers(device, q, kv),
        flops=attention_flops(device, fit.constants["matmul"], pairs, q, kv, d, 1.0),
        pieces=pairs,
        spill_bytes=4 * pairs * q * kv,
    )
    return kernel_cycles(device, fit, "attention.full", work) / device.core_clock_hz


def attention_flops(
    device: Device,
    c: Mapping[str, float],
    pairs: np.ndarray,
    q: np.ndarray,
    kv: np.ndarray,
    d: np.ndarray,
    rounds: float,
) -> np.ndarray:
    """What the peak would do in the time of attention's contractions, as they run alone: scores
    [q, kv] of ``pairs`` heads, and values [q, d]; a gradient has 2.5 rounds of the two."""
    scores = matmul_cycles(device, c, Product(b=pairs, m=q, k=d, n=kv, out=4))
    values = matmul_cycles(device, c, Product(b=pairs, m=q, k=kv, n=d))
    return rounds * (scores + values) * device.peak("bfloat16") / device.core_clock_hz


def gather_time_s(
    device: Device, rows: ArrayLike, width: ArrayLike, dtype: str = "bfloat16"
) -> np.ndarray:
    """Seconds to look up rows of ``width`` elements."""
    rows, width = np.asarray(rows, dtype=np.float64), np.asarray(width, dtype=np.float64)
    work = Work(
        n_bytes=2 * rows * width * item_bytes(dtype),
        registers=registers(device, rows, width),
        pieces=rows,
        narrow=item_bytes(dtype) < 4,
    )
    fit = load_calibration(device.calibration)
    return kernel_cycles(device, fit, "index.gather", work) / device.core_clock_hz


def sort_time_s(device: Device, rows: ArrayLike, length: ArrayLike) -> np.ndarray:
    """Seconds to sort rows of 4-byte keys: a bitonic network, log2(n) (log2(n) + 1) / 2 passes."""
    rows, length = np.asarray(rows, dtype=np.float64), np.asarray(length, dtype=np.float64)
    depth = np.log2(np.maximum(length, 2))
    network = registers(device, rows, length) * depth * (depth + 1) / 2
    work = Work(n_bytes=8 * rows * length, registers=network, pieces=rows / 8)
    fit = load_calibration(device.calibration)
    return kernel_cycles(device, fit, "sort.sort", work) / device.core_clock_hz
