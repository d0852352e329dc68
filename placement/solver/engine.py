"""The one engine for table problems: reduction, dual ascent, and tree-block local search.

Dual steps raise the bound and price memory; each of their decoded assignments is a start for the
local search, which repairs and improves it under those prices. Small problems alternate the two in
one thread, reproducibly, until the gap is closed, nothing has improved for long, or the limits are
reached. Large ones, or patient calls, give each a thread where there are two processors, and use
all of the time.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from cost_model.problem import FORBIDDEN, Problem
from graphs.errors import InfeasibleError
from placement.solver.solution import CLOSED, Progress, Solution

if TYPE_CHECKING:
    from placement.solver.core import Reduced

_LARGE_CELLS, _HUGE_CELLS = 400_000, 4_000_000
_CHUNK_S = 0.1
_WORTH_A_ROUND = 0.9
_QUIET_NEAR, _QUIET = 12, 40


def solve(
    problem: Problem,
    *,
    time_limit_s: float,
    seed: int = 0,
    max_evaluations: int | None = None,
    initial: np.ndarray | None = None,
    bound: bool = True,
    on_progress: Callable[[Progress], None] | None = None,
    patient: bool = False,
    propose: Callable[[Reduced], np.ndarray] | None = None,
    enough: float = math.inf,
    tolerance: float = CLOSED,
) -> Solution:
    """Near-optimal assignment with a dual bound.

    ``patient`` spends all of the time while the gap is open, in two threads where there are two
    processors, with branch and cut where the problem is small enough; otherwise small problems
    end once nothing has improved for long.

    It ends as soon as the bound is ``enough``, or within ``tolerance`` of the cost. ``initial``
    ([N] strategies) is improved upon, never returned worse. ``propose`` gives states of the reduced
    problem, which local search repairs and improves before anything else. With ``max_evaluations``
    everything runs in one thread, and the same seed gives the same answer where the time limit does
    not bind. Even without time left, one round is made, so as to answer.
    """
    start = time.monotonic()
    from placement.solver.ascent import Ascent
    from placement.solver.core import reduce
    from placement.solver.incumbent import Incumbent
    from placement.solver.polish import Polish

    try:
        reduced = reduce(problem)
    except InfeasibleError:
        return nothing_fits(problem, start)
    best = Incumbent(
        reduced,
        start=start,
        deadline=start + time_limit_s,
        max_evaluations=max_evaluations,
        on_progress=on_progress,
        enough=enough,
        tolerance=tolerance,
    )
    if initial is not None:
        best.offer_assignment(np.asarray(initial))
    if propose is not None and not best.expired():
        _begin_at(propose(reduced), Polish(best, seed))
    size = len(reduced.core.cells) + len(reduced.core.fixed) * 20
    large = size >= (_LARGE_CELLS if patient else _HUGE_CELLS)
    if large and max_evaluations is None and _two_processors():
        _race(Ascent(best), Polish(best, seed))
    else:
        problem = improve(problem, best, seed)
        if patient and not best.over():
            _insist(problem, best, seed)
    return solution_of(problem, best, start, with_bound=bound)


def _begin_at(x: np.ndarray, polish) -> None:
    """Offer x, repaired and improved without prices."""
    best = polish.incumbent
    best.offer(x)
    if len(x) and not best.over():
        polish.local_search(x, np.zeros(len(best.core.fixed)), int(min(2000, 20 * len(x))))


def improve(problem: Problem, best, seed: int) -> Problem:
    """Improve the incumbent in one thread, in rounds that drop what its cost rules out.

    Returns the problem without the strategies ruled out: every better assignment lies in it.
    """
    from placement.solver.ascent import Ascent
    from placement.solver.core import reduce
    from placement.solver.polish import Polish

    while True:
        ascent, polish = Ascent(best), Polish(best, seed)
        _alternate(ascent, polish)
        if best.over() or not best.feasible:
            return problem
        useful = ascent.useful()
        problem = best.reduced.restrict(problem, useful)
        if best.over() or useful.mean() > _WORTH_A_ROUND:
            return problem
        try:
            best.move_to(reduce(problem))
        except InfeasibleError:
            best.prove()
            return problem
        seed += 1


def _alternate(ascent, polish) -> None:
    """Dual steps and local search in turn; at least one round.

    Every state of a root is not tried here: nodes of traced programs have up to hundreds.
    """
    best = ascent.incumbent
    n_moves = int(min(2000, 20 * len(ascent.order)))
    quiet = 0
    while True:
        before = (best.excess, best.cost, best.bound)
        ascent.step(10)
        for x in (ascent.decoded, best.x):
            if x is not None and not best.closed() and not best.impossible():
                polish.local_search(x, ascent.prices, n_moves, hubs=0.0)
        gained = (
            best.excess < before[0]
            or best.cost < before[1] - 1e-6 * abs(before[1])
            or best.bound > before[2] + 1e-4 * abs(best.cost)
        )
        quiet = 0 if gained else quiet + 1
        near = best.cost - best.bound <= 1e-3 * abs(best.cost)
        if best.over() or (best.feasible and quiet >= (_QUIET_NEAR if near else _QUIET)):
            return


def _insist(problem: Problem, best, seed: int) -> None:
    """Branch and cut if the problem is small, with local search in a second thread."""
    from placement.solver.ascent import Ascent
    from placement.solver.branch import branch_and_cut, promising
    from placement.solver.core import reduce
    from placement.solver.polish import Polish

    if best.feasible:
        try:
            best.move_to(reduce(problem))
        except InfeasibleError:
            best.prove()
            return
    ascent, polish = Ascent(best), Polish(best, seed)
    ascent.step(200)
    if not promising(best.core):
        return _race(ascent, polish)
    failures: list[BaseException] = []
    searcher = threading.Thread(target=_search, args=(ascent, polish, failures), daemon=True)
    if _two_processors():
        searcher.start()
    if branch_and_cut(best, best.deadline) and best.feasible:
        best.prove()
    if not best.over():
        _search(ascent, polish, failures)
    if searcher.is_alive():
        searcher.join()


def _two_processors() -> bool:
    return len(os.sched_getaffinity(0)) > 1


def _race(ascent, polish) -> None:
    """Dual ascent in a second thread, local search in this one.

    Where the ascent settles, its thread anneals for as long as it climbed, and climbs again.
    """
    best = ascent.incumbent
    failures: list[BaseException] = []
    other = polish.sibling()

    def climb() -> None:
        try:
            n_steps, began = 1, time.monotonic()
            while not best.over() or ascent.n_published == 0:  # one round is always made
                spent = ascent.step(n_steps)
                n_steps = max(1, min(int(n_steps * _CHUNK_S / max(spent, 1e-4)), 2 * n_steps))
                if ascent.settled:
                    if best.feasible and not best.over():
                        _anneal(ascent, other, min(time.monotonic() - began, 20.0))
                    ascent.shake()
                    began = time.monotonic()
        except BaseException as error:
            failures.append(error)

    climber = threading.Thread(target=climb, daemon=True)
    climber.start()
    while ascent.n_published == 0 and not failures:
        time.sleep(0.005)
    _search(ascent, polish, failures)
    climber.join()
    if failures:
        raise failures[0]


def _search(ascent, polish, failures) -> None:
    """Polish what the dual decodes; once that gains nothing, anneal the incumbent as well."""
    best = ascent.incumbent
    seen, quiet, cycle = -1, 0, 0
    while not failures:
        before = (best.excess, best.cost)
        if ascent.n_published != seen:
            seen = ascent.n_published
            n_moves = polish.moves_in(2 * _CHUNK_S)
            walk = polish.local_search(ascent.decoded, ascent.prices, n_moves)
            polish.cross(walk.best_x)
        if best.over():
            return
        block = polish.any_block() if quiet else polish.block
        n_moves = polish.moves_in(2 * _CHUNK_S, block)
        polish.local_search(best.x, ascent.prices, n_moves, block)
        if best.over():
            return
        gained = best.excess < before[0] or best.cost < before[1] - 1e-5 * abs(before[1])
        quiet = 0 if gained else quiet + 1
        if quiet >= 10 and best.feasible:
            quiet = 0
            _anneal(ascent, polish, min(3.0 * 1.25**cycle, 40.0))
            cycle += 1


def _anneal(ascent, polish, seconds: float) -> None:
    """One annealing of the incumbent, and what of it is better."""
    best = ascent.incumbent
    seconds = min(seconds, max(best.deadline - time.monotonic(), 0.1))
    walk = polish.anneal(best.x, lambda: ascent.prices, polish.any_style(), seconds)
    polish.cross(walk.best_x)


def solution_of(
    problem: Problem, best, start: float, *, with_bound: bool = True, proved: bool = False
) -> Solution:
    """The incumbent as a Solution of the problem; ``proved``: optimal by other means."""
    reduced = best.reduced
    x = best.x if best.x is not None else np.zeros(len(reduced.core.offsets) - 1, dtype=np.int32)
    assignment = reduced.lift(x)
    cost = problem.cost(assignment)
    feasible = cost < FORBIDDEN and problem.is_feasible(assignment)
    lower = -math.inf
    if with_bound:
        lower = best.bound + reduced.constant
        if feasible:
            lower = min(lower, cost)
    status = "infeasible" if best.impossible() else "unknown"
    if feasible:
        status = "optimal" if proved or best.optimal() else "feasible"
    return Solution(
        assignment=assignment,
        cost=cost,
        lower_bound=lower,
        feasible=feasible,
        evaluations=best.evaluations,
        elapsed_s=time.monotonic() - start,
        status=status,
    )


def nothing_fits(problem: Problem, start: float) -> Solution:
    """The answer where reduction proves that no assignment is feasible."""
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
