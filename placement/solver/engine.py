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
        return Solution(
            assignment=np.zeros(problem.n_nodes, dtype=np.int32),
            cost=math.inf,
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
        n, n_times = problem.n_nodes, len(core.fixed)
        self.order, self.is_tree = _dual.elimination_order(core)
        self.rank = np.empty(n, dtype=np.int64)
        self.rank[self.order] = np.arange(n)
        self.messages = np.zeros(core.message[-1])
        self.scalars = np.array([-np.inf, 1.0, 0.0, np.inf, np.inf])
        self.dual_state = (
            np.zeros(n_times),
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
        excess = float(np.maximum(use - self.core.limit * (1 + 1e-12), 0.0).sum())
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
                cost=self.best_cost if feasible else math.inf,
                lower_bound=float(self.scalars[0]),
                evaluations=self.evaluations,
            )
        )

    def closed(self) -> bool:
        gap = self.best_cost - self.scalars[0]
        return self.best_excess == 0.0 and gap <= _CLOSED * abs(self.best_cost)

    def improve(self) -> None:
        quiet = 0
        while not self.expired() and not self.closed():
            before = (self.best_excess, self.best_cost, float(self.scalars[0]))
            self.raise_bound()
            self.local_search(self.dual_state[3])
            if self.best is not None:
                self.local_search(self.best)
            gained = (
                self.best_excess < before[0]
                or self.best_cost < before[1] - 1e-6 * abs(before[1])
                or self.scalars[0] > before[2] + 1e-4 * abs(self.best_cost)
            )
            quiet = 0 if gained else quiet + 1
            if quiet >= 40 and self.best_excess == 0.0 and self.problem.n_nodes < 5000:
                break

    def raise_bound(self) -> None:
        began = time.monotonic()
        target = self.best_cost if self.best_excess == 0.0 else self._guess()
        n_steps = int(min(10, self.budget - self.evaluations))
        self._dual.ascend(
            self.core,
            self.order,
            self.rank,
            self.is_tree,
            self.messages,
            self.dual_state,
            n_steps,
            target,
            0.7,
        )
        self.evaluations += n_steps
        self.offer(self.dual_state[3])
        self.offer(self.dual_state[4])
        if self.scalars[1] < 1e-4:
            self.scalars[1] = 0.3
        self.step_s = time.monotonic() - began

    def _guess(self) -> float:
        """A target for step lengths before anything feasible is known."""
        bound = float(self.scalars[0])
        return bound + 0.1 * abs(bound) if math.isfinite(bound) else 1e3

    def local_search(self, x: np.ndarray) -> None:
        core, x = self.core, x.copy()
        use = np.empty(len(core.fixed))
        self._dual.usage_of(core, x, use)
        excess = float(np.maximum(use - core.limit, 0.0).sum())
        cost = self._dual.cost_of(core, x)
        state = np.array([cost, excess, cost, excess])
        best_x = x.copy()
        multipliers = self.dual_state[2]
        positive = multipliers[multipliers > 0.0]
        penalty = (
            2.0 * float(positive.mean())
            if len(positive)
            else 1e-3 * abs(cost) / (core.limit or 1.0)
        )
        n_moves = 2000
        for _ in range(3 if excess > 0 else 1):
            left = int(min(n_moves, self.budget - self.evaluations))
            self.evaluations += self._blocks.search(
                core,
                x,
                use,
                best_x,
                state,
                multipliers,
                n_moves,
                left,
                20,
                0.0,
                penalty,
                int(self.rng.integers(2**31)),
            )
            if state[1] == 0.0:
                break
            penalty *= 4.0
        self.offer(best_x)

    def solution(self, *, with_bound: bool) -> Solution:
        x = self.best if self.best is not None else np.zeros(self.problem.n_nodes, dtype=np.int32)
        assignment = self.reduced.lift(x)
        cost = self.problem.cost(assignment)
        feasible = cost < FORBIDDEN and self.problem.is_feasible(assignment)
        lower = min(float(self.scalars[0]), cost) if with_bound else -math.inf
        status = "unknown"
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
