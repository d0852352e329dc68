"""Cycles of a contraction inside a program, where XLA:TPU computes its operands in its kernel.

    start + min over windows of (compute^p + memory^p + drain^p)^(1/p) + per_step steps
    + load + per_product b

The kernel holds a window [bm, bn] of the result on chip and goes through k for it in steps of
``STEP``. So the left operand is read n / bn times and the right one m / bm times, each by all the
arrays that it is computed from (:mod:`cost_model.fusion`). What has to fit into ``window_bytes``:
the window in float32 and twice as a 16-bit result, and a step of every array, twice, because the
next one is on its way. The compiler takes the window of the least time.

- compute: ``compute_factor`` times the peak cycles on padded shapes;
- memory: ``memory_factor`` times bytes over bandwidth; an operand that the kernel before has left
  on chip is not read and needs no room;
- drain: ``drain`` cycles per register of results.

Start, load and products are those of :mod:`cost_model.matmul`. Vector instructions of the chains cost
nothing that the fit can see: they run beside the matrix unit.
"""

from __future__ import annotations

import numpy as np

from cost_model.device import Device
from cost_model.fitted import Calibration, load_calibration, soft_max, start_cycles
from cost_model.fusion import Chain
from cost_model.matmul import Product, peak_cycles, result_registers

STEP = 256
"""Elements of k that are on chip at a time."""
_SIDES = np.array([128, 256, 384, 512, 640, 768, 1024, 1280, 1536, 2048, 3072, 4096, 8192], float)
"""Sides of windows that are tried."""
_WINDOW_BYTES = 8
"""Of an element of the window: float32, and a 16-bit result twice."""


def contraction_time_s(
    device: Device, x: Product, left: Chain, right: Chain, dtype: str = "bfloat16"
) -> np.ndarray:
    """Seconds of a contraction whose device has constants for it; 0 where it is empty."""
    fit = load_calibration(device.calibration)
    limit = fit.constants["matmul"]["resident_bytes"]
    cycles = contraction_cycles(device, fit, x, left, right, dtype, limit)
    return np.where(x.b * x.m * x.k * x.n > 0, cycles / device.core_clock_hz, 0.0)


def contraction_cycles(
    device: Device,
    fit: Calibration,
    x: Product,
    left: Chain,
    right: Chain,
    dtype: str = "bfloat16",
    resident_bytes: float = 0.0,
) -> np.ndarray:
    """[shapes] the formula of the module docstring; constants ``contraction`` and ``matmul``.

    Operands of at most ``resident_bytes`` together, or one of them, are on chip already.
    """
    c, alone = fit.constants["contraction"], fit.constants["matmul"]
    first, second = x.b * x.m * x.k, x.b * x.k * x.n
    read_left, read_right = _read(first * left.itemsize, second * right.itemsize, resident_bytes)
    per_left, per_right = read_left * left.itemsize, read_right * right.itemsize
    rows, columns = (a.ravel() for a in np.meshgrid(_SIDES, _SIDES, indexing="ij"))
    rows, columns = np.minimum(rows, _spread(x.m)), np.minimum(columns, _spread(x.n))
    step = _spread(np.minimum(STEP, x.k))
    room = _WINDOW_BYTES * rows * columns
    room = room + 2 * step * (rows * _spread(per_left) + columns * _spread(per_right))
    again_left, again_right = np.ceil(_spread(x.n) / columns), np.ceil(_spread(x.m) / rows)
    moved = _spread(first * per_left) * again_left + _spread(second * per_right) * again_right
    moved = moved + _spread(x.b * x.m * x.n * x.out)
    memory = c["memory_factor"] * moved * device.core_clock_hz / device.hbm_bandwidth_bytes_per_s
    compute = c["compute_factor"] * peak_cycles(device, x, dtype)
    drain = c["drain"] * result_registers(x)
    busy = soft_max(c["sharpness"], _spread(compute), memory, _spread(drain))
    steps = _spread(x.b) * again_left * again_right * np.ceil(_spread(x.k) / step)
    fits = (room <= c["window_bytes"]) | (rows * columns <= _SIDES[0] ** 2)
    found = np.where(fits, busy + c["per_step"] * steps, np.inf).min(-1)
    load = np.where(np.asarray(x.size) > 2, alone["load_32"] * (first + second) / 1024, 0.0)
    return start_cycles(device, alone) + found + load + alone["per_product"] * x.b


def _spread(a: np.ndarray) -> np.ndarray:
    """With a last axis for the windows."""
    return np.asarray(a)[..., None]


def _read(left: np.ndarray, right: np.ndarray, limit: float) -> tuple[np.ndarray, np.ndarray]:
    """Whether the bytes of each operand are read from device memory: not those of both where they
    fit on chip, else not the larger, else not the smaller."""
    large, small = np.maximum(left, right), np.minimum(left, right)
    both = left + right <= limit
    keeps = np.where(large <= limit, large, np.where(small <= limit, small, -1.0))
    left_read = ~(both | (keeps == left))
    right_read = ~(both | ((keeps == right) & (left != right)))
    return left_read, right_read
