"""The exact optimum of small table problems: the engine, then branch and cut on what is left."""

from __future__ import annotations

import time

from cost_model.problem import Problem
from graphs.errors import InfeasibleError
from placement.solver.engine import nothing_fits, solution_of
from placement.solver.solution import Solution


def exact(problem: Problem, *, time_limit_s: float = 60.0, seed: int = 0) -> Solution:
    """Optimum by branch and cut; status 'optimal' only where it is proved.

    The engine goes first, for up to a third of the time: its cost and bound rule out most
    strategies (reduced-cost fixing), and HiGHS gets the rest with its assignment as a start.
    """
    from placement.solver.branch import branch_and_cut
    from placement.solver.core import reduce
    from placement.solver.engine import improve
    from placement.solver.incumbent import Incumbent

    start = time.monotonic()
    try:
        reduced = reduce(problem)
    except InfeasibleError:
        return nothing_fits(problem, start)
    best = Incumbent(
        reduced,
        start=start,
        deadline=start + time_limit_s / 3,
        max_evaluations=None,
        on_progress=None,
    )
    restricted = improve(problem, best, seed)
    proved = best.closed() or best.impossible()
    if not proved:
        try:
            if best.feasible:
                best.move_to(reduce(restricted))
        except InfeasibleError:
            best.prove()
            proved = True
    if not proved:
        proved = branch_and_cut(best, start + time_limit_s)
    return solution_of(problem, best, start, proved=proved)
