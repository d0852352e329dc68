"""What a solver returns."""

from __future__ import annotations

import dataclasses

import numpy as np

CLOSED = 1e-6
"""Relative gap between cost and bound that counts as none."""
NEAR = 1e-4
"""The same where costs stand for times that are known less well."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Solution:
    """An assignment with its certificate. N nodes."""

    assignment: np.ndarray
    """[N] int32 strategy indices of the problem; the least infeasible found if not feasible."""
    cost: float
    """Problem.cost of the assignment."""
    lower_bound: float
    """No feasible assignment costs less; -inf if no bound was asked for."""
    feasible: bool
    """Nothing forbidden is used and the usage limit holds."""
    evaluations: int
    """Complete assignments scored."""
    elapsed_s: float
    status: str
    """optimal | feasible | infeasible (none exists) | unknown (none found in the limits)."""

    @property
    def gap(self) -> float:
        """(cost - lower_bound) / cost; 0 when both are 0, inf without a solution or a bound."""
        if not self.feasible or not np.isfinite(self.lower_bound):
            return float("inf")
        if self.cost <= 0.0:
            return 0.0
        return max(self.cost - self.lower_bound, 0.0) / self.cost


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """A snapshot for progress callbacks."""

    elapsed_s: float
    assignment: np.ndarray | None
    """[N] int32, the best feasible so far, or None."""
    cost: float
    """inf before the first feasible assignment."""
    lower_bound: float
    evaluations: int
