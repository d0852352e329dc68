"""Lower bounds of the simulated step time over all choices on one mesh, and the plans behind them.

Each round answers a mean of paths through the simulation (:mod:`cost_model.critical`) with the
assignment that makes it short, and takes the longest path under the mean of all answers so far. Rounds
on certain paths and on any path take turns: the dual of the former's table problem bounds the step
time of every plan that fits, and the answers of both are often better plans than that of any fixed
price of hideable communication, because only what the step waits for is charged.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np

from cost_model.simulate import Simulator


@dataclasses.dataclass(frozen=True, kw_only=True)
class Round:
    """One answer to a mean of paths."""

    bound_s: float
    """No plan on this mesh that fits takes less; 0 where the paths were not certain."""
    choices: np.ndarray
    """[nodes] what makes the paths short; it need not fit."""


def computation_bound_s(
    simulator: Simulator,
    *,
    limit_bytes: float,
    time_limit_s: float,
    enough_s: float,
) -> float:
    """Seconds that no plan on this mesh that fits can take less, by the computation lane alone.

    Needs no plan to begin at, and ends where the bound is ``enough_s``: cheaper than to find a plan
    on a mesh that is no good.
    """
    from cost_model.critical import Path, Paths
    from placement.solver import NEAR, solve

    every = np.ones(len(simulator.kind))
    problem = Paths(simulator).problem(
        Path(computed=every, hidden=0.0 * every), limit_bytes + simulator.on_chip_bytes
    )
    found = solve(problem, time_limit_s=time_limit_s, enough=enough_s, tolerance=NEAR)
    return max(0.0, float(found.lower_bound))


def rounds(
    simulator: Simulator,
    choices: np.ndarray,
    *,
    limit_bytes: float,
    time_limit_s: float,
    max_evaluations: int | None = None,
    plans: bool = True,
) -> Iterator[Round]:
    """Rounds without end, from the longest path of ``choices`` ([nodes]) on.

    Args:
      simulator: the judge.
      choices: an assignment that the first path is taken from; the better, the better the bound.
      limit_bytes: memory that plans must keep, by :meth:`Simulator.peak_memory_bytes`.
      time_limit_s: of one round.
      max_evaluations: as for :func:`placement.solver.solve`.
      plans: False for rounds on certain paths alone.
    """
    from cost_model.critical import Paths
    from cost_model.operands import with_operands
    from placement.solver import NEAR, solve

    paths = Paths(simulator)
    seconds = paths.durations(choices)
    means = {certain: paths.longest(seconds, certain=certain)[0] for certain in (True, False)}
    for played in itertools.count(1):
        certain = played % 2 == 1 or not plans
        # What stays on chip is no device memory, whichever bytes it is.
        problem = paths.problem(means[certain], limit_bytes + simulator.on_chip_bytes)
        found = solve(
            problem,
            time_limit_s=time_limit_s,
            max_evaluations=max_evaluations,
            bound=certain,
            tolerance=NEAR,
        )
        answer = fitting = np.asarray(found.assignment, np.int64)
        if found.feasible and simulator.peak_memory_bytes(answer) > limit_bytes:
            counted = with_operands(problem, simulator.tables.operands)
            counted = dataclasses.replace(counted, usage_limit=limit_bytes)
            again = solve(
                counted,
                time_limit_s=time_limit_s,
                max_evaluations=max_evaluations,
                bound=False,
                tolerance=NEAR,
            )
            fitting = np.asarray(again.assignment, np.int64)
        yield Round(bound_s=max(0.0, float(found.lower_bound)) if certain else 0.0, choices=fitting)
        share = 2.0 / (played + 2)
        seconds = (1.0 - share) * seconds + share * paths.durations(answer)
        for kind, mean in means.items():
            means[kind] = mean.towards(paths.longest(seconds, certain=kind)[0], share)
