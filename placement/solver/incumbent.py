"""The best assignment and bound so far, shared by the threads of one solve."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

import numpy as np

from placement.solver import _dual
from placement.solver.core import Reduced
from placement.solver.solution import CLOSED, Progress

_ROUNDING = 1e-12


class Incumbent:
    """Keeps the cheapest feasible core assignment, or else the one that breaks the limit least."""

    def __init__(
        self,
        reduced: Reduced,
        *,
        start: float,
        deadline: float,
        max_evaluations: int | None,
        on_progress: Callable[[Progress], None] | None,
        enough: float = math.inf,
        tolerance: float = CLOSED,
    ) -> None:
        self.reduced, self.core = reduced, reduced.core
        self.start, self.deadline = start, deadline
        self.budget = math.inf if max_evaluations is None else max_evaluations
        self.on_progress = on_progress
        self.enough, self.tolerance = enough, tolerance
        self.x: np.ndarray | None = None
        """[N] int32 core states."""
        self.cost, self.excess = math.inf, math.inf
        self.bound = -math.inf
        """Of the core, without the constant."""
        self.evaluations = 0
        self.lock = threading.Lock()

    @property
    def feasible(self) -> bool:
        return self.excess == 0.0

    def expired(self) -> bool:
        return time.monotonic() >= self.deadline or self.evaluations >= self.budget

    def optimal(self) -> bool:
        """The gap to the bound is nothing."""
        return self._within(CLOSED)

    def closed(self) -> bool:
        """The gap to the bound is no more than what is tolerated."""
        return self._within(self.tolerance)

    def _within(self, share: float) -> bool:
        whole = abs(self.cost + self.reduced.constant)
        return self.feasible and self.cost - self.bound <= share * whole

    def impossible(self) -> bool:
        """The bound has passed the cost of every allowed assignment, so none is feasible."""
        return not self.feasible and self.bound > 0.6 * self.reduced.forbidden

    def over(self) -> bool:
        return self.closed() or self.impossible() or self.expired() or self.proven()

    def proven(self) -> bool:
        """The bound is all that was asked for."""
        return self.bound + self.reduced.constant >= self.enough

    def measure(self, x: np.ndarray) -> tuple[float, float, np.ndarray]:
        """Cost of a core assignment, its usage beyond the limit summed over time, and usage [T]."""
        use = np.empty(len(self.core.fixed))
        _dual.usage_of(self.core, x, use)
        beyond = use - self.core.limit
        excess = float(beyond[beyond > _ROUNDING * self.core.limit].sum())
        return float(_dual.cost_of(self.core, x)), excess, use

    def offer(self, x: np.ndarray) -> None:
        """Take x as the best if it is; x is copied."""
        cost, excess, _ = self.measure(x)
        if cost >= self.reduced.forbidden:
            excess += 1e300
        with self.lock:
            if (excess, cost) < (self.excess, self.cost):
                self.x, self.cost, self.excess = x.copy(), cost, excess
                self.report()

    def offer_assignment(self, assignment: np.ndarray) -> None:
        """Take a problem assignment [P], if the core has it and it is the best."""
        x = self.reduced.project(assignment)
        if np.array_equal(self.reduced.lift(x), assignment):
            self.evaluations += 1
            self.offer(x)

    def move_to(self, reduced: Reduced) -> None:
        """Go on with another reduction, of a problem that keeps the best and all that is better."""
        assert self.x is not None
        x = reduced.project(self.reduced.lift(self.x))
        shift = self.reduced.constant - reduced.constant
        with self.lock:
            self.reduced, self.core, self.x = reduced, reduced.core, x
            self.bound += shift
            self.cost, _, _ = self.measure(x)

    def prove(self) -> None:
        """Nothing else can be as cheap: the bound is the cost."""
        self.raise_bound(self.cost)

    def raise_bound(self, bound: float) -> None:
        with self.lock:
            if bound > self.bound:
                self.bound = bound
                self.report()

    def report(self) -> None:
        if self.on_progress is None:
            return
        constant = self.reduced.constant
        found = self.x is not None and self.feasible
        self.on_progress(
            Progress(
                elapsed_s=time.monotonic() - self.start,
                assignment=self.reduced.lift(self.x) if found and self.x is not None else None,
                cost=self.cost + constant if found else math.inf,
                lower_bound=self.bound + constant,
                evaluations=self.evaluations,
            )
        )
