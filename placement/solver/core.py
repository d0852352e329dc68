"""The form of a table problem that compiled loops read.

What cannot be part of an answer is removed first, exactly: forbidden strategies and strategies
without an allowed partner across some edge (arc consistency); nodes whose strategies determine
each other one to one (they become one node); nodes with one strategy; parallel edges (added) and
edges whose cost is a sum of two node costs; time points whose live set lies inside another's or
whose usage cannot pass the limit whatever is chosen. Forbidden pairs that remain get a finite cost
above that of any allowed assignment, so that sums of costs keep their precision.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from cost_model.problem import FORBIDDEN, Problem
from graphs.errors import InfeasibleError
from placement.solver import _build

_WORTH_REPEATING = 0.98


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
    """[D] int64 into cells; neighbour state b with own state a is at table + b*K_own + a."""
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
    """[T] float64, bytes used whatever is chosen; amounts come on top."""
    limit: float
    """bytes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reduced:
    """A Core with the way back to the P nodes of the problem."""

    core: Core
    group: np.ndarray
    """[P] int64, the core node that decides each problem node; -1 if it has one strategy left."""
    map_at: np.ndarray
    """[P+1] int64 offsets into maps."""
    maps: np.ndarray
    """int32; the strategy of problem node i where its core node is in state a: map_at[i] + a."""
    constant: float
    """Cost of every allowed assignment that the core leaves out."""
    forbidden: float
    """The finite stand-in for a forbidden pair."""

    def lift(self, x: np.ndarray) -> np.ndarray:
        """[P] int32 strategy indices of the problem from core states [N]."""
        state = np.where(self.group >= 0, np.append(x, 0)[self.group], 0)
        return self.maps[self.map_at[:-1] + state]

    def project(self, assignment: np.ndarray) -> np.ndarray:
        """[N] int32 core states nearest to an assignment; its first member decides a class."""
        x = np.zeros(len(self.core.offsets) - 1, dtype=np.int32)
        k = np.diff(self.map_at)
        rows = np.repeat(np.arange(len(k)), k)
        hits = np.flatnonzero(self.maps == np.asarray(assignment)[rows])[::-1]
        hits = hits[self.group[rows[hits]] >= 0]
        x[self.group[rows[hits]]] = hits - self.map_at[rows[hits]]
        return x

    def restrict(self, problem: Problem, useful: np.ndarray) -> Problem:
        """The problem with the core strategies forbidden that are not ``useful`` [sum K]."""
        rows = np.repeat(np.arange(len(self.group)), np.diff(self.map_at))
        group = self.group[rows]
        state = np.arange(len(rows)) - self.map_at[rows]
        drop = (group >= 0) & ~useful[np.where(group >= 0, self.core.offsets[group] + state, 0)]
        costs = problem.node_costs.copy()
        costs[(problem.strategy_offsets[rows] + self.maps)[drop]] = FORBIDDEN
        return dataclasses.replace(problem, node_costs=costs)


def reduce(problem: Problem) -> Reduced:
    """Exact reduction. Raises InfeasibleError when it proves that nothing is allowed."""
    p = problem
    alive, (root, map_at, maps) = _allowed(p)
    n_states = np.diff(map_at)
    is_open = (root == np.arange(p.n_nodes)) & (n_states > 1)
    number = np.cumsum(is_open) - 1
    group = np.where(n_states > 1, number[root], -1)
    core_at = np.concatenate([[0], np.cumsum(n_states[is_open])]).astype(np.int64)
    n_core = len(core_at) - 1
    graph = (p.strategy_offsets, p.edge_nodes, p.edge_offsets, p.edge_costs)
    unary, constant, key = _build.fold(*graph, p.node_costs, root, map_at, maps, group, core_at)
    forbidden = _stand_in(p, alive)
    keys, slot = _slots(key)
    pairs = np.stack([keys // max(n_core, 1), keys % max(n_core, 1)], axis=1)
    k = np.diff(core_at)
    slot_at = _starts(k[pairs[:, 0]] * k[pairs[:, 1]])
    cells = _build.gather_tables(
        *graph, map_at, maps, group, core_at, slot, slot_at, FORBIDDEN, forbidden
    )
    kept = np.flatnonzero(_build.split_separable(pairs, slot_at, cells, core_at, unary))
    core = Core(
        offsets=core_at,
        unary=unary,
        **_edges(pairs, slot_at, cells, core_at, kept),
        **_usages(p, n_states, root, map_at, maps, group, core_at),
    )
    return Reduced(
        core=core,
        group=group,
        map_at=map_at,
        maps=maps,
        constant=float(constant),
        forbidden=forbidden,
    )


def _allowed(p: Problem) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Strategies that arc consistency and one-to-one classes leave, and the classes."""
    alive = p.node_costs < FORBIDDEN
    graph = (p.strategy_offsets, p.edge_nodes, p.edge_offsets, p.edge_costs, FORBIDDEN)
    constrains = _build.forbidding_edges(p.edge_offsets, p.edge_costs, FORBIDDEN)
    while True:
        emptied = _build.arc_consistency(*graph, constrains, alive)
        if emptied >= 0:
            raise InfeasibleError(
                f"node {emptied} of {p.name!r} has no allowed strategy left; "
                "remove some forbidden costs"
            )
        root, map_at, maps, killed = _build.find_classes(*graph, constrains, alive)
        if not killed:
            return alive, (root, map_at, maps)


def _stand_in(problem: Problem, alive: np.ndarray) -> float:
    """Above twice the cost of any allowed assignment."""
    total = float(problem.node_costs[alive].max(initial=0.0)) * problem.n_nodes
    if problem.n_edges:
        allowed = np.where(problem.edge_costs < FORBIDDEN, problem.edge_costs, 0.0)
        total += float(np.maximum.reduceat(allowed, problem.edge_offsets[:-1]).sum())
    return 2.0 * total + 1e-30


def _edges(
    pairs: np.ndarray, slot_at: np.ndarray, cells: np.ndarray, core_at: np.ndarray, kept: np.ndarray
) -> dict[str, np.ndarray]:
    """The directed edge arrays of a Core."""
    k = np.diff(core_at)
    low, high = pairs[kept, 0], pairs[kept, 1]
    owner, other = np.concatenate([low, high]), np.concatenate([high, low])
    m = len(kept)
    order = np.argsort(owner, kind="stable")
    place = np.empty(2 * m, dtype=np.int64)
    place[order] = np.arange(2 * m)
    partner = np.concatenate([np.arange(m, 2 * m), np.arange(m)])
    sizes = k[low] * k[high]
    table_at = _starts(np.concatenate([sizes, sizes]))
    out = np.empty(table_at[-1])
    _build.orient(pairs, slot_at, cells, core_at, kept, table_at, out)
    return {
        "edge_start": _starts(np.bincount(owner, minlength=len(k))),
        "neighbour": other[order].astype(np.int32),
        "reverse": place[partner[order]],
        "table": table_at[:-1][order],
        "message": _starts(k[owner[order]]),
        "cells": out,
    }


def _usages(
    p: Problem,
    n_states: np.ndarray,
    root: np.ndarray,
    map_at: np.ndarray,
    maps: np.ndarray,
    group: np.ndarray,
    core_at: np.ndarray,
) -> dict:
    """The usage arrays of a Core; each entry's least amount goes to the fixed usage."""
    n_core = len(core_at) - 1
    times = p.usage_intervals
    live = times[:, 0] < times[:, 1]
    if not np.isfinite(p.usage_limit) or not live.any():
        none = np.zeros(0, np.int32)
        return {
            "use_start": np.zeros(n_core + 1, np.int64),
            "use_from": none,
            "use_to": none,
            "use_value": np.zeros(0, np.int64),
            "amounts": np.zeros(0),
            "fixed": np.zeros(0),
            "limit": 0.0,
        }
    points = _maximal_times(times[live])
    first = np.searchsorted(points, times[:, 0])
    last = np.searchsorted(points, times[:, 1])
    owner = group[p.usage_nodes] + 1
    key = (owner * (len(points) + 1) + first) * (len(points) + 1) + last
    keys, slot = _slots(np.where(live & (first < last), key, -1))
    rest, last = np.divmod(keys, len(points) + 1)
    owner, first = np.divmod(rest, len(points) + 1)
    sizes = np.where(owner > 0, np.append(np.diff(core_at), 0)[owner - 1], 1)
    slot_at = _starts(sizes)
    amounts = _build.gather_usages(
        p.usages, p.usage_offsets, p.usage_nodes, map_at, maps, group, core_at, slot, slot_at
    )
    most = np.maximum.reduceat(amounts, slot_at[:-1]) if len(keys) else np.zeros(0)
    least = np.minimum.reduceat(amounts, slot_at[:-1]) if len(keys) else np.zeros(0)
    base = _pile(first, last, least, len(points))
    if base.max(initial=0.0) > p.usage_limit * (1 + 1e-12):
        raise InfeasibleError(
            f"{p.name!r} needs at least {base.max():g} bytes at its peak and the usage limit is "
            f"{p.usage_limit:g}; raise the limit"
        )
    kept = np.flatnonzero(_pile(first, last, most, len(points)) > p.usage_limit)
    first, last = np.searchsorted(kept, first), np.searchsorted(kept, last)
    while len(kept):
        greatest = ~_implied(first, last, owner, slot_at, amounts, len(kept))
        rank = np.concatenate([[0], np.cumsum(greatest)])
        kept, first, last = kept[greatest], rank[first], rank[last]
        if rank[-1] > _WORTH_REPEATING * len(greatest):
            break
    amounts -= np.repeat(least, sizes)
    chosen = np.flatnonzero((most > least) & (first < last))
    return {
        "use_start": _starts(np.bincount(owner[chosen] - 1, minlength=n_core)),
        "use_from": first[chosen].astype(np.int32),
        "use_to": last[chosen].astype(np.int32),
        "use_value": slot_at[:-1][chosen],
        "amounts": amounts,
        "fixed": base[kept],
        # Prices are relative to the limit, so that it may not be nothing.
        "limit": float(max(p.usage_limit, 1e-9 * amounts.max(initial=0.0))),
    }


def _slots(key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorted distinct keys >= 0 and, for each key, its index there (-1 for a key of -1)."""
    keys, inverse = np.unique(key[key >= 0], return_inverse=True)
    slot = np.full(len(key), -1, dtype=np.int64)
    slot[key >= 0] = inverse
    return keys, slot


def _starts(sizes: np.ndarray) -> np.ndarray:
    """[n+1] int64 offsets of consecutive runs of these sizes."""
    starts = np.zeros(len(sizes) + 1, dtype=np.int64)
    np.cumsum(sizes, out=starts[1:])
    return starts


def _implied(
    first: np.ndarray,
    last: np.ndarray,
    owner: np.ndarray,
    slot_at: np.ndarray,
    amounts: np.ndarray,
    n_points: int,
) -> np.ndarray:
    """[T] whether a neighbouring time point uses at least as much, whatever is chosen."""
    live = np.flatnonzero(first < last)
    time = np.concatenate([first[live], last[live]])
    entry = np.concatenate([live, live])
    sign = np.repeat([1.0, -1.0], len(live))
    order = np.lexsort((owner[entry], time))
    entry = entry[order]
    most, least = _build.usage_steps(
        time[order], owner[entry], entry, sign[order], slot_at, amounts, n_points
    )
    by_next = np.append(least[:-1] >= 0.0, False)
    by_previous = np.append(False, (most[:-1] <= 0.0) & ~by_next[:-1])
    return by_next | by_previous


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
