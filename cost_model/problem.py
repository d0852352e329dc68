"""The additive score of a plan: a table problem.

minimise   sum_i  node_cost[i, s_i]  +  sum_(i,j)  edge_cost[i, j, s_i, s_j]
subject to sum_u  usage[u, s_node(u)] <= usage_limit   at every time point t,

the sum running over the usage entries u whose half-open interval [start, end) holds t. This is the
form of the ASPLOS 2025 contest on intra-operator parallelism (Moffitt and Fegade, "IOPDDL") and of
Alpa's integer program; a node may carry several usage entries because one decision here governs
several tensors with different live ranges.

Ragged data is stored flat with offsets so that compiled loops read it directly.
"""

from __future__ import annotations

import dataclasses

import numpy as np

FORBIDDEN = 1e18
"""Costs at or above this mean that the choice (or pair) is not allowed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """N nodes, S_i strategies of node i, E pairwise edges, U usage entries."""

    name: str
    strategy_offsets: np.ndarray
    """[N+1] int64; strategies of node i are rows strategy_offsets[i]:strategy_offsets[i+1]."""
    node_costs: np.ndarray
    """[sum S_i] float64, in seconds for traced programs, >= 0."""
    edge_nodes: np.ndarray
    """[E, 2] int32, i < j not required, i != j, each unordered pair at most once."""
    edge_offsets: np.ndarray
    """[E+1] int64 into edge_costs."""
    edge_costs: np.ndarray
    """[sum S_i*S_j] float64, row-major over (s_i, s_j)."""
    usage_nodes: np.ndarray
    """[U] int32, the node of each usage entry."""
    usage_intervals: np.ndarray
    """[U, 2] int64 half-open [start, end); empty intervals are allowed and use nothing."""
    usage_offsets: np.ndarray
    """[U+1] int64 into usages; entry u has S_node(u) values."""
    usages: np.ndarray
    """[sum over u of S_node(u)] float64, bytes, >= 0."""
    usage_limit: float
    """bytes; np.inf for none."""
    n_auxiliary: int = 0
    """Trailing nodes that only express costs of three or more nodes; not decisions of their own."""

    @property
    def n_nodes(self) -> int:
        return len(self.strategy_offsets) - 1

    @property
    def n_edges(self) -> int:
        return len(self.edge_nodes)

    def n_strategies(self) -> np.ndarray:
        """[N] int64."""
        return np.diff(self.strategy_offsets)

    def cost(self, assignment: np.ndarray) -> float:
        """Objective of an assignment, [N] strategy indices; >= FORBIDDEN if it uses such a one."""
        x = np.asarray(assignment, dtype=np.int64)
        i, j = self.edge_nodes[:, 0], self.edge_nodes[:, 1]
        cells = self.edge_offsets[:-1] + x[i] * self.n_strategies()[j] + x[j]
        nodes = self.node_costs[self.strategy_offsets[:-1] + x]
        return float(nodes.sum() + self.edge_costs[cells].sum())

    def peak_usage(self, assignment: np.ndarray) -> float:
        """Largest usage over all time points, bytes."""
        x = np.asarray(assignment, dtype=np.int64)
        value = self.usages[self.usage_offsets[:-1] + x[self.usage_nodes]]
        live = self.usage_intervals[:, 0] < self.usage_intervals[:, 1]
        if not live.any():
            return 0.0
        # At equal times ends come first, because intervals are half-open.
        times = np.concatenate([self.usage_intervals[live, 1], self.usage_intervals[live, 0]])
        change = np.concatenate([-value[live], value[live]])
        order = np.argsort(times, kind="stable")
        return float(max(np.cumsum(change[order]).max(), 0.0))

    def is_feasible(self, assignment: np.ndarray) -> bool:
        """Whether nothing forbidden is used and the usage limit holds."""
        slack = 1e-9 * abs(self.usage_limit) if np.isfinite(self.usage_limit) else 0.0
        return (
            self.cost(assignment) < FORBIDDEN
            and self.peak_usage(assignment) <= self.usage_limit + slack
        )
