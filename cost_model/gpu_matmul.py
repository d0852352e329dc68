r"""Cycles of a matrix multiplication on a GPU, vectorised over shapes.

Libraries and compilers cut the result of ``b`` products [m, k] @ [k, n] into tiles [tm, tn] and k
into s parts; a multiprocessor works on one tile and part at a time. The fastest of the tiles and
parts in ``SIDES`` and ``PARTS`` is taken, in cycles of the core clock:

    start + min over tm, tn, s of (waves tile, memory)_q + parts
    waves = ceil(b ceil(m / tm) ceil(n / tn) s / multiprocessors)
    tile  = (compute, load)_p + store

where (x, y)_p = (x^p + y^p)^(1/p), p is ``sharpness`` and q is ``overlap``; and

- compute: ``compute_factor`` times the peak cycles of 2 tm tn k / s operations on one
  multiprocessor, k / s rounded up to a step of 128 bytes;
- load: ``load`` cycles per byte of the operands of a tile, (tm + tn) k / s elements, from the
  second-level cache. An operand whose rows do not start at multiples of 16 bytes cannot be copied
  in blocks: it costs ``unaligned`` times as much, and ``odd`` times where they do not start at
  multiples of 4. 32-bit types are multiplied along rows of k only: a right operand [k, n] costs
  ``right_32`` times as much;
- store: ``store`` cycles per byte of the tile of the result, ``store_unaligned`` times as much
  where its rows do not start at multiples of 16 bytes;
- memory: ``memory_factor`` times bytes of operands and result over bandwidth;
- parts: where s > 1, ``part_start``, and ``part_factor`` times the bytes of s results in float32,
  and of their sum, over bandwidth.

The constants are fitted to kernels timed on a device (``cost_model/calibration``).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from cost_model.device import Device
from cost_model.fitted import soft_max
from cost_model.product import Product

_LONG, _SHORT = (64, 128, 192, 256), (16, 32, 64, 96, 128, 160, 192, 256)
_LARGEST = 256 * 160
"""Elements of the largest tile: its sums fill the registers of a multiprocessor."""
SIDES = sorted({s for a in _LONG for b in _SHORT if a * b <= _LARGEST for s in ((a, b), (b, a))})
"""Tiles [tm, tn] that are tried."""
PARTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
"""Parts of k that are tried."""
_TM, _TN, _S = np.array([(a, b, s) for a, b in SIDES for s in PARTS], float).T
_STEP_BYTES = 128
_BLOCK_BYTES = 16
_WORD_BYTES = 4


def tiled(c: Mapping[str, float]) -> bool:
    """Whether constants of matrix multiplications are those of this formula."""
    return "load" in c


def gpu_matmul_cycles(device: Device, c: Mapping[str, float], x: Product) -> np.ndarray:
    """[shapes] the formula of the module docstring."""
    per_byte = device.core_clock_hz / device.hbm_bandwidth_bytes_per_s
    b, m, k, n, size, out = (_spread(v) for v in (x.b, x.m, x.k, x.n, x.size, x.out))
    step = _STEP_BYTES / size
    depth = np.ceil(k / _S / step) * step
    compute = 2 * _TM * _TN * depth / _rate(device, size)
    left, right = (_spread(v) for v in _load_factors(c, x))
    load = c["load"] * (_TM * left + _TN * right) * depth * size
    wide = np.where(_S > 1, 4, out)
    ragged = np.where(n * out % _BLOCK_BYTES > 0, c["store_unaligned"], 1.0)
    store = c["store"] * _TM * _TN * wide * ragged
    tile = soft_max(c["sharpness"], c["compute_factor"] * compute, load) + store
    waves = np.ceil(b * np.ceil(m / _TM) * np.ceil(n / _TN) * _S / device.multiprocessors)
    memory = c["memory_factor"] * per_byte * b * ((m * k + k * n) * size + m * n * out)
    sums = c["part_factor"] * per_byte * 4 * b * m * n * (_S + 1)
    parts = np.where(_S > 1, c["part_start"] + sums, 0.0)
    return c["start"] + (soft_max(c["overlap"], waves * tile, memory) + parts).min(-1)


def gpu_matmul_features(x: Product) -> np.ndarray:
    """[shapes, F] coordinates in which near shapes have near residuals: octaves of the sides, and
    how operands lie and start."""
    columns = [np.log2(np.maximum(side, 1)) for side in (x.m, x.k, x.n, x.b)]
    columns += [2.0 * (np.asarray(y) > 2) for y in (x.size, x.out)]
    left, right = _rows(x)
    columns += [0.7 * _misfit(row * np.asarray(x.size)) for row in (left, right)]
    columns += [0.5 * np.asarray(y) for y in x.turned]
    return np.stack(np.broadcast_arrays(*columns), axis=-1)


def _load_factors(c: Mapping[str, float], x: Product) -> tuple[np.ndarray, np.ndarray]:
    """What a byte of the left and of the right operand costs more, [shapes]."""
    factors = np.array([1.0, c["unaligned"], c["odd"]])
    size = np.asarray(x.size)
    left, right = (factors[_misfit(row * size)] for row in _rows(x))
    along_n = (size > 2) & ~np.asarray(x.turned[1], bool)
    return left, np.where(along_n, np.maximum(right, c["right_32"]), right)


def _rows(x: Product) -> tuple[np.ndarray, np.ndarray]:
    """Elements of a row of each operand, as it lies in memory."""
    return np.where(x.turned[0], x.m, x.k), np.where(x.turned[1], x.k, x.n)


def _misfit(row_bytes: np.ndarray) -> np.ndarray:
    """0 where rows start at multiples of 16 bytes, 1 where at multiples of 4, 2 elsewhere."""
    return (row_bytes % _BLOCK_BYTES > 0).astype(int) + (row_bytes % _WORD_BYTES > 0)


def _rate(device: Device, size: np.ndarray) -> np.ndarray:
    """Operations of one multiprocessor in a cycle at the peak, by bytes of an operand."""
    byte, half, word = (device.peak(t) for t in ("int8", "bfloat16", "float32"))
    peak = np.where(size > 2, word, np.where(size > 1, half, byte))
    return peak / device.core_clock_hz / device.multiprocessors


def _spread(v: ArrayLike) -> np.ndarray:
    """With a last axis for the tiles."""
    return np.asarray(v, float)[..., None]
