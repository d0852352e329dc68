"""Complete an assignment cheaply: one greedy sweep, then single changes that lower the tables' cost.

Nodes that a short plan has decided stay. The sweep takes free nodes in order; a neighbour that is
not decided yet counts with its cheapest choice. Then each free node in turn takes its cheapest
choice given all others, until nothing changes (iterated conditional modes, Besag 1986).
"""

from __future__ import annotations

import dataclasses

import numba
import numpy as np

from cost_model.problem import Problem
from cost_model.tables import Tables

_SWEEPS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completer:
    """The tables of a candidate, arranged by node. N nodes, E edges."""

    problem: Problem
    first: np.ndarray
    """[N+1] int64 into `edges`."""
    edges: np.ndarray
    """[2E] int64, edges of each node."""
    lows: np.ndarray
    """[sum over E of S_i + S_j] cheapest entry of each row, then of each column, of each edge."""
    low_offsets: np.ndarray
    """[E+1] int64."""
    held_bytes: np.ndarray
    """[sum S] bytes of all usage entries of a node's choice."""
    scale_s: float
    """Sum of the nodes' cheapest choices."""

    @classmethod
    def of(cls, tables: Tables) -> Completer:
        p = tables.problem
        incident: list[list[int]] = [[] for _ in range(p.n_nodes)]
        sizes = p.n_strategies()
        lows, low_offsets = [], [0]
        for e, (i, j) in enumerate(p.edge_nodes):
            incident[i].append(e)
            incident[j].append(e)
            table = p.edge_costs[p.edge_offsets[e] : p.edge_offsets[e + 1]]
            table = table.reshape(sizes[i], sizes[j])
            lows += [table.min(axis=1), table.min(axis=0)]
            low_offsets.append(low_offsets[-1] + int(sizes[i] + sizes[j]))
        held = np.zeros(len(p.node_costs))
        for u, node in enumerate(p.usage_nodes):
            a, b = p.usage_offsets[u], p.usage_offsets[u + 1]
            start = p.strategy_offsets[node]
            held[start : start + b - a] += p.usages[a:b]
        return cls(
            problem=p,
            first=np.concatenate([[0], np.cumsum([len(x) for x in incident])]).astype(np.int64),
            edges=np.array([e for x in incident for e in x], np.int64),
            lows=np.concatenate(lows) if lows else np.zeros(0),
            low_offsets=np.array(low_offsets, np.int64),
            held_bytes=held,
            scale_s=float(np.minimum.reduceat(p.node_costs, p.strategy_offsets[:-1]).sum()),
        )

    def __call__(
        self,
        fixed: np.ndarray,
        seconds_per_limit: float = 0.0,
        *,
        binding: bool = True,
        start: np.ndarray | None = None,
    ) -> np.ndarray:
        """[N] choices; ``fixed`` [N] holds a choice or -1, ``start`` [N] choices to begin with at
        the free nodes, by default none.

        Where the fixed choices do not bind, they are the start of single changes to all nodes.

        ``seconds_per_limit`` is what holding all of the memory limit costs, in units of `scale_s`.
        """
        p = self.problem
        costs = p.node_costs
        if seconds_per_limit:
            costs = costs + self.held_bytes * (seconds_per_limit * self.scale_s / p.usage_limit)
        arrays = (
            costs, p.strategy_offsets, p.edge_nodes.astype(np.int64).reshape(-1, 2),
            p.edge_offsets, p.edge_costs, self.first, self.edges, self.lows, self.low_offsets,
        )  # fmt: skip
        fixed = np.asarray(fixed, np.int64)
        begin = fixed if start is None else np.where(fixed >= 0, fixed, start)
        x = _complete(fixed, begin, *arrays)
        return x if binding else _complete(np.full_like(fixed, -1), x, *arrays)


def prices(p: Problem, choices: np.ndarray, node: int) -> np.ndarray:
    """[S] seconds by the tables of each choice of a node, all else as it is."""
    price = p.node_costs[p.strategy_offsets[node] : p.strategy_offsets[node + 1]].copy()
    sizes = p.n_strategies()
    at = (p.edge_nodes[:, 0] == node) | (p.edge_nodes[:, 1] == node)
    for e in np.flatnonzero(at):
        i, j = p.edge_nodes[e]
        table = p.edge_costs[p.edge_offsets[e] : p.edge_offsets[e + 1]]
        table = table.reshape(sizes[i], sizes[j])
        price += table[:, choices[j]] if i == node else table[choices[i]]
    return price


def cheapest_others(p: Problem, choices: np.ndarray, node: int) -> np.ndarray:
    """Other choices of a node, cheapest first by the tables with all else as it is."""
    order = np.argsort(prices(p, choices, node), kind="stable")
    return order[order != choices[node]]


@numba.njit(cache=True)
def _complete(
    fixed,
    start,
    costs,
    offsets,
    edge_nodes,
    edge_offsets,
    edge_costs,
    first,
    edges,
    lows,
    low_offsets,
):
    n = len(fixed)
    x = start.copy()
    for _ in range(_SWEEPS + 1):
        changed = False
        for v in range(n):
            if fixed[v] >= 0:
                continue
            size = offsets[v + 1] - offsets[v]
            total = costs[offsets[v] : offsets[v + 1]].copy()
            for at in range(first[v], first[v + 1]):
                e = edges[at]
                i, j = edge_nodes[e, 0], edge_nodes[e, 1]
                columns = offsets[j + 1] - offsets[j]
                base = edge_offsets[e]
                if v == i:
                    if x[j] >= 0:
                        for s in range(size):
                            total[s] += edge_costs[base + s * columns + x[j]]
                    else:
                        for s in range(size):
                            total[s] += lows[low_offsets[e] + s]
                elif x[i] >= 0:
                    for s in range(size):
                        total[s] += edge_costs[base + x[i] * columns + s]
                else:
                    rows = offsets[i + 1] - offsets[i]
                    for s in range(size):
                        total[s] += lows[low_offsets[e] + rows + s]
            best = 0
            for s in range(size):
                if total[s] < total[best]:
                    best = s
            if x[v] < 0 or total[best] < total[x[v]]:
                x[v] = best
                changed = True
        if not changed:
            break
    return x
