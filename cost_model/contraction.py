"""Cycles of a contraction inside a program, where XLA:TPU computes its operands in its kernel.

    start + min over windows of (compute^p + vector^p + memory^p + drain^p)^(1/p) + per_step steps
    + load + per_product b

The kernel holds a window [bm, bn] of the result on chip and goes through k for it in steps of
``STEP``. So the left operand is read n / bn times and the right one m / bm times, each by all the
arrays that it is computed from (:mod:`cost_model.fusion`). What has to fit into ``window_bytes``:
the window in float32 and twice as a 16-bit result, and a step of every array, twice, because the
next one is on its way. The compiler takes the window of the least time.

- compute: ``compute_factor`` times the peak cycles on padded shapes;
- vector: ``vector_cycles`` per instruction of a chain and register of its operand, each time that
  it is read;
- memory: ``memory_factor`` times bytes over bandwidth; operands that the kernels before have left
  on chip are not read, and need no room unless they are computed;
- drain: ``drain`` cycles per register of 16-bit results.

Start, load and products are those of :mod:`cost_model.matmul`.
"""

from __future__ import annotations

import numpy as np

from cost_model.device import Device
from cost_model.fitted import Calibration, load_calibration, soft_max, start_cycles
from cost_model.fusion import Chain
from cost_model.matmul import peak_cycles, result_registers
from cost_model.product import Product

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

    Operands of at most ``resident_bytes`` together are on chip already, and a result of at most
    that many stays there.
    """
    c, alone = fit.constants["contraction"], fit.constants["matmul"]
    first, second = x.b * x.m * x.k, x.b * x.k * x.n
    read = first * left.itemsize + second * right.itemsize > resident_bytes
    rows, columns = _windows(c["window_bytes"], x, (left, right), read)
    again_left, again_right = np.ceil(_spread(x.n) / columns), np.ceil(_spread(x.m) / rows)
    moved = _spread(first * read * left.itemsize) * again_left
    moved = moved + _spread(second * read * right.itemsize) * again_right
    result = x.b * x.m * x.n * x.out
    moved = moved + _spread(np.where(result > resident_bytes, result, 0.0))
    memory = c["memory_factor"] * moved * device.core_clock_hz / device.hbm_bandwidth_bytes_per_s
    vector = _spread(first * left.instructions) * again_left
    vector = vector + _spread(second * right.instructions) * again_right
    vector = c["vector_cycles"] * vector / 1024
    compute = c["compute_factor"] * peak_cycles(device, x, dtype)
    narrow = np.asarray(x.out) <= 2  # results in float32 leave as they are
    drain = np.where(narrow, c["drain"], alone["drain_32"]) * result_registers(x)
    busy = soft_max(c["sharpness"], _spread(compute), vector, memory, _spread(drain))
    steps = _spread(x.b * np.ceil(x.k / STEP)) * again_left * again_right
    found = (busy + c["per_step"] * steps).min(-1)
    load = np.where(np.asarray(x.size) > 2, alone["load_32"] * (first + second) / 1024, 0.0)
    return start_cycles(device, alone) + found + load + alone["per_product"] * x.b


def _windows(
    limit: float, x: Product, operands: tuple[Chain, Chain], read: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns [shapes, windows] of results held at once; those that do not fit are the
    smallest."""
    rows, columns = (a.ravel() for a in np.meshgrid(_SIDES, _SIDES, indexing="ij"))
    rows, columns = np.minimum(rows, _spread(x.m)), np.minimum(columns, _spread(x.n))
    left, right = (np.where(o.instructions > 0, 1.0, read) * o.itemsize for o in operands)
    step = np.minimum(STEP, x.k)
    room = _WINDOW_BYTES * rows * columns
    room = room + 2 * (rows * _spread(step * left) + columns * _spread(step * right))
    least = np.where(room <= limit, np.inf, _SIDES[0])
    return np.minimum(rows, least), np.minimum(columns, least)


def _spread(a: np.ndarray) -> np.ndarray:
    """With a last axis for the windows."""
    return np.asarray(a)[..., None]
