"""From groups and a layout to the table problem and the events that the simulation replays.

A node is a set of tied groups (:mod:`graphs.fold`); its choices are those of its first group. Node
costs are operator seconds plus combining partial results; edge costs are resharding seconds, both
times the trips of the loops they run in. Collectives that only wait for weights, and gradient
reductions that only the optimizer waits for, can hide behind computation: tables price them at
``exposure`` times their length (:meth:`Tables.at` changes it), the simulation decides what really
hides.
"""

from __future__ import annotations

import dataclasses
from itertools import combinations

import numpy as np

from cost_model.analysis import Analysis
from cost_model.events import (
    COLLECTIVE,
    COMPUTE,
    RESHARD,
    Event,
    apart,
    moved,
    own_events,
    reshards,
)
from cost_model.layout import MeshLayout
from cost_model.live import usage_entries
from cost_model.operands import Operand
from cost_model.pricing import Pricing
from cost_model.problem import Problem
from graphs.choices import Choices, choices_of
from graphs.errors import MeshwrightError
from graphs.groups import HEAVY, Grouping


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tables:
    """The table problem of a program on a layout, and how to read an assignment."""

    grouping: Grouping
    layout: MeshLayout
    pricing: Pricing
    node_of: np.ndarray
    """[groups] int32, node of each group."""
    groups_of: tuple[tuple[int, ...], ...]
    """[nodes] the groups tied in each node, first one first."""
    choices: tuple[Choices, ...]
    """[nodes]."""
    problem: Problem
    events: tuple[Event, ...]
    """In program order."""
    usage_labels: tuple[str, ...]
    """[usage entries] what each entry holds."""
    operands: tuple[Operand, ...]
    """Copies that resharded activations need; the problem's memory leaves them out."""
    exposure: float
    """Share of hideable communication that ``problem`` charges."""
    hidden_node_costs: np.ndarray
    """[sum S] hideable seconds in full, already charged at ``exposure`` in the problem."""
    hidden_edge_costs: np.ndarray
    """[sum S_i*S_j] the same for edges."""

    def at(self, exposure: float, usage_limit_bytes: float | None = None) -> Tables:
        """The same tables charging another share of what can hide (and another memory limit)."""
        change = exposure - self.exposure
        limit = self.problem.usage_limit if usage_limit_bytes is None else usage_limit_bytes
        problem = dataclasses.replace(
            self.problem,
            node_costs=self.problem.node_costs + change * self.hidden_node_costs,
            edge_costs=self.problem.edge_costs + change * self.hidden_edge_costs,
            usage_limit=limit,
        )
        return dataclasses.replace(self, problem=problem, exposure=exposure)


def build_tables(
    analysis: Analysis,
    layout: MeshLayout,
    *,
    usage_limit_bytes: float,
    exposure: float = 1.0,
    keep: int = 192,
) -> Tables:
    """Price every choice of every group of a program on a layout of its kind of device.

    ``keep`` bounds the choices of a node; the cheapest by themselves stay.
    """
    grouping, sums, times = analysis.grouping, analysis.sums, analysis.times
    pricing = Pricing.of(layout, analysis.contractions)
    firsts = sorted(set(analysis.tied))
    number = {g: n for n, g in enumerate(firsts)}
    node_of = np.array([number[t] for t in analysis.tied], np.int32)
    groups_of: list[list[int]] = [[] for _ in firsts]
    for g, n in enumerate(node_of):
        groups_of[n].append(g)
    choices, node_costs, node_hidden, events = [], [], [], []
    own_of: dict[int, list[Event]] = {}
    known: dict[tuple, Choices] = {}
    for n, g in enumerate(firsts):
        menu = choices_of(grouping.groups[g], layout.mesh.axis_sizes, known=known)
        menu = _keep_pins(grouping, g, menu, layout)
        own = own_events(analysis, g, n, menu, pricing)
        cost, hidden = np.zeros(len(menu)), np.zeros(len(menu))
        for e in own:
            if e.hides:
                hidden = hidden + e.seconds * times[e.region]
            else:
                cost = cost + e.seconds * times[e.region]
        cost = cost + exposure * hidden
        if len(menu) > keep:
            best = np.sort(np.argsort(cost, kind="stable")[:keep])
            menu = Choices(place=menu.place[best], scatter=menu.scatter[best])
            cost, hidden = cost[best], hidden[best]
            own = [
                dataclasses.replace(
                    e,
                    seconds=e.seconds[best],
                    n_bytes=None if e.n_bytes is None else e.n_bytes[:, best],
                    waits=None if e.waits is None else e.waits[best],
                )
                for e in own
            ]
        choices.append(menu)
        own_of[n] = own
        node_costs.append(cost * len(groups_of[n]))
        node_hidden.append(hidden * len(groups_of[n]))
        events += own
        for other in groups_of[n][1:]:
            events += moved(own, grouping.groups[g], grouping.groups[other])
    edges: dict[tuple[int, int], np.ndarray] = {}
    edge_hidden: dict[tuple[int, int], np.ndarray] = {}
    operands = []
    alike: dict[tuple, tuple[Event, float]] = {}
    for event, weight, copy in reshards(analysis, node_of, choices, pricing):
        if copy is not None:
            operands.append(copy)
        if event is None:
            continue
        events.append(event)
        arrays = (id(event.seconds), id(event.rows), id(event.columns))
        key = (event.source, event.node, event.hides, *arrays)
        alike[key] = (event, weight + alike[key][1] if key in alike else weight)
    for event, weight in alike.values():
        _charge(event, weight * (exposure if event.hides else 1.0), node_costs, edges)
        if event.hides:
            _charge(event, weight, node_hidden, edge_hidden)
    for first, second in ((a, b) for parts in sums.added for a, b in combinations(parts, 2)):
        i, j = int(node_of[first]), int(node_of[second])
        if i == j:
            continue
        event = apart(
            grouping,
            (first, second),
            (i, j),
            (choices[i], choices[j]),
            (own_of[i], own_of[j]),
            pricing,
        )
        if event is not None:
            events.append(event)
            _charge(event, times[event.region], node_costs, edges)
    problem, labels = _problem(
        grouping,
        layout,
        choices,
        node_costs,
        edges,
        usage_entries(analysis.lifetimes, grouping, node_of, choices, pricing.axis_sizes),
        usage_limit_bytes,
    )
    hidden_edges = [
        edge_hidden[k].ravel() if k in edge_hidden else np.zeros(edges[k].size)
        for k in sorted(edges)
    ]
    order = sorted(range(len(events)), key=lambda i: (events[i].op, _PHASE[events[i].kind]))
    return Tables(
        grouping=grouping,
        layout=layout,
        pricing=pricing,
        node_of=node_of,
        groups_of=tuple(tuple(g) for g in groups_of),
        choices=tuple(choices),
        problem=problem,
        events=tuple(events[i] for i in order),
        usage_labels=labels,
        operands=tuple(operands),
        exposure=exposure,
        hidden_node_costs=np.concatenate(node_hidden) if node_hidden else np.zeros(0),
        hidden_edge_costs=np.concatenate(hidden_edges) if hidden_edges else np.zeros(0),
    )


_PHASE = {RESHARD: 0, COMPUTE: 1, COLLECTIVE: 2}


def _charge(event: Event, weight: float, nodes, edges) -> None:
    """Add a reshard to the costs."""
    i, j = event.source, event.node
    assert event.rows is not None and event.columns is not None
    if i == j:
        nodes[i] = nodes[i] + weight * event.seconds[event.rows, event.columns]
        return
    full = weight * event.seconds[event.rows[:, None], event.columns]
    if i > j:
        i, j, full = j, i, full.T
    edges[(i, j)] = edges[(i, j)] + full if (i, j) in edges else np.ascontiguousarray(full)


def _keep_pins(grouping: Grouping, g: int, menu: Choices, layout: MeshLayout) -> Choices:
    """The choices that honour what the user has sharded by hand.

    Raises MeshwrightError where the mesh lacks an axis that the user names, or its size does not
    divide the dimension.
    """
    item = grouping.groups[g]
    names = layout.mesh.axis_names
    keep = np.ones(len(menu), bool)
    for o in item.ops if item.kind == HEAVY else ():
        for factor, axes in grouping.rules[o].pins.items():
            unknown = [a for a in axes if a not in names]
            if unknown:
                raise MeshwrightError(
                    f"the function constrains a dimension to mesh axis {unknown[0]!r} but the mesh "
                    f"has axes {', '.join(names)}; pin mesh_shape with that axis or drop the "
                    "constraint"
                )
            cls = item.factors[factor]
            want = np.array([n in axes and layout.mesh.shape[n] > 1 for n in names])
            keep &= ((menu.place == cls) == want).all(axis=1)
    if not keep.any():
        raise MeshwrightError(
            f"the function constrains a dimension to mesh axes whose size does not divide it "
            f"(mesh {layout.mesh.shape}); choose sizes that divide or drop the constraint"
        )
    return menu if keep.all() else Choices(place=menu.place[keep], scatter=menu.scatter[keep])


def _problem(grouping, layout, choices, node_costs, edges, entries, limit):
    sizes = np.array([len(c) for c in choices], np.int64)
    keys = sorted(edges)
    shape = "x".join(map(str, layout.mesh.axis_sizes))
    problem = Problem(
        name=f"{grouping.graph.fingerprint[:8]} on {layout.cluster.notation} as {shape}",
        strategy_offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        node_costs=np.concatenate(node_costs) if node_costs else np.zeros(0),
        edge_nodes=np.array(keys, np.int32).reshape(-1, 2),
        edge_offsets=np.concatenate([[0], np.cumsum([edges[k].size for k in keys])]).astype(
            np.int64
        ),
        edge_costs=np.concatenate([edges[k].ravel() for k in keys]) if keys else np.zeros(0),
        usage_nodes=np.array([e.node for e in entries], np.int32),
        usage_intervals=np.array([e.interval for e in entries], np.int64).reshape(-1, 2),
        usage_offsets=np.concatenate([[0], np.cumsum([len(e.n_bytes) for e in entries])]).astype(
            np.int64
        ),
        usages=np.concatenate([e.n_bytes for e in entries]) if entries else np.zeros(0),
        usage_limit=limit,
    )
    return problem, tuple(e.label for e in entries)
