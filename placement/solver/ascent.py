"""Dual ascent in chunks: prices of memory, the bound, and decoded assignments."""

from __future__ import annotations

import math
import time

import numpy as np

from placement.solver import _dual
from placement.solver.incumbent import Incumbent

_FLOOR = 1e-3
_SHAKE = 0.03


class Ascent:
    """State of the dual; ``step`` advances it and publishes copies that others may read."""

    def __init__(self, incumbent: Incumbent) -> None:
        core = incumbent.core
        self.incumbent, self.core = incumbent, core
        n, n_times = len(core.offsets) - 1, len(core.fixed)
        self.order, self.is_tree = _dual.elimination_order(core)
        self.rank = np.empty(n, dtype=np.int64)
        self.rank[self.order] = np.arange(n)
        self.messages = np.zeros(core.message[-1])
        self.scalars = np.array([-np.inf, 1.0, 0.0, np.inf, np.inf, 0.0])
        self.state = (
            np.zeros(n_times),
            np.zeros(n_times),
            np.zeros(n, dtype=np.int32),
            np.zeros(n, dtype=np.int32),
            self.scalars,
        )
        self.prices = np.zeros(n_times)
        """[T] the best multipliers, published."""
        self.decoded: np.ndarray | None = None
        """[N] int32 the latest decoded assignment, published."""
        self.n_published = 0

    @property
    def settled(self) -> bool:
        """Steps have become too short to move the bound."""
        return self.scalars[1] <= 1.01 * _FLOOR

    def shake(self) -> None:
        """Lengthen the steps again: the bound is kept, and new assignments are decoded."""
        self.scalars[1] = _SHAKE
        self.scalars[2] = 0.0

    def step(self, n_steps: int) -> float:
        """Advance and offer what was decoded; returns the seconds it took."""
        began = time.monotonic()
        best = self.incumbent
        target = best.cost if best.feasible else math.inf
        known = self.scalars[3]
        best.evaluations += _dual.ascend(
            self.core,
            self.order,
            self.rank,
            self.is_tree,
            self.messages,
            self.state,
            int(max(1, min(n_steps, best.budget - best.evaluations))),
            target,
        )
        _, prices, x, best_x, _ = self.state
        best.raise_bound(float(self.scalars[0]))
        best.offer(x)
        if self.scalars[3] != known:
            best.offer(best_x)
        self.prices = prices.copy()
        self.decoded = x.copy()
        self.n_published += 1
        return time.monotonic() - began

    def useful(self) -> np.ndarray:
        """[sum K] whether each core strategy can be part of an assignment as cheap as the best."""
        best = self.incumbent
        costs = np.empty(len(self.core.unary))
        prices = self.state[1]
        _dual.penalise(self.core, prices, 1.0, costs)
        arguments = (self.core, costs, self.order, self.rank, self.is_tree, self.messages)
        for _ in range(3):
            _dual.sweep(*arguments, True)
            bound = _dual.sweep(*arguments, False)
        bound -= float(prices @ (self.core.limit - self.core.fixed))
        best.raise_bound(bound)
        least = np.empty(len(self.core.unary))
        _dual.least_with(self.core, costs, self.messages, bound, least)
        whole = abs(best.cost + best.reduced.constant)
        return least <= best.cost + 1e-9 * whole
