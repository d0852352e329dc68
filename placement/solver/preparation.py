"""Compile the engine's loops ahead of use.

Numba keeps the compiled code beside the sources (or in the user's cache directory), so that one
run per installation suffices; every later process loads it in a fraction of a second.
"""

from __future__ import annotations

import time

import numpy as np

from cost_model.problem import FORBIDDEN, Problem
from placement.solver.engine import solve


def prepare(*, policy: bool = False) -> float:
    """Load or compile every compiled loop of the engine, and of the policy on request; returns the
    seconds it took."""
    start = time.monotonic()
    # These load numba, which importing this package should not.
    from placement.solver.core import reduce
    from placement.solver.incumbent import Incumbent
    from placement.solver.polish import Polish

    problem = _touch_everything()
    solve(problem, time_limit_s=0.0)
    incumbent = Incumbent(
        reduce(problem), start=start, deadline=start, max_evaluations=None, on_progress=None
    )
    incumbent.offer(np.array([1, 1, 1, 1], dtype=np.int32))
    Polish(incumbent, 0).cross(np.array([0, 0, 1, 1], dtype=np.int32))
    if policy:
        from placement.solver.policy import propose

        propose(incumbent.reduced)
    return time.monotonic() - start


def _touch_everything() -> Problem:
    """Five nodes: a triangle, a tied node, and memory that does not allow the cheapest choice."""
    edges = np.array([[0, 1], [1, 2], [0, 2], [2, 3], [3, 4]], dtype=np.int32)
    rng = np.random.default_rng(0)
    tables = rng.integers(1, 9, (5, 4)).astype(float)
    tables[3] = [0.0, FORBIDDEN, FORBIDDEN, 0.0]
    return Problem(
        name="prepare",
        strategy_offsets=np.arange(0, 11, 2),
        node_costs=np.tile([0.0, 20.0], 5),
        edge_nodes=edges,
        edge_offsets=np.arange(0, 21, 4),
        edge_costs=tables.ravel(),
        usage_nodes=np.arange(5, dtype=np.int32),
        usage_intervals=np.tile(np.array([[0, 4]]), (5, 1)),
        usage_offsets=np.arange(0, 11, 2),
        usages=np.tile([3.0, 1.0], 5),
        usage_limit=9.0,
    )
