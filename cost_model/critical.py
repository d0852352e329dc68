"""Paths through the schedule simulation: what no plan can take less than, and what to shorten.

The simulation makes one lane wait for the other at known places, so that a step takes at least as
long as any path through its events that changes lanes only there. In each stretch between loop
boundaries, where both lanes start together, a path

1. begins on the network lane and executes its collectives, up to any place before the first gradient
   reduction (until then the network never ends later than the computation that waits for it);
2. goes on along the computation lane;
3. and may end on the network lane with the gradient reductions from one of them on, which starts no
   earlier than the operator before it.

Collectives that stop computation lie on every path. The length of a path is a sum over events, thus
over choices of nodes and pairs of nodes: a table problem whose least cost bounds the simulated time
of every assignment from below, and so does that of any mean of paths. The best such bound is the
value of a game, of a path that wants to be long against choices that want it short; its rounds are
Brown's fictitious play (Brown 1951, "Iterative solution of games by fictitious play"), each answer
being that to the mean of what the other has played.
"""

from __future__ import annotations

import dataclasses

import numba
import numpy as np

from cost_model.events import COMPUTE, RESHARD
from cost_model.problem import Problem
from cost_model.simulate import Simulator


@dataclasses.dataclass(frozen=True, kw_only=True)
class Path:
    """A path, or a mean of paths."""

    computed: np.ndarray
    """[events] share of paths that execute an operator on the computation lane."""
    hidden: np.ndarray
    """[events] share of paths that execute a collective which hides."""

    def towards(self, other: Path, share: float) -> Path:
        """The mean that gives ``share`` to the other."""
        return Path(
            computed=(1.0 - share) * self.computed + share * other.computed,
            hidden=(1.0 - share) * self.hidden + share * other.hidden,
        )


class Paths:
    """The paths of a simulator."""

    def __init__(self, simulator: Simulator) -> None:
        self.simulator = simulator
        s, p = simulator, simulator.tables.problem
        at = {
            (int(i), int(j)): int(first) for (i, j), first in zip(p.edge_nodes, p.edge_offsets[:-1])
        }
        self._edge_at = np.array(
            [
                at[min(i, j), max(i, j)] if kind == RESHARD and i != j else 0
                for kind, i, j in zip(s.kind, s.source, s.node)
            ],
            np.int64,
        )
        self._late = np.array([e.hides and e.late for e in s.tables.events], bool)
        self._stretch, self.turns = _stretches(s.op, s.region_start, s.region_stop, s.region_trips)
        """[events] how often a step executes each."""

    def durations(self, choices: np.ndarray) -> np.ndarray:
        """[events, 3] seconds of an assignment ([nodes]): computing, stopping computation, hiding."""
        s = self.simulator
        return _durations(
            np.asarray(choices, np.int64), s.kind, s.node, s.source, s.seconds, s.mode, s.offset,
            s.n_columns, s.rows, s.row_offset, s.columns, s.column_offset,
        )  # fmt: skip

    def longest(self, durations: np.ndarray) -> tuple[Path, float]:
        """The longest path where events take these seconds ([events, 3]), and its seconds."""
        computed, hidden, length = _longest(
            durations, self.simulator.kind == COMPUTE, self._late, self._stretch, self.turns
        )
        return Path(computed=computed, hidden=hidden), length

    def problem(self, path: Path, usage_limit_bytes: float) -> Problem:
        """The table problem whose costs are the lengths of a path, seconds."""
        s, p = self.simulator, self.simulator.tables.problem
        nodes, edges = np.zeros_like(p.node_costs), np.zeros_like(p.edge_costs)
        on = self.turns * np.where(s.kind == COMPUTE, path.computed, 1.0)
        _charge(
            on, self.turns * path.hidden, s.kind, s.node, s.source, s.seconds, s.mode, s.offset,
            s.n_columns, s.rows, s.row_offset, s.columns, s.column_offset, self._edge_at,
            p.strategy_offsets, nodes, edges,
        )  # fmt: skip
        return dataclasses.replace(
            p, node_costs=nodes, edge_costs=edges, usage_limit=usage_limit_bytes
        )


@numba.njit(cache=True)
def _stretches(op, region_start, region_stop, region_trips):
    """[events] number of the stretch between loop boundaries that each lies in, and its turns."""
    n_regions = len(region_start)
    stretch, turns = np.zeros(len(op), np.int64), np.ones(len(op))
    stack, times = np.zeros(n_regions + 1, np.int64), np.ones(n_regions + 1)
    depth, following, number = 0, 1, 0
    for e in range(len(op)):
        here, moved = op[e], False
        while depth > 0 and region_stop[stack[depth]] <= here:
            depth -= 1
            moved = True
        while following < n_regions and region_start[following] <= here:
            r = following
            following += 1
            if region_stop[r] <= here or region_stop[r] <= region_start[r]:
                continue
            depth += 1
            stack[depth] = r
            times[depth] = times[depth - 1] * region_trips[r]
            moved = True
        number += moved
        stretch[e], turns[e] = number, times[depth]
    return stretch, turns


@numba.njit(cache=True)
def _durations(
    choices, kind, node, source, seconds, mode, offset, n_columns, rows, row_offset, columns,
    column_offset,
):  # fmt: skip
    found = np.zeros((len(kind), 3))
    for e in range(len(kind)):
        if kind[e] == 2:
            i = (
                offset[e]
                + rows[row_offset[e] + choices[source[e]]] * n_columns[e]
                + columns[column_offset[e] + choices[node[e]]]
            )
        else:
            i = offset[e] + choices[node[e]]
        lane = 0 if kind[e] == 0 else (1 if mode[i] == 0 else 2)
        found[e, lane] = seconds[i]
    return found


@numba.njit(cache=True)
def _longest(durations, computes, late, stretch, turns):
    n = len(computes)
    computed, hidden = np.zeros(n), np.zeros(n)
    length = 0.0
    first = 0
    while first < n:
        stop = first
        while stop < n and stretch[stop] == stretch[first]:
            stop += 1
        network, compute, ending = 0.0, 0.0, -1.0
        left = first  # from here on the path is on the computation lane
        before, before_at, before_left = 0.0, first, first
        ends_left, ends_at, ends_from = first, first, stop
        seen = False
        for e in range(first, stop):
            if computes[e]:
                before, before_at, before_left = compute, e, left
                compute += durations[e, 0]
                continue
            blocks, hides = durations[e, 1], durations[e, 2]
            if late[e]:
                seen = True
                if before > ending:
                    ending, ends_left, ends_at, ends_from = before, before_left, before_at, e
            network += blocks + hides
            compute += blocks
            before += blocks
            if ending >= 0.0:
                ending += blocks + (hides if late[e] else 0.0)
            if not seen and network > compute:
                compute, left = network, e + 1
        longest = max(network, max(compute, ending))
        length += turns[first] * longest
        for e in range(first, stop):
            if longest == compute:
                on, off = e >= left, e < left
            elif longest == network:
                on, off = False, True
            else:
                on = ends_left <= e < ends_at
                off = e < ends_left or (e >= ends_from and late[e])
            computed[e], hidden[e] = on and computes[e], off and not computes[e]
        first = stop
    return computed, hidden, length


@numba.njit(cache=True)
def _charge(
    on, off, kind, node, source, seconds, mode, offset, n_columns, rows, row_offset, columns,
    column_offset, edge_at, starts, nodes, edges,
):  # fmt: skip
    for e in range(len(kind)):
        j = node[e]
        own, other = starts[j], source[e]
        n_own = starts[j + 1] - own
        if kind[e] != 2:
            for b in range(n_own):
                i = offset[e] + b
                nodes[own + b] += (on[e] if mode[i] == 0 else off[e]) * seconds[i]
            continue
        n_other = starts[other + 1] - starts[other]
        for a in range(n_other):
            row = offset[e] + rows[row_offset[e] + a] * n_columns[e]
            for b in range(n_own):
                if other == j and a != b:
                    continue
                i = row + columns[column_offset[e] + b]
                cost = (on[e] if mode[i] == 0 else off[e]) * seconds[i]
                if other == j:
                    nodes[own + b] += cost
                elif other < j:
                    edges[edge_at[e] + a * n_own + b] += cost
                else:
                    edges[edge_at[e] + b * n_other + a] += cost
