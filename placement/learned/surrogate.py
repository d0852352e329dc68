"""What opened candidates say about unopened ones.

The policy's value and fit heads are prior means; their errors are alike for candidates that are
alike. A Gaussian process over candidate features (Rasmussen and Williams 2006, eq. 2.23-2.24) with

    k(x, y) = s^2 exp(-|x - y|^2 / (2 F l^2)),   F features, each in units of its spread,

turns the errors seen so far into corrections of the others, and gives the expected improvement
(Jones et al. 1998) over the best step time known.
"""

from __future__ import annotations

import math

import numpy as np

LENGTH, SPREAD, NOISE = 0.6, 0.35, 0.02
FIT_SPREAD, FIT_SEEN = 3.0, 4.0
"""Standard deviation of the fit head's logit, and the logit that a seen candidate counts as."""


class Surrogate:
    """Beliefs about K candidates."""

    def __init__(self, value: np.ndarray, fit: np.ndarray, features: np.ndarray) -> None:
        spread = features.std(0)
        self.x = features[:, spread > 1e-6] / spread[spread > 1e-6]
        self.value, self.fit = value.astype(np.float64), fit.astype(np.float64)
        self.seen: list[int] = []
        self.errors: list[float] = []
        self.fit_errors: list[float] = []
        self.timed: list[bool] = []

    def add(self, k: int, log_time: float, fits: bool) -> None:
        """Candidate k turned out so."""
        self.seen.append(k)
        self.errors.append(log_time - self.value[k])
        self.timed.append(fits)
        self.fit_errors.append((FIT_SEEN if fits else -FIT_SEEN) - self.fit[k])

    def _kernel(self, at: list[int]) -> np.ndarray:
        """[K, n] similarities."""
        own = self.x[at]
        square = (self.x**2).sum(1)[:, None] + (own**2).sum(1)[None] - 2.0 * self.x @ own.T
        scale = 2.0 * LENGTH**2 * max(self.x.shape[1], 1)
        return np.exp(-np.maximum(square, 0.0) / scale)

    def beliefs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """[K] mean and standard deviation of the log step time, and logit of fitting."""
        timed = [k for k, t in zip(self.seen, self.timed) if t]
        mean, deviation = self.value, np.full(len(self.value), SPREAD)
        if timed:
            errors = np.array([e for e, t in zip(self.errors, self.timed) if t])
            shift = float(np.median(errors))
            near = self._kernel(timed)
            inside = near[timed] + (NOISE / SPREAD) ** 2 * np.eye(len(timed))
            weights = np.linalg.solve(inside, near.T)
            mean = self.value + shift + weights.T @ (errors - shift)
            left = np.maximum(1.0 - (near.T * weights).sum(0), 1e-4)
            deviation = SPREAD * np.sqrt(left)
        fit = self.fit
        if self.seen:
            near = self._kernel(self.seen)
            inside = near[self.seen] + (1.0 / FIT_SPREAD) ** 2 * np.eye(len(self.seen))
            fit = self.fit + np.linalg.solve(inside, near.T).T @ np.array(self.fit_errors)
        return mean, deviation, fit

    def improvement(self, best_log_time: float) -> np.ndarray:
        """[K] expected relative improvement over the best known, times the chance of fitting."""
        mean, deviation, fit = self.beliefs()
        z = (best_log_time - mean) / deviation
        density = np.exp(-0.5 * z**2) / math.sqrt(2.0 * math.pi)
        below = 0.5 * (1.0 + _erf(z / math.sqrt(2.0)))
        return deviation * (z * below + density) / (1.0 + np.exp(-fit))


def _erf(x: np.ndarray) -> np.ndarray:
    from scipy.special import erf

    return erf(x)
