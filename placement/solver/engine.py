"""The one engine for table problems: reduction, dual ascent, and tree-block local search.

Dual steps raise the bound and price memory; each of their decoded assignments is a start for the
local search, which repairs and improves it under those prices. The two alternate until the gap is
closed, nothing has improved for long, or the limits are reached.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np

from cost_model.problem import FORBIDDEN, Problem
from graphs.errors import InfeasibleError
from placement.solver.solution import Progress, Solution

_CLOSED = 1e-6
_REPAIRS = 12


def solve(
    problem: Problem,
    *,
    time_limit_s: float,
    seed: int = 0,
    max_evaluations: int | None = None,
    initial: np.ndarray | None = None,
    bound: bool = True,
    on_progress: Callable[[Progress], None] | None = None,
) -> Solution:
    """Near-optimal assignment with a dual bound.

    ``initial`` ([N] strategies) is improved upon, never returned worse. The same seed with the same
    ``max_evaluations`` and no binding time limit gives the same answer.
    """
    start = time.monotonic()
    from placement.solver import core as cores

    try:
        reduced = cores.reduce(problem)
    except InfeasibleError:
        least = _least_usage(problem)
        return Solution(
            assignment=least,
            cost=problem.cost(least),
            lower_bound=math.inf,
            feasible=False,
            evaluations=0,
            elapsed_s=time.monotonic() - start,
            status="infeasible",
        )
    run = _Run(problem, reduced, start + time_limit_s, seed, max_evaluations, on_progress, start)
    if initial is not None:
        run.offer_problem_assignment(np.asarray(initial))
    run.improve()
    return run.solution(with_bound=bound)


def _least_usage(problem: Problem) -> np.ndarray:
    """[N] int32: each node's allowed strategy that uses least, summed over its entries."""
    total = np.where(problem.node_costs < FORBIDDEN, 0.0, np.inf)
    for u, i in enumerate(problem.usage_nodes):
        start, end = problem.usage_intervals[u]
        if start < end:
            amount = problem.usages[problem.usage_offsets[u] : problem.usage_offsets[u + 1]]
            total[problem.strategy_offsets[i] : problem.strategy_offsets[i + 1]] += amount
    bounds = zip(problem.strategy_offsets[:-1], problem.strategy_offsets[1:])
    return np.array([total[a:b].argmin() for a, b in bounds], dtype=np.int32)


class _Run:
    """State of one solve; small chunks of compiled work between looks at the clock."""

    def __init__(self, problem, reduced, deadline, seed, max_evaluations, on_progress, start):
        from placement.solver import _blocks, _dual

        self._blocks, self._dual = _blocks, _dual
        self.problem, self.reduced, self.core = problem, reduced, reduced.core
        self.deadline, self.start = deadline, start
        self.budget = math.inf if max_evaluations is None else max_evaluations
        self.on_progress = on_progress
        self.rng = np.random.default_rng(seed)
        core = self.core
        n, n_times = len(core.offsets) - 1, len(core.fixed)
        self.order, self.is_tree = _dual.elimination_order(core)
        self.rank = np.empty(n, dtype=np.int64)
        self.rank[self.order] = np.arange(n)
        self.messages = np.zeros(core.message[-1])
        self.scalars = np.array([-np.inf, 1.0, 0.0, np.inf, np.inf, 0.0])
        self.dual_state = (
            np.zeros(n_times),
            np.zeros(n_times),
            np.zeros(n, dtype=np.int32),
            np.zeros(n, dtype=np.int32),
            self.scalars,
        )
        self.best: np.ndarray | None = None
        self.best_cost, self.best_excess = math.inf, math.inf
        self.evaluations = 0
        self.step_s = 0.0

    def expired(self) -> bool:
        return time.monotonic() >= self.deadline or self.evaluations >= self.budget

    def offer(self, x: np.ndarray) -> None:
        """Take x as the best if it is."""
        use = np.empty(len(self.core.fixed))
        self._dual.usage_of(self.core, x, use)
        over = use - self.core.limit
        excess = float(over[over > 1e-12 * self.core.limit].sum())
        cost = self._dual.cost_of(self.core, x)
        if cost >= self.reduced.forbidden:
            excess += 1e300
        if (excess, cost) < (self.best_excess, self.best_cost):
            self.best, self.best_cost, self.best_excess = x.copy(), cost, excess
            self.report()

    def offer_problem_assignment(self, assignment: np.ndarray) -> None:
        x = self.reduced.project(assignment)
        if np.array_equal(self.reduced.lift(x), assignment):
            self.evaluations += 1
            self.offer(x)

    def report(self) -> None:
        if self.on_progress is None:
            return
        feasible = self.best is not None and self.best_excess == 0.0
        self.on_progress(
            Progress(
                elapsed_s=time.monotonic() - self.start,
                assignment=self.reduced.lift(self.best) if feasible else None,
                cost=self.best_cost + self.reduced.constant if feasible else math.inf,
                lower_bound=float(self.scalars[0]) + self.reduced.constant,
                evaluations=self.evaluations,
            )
        )

    def closed(self) -> bool:
        gap = self.best_cost - self.scalars[0]
        whole = abs(self.best_cost + self.reduced.constant)
        return self.best_excess == 0.0 and gap <= _CLOSED * whole

    def impossible(self) -> bool:
        """The bound has passed the cost of every allowed assignment, so none is feasible."""
        return self.best_excess > 0.0 and self.scalars[0] > 0.6 * self.reduced.forbidden

    def improve(self) -> None:
        """Alternate until closed, quiet or out of limits; at least one round, so as to answer."""
        quiet = 0
        while True:
            before = (self.best_excess, self.best_cost, float(self.scalars[0]))
            self.raise_bound()
            if not self.closed():
                self.local_search(self.dual_state[2])
            if self.best is not None and not self.closed():
                self.local_search(self.best)
            gained = (
                self.best_excess < before[0]
                or self.best_cost < before[1] - 1e-6 * abs(before[1])
                or self.scalars[0] > before[2] + 1e-4 * abs(self.best_cost)
            )
            quiet = 0 if gained else quiet + 1
            settled = quiet >= 40 and self.best_excess == 0.0 and len(self.order) < 2000
            if settled or self.closed() or self.impossible() or self.expired():
                break

    def raise_bound(self) -> None:
        began = time.monotonic()
        target = self.best_cost if self.best_excess == 0.0 else math.inf
        n_steps = int(min(10, self.budget - self.evaluations))
        self.evaluations += self._dual.ascend(
            self.core,
            self.order,
            self.rank,
            self.is_tree,
            self.messages,
            self.dual_state,
            n_steps,
            target,
        )
        self.offer(self.dual_state[2])
        self.offer(self.dual_state[3])
        self.step_s = time.monotonic() - began

    def local_search(self, x: np.ndarray) -> None:
        """Improve x under the present prices; if it breaks the limit, repair it first."""
        core, x = self.core, x.copy()
        use = np.empty(len(core.fixed))
        self._dual.usage_of(core, x, use)
        cost = self._dual.cost_of(core, x)
        excess = float(np.maximum(use - core.limit, 0.0).sum())
        state = np.array([cost, excess, cost, excess])
        best_x = x.copy()
        prices = self.dual_state[1]
        penalty = max(float(prices.max(initial=0.0)), 1e-4 * abs(cost) / (core.limit or 1.0))
        n_moves = int(min(2000, 20 * len(x)))
        for _ in range(_REPAIRS):
            repairing = state[1] > 0.0
            if repairing:
                penalty *= 3.0
                prices = prices + penalty * (use > core.limit)
            self._search(x, use, best_x, state, prices, penalty, 300 if repairing else n_moves)
            if not repairing or self.expired():
                break
        self.offer(best_x)

    def _search(self, x, use, best_x, state, prices, penalty, n_moves) -> None:
        self.evaluations += self._blocks.search(
            self.core,
            x,
            use,
            best_x,
            state,
            prices,
            n_moves,
            int(min(n_moves, self.budget - self.evaluations)),
            20,
            0.0,
            abs(float(state[0])) / max(len(x), 1),
            penalty,
            int(self.rng.integers(2**31)),
        )

    def solution(self, *, with_bound: bool) -> Solution:
        x = self.best if self.best is not None else np.zeros(len(self.rank), dtype=np.int32)
        assignment = self.reduced.lift(x)
        cost = self.problem.cost(assignment)
        feasible = cost < FORBIDDEN and self.problem.is_feasible(assignment)
        lower = -math.inf
        if with_bound:
            lower = float(self.scalars[0]) + self.reduced.constant
            if feasible:
                lower = min(lower, cost)
        status = "infeasible" if self.impossible() else "unknown"
        if feasible:
            status = "optimal" if self.closed() else "feasible"
        return Solution(
            assignment=assignment,
            cost=cost,
            lower_bound=lower,
            feasible=feasible,
            evaluations=self.evaluations,
            elapsed_s=time.monotonic() - self.start,
            status=status,
        )
