"""The form of a table problem that compiled loops read.

What cannot be part of an answer is removed first, exactly: forbidden strategies and strategies
without an allowed partner across some edge (arc consistency), edges to nodes with one strategy
(folded into node costs), and time points whose live set lies inside another's or whose usage cannot
pass the limit whatever is chosen. Forbidden pairs get a finite cost above that of any allowed
assignment, so that sums of costs keep their precision.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from cost_model.problem import FORBIDDEN, Problem
from graphs.errors import InfeasibleError
from placement.solver import _build


class Core(NamedTuple):
    """N nodes with K_i kept strategies, D = 2E directed edges grouped by owner, T time points."""

    offsets: np.ndarray
    """[N+1] int64 into unary."""
    unary: np.ndarray
    """[sum K] float64."""
    edge_start: np.ndarray
    """[N+1] int64; directed edges owned by node i."""
    neighbour: np.ndarray
    """[D] int32."""
    reverse: np.ndarray
    """[D] int64, the same edge owned by the neighbour."""
    table: np.ndarray
    """[D] int64 into cells; cell (b, a) of neighbour state b, own state a is table + b*K_own + a."""
    message: np.ndarray
    """[D+1] int64 offsets of per-own-state messages."""
    cells: np.ndarray
    """[...] float64; each undirected edge is stored in both orientations."""
    use_start: np.ndarray
    """[N+1] int64; usage entries of node i."""
    use_from: np.ndarray
    """[U] int32 first kept time point."""
    use_to: np.ndarray
    """[U] int32 one past the last kept time point."""
    use_value: np.ndarray
    """[U] int64 into amounts."""
    amounts: np.ndarray
    """[...] float64, bytes."""
    fixed: np.ndarray
    """[T] float64, bytes used whatever is chosen (nodes with one strategy)."""
    limit: float
    """bytes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reduced:
    """A Core with the way back to the problem's own strategy indices."""

    core: Core
    kept: np.ndarray
    """[sum K] int32, the problem's strategy index of each kept strategy."""
    constant: float
    """Cost present in every assignment (nothing at present is dropped from the core)."""
    forbidden: float
    """The finite stand-in for a forbidden pair."""

    def lift(self, x: np.ndarray) -> np.ndarray:
        """[N] int32 strategy indices of the problem from those of the core."""
        return self.kept[self.core.offsets[:-1] + x].astype(np.int32)

    def project(self, assignment: np.ndarray) -> np.ndarray:
        """[N] int32 core states; 0 where the assignment's strategy was removed."""
        x = np.zeros(len(assignment), dtype=np.int32)
        for i, s in enumerate(np.asarray(assignment).tolist()):
            a, b = self.core.offsets[i], self.core.offsets[i + 1]
            at = np.searchsorted(self.kept[a:b], s)
            if at < b - a and self.kept[a + at] == s:
                x[i] = at
        return x


def reduce(problem: Problem) -> Reduced:
    """Exact reduction. Raises InfeasibleError when it proves that nothing is allowed."""
    k = problem.n_strategies()
    alive = problem.node_costs < FORBIDDEN
    emptied = _build.arc_consistency(
        problem.strategy_offsets,
        problem.edge_nodes,
        problem.edge_offsets,
        problem.edge_costs,
        FORBIDDEN,
        alive,
    )
    if emptied >= 0:
        raise InfeasibleError(
            f"node {emptied} of {problem.name!r} has no allowed strategy left; "
            "remove some forbidden costs"
        )
    kept_flat = np.flatnonzero(alive)
    counts = np.add.reduceat(alive.astype(np.int64), problem.strategy_offsets[:-1])
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    kept = (kept_flat - np.repeat(problem.strategy_offsets[:-1], counts)).astype(np.int32)
    unary = problem.node_costs[kept_flat].astype(np.float64)
    forbidden = _stand_in(problem, unary)
    i, j = problem.edge_nodes[:, 0], problem.edge_nodes[:, 1]
    open_edge = (counts[i] > 1) & (counts[j] > 1)
    _build.fold_edges(
        np.flatnonzero(~open_edge),
        problem.edge_nodes,
        problem.edge_offsets,
        problem.edge_costs,
        k,
        offsets,
        kept,
        unary,
    )
    edges = np.flatnonzero(open_edge)
    ei, ej = i[edges].astype(np.int64), j[edges].astype(np.int64)
    owner = np.concatenate([ei, ej])
    other = np.concatenate([ej, ei])
    order = np.argsort(owner, kind="stable")
    n_open = len(edges)
    place = np.empty(2 * n_open, dtype=np.int64)
    place[order] = np.arange(2 * n_open)
    partner = np.concatenate([np.arange(n_open, 2 * n_open), np.arange(n_open)])
    sizes = counts[ei] * counts[ej]
    table_at = np.concatenate([[0], np.cumsum(np.concatenate([sizes, sizes]))]).astype(np.int64)
    cells = np.empty(table_at[-1])
    _build.copy_tables(
        edges,
        problem.edge_nodes,
        problem.edge_offsets,
        problem.edge_costs,
        k,
        offsets,
        kept,
        FORBIDDEN,
        forbidden,
        table_at,
        cells,
    )
    use_start, use_from, use_to, use_value, amounts, fixed = _usages(
        problem, counts, offsets, kept, alive
    )
    core = Core(
        offsets=offsets,
        unary=unary,
        edge_start=np.concatenate(
            [[0], np.cumsum(np.bincount(owner, minlength=problem.n_nodes))]
        ).astype(np.int64),
        neighbour=other[order].astype(np.int32),
        reverse=place[partner[order]],
        table=table_at[:-1][order],
        message=np.concatenate([[0], np.cumsum(counts[owner[order]])]).astype(np.int64),
        cells=cells,
        use_start=use_start,
        use_from=use_from,
        use_to=use_to,
        use_value=use_value,
        amounts=amounts,
        fixed=fixed,
        limit=float(problem.usage_limit) if len(fixed) else 0.0,
    )
    return Reduced(core=core, kept=kept, constant=0.0, forbidden=forbidden)


def _stand_in(problem: Problem, unary: np.ndarray) -> float:
    """Above twice the cost of any allowed assignment."""
    allowed = np.where(problem.edge_costs < FORBIDDEN, problem.edge_costs, 0.0)
    total = float(unary.max(initial=0.0)) * problem.n_nodes
    if len(allowed):
        total += float(np.maximum.reduceat(allowed, problem.edge_offsets[:-1]).sum())
    return 2.0 * total + 1e-30


def _usages(
    problem: Problem, counts: np.ndarray, offsets: np.ndarray, kept: np.ndarray, alive: np.ndarray
) -> tuple[np.ndarray, ...]:
    n = problem.n_nodes
    nodes, times = problem.usage_nodes.astype(np.int64), problem.usage_intervals
    sizes = counts[nodes]
    value_at = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    rows = np.repeat(problem.usage_offsets[:-1], sizes) + kept[
        np.repeat(offsets[nodes], sizes) + _within(sizes)
    ].astype(np.int64)
    amounts = problem.usages[rows].astype(np.float64)
    live = times[:, 0] < times[:, 1]
    if not np.isfinite(problem.usage_limit) or not live.any():
        none, flat = np.zeros(0, np.int32), np.zeros(n + 1, np.int64)
        return flat, none, none, np.zeros(0, np.int64), np.zeros(0), np.zeros(0)
    most = np.maximum.reduceat(amounts, value_at[:-1])
    least = np.minimum.reduceat(amounts, value_at[:-1])
    points = _maximal_times(times[live])
    first, last = np.searchsorted(points, times[:, 0]), np.searchsorted(points, times[:, 1])
    last = np.where(live, last, first)
    upper = _pile(first, last, most, len(points))
    binding = upper > problem.usage_limit
    if _pile(first, last, least, len(points)).max(initial=0.0) > problem.usage_limit * (1 + 1e-12):
        peak = _pile(first, last, least, len(points)).max()
        raise InfeasibleError(
            f"{problem.name!r} needs at least {peak:g} bytes at its peak and the usage limit is "
            f"{problem.usage_limit:g}; raise the limit"
        )
    rank = np.concatenate([[0], np.cumsum(binding)])
    first, last = rank[first], rank[last]
    varies = (most > least) & (first < last)
    constant = (first < last) & ~varies
    fixed = _pile(first[constant], last[constant], least[constant], int(rank[-1]))
    chosen = np.flatnonzero(varies)
    chosen = chosen[np.argsort(nodes[chosen], kind="stable")]
    start = np.concatenate([[0], np.cumsum(np.bincount(nodes[chosen], minlength=n))])
    return (
        start.astype(np.int64),
        first[chosen].astype(np.int32),
        last[chosen].astype(np.int32),
        value_at[:-1][chosen],
        amounts,
        fixed,
    )


def _maximal_times(times: np.ndarray) -> np.ndarray:
    """Starts followed by an end before any other start: every live set lies in one of theirs."""
    events = np.unique(times)
    starts, ends = np.isin(events, times[:, 0]), np.isin(events, times[:, 1])
    return events[:-1][starts[:-1] & ends[1:]]


def _pile(first: np.ndarray, last: np.ndarray, amount: np.ndarray, n_points: int) -> np.ndarray:
    change = np.zeros(n_points + 1)
    np.add.at(change, first, amount)
    np.add.at(change, last, -amount)
    return np.maximum(np.cumsum(change)[:-1], 0.0)


def _within(sizes: np.ndarray) -> np.ndarray:
    """0..size-1 for each size, concatenated."""
    ends = np.cumsum(sizes)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - sizes, sizes)
