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

With a profile, the residuals at the profiled shapes, averaged over near shapes, are added. GPUs that
have a profile have a formula of their own, :mod:`cost_model.gpu_matmul`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from cost_model.device import Device
from cost_model.fitted import load_calibration, nearby_residuals, soft_max, start_cycles
from cost_model.gpu_matmul import gpu_matmul_cycles, gpu_matmul_features, tiled
from cost_model.product import Product


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
    product = Product.of(batch, m, k, n, dtype, out_dtype, turned)
    fit = load_calibration(device.calibration)
    cycles = matmul_cycles(device, fit.constants["matmul"], product, dtype)
    if "matmul" in fit.neighbours:
        features = matmul_features(device, product)
        cycles = cycles * np.exp(nearby_residuals(*fit.neighbours["matmul"], features))
    some = product.b * product.m * product.k * product.n > 0
    return np.where(some, cycles / device.core_clock_hz, 0.0)


def matmul_cycles(
    device: Device, c: Mapping[str, float], x: Product, dtype: str = "bfloat16"
) -> np.ndarray:
    """The formula of the module docstring, or of :mod:`cost_model.gpu_matmul` where c is its."""
    if tiled(c):
        return gpu_matmul_cycles(device, c, x)
    hz, read = device.core_clock_hz, c["block"]
    left, right, result = (
        x.b * x.m * x.k * x.size,
        x.b * x.k * x.n * x.size,
        x.b * x.m * x.n * x.out,
    )
    limit = c["resident_bytes"]
    large, small = np.maximum(left, right), np.minimum(left, right)
    resident = np.where(large <= limit, large, np.where(small <= limit, small, 0.0))
    again = left * np.maximum(1, x.n / read) + right * np.maximum(1, x.m / read)
    moved = np.where(resident > 0, left + right - resident, again) + result
    memory = c["memory_factor"] * moved / (device.hbm_bandwidth_bytes_per_s / hz)
    registers = result_registers(x)
    wide = np.asarray(x.out) > 2
    drain = registers * (np.where(wide, c["drain_32"], c["drain_16"]) + c["drain_k"] * x.k / 1024)
    load = np.where(np.asarray(x.size) > 2, c["load_32"] * (left + right) / 4096, 0.0)
    ragged = ((x.b % 8 == 0) | (x.b == 2) | (x.b == 4)) & ((x.m % 8 > 0) | (x.n % 8 > 0))
    copy = np.where(ragged, c["copy_ragged"] * registers, 0.0)
    turn = c["turn_left"] * np.asarray(x.turned[0]) * x.b * x.m * x.k * np.maximum(1, x.n / read)
    turn = turn + c["turn_right"] * np.asarray(x.turned[1]) * x.b * x.k * x.n * np.maximum(
        1, x.m / read
    )
    compute = c["compute_factor"] * peak_cycles(device, x, dtype)
    peak_of_three = soft_max(c["sharpness"], compute, memory, drain)
    return (
        start_cycles(device, c) + peak_of_three + load + copy + turn / 1024 + c["per_product"] * x.b
    )


def peak_cycles(device: Device, x: Product, dtype: str) -> np.ndarray:
    """Cycles of the matrix unit at its peak on shapes padded to its tiles."""
    width = device.matrix_tile
    peak = device.achievable_flops_per_s.get("bfloat16") if device.family == "gpu" else None
    peak = (peak or device.peak("bfloat16")) * device.peak(dtype) / device.peak("bfloat16")
    padded = np.minimum(_up(x.m, 8) * _up(x.n, width), _up(x.m, width) * _up(x.n, 8))
    return 2 * x.b * padded * _up(x.k, width) / (peak / device.core_clock_hz)


def result_registers(x: Product) -> np.ndarray:
    """Registers of 8 x 128 of the results, whichever side lies along the lanes."""
    along = np.minimum(_up(x.m, 8) * _up(x.n, 128), _up(x.m, 128) * _up(x.n, 8))
    return x.b * along / 1024


def matmul_features(device: Device, x: Product) -> np.ndarray:
    """[..., F] coordinates in which near shapes have near residuals."""
    if device.multiprocessors:
        return gpu_matmul_features(x)
    sides = (x.m, x.k, x.n)
    columns = [np.log2(np.maximum(side, 1)) for side in (*sides, x.b)]
    columns += [2.0 * (np.broadcast_to(y, x.m.shape) > 2) for y in (x.size, x.out)]
    columns += [0.5 * (side % 128 > 0) for side in sides]
    columns += [0.5 * np.broadcast_to(y, x.m.shape) for y in x.turned]
    return np.stack(columns, axis=-1)


def _up(x: np.ndarray, tile: int) -> np.ndarray:
    return np.ceil(x / tile) * tile
