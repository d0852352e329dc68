"""Optimizers on the engine: the strong search, the exact solver, and a fast heuristic."""

from __future__ import annotations

import numpy as np

from cost_model.tables import Tables
from placement.optimizers.interface import Assignment, Budget


def search(tables: Tables, key: int, budget: Budget) -> Assignment:
    """Dual ascent and tree-block local search, with a lower bound."""
    from placement.solver import NEAR, solve

    return _assignment(
        solve(
            tables.problem,
            time_limit_s=budget.time_limit_s,
            seed=key,
            max_evaluations=budget.max_evaluations,
            tolerance=NEAR,
        )
    )


def exact(tables: Tables, key: int, budget: Budget) -> Assignment:
    """Mixed-integer program (HiGHS) where it finishes in the time; its bound in any case."""
    from placement.solver import exact as solve_exactly

    return _assignment(solve_exactly(tables.problem, time_limit_s=budget.time_limit_s))


def heuristic(tables: Tables, key: int, budget: Budget) -> Assignment:
    """One sweep: each node in program order takes its cheapest choice given those before it."""
    p = tables.problem
    n = p.n_nodes
    picks = np.full(n, -1, np.int64)
    sizes = p.n_strategies()
    neighbours: list[list[tuple[int, int, bool]]] = [[] for _ in range(n)]
    for e, (i, j) in enumerate(p.edge_nodes):
        neighbours[i].append((int(j), e, True))
        neighbours[j].append((int(i), e, False))
    for node in range(n):
        cost = p.node_costs[p.strategy_offsets[node] : p.strategy_offsets[node + 1]].copy()
        for other, e, first in neighbours[node]:
            table = p.edge_costs[p.edge_offsets[e] : p.edge_offsets[e + 1]]
            i, j = p.edge_nodes[e]
            table = table.reshape(sizes[i], sizes[j])
            table = table if first else table.T
            cost += table[:, picks[other]] if picks[other] >= 0 else table.min(axis=1)
        picks[node] = int(cost.argmin())
    return score(tables, picks, evaluations=1)


def score(tables: Tables, picks: np.ndarray, evaluations: int) -> Assignment:
    """Table cost and feasibility of given choices."""
    from placement.solver.scoring import peak_usage, total_cost

    p = tables.problem
    return Assignment(
        choices=picks,
        table_cost_s=total_cost(p, picks),
        lower_bound_s=0.0,
        feasible=peak_usage(p, picks) <= p.usage_limit,
        evaluations=evaluations,
    )


def _assignment(solution) -> Assignment:
    return Assignment(
        choices=np.asarray(solution.assignment, np.int64),
        table_cost_s=float(solution.cost),
        lower_bound_s=max(0.0, float(solution.lower_bound)),
        feasible=bool(solution.feasible),
        evaluations=int(solution.evaluations),
    )
