"""Paths through the schedule simulation: what no plan can take less than, and what to shorten.

The simulation makes one lane wait for the other at known places, so that a step takes at least as
long as any path through its events that changes lanes only there. In each stretch between loop
boundaries both lanes start together. From there a path

* leaves the computation lane where a collective starts that hides behind what follows (a gradient
  reduction): no earlier than the operator before it;
* leaves the network lane where computation waits for a gather.

Collectives that stop computation lie on every path. Whether computation waits for a gather depends
on whether there is one, which is a choice. A *certain* path is one for all choices: it leaves the
network lane only before the first gradient reduction, until which the network never ends later than
the computation, and counts no gathers after one.

The length of a path is a sum over choices of nodes and of pairs of nodes: a table problem. Of certain
paths, and of means of them, its least cost bounds the simulated time of every assignment from below.
The best such bound is the value of a game, of a path that wants to be long against choices that want
it short; its rounds are fictitious play (Brown 1951, "Iterative solution of games by fictitious
play"), each answer being that to the mean of what the other has played.
"""

from __future__ import annotations

import dataclasses

import numba
import numpy as np

from cost_model.events import COMPUTE, RESHARD
from cost_model.problem import Problem
from cost_model.simulate import Simulator, value_at


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
        self._role = np.array([_role(e) for e in s.tables.events], np.int64)
        self._stretch, self.turns = _stretches(s.op, s.region_start, s.region_stop, s.region_trips)
        """[events] how often a step executes each."""
        # Events of tied groups cost the same choices the same: one of each is charged for all.
        _, self._first, self._alike = np.unique(
            np.stack([s.kind, s.node, s.source, s.offset, s.row_offset, s.column_offset]),
            axis=1, return_index=True, return_inverse=True,
        )  # fmt: skip

    def durations(self, choices: np.ndarray) -> np.ndarray:
        """[events, 3] seconds of an assignment ([nodes]): computing, stopping computation, hiding."""
        s = self.simulator
        return _durations(
            np.asarray(choices, np.int64), s.kind, s.node, s.source, s.seconds, s.mode, s.offset,
            s.n_columns, s.rows, s.row_offset, s.columns, s.column_offset,
        )  # fmt: skip

    def longest(self, durations: np.ndarray, *, certain: bool) -> tuple[Path, float]:
        """A long path where events take these seconds ([events, 3], or a mean), and its seconds.

        ``certain``: one that is a path whatever is chosen.
        """
        computed, hidden, length = _longest(
            durations, self._role, self._stretch, self.turns, certain
        )
        return Path(computed=computed, hidden=hidden), length

    def problem(self, path: Path, usage_limit_bytes: float) -> Problem:
        """The table problem whose costs are the lengths of a path, seconds."""
        s, p = self.simulator, self.simulator.tables.problem
        nodes, edges = np.zeros_like(p.node_costs), np.zeros_like(p.edge_costs)
        first, alike = self._first, self._alike.reshape(-1)
        on = self.turns * np.where(s.kind == COMPUTE, path.computed, 1.0)
        _charge(
            np.bincount(alike, on), np.bincount(alike, self.turns * path.hidden), s.kind[first],
            s.node[first], s.source[first], s.seconds, s.mode, s.offset[first], s.n_columns[first],
            s.rows, s.row_offset[first], s.columns, s.column_offset[first], self._edge_at[first],
            p.strategy_offsets, nodes, edges,
        )  # fmt: skip
        return dataclasses.replace(
            p, node_costs=nodes, edge_costs=edges, usage_limit=usage_limit_bytes
        )


_COMPUTES, _STOPS, _GATHERS, _REDUCES = 0, 1, 2, 3
"""What an event is to a path: an operator, a collective that always stops computation, one that
computation waits for, one that hides behind what follows."""


def _role(event) -> int:
    if event.kind == COMPUTE:
        return _COMPUTES
    if not event.hides:
        return _STOPS
    return _REDUCES if event.late else _GATHERS


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
        i = value_at(
            e, choices, kind, node, source, offset, n_columns, rows, row_offset, columns,
            column_offset,
        )  # fmt: skip
        lane = 0 if kind[e] == 0 else (1 if mode[i] == 0 else 2)
        found[e, lane] = seconds[i]
    return found


@numba.njit(cache=True)
def _longest(durations, role, stretch, turns, certain):
    """Greedy in program order; turns between lanes are kept as a tree, each with the one before it."""
    n = len(role)
    computed, hidden = np.zeros(n), np.zeros(n)
    # A turn off the computation lane leaves before operator `leaves` and goes on with reduction
    # `enters`; one onto it leaves after collective `leaves`.
    earlier = np.full(2 * n + 2, -1)
    leaves, enters = np.zeros(2 * n + 2, np.int64), np.zeros(2 * n + 2, np.int64)
    n_turns = 0
    length = 0.0
    first = 0
    while first < n:
        stop = first
        while stop < n and stretch[stop] == stretch[first]:
            stop += 1
        network = compute = 0.0
        onto = -1  # the latest turn onto the computation lane
        before, before_at, before_onto = 0.0, first, -1  # at the start of the latest operator
        away, off = -1.0, -1  # on the network after the latest turn off
        reduced = False
        for e in range(first, stop):
            if role[e] == _COMPUTES:
                before, before_at, before_onto = compute, e, onto
                compute += durations[e, 0]
                continue
            blocks, hides = durations[e, 1], durations[e, 2]
            if role[e] == _REDUCES:
                reduced = True
                if before > away:
                    away, off = before, n_turns
                    earlier[off], leaves[off], enters[off] = before_onto, before_at, e
                    n_turns += 1
            network += blocks + hides
            compute += blocks
            before += blocks
            if off >= 0:
                away += blocks + (hides if role[e] == _REDUCES or not certain else 0.0)
            left, previous = compute, -2
            if not reduced or (not certain and role[e] == _GATHERS and hides > 0.0):
                if network > left:
                    left, previous = network, -1
                if off >= 0 and away > left:
                    left, previous = away, off
            if previous > -2:
                compute, onto = left, n_turns
                earlier[onto], leaves[onto] = previous, e
                n_turns += 1
        longest = max(network, max(compute, away))
        length += turns[first] * longest
        # Back from the end of the stretch.
        at, on_network, turn = stop, True, -1
        if longest == compute:
            on_network, turn = False, onto
        elif longest == away:
            turn = off
        while True:
            if on_network:
                gathers = turn < 0 or not certain
                for e in range(first if turn < 0 else enters[turn], at):
                    if role[e] == _REDUCES or (role[e] == _GATHERS and gathers):
                        hidden[e] = 1.0
            else:
                for e in range(first if turn < 0 else leaves[turn] + 1, at):
                    if role[e] == _COMPUTES:
                        computed[e] = 1.0
            if turn < 0:
                break
            at = leaves[turn] if on_network else leaves[turn] + 1
            turn, on_network = earlier[turn], not on_network
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
