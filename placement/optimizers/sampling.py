"""Optimizers that only score assignments: random sampling and simulated annealing."""

from __future__ import annotations

import time

import numpy as np

from cost_model.tables import Tables
from placement.optimizers.interface import Assignment, Budget
from placement.solver.scoring import peak_usage, total_costs

_BATCH = 256
_DEFAULT_EVALUATIONS = 4096


def random(tables: Tables, key: int, budget: Budget) -> Assignment:
    """Uniform assignments; the cheapest that fits."""
    p = tables.problem
    rng = np.random.default_rng(key)
    limit = budget.max_evaluations or _DEFAULT_EVALUATIONS
    sizes = p.n_strategies()
    deadline = time.monotonic() + budget.time_limit_s
    best, best_rank, spent = None, (True, np.inf), 0
    while spent < limit and (best is None or time.monotonic() < deadline):
        batch = rng.integers(0, sizes, size=(min(_BATCH, limit - spent), len(sizes)))
        spent += len(batch)
        for x, cost in zip(batch, total_costs(p, batch)):
            if (False, cost) < best_rank or best is None:
                rank = (peak_usage(p, x) > p.usage_limit, float(cost))
                if rank < best_rank or best is None:
                    best, best_rank = x, rank
    assert best is not None
    return Assignment(
        choices=best,
        table_cost_s=best_rank[1],
        lower_bound_s=0.0,
        feasible=not best_rank[0],
        evaluations=spent,
    )


def annealing(tables: Tables, key: int, budget: Budget) -> Assignment:
    """Simulated annealing over single changes, each proposal scored as a whole assignment.

    The temperature falls geometrically from 10 % to 0.01 % of the first cost; excess memory costs
    its share of the limit in first costs.
    """
    p = tables.problem
    rng = np.random.default_rng(key)
    limit = budget.max_evaluations or _DEFAULT_EVALUATIONS
    sizes = p.n_strategies()
    movable = np.flatnonzero(sizes > 1)
    deadline = time.monotonic() + budget.time_limit_s
    x = np.zeros(len(sizes), np.int64)
    first = float(total_costs(p, x[None])[0])

    def energy(y: np.ndarray, cost: float) -> float:
        excess = (
            max(0.0, peak_usage(p, y) / p.usage_limit - 1.0) if np.isfinite(p.usage_limit) else 0
        )
        return cost + excess * first

    now = best = energy(x, first)
    best_x, spent = x.copy(), 1
    while spent < limit and time.monotonic() < deadline and len(movable):
        heat = 0.1 * first * (1e-3 ** (spent / limit))
        y = x.copy()
        node = rng.choice(movable)
        y[node] = rng.integers(0, sizes[node])
        spent += 1
        value = energy(y, float(total_costs(p, y[None])[0]))
        if value <= now or rng.random() < np.exp((now - value) / max(heat, 1e-30)):
            x, now = y, value
            if now < best:
                best, best_x = now, x.copy()
    return Assignment(
        choices=best_x,
        table_cost_s=float(total_costs(p, best_x[None])[0]),
        lower_bound_s=0.0,
        feasible=peak_usage(p, best_x) <= p.usage_limit,
        evaluations=spent,
    )
