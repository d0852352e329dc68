"""Seconds of an operator on one device, vectorised over shapes.

First principles: a matrix multiplication takes the longer of its flops on shapes rounded up to the
matrix unit and its bytes through device memory, plus a start; everything else is bound by bytes or
by vector flops. Where ``cost_model/calibration`` has a fitted table for the device, its constants
replace the defaults.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from cost_model.device import Device

_ITEM_BYTES = {"float64": 8, "float32": 4, "int32": 4, "uint32": 4, "int64": 8}


def item_bytes(dtype: str) -> int:
    """Bytes of one element of a JAX dtype."""
    if dtype in _ITEM_BYTES:
        return _ITEM_BYTES[dtype]
    return 1 if dtype.startswith(("float8", "int8", "uint8", "bool")) else 2


def matmul_time_s(
    device: Device,
    batch: ArrayLike,
    m: ArrayLike,
    k: ArrayLike,
    n: ArrayLike,
    dtype: str = "bfloat16",
    out_dtype: str | None = None,
) -> np.ndarray:
    """Seconds of batch x [m, k] @ [k, n], operands of ``dtype``, result of ``out_dtype``."""
    batch, m, k, n = (np.asarray(x, dtype=np.float64) for x in (batch, m, k, n))
    tile = device.matrix_tile
    sublane = min(tile, 8 if device.family == "tpu" else 16)
    flops = 2 * batch * _up(m, sublane) * _up(k, tile) * _up(n, tile)
    size, out = item_bytes(dtype), item_bytes(out_dtype or dtype)
    moved = batch * ((m * k + k * n) * size + m * n * out)
    time = np.maximum(
        flops / (device.peak(dtype) * 0.9), moved / (device.hbm_bandwidth_bytes_per_s * 0.85)
    )
    return np.where(batch * m * k * n > 0, time + device.launch_latency_s, 0.0)


def memory_bound_time_s(device: Device, n_bytes: ArrayLike) -> np.ndarray:
    """Seconds to move n_bytes (reads plus writes) through device memory in one kernel."""
    n_bytes = np.asarray(n_bytes, dtype=np.float64)
    time = n_bytes / (device.hbm_bandwidth_bytes_per_s * 0.85)
    return np.where(n_bytes > 0, time + device.launch_latency_s, 0.0)


def elementwise_time_s(device: Device, n_bytes: ArrayLike, vector_flops: ArrayLike) -> np.ndarray:
    """Seconds of a fused element-wise kernel: the longer of its bytes and its vector flops."""
    vector = np.asarray(vector_flops, dtype=np.float64) / device.vector_flops_per_s
    return np.maximum(memory_bound_time_s(device, n_bytes), vector)


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
    bh = np.asarray(batch, dtype=np.float64) * np.asarray(heads, dtype=np.float64)
    q, kv = np.asarray(q_len, dtype=np.float64), np.asarray(kv_len, dtype=np.float64)
    scores = bh * q * kv
    return (
        matmul_time_s(device, bh, q, head_dim, kv, dtype)
        + matmul_time_s(device, bh, q, kv, head_dim, dtype)
        + elementwise_time_s(device, 2 * item_bytes(dtype) * scores, 12 * scores)
    )


def gather_time_s(device: Device, rows: ArrayLike, row_bytes: ArrayLike) -> np.ndarray:
    """Seconds to gather (or scatter-add) rows of row_bytes: read, write, one start per row."""
    rows = np.asarray(rows, dtype=np.float64)
    moved = 2 * rows * np.maximum(np.asarray(row_bytes, dtype=np.float64), 512.0)
    return memory_bound_time_s(device, moved)


def sort_time_s(device: Device, rows: ArrayLike, length: ArrayLike) -> np.ndarray:
    """Seconds to sort rows of 4-byte keys: a bitonic network, log2(n) (log2(n) + 1) / 2 passes."""
    rows, length = np.asarray(rows, dtype=np.float64), np.asarray(length, dtype=np.float64)
    depth = np.log2(np.maximum(length, 2))
    return elementwise_time_s(device, 8 * rows * length, rows * length * depth * (depth + 1) * 4)


def _up(x: np.ndarray, tile: int) -> np.ndarray:
    return np.ceil(x / tile) * tile
