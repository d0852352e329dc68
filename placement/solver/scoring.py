"""Cost and peak memory of assignments, compiled: how optimizers without a solver score theirs."""

from __future__ import annotations

import numba
import numpy as np

from cost_model.problem import Problem


def total_cost(problem: Problem, choices: np.ndarray) -> float:
    """The objective of one assignment [N]."""
    return float(total_costs(problem, choices[None, :])[0])


def total_costs(problem: Problem, choices: np.ndarray) -> np.ndarray:
    """The objective of each of K assignments [K, N]."""
    return _costs(
        np.ascontiguousarray(choices, np.int64),
        problem.strategy_offsets,
        problem.node_costs,
        problem.edge_nodes,
        problem.edge_offsets,
        problem.edge_costs,
    )


def peak_usage(problem: Problem, choices: np.ndarray) -> float:
    """Largest sum of usages over time of one assignment."""
    if not len(problem.usage_nodes):
        return 0.0
    values = problem.usages[problem.usage_offsets[:-1] + choices[problem.usage_nodes]]
    live = problem.usage_intervals[:, 0] < problem.usage_intervals[:, 1]
    times = np.concatenate([problem.usage_intervals[live, 0], problem.usage_intervals[live, 1]])
    deltas = np.concatenate([values[live], -values[live]])
    order = np.lexsort((deltas, times))  # releases before acquisitions at one time
    return float(np.cumsum(deltas[order]).max(initial=0.0))


@numba.njit(cache=True)
def _costs(choices, offsets, node_costs, edge_nodes, edge_offsets, edge_costs):
    out = np.zeros(len(choices))
    for k in range(len(choices)):
        x = choices[k]
        total = 0.0
        for i in range(len(offsets) - 1):
            total += node_costs[offsets[i] + x[i]]
        for e in range(len(edge_nodes)):
            i, j = edge_nodes[e, 0], edge_nodes[e, 1]
            total += edge_costs[edge_offsets[e] + x[i] * (offsets[j + 1] - offsets[j]) + x[j]]
        out[k] = total
    return out
