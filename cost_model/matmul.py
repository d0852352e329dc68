r"""Cycles of a matrix multiplication on one device, vectorised over shapes.

A matrix multiplication of ``b`` products [m, k] @ [k, n] takes, in cycles of the core clock,

    start + (compute^p + memory^p + drain^p)^(1/p) + load + copy + turn + per_product b

- compute: ``compute_factor`` times the peak cycles on padded shapes; the matrix unit is T wide, k
  rounds up to T, one of m and n to T and the other to 8, whichever pads less (tile quantisation);
- memory: ``memory_factor`` times bytes over bandwidth. One operand of at most ``resident_bytes`` is
  brought on chip ahead of the kernel (the compiler's cross-program prefetch: the larger if it fits,
  else the smaller) and costs nothing; with none on chip, both are read again for every ``block`` of
  the other side;
- drain: results leave the matrix unit in registers of 8 x 128: ``drain_16`` or ``drain_32`` cycles
  each by result width, ``drain_k`` more for each 1024 of k (partial sums);
- load: ``load_32`` cycles per register of 32-bit operands (split for the 16-bit matrix unit);
- copy: where a side is no multiple of 8 and the batch is, the compiler keeps the batch in the
  registers' rows and copies the result, ``copy_ragged`` per register.
- turn: an operand that lies transposed in memory is turned each time it is read, ``turn_left`` or
  ``turn_right`` cycles per register.

With a profile, the residuals at the profiled shapes, averaged over near shapes, are added.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cost_model.device import Device, item_bytes
from cost_model.fitted import load_calibration, nearby_residuals, soft_max, start_cycles


def matmul_time_s(
    device: Device,
    batch: ArrayLike,
    m: ArrayLike,
    k: ArrayLike,
    n: ArrayLike,
    dtype: str = "bfloat16",
    out_dtype: str | None = None,
    turned: tuple[bool, bool] = (False, False),
) -> np.ndarray:
    """Seconds of batch x [m, k] @ [k, n], operands of ``dtype``, result of ``out_dtype``.

    ``turned`` says which operand lies transposed in memory: [k, m], [n, k].
    """
    shape = np.broadcast_arrays(*(np.asarray(x, dtype=np.float64) for x in (batch, m, k, n)))
    b, m, k, n = shape
    size, out = item_bytes(dtype), item_bytes(out_dtype or dtype)
    fit = load_calibration(device.calibration)
    cycles = matmul_cycles(device, fit.constants["matmul"], b, m, k, n, size, out, turned, dtype)
    if "matmul" in fit.neighbours:
        features = matmul_features(b, m, k, n, size, out, turned)
        cycles = cycles * np.exp(nearby_residuals(*fit.neighbours["matmul"], features))
    return np.where(b * m * k * n > 0, cycles / device.core_clock_hz, 0.0)


def matmul_cycles(
    device: Device,
    c: Mapping[str, float],
    b: np.ndarray,
    m: np.ndarray,
    k: np.ndarray,
    n: np.ndarray,
    size: int | np.ndarray,
    out: int | np.ndarray,
    turned: tuple[Any, Any] = (False, False),
    dtype: str = "bfloat16",
) -> np.ndarray:
    """The formula of the module docstring; ``size`` and ``out`` are bytes of an element."""
    width = device.matrix_tile
    hz = device.core_clock_hz
    peak = device.achievable_flops_per_s.get("bfloat16") if device.family == "gpu" else None
    peak = (peak or device.peak("bfloat16")) * device.peak(dtype) / device.peak("bfloat16")
    padded = np.minimum(_up(m, 8) * _up(n, width), _up(m, width) * _up(n, 8))
    compute = c["compute_factor"] * 2 * b * padded * _up(k, width) / (peak / hz)
    left, right, result = b * m * k * size, b * k * n * size, b * m * n * out
    limit = c["resident_bytes"]
    large, small = np.maximum(left, right), np.minimum(left, right)
    resident = np.where(large <= limit, large, np.where(small <= limit, small, 0.0))
    again = left * np.maximum(1, n / c["block"]) + right * np.maximum(1, m / c["block"])
    moved = np.where(resident > 0, left + right - resident, again) + result
    memory = c["memory_factor"] * moved / (device.hbm_bandwidth_bytes_per_s / hz)
    registers = b * np.minimum(_up(m, 8) * _up(n, 128), _up(m, 128) * _up(n, 8)) / 1024
    wide = np.asarray(out) > 2
    drain = registers * (np.where(wide, c["drain_32"], c["drain_16"]) + c["drain_k"] * k / 1024)
    load = np.where(np.asarray(size) > 2, c["load_32"] * (left + right) / 4096, 0.0)
    ragged = ((b % 8 == 0) | (b == 2) | (b == 4)) & ((m % 8 > 0) | (n % 8 > 0))
    copy = np.where(ragged, c["copy_ragged"] * registers, 0.0)
    turn = c["turn_left"] * np.asarray(turned[0]) * b * m * k * np.maximum(1, n / c["block"])
    turn = turn + c["turn_right"] * np.asarray(turned[1]) * b * k * n * np.maximum(
        1, m / c["block"]
    )
    peak_of_three = soft_max(c["sharpness"], compute, memory, drain)
    return (
        start_cycles(device, c) + peak_of_three + load + copy + turn / 1024 + c["per_product"] * b
    )


def matmul_features(
    b: np.ndarray,
    m: np.ndarray,
    k: np.ndarray,
    n: np.ndarray,
    size: int | np.ndarray,
    out: int | np.ndarray,
    turned: tuple[Any, Any] = (False, False),
) -> np.ndarray:
    """[..., F] coordinates in which near shapes have near residuals."""
    columns = [np.log2(np.maximum(x, 1)) for x in (m, k, n, b)]
    columns += [2.0 * (np.broadcast_to(x, m.shape) > 2) for x in (size, out)]
    columns += [0.5 * (x % 128 > 0) for x in (m, k, n)]
    columns += [0.5 * np.broadcast_to(x, m.shape) for x in turned]
    return np.stack(columns, axis=-1)


def _up(x: np.ndarray, tile: int) -> np.ndarray:
    return np.ceil(x / tile) * tile
