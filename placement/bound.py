"""A lower bound of the simulated step time over all choices on one mesh.

The computation lane executes every operator and stops for every collective that cannot hide, so the
simulated time is at least the additive score with hideable collectives priced at nothing. That score
is bounded below by the dual of its table problem without the memory limit.
"""

from __future__ import annotations

from cost_model.tables import Tables


def simulation_bound_s(tables: Tables, time_limit_s: float = 0.5) -> float:
    """Seconds that no assignment on this mesh can beat in simulation."""
    from placement.solver import solve

    free = tables.at(0.0, usage_limit_bytes=float("inf"))
    return max(0.0, float(solve(free.problem, time_limit_s=time_limit_s).lower_bound))
