"""Bounds of the constants that only GPUs have, for :mod:`cost_model.calibration.fit`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from cost_model.calibration.programs import Case
from cost_model.compute import Work

TILED_BOUNDS: dict[str, tuple[float, float, float]] = {
    "start": (3000, 500, 8000),
    "compute_factor": (1.1, 0.92, 2.0),
    "load": (0.02, 5e-4, 0.2),
    "unaligned": (2.0, 1.0, 8.0),
    "odd": (3.0, 1.0, 12.0),
    "right_32": (1.5, 0.5, 5.0),
    "store": (0.02, 1e-4, 1.0),
    "store_unaligned": (1.5, 0.5, 10.0),
    "memory_factor": (1.15, 0.9, 2.0),
    "part_factor": (1.0, 0.01, 20.0),
    "part_start": (1000, 10, 8000),
    "sharpness": (4, 1, 12),
    "overlap": (4, 1, 12),
}
"""Of :mod:`cost_model.gpu_matmul`: start, least and greatest value. The clock is at most 1 / 0.92 of
the one that the peak is stated for."""

CACHE_BOUNDS: dict[str, tuple[float, float, float]] = {
    "cache_bytes": (2e7, 2e6, 5e7),
    "cached_factor": (0.5, 0.05, 1.5),
    "spread": (1500, 1, 8000),
    "spread_bytes": (3e5, 1e4, 5e6),
}
"""Of kernels that move data (:mod:`cost_model.compute`). No cache of these parts is larger."""

GPU_LOOPS = ("elementwise",)
"""Kinds whose programs are one kernel each: reductions are several, and optimizers, which write
several arrays, take twice the time where rows do not start at multiples of 16 bytes."""
_SEVERAL_KERNELS = ("attention", "sort", "ragged_dot")
"""Kinds whose kernels hand each other what they read."""


def cache_constants(kind: str, loops: Mapping[str, float]) -> dict[str, float]:
    """What loops say of the cache: it is the device's, not a kind's, so it is fitted once."""
    if kind in _SEVERAL_KERNELS:
        return {}
    return {name: loops[name] for name in CACHE_BOUNDS if name in loops}


_SIDES = {"attention": "qk", "ragged_dot": "mn", "one_hot": "rv"}


def unpadded(work: Work, case: Case) -> Work:
    """The same work on registers that are full: threads of a GPU take one element after another."""
    dims = dict(case.dims)
    sides = _SIDES.get(case.variant, _SIDES.get(case.kind, "rc"))
    rows, columns = (dims[side] for side in sides)
    padded = -(-rows // 8) * 8 * -(-columns // 128) * 128
    return dataclasses.replace(work, registers=work.registers * rows * columns / padded)
