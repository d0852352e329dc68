"""Least squares of a model of cycles, on logarithms, with a soft loss against odd kernels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

_TRUST = 0.03
"""Relative error that a constant of a variant may cost before it leaves that of its kind."""


def least_squares(
    model: Callable[[dict[str, float]], np.ndarray],
    bounds: dict[str, tuple[float, float, float]],
    measured: np.ndarray,
    near: dict[str, float] | None = None,
) -> tuple[dict[str, float], float]:
    """Constants within bounds, in logarithms, that make log(model / measured) small.

    With ``near``, leaving one of those constants by a factor e costs as much as an error of _TRUST.
    """
    from scipy import optimize

    names = list(bounds)
    start, low, high = np.log(np.array([bounds[n] for n in names])).T
    target = np.log(measured)
    anchor = None
    if near is not None:
        anchor = np.log([near.get(n, bounds[n][0]) for n in names])

    def residual(x: np.ndarray) -> np.ndarray:
        error = np.log(model(dict(zip(names, np.exp(x).tolist())))) - target
        return error if anchor is None else np.concatenate([error, _TRUST * (x - anchor)])

    starts = [start]
    if anchor is not None:
        starts.append(np.clip(anchor, low + 1e-6, high - 1e-6))
    found = min(
        (
            optimize.least_squares(
                residual, x, bounds=(low, high), loss="soft_l1", f_scale=0.1, max_nfev=200
            )
            for x in starts
        ),
        key=lambda f: f.cost,
    )
    values = {n: float(f"{v:.5g}") for n, v in zip(names, np.exp(found.x))}
    return values, float(found.cost)
