"""Short plans: a whole plan in about a dozen decisions, for optimizers that only score plans.

A plan over every node of the tables is far too long to be found by scoring alone, so searches that
work by scoring are given what an expert would say instead: the outer candidate; for each mesh axis
which named dimension class it shards on activations and which on optimizer state; whether weights
are sharded like the state or gathered (ZeRO-3 against ZeRO-1); a price of memory; which of these
decisions are made at all; and whether they bind or are a start that single changes improve. Every
hand-tuned rule of :mod:`placement.optimizers.rules` can be said this way. What a short plan leaves
open is completed cheaply (:mod:`placement.learned.completion`).

An axis option is a preference list of classes: the first one that a group has and that the axis
divides is sharded, or none. ``parallel`` stands for any class of that name; the four parallel
classes with most bytes of state can also be named one by one (experts, vocabulary, feed-forward,
heads).
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from functools import cached_property

import numpy as np

from cost_model.tables import Tables
from graphs.groups import COPY, HEAVY, LEAF, Grouping
from graphs.names import BATCH, HIDDEN, PARALLEL, SEQUENCE, Names, name_classes
from placement.learned.completion import Completer

N_NAMED = 4
"""Parallel classes that can be named."""
_NAMED = tuple(f"{PARALLEL} {n}" for n in range(N_NAMED))
ACTIVATION_OPTIONS: tuple[tuple[str, ...], ...] = (
    (BATCH,),
    (),
    (SEQUENCE,),
    (HIDDEN,),
    (PARALLEL,),
    (PARALLEL, SEQUENCE),
    (PARALLEL, HIDDEN),
    *((name,) for name in _NAMED),
    *((name, BATCH) for name in _NAMED),
)
STATE_OPTIONS: tuple[tuple[str, ...], ...] = (
    (HIDDEN, PARALLEL),
    (),
    (HIDDEN,),
    (PARALLEL,),
    (PARALLEL, HIDDEN),
    *((name,) for name in _NAMED),
    *((name, HIDDEN) for name in _NAMED),
)
MEMORY_PRICES = (0.0, 0.3, 3.0)
"""What holding the whole memory limit costs, in cheapest step times."""
SCOPES = (
    ("activation", "weight", "state"),
    ("activation",),
    ("weight", "state"),
    (),
)
MAX_AXES = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShortPlan:
    """Decisions below the outer candidate; those of axes that a mesh lacks are ignored."""

    activations: tuple[int, ...]
    """[MAX_AXES] into ACTIVATION_OPTIONS."""
    states: tuple[int, ...]
    """[MAX_AXES] into STATE_OPTIONS."""
    gathered: tuple[int, ...]
    """[MAX_AXES] 1 where weights drop the hidden dimension's sharding."""
    memory_price: int
    """Into MEMORY_PRICES."""
    scope: int = 0
    """Into SCOPES: what is decided at all."""
    binding: int = 1
    """0 where the decisions are only the start of single changes that lower the tables' cost."""


CHOICES_OF_AXIS = (len(ACTIVATION_OPTIONS), len(STATE_OPTIONS), 2)
FSDP = ShortPlan(activations=(0,) * 3, states=(0,) * 3, gathered=(0,) * 3, memory_price=0)
"""Batch on every axis, state on every axis: what most searches start from."""


def random_plan(rng: np.random.Generator) -> ShortPlan:
    """Uniform decisions."""
    return ShortPlan(
        activations=tuple(int(v) for v in rng.integers(0, len(ACTIVATION_OPTIONS), MAX_AXES)),
        states=tuple(int(v) for v in rng.integers(0, len(STATE_OPTIONS), MAX_AXES)),
        gathered=tuple(int(v) for v in rng.integers(0, 2, MAX_AXES)),
        memory_price=int(rng.integers(0, len(MEMORY_PRICES))),
        scope=int(rng.integers(0, len(SCOPES))),
        binding=int(rng.integers(0, 2)),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speaker:
    """Turns short plans into choices of one candidate's tables."""

    tables: Tables
    nodes: tuple[tuple[int, str, tuple[int, ...], tuple[tuple[str, ...], ...]], ...]
    """(node, activation | weight | state, class sizes, names of each class) of deciding nodes."""

    @classmethod
    def of(cls, tables: Tables, names: Names | None = None) -> Speaker:
        grouping = tables.grouping
        names = name_classes(grouping) if names is None else names
        return cls(tables=tables, nodes=tuple(_deciding(tables, names, _named(grouping, names))))

    @cached_property
    def completer(self) -> Completer:
        return Completer.of(self.tables)

    @cached_property
    def _rows(self) -> tuple[dict[tuple[int, ...], int], ...]:
        """For each deciding node, the first choice of each placement."""
        found = []
        for node, *_ in self.nodes:
            table: dict[tuple[int, ...], int] = {}
            for n, row in enumerate(self.tables.choices[node].place.tolist()):
                table.setdefault(tuple(row), n)
            found.append(table)
        return tuple(found)

    def choices(self, plan: ShortPlan) -> np.ndarray:
        """[nodes] int64, the plan completed."""
        price = MEMORY_PRICES[plan.memory_price]
        return self.completer(self.fixed(plan), price, binding=bool(plan.binding))

    def fixed(self, plan: ShortPlan) -> np.ndarray:
        """[nodes] int64, the choices that the plan decides, -1 elsewhere."""
        sizes = self.tables.layout.mesh.axis_sizes
        out = np.full(len(self.tables.choices), -1, np.int64)
        acts = [ACTIVATION_OPTIONS[plan.activations[a]] for a in range(len(sizes))]
        states = [STATE_OPTIONS[plan.states[a]] for a in range(len(sizes))]
        weights = [
            tuple(w for w in states[a] if w != HIDDEN) if plan.gathered[a] else states[a]
            for a in range(len(sizes))
        ]
        wanted = {"activation": acts, "state": states, "weight": weights}
        for (node, kind, class_sizes, names), rows in zip(self.nodes, self._rows):
            if kind not in SCOPES[plan.scope]:
                continue
            pick = rows.get(_placement(wanted[kind], class_sizes, names, sizes))
            if pick is not None:
                out[node] = pick
        return out

    def imposed(
        self, choices: np.ndarray, kind: str, axis: int, wanted: tuple[str, ...]
    ) -> np.ndarray:
        """[nodes] int64, what nodes of a kind take where they shard the first of the ``wanted``
        classes that they have on one axis, and are placed on the others as in ``choices``; -1
        elsewhere."""
        sizes = self.tables.layout.mesh.axis_sizes
        out = np.full(len(self.tables.choices), -1, np.int64)
        for (node, of, class_sizes, names), rows in zip(self.nodes, self._rows):
            if of != kind:
                continue
            place = self.tables.choices[node].place[choices[node]].tolist()
            place[axis] = -1
            load = [math.prod(n for n, p in zip(sizes, place) if p == c) for c in range(len(names))]
            place[axis] = _first_class(wanted, class_sizes, names, load, sizes[axis])
            pick = rows.get(tuple(place))
            if pick is not None:
                out[node] = pick
        return out


def _placement(wanted, class_sizes, names, axis_sizes) -> tuple[int, ...]:
    """Class on each axis, or -1; the last axes choose first, as the rules' model axis does."""
    place = [-1] * len(axis_sizes)
    load = [1] * len(class_sizes)
    for a in reversed(range(len(axis_sizes))):
        place[a] = _first_class(wanted[a], class_sizes, names, load, axis_sizes[a])
        if place[a] >= 0:
            load[place[a]] *= axis_sizes[a]
    return tuple(place)


def _first_class(wanted, class_sizes, names, load, devices: int) -> int:
    """The class of the first of the wanted names that so many more devices divide, or -1; ``load``
    holds the devices that shard each class already."""
    for name in wanted:
        found = [
            c
            for c in range(len(class_sizes))
            if name in names[c] and class_sizes[c] % (load[c] * devices) == 0
        ]
        if found:
            return max(found, key=lambda c: class_sizes[c] // load[c])
    return -1


def _deciding(tables: Tables, names: Names, named: dict[int, str]):
    """Nodes that a short plan decides: state, and what lies between operators."""
    grouping = tables.grouping
    graph = grouping.graph
    state_out = {graph.outputs[b] for _, b in graph.aliases}
    state_in = {graph.inputs[a] for a, _ in graph.aliases}
    for node, groups in enumerate(tables.groups_of):
        g = groups[0]
        item = grouping.groups[g]
        if item.kind in (HEAVY, COPY) or not item.sizes or len(tables.choices[node]) < 2:
            continue
        kind = "activation"
        if any(t in state_out for t in item.tensors):
            kind = "state"
        elif item.kind == LEAF and any(t in state_in for t in item.tensors):
            kind = "weight"
        of = []
        for c in range(len(item.sizes)):
            name, root = names.of[g][c], names.root[g][c]
            of.append((name, named[root]) if root in named else (name,))
        if kind == "activation":
            of = [_without_weights(item, names.of[g], c, x) for c, x in enumerate(of)]
        yield node, kind, item.sizes, tuple(of)


def _without_weights(item, roles, c: int, found: tuple[str, ...]) -> tuple[str, ...]:
    """A parallel class beside the hidden one in one tensor is a weight's, not an activation's."""
    beside = any(
        c in dims and any(d >= 0 and roles[d] == HIDDEN for d in dims)
        for dims in item.tensors.values()
    )
    return () if roles[c] == PARALLEL and beside else found


def _named(grouping: Grouping, names: Names) -> dict[int, str]:
    """root -> name of the parallel classes with most bytes of state."""
    graph = grouping.graph
    held: Counter[int] = Counter()
    for t in {graph.inputs[a] for a, _ in graph.aliases}:
        g = grouping.group_of[t]
        for c in {c for c in grouping.groups[g].tensors[t] if c >= 0}:
            if names.of[g][c] == PARALLEL:
                held[names.root[g][c]] += int(graph.tensors[t].n_bytes)
    return {root: name for (root, _), name in zip(held.most_common(N_NAMED), _NAMED)}
