"""Fit of :mod:`cost_model.contraction` to profiled contractions that compute their operands.

Every profiled program is a loop of two steps over stacked operands, as a scanned model runs them,
so that nothing is brought on chip ahead and slices, chains and products are one kernel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from cost_model.calibration.chains import INSTRUCTIONS, READS
from cost_model.calibration.least_squares import least_squares
from cost_model.calibration.programs import LOOP_STEPS, Case
from cost_model.contraction import contraction_cycles
from cost_model.device import Device, item_bytes
from cost_model.fitted import Calibration
from cost_model.fusion import Chain
from cost_model.product import Product

_BOUNDS: dict[str, tuple[float, float, float]] = {
    "loop": (3000, 10, 30000),
    "compute_factor": (1.03, 0.5, 1.5),
    "memory_factor": (1.3, 0.5, 4.0),
    "vector_cycles": (0.3, 0.001, 20),
    "drain": (5, 0.01, 50),
    "per_step": (100, 1, 5000),
    "sharpness": (3, 1.0, 12),
}
"""Start, least and greatest value of each constant in the fit."""
_WINDOW_BYTES = [2.0**20 * x for x in (8, 12, 16, 24, 32, 48, 64, 96)]
"""Room on chip that is tried; the fit takes the one with the least error."""


def program_cycles(device: Device, fit: Calibration, items: Sequence[Case]) -> np.ndarray:
    """[cases] cycles of the profiled programs under these constants.

    ``loop`` is what a step of their loop takes besides: slices of row numbers, updates of stacks.
    """
    found = np.zeros(len(items))
    kinds = [item.variant for item in items]
    for kind in sorted(set(kinds)):
        own = np.array([i for i, k in enumerate(kinds) if k == kind])
        _, left, right, *out = kind.split("_")
        dims = [dict(items[i].dims) for i in own]
        b, m, k, n = (np.array([float(d.get(x, 1)) for d in dims]) for x in "bmkn")
        product = Product.of(b, m, k, n, out_dtype=(*out, None)[0])
        first, second = (
            Chain(instructions=INSTRUCTIONS[side], itemsize=sum(map(item_bytes, READS[side])))
            for side in (left, right)
        )
        cycles = contraction_cycles(device, fit, product, first, second)
        found[own] = LOOP_STEPS * (cycles + fit.constants["contraction"]["loop"])
    return found


def fit_contraction(
    device: Device, fit: Calibration, items: Sequence[Case], measured: np.ndarray
) -> dict[str, float]:
    """Constants of :mod:`cost_model.contraction` from measured cycles [cases]."""

    def model(c: dict[str, float]) -> np.ndarray:
        constants = {**fit.constants, "contraction": c}
        return program_cycles(device, dataclasses.replace(fit, constants=constants), items)

    tried = []
    for room in _WINDOW_BYTES:
        fixed = {"window_bytes": room}
        found, loss = least_squares(lambda c, fixed=fixed: model(c | fixed), _BOUNDS, measured)
        tried.append((loss, found | fixed))
    return min(tried, key=lambda t: t[0])[1]
