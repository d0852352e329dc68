"""A traced program in totals: what it multiplies, moves, gathers and keeps, by role of dimension.

The named dimension classes of :mod:`graphs.names` play four roles: batch, sequence, parallel (heads,
feed-forward, vocabulary, experts) and hidden. For every decision group of the folded program this
module notes how large each role is in its operator, in what it reduces and in its result, so that
closed-form estimates (:mod:`placement.learned.closed_form`) can divide by mesh axes without looking
at the graph again. All counts are of one step on the whole program; no hardware enters.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from cost_model.rows import distinct_rows
from graphs.fold import fold
from graphs.groups import COPY, HEAVY, LEAF, Group, Grouping
from graphs.names import BATCH, HIDDEN, PARALLEL, SEQUENCE, Names, name_classes
from graphs.rules import WHOLE

ROLES = (BATCH, SEQUENCE, PARALLEL, HIDDEN)
Sizes = list[tuple[int, int]]
"""For each role the sizes of its two largest classes."""
NOTHING: Sizes = [(1, 1)] * len(ROLES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pieces:
    """P things of one kind and how large each role is in them."""

    amount: np.ndarray
    """[P] float64, flops or bytes in one step."""
    sizes: np.ndarray
    """[P, roles, 2] int64, sizes of the two largest classes of each role; 1 where absent."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """Totals of a folded program."""

    grouping: Grouping
    names: Names
    firsts: tuple[int, ...]
    """[N] first group of each node, in the order of ``cost_model.tables``."""
    tied: tuple[int, ...]
    """[groups] :func:`graphs.fold.fold`."""
    count: np.ndarray
    """[N] groups tied in each node."""
    times: np.ndarray
    """[N] trips of the region that a node runs in, times its count."""
    batch: int
    """Size of the batch class, sequences; 1 where there is none."""
    contractions: Pieces
    """flops."""
    reduced: np.ndarray
    """[P, roles, 2] int64, sizes of the classes that each contraction sums over."""
    results: Pieces
    """bytes of each contraction's result."""
    is_gradient: np.ndarray
    """[P] whether it sums the batch away: a weight gradient."""
    weights_read: Pieces
    """bytes of weights that contractions read."""
    attended: Pieces
    """bytes of the smaller operand of contractions of two activations over the sequence."""
    moved: Pieces
    """bytes that fused loops and gathers move."""
    weights: Pieces
    """bytes of state that contractions read: the parameters."""
    moments: Pieces
    """bytes of the other state."""
    saved: Pieces
    """bytes that loops stack for later: saved activations."""
    inside: Pieces
    """bytes made inside loops from the batch, all trips: what saving everything would keep."""
    dots: Pieces
    """bytes of contractions' results inside loops that hold the batch."""
    largest: Pieces
    """bytes of the largest tensors that hold the batch, outside loops."""

    @property
    def flops(self) -> float:
        """Of one step."""
        return float(self.contractions.amount.sum())


class _List:
    def __init__(self) -> None:
        self.amount: list[float] = []
        self.sizes: list[Sizes] = []

    def add(self, amount: float, sizes: Sizes) -> None:
        self.amount.append(amount)
        self.sizes.append(sizes)

    def pieces(self) -> Pieces:
        if not self.amount:
            return Pieces(amount=np.zeros(1), sizes=np.array([NOTHING], np.int64))
        sizes = np.array(self.sizes, np.int64)
        rows, index = distinct_rows(sizes.reshape(len(sizes), -1))
        amount = np.bincount(index, np.array(self.amount), minlength=len(rows))
        rows = rows.reshape(-1, *sizes.shape[1:])
        return Pieces(amount=amount, sizes=rows)


def program_of(grouping: Grouping, tied: tuple[int, ...] | None = None) -> Program:
    """The totals of a grouping; ``tied`` is its fold where that is known already."""
    graph = grouping.graph
    tied = fold(grouping) if tied is None else tied
    names = name_classes(grouping)
    firsts = tuple(sorted(set(tied)))
    number = {g: n for n, g in enumerate(firsts)}
    count = np.bincount([number[t] for t in tied], minlength=len(firsts)).astype(np.float64)
    trips = graph.multiplicities()
    times = np.array([trips[region_of(grouping, g)] for g in firsts]) * count
    state = {graph.inputs[a] for a, _ in graph.aliases}
    kinds = ("moved", "weights", "moments", "saved", "inside", "dots", "large", "attended")
    lists = {k: _List() for k in kinds}
    heavy = _Heavy()
    for n, g in enumerate(firsts):
        item = grouping.groups[g]
        roles = names.of[g]
        if item.kind == HEAVY:
            heavy.add(grouping, g, item, roles, float(times[n]), lists)
        elif item.kind != COPY:
            for view in item.views:
                n_bytes = graph.tensors[view.tensor].n_bytes * trips[view.region] * count[n]
                lists["moved"].add(float(n_bytes), sizes_of(item, roles, view.dims))
        for t, dims in item.tensors.items():
            _place(grouping, item, roles, t, dims, state, trips, float(count[n]), lists)
    batch = [
        item.sizes[c]
        for g, item in enumerate(grouping.groups)
        for c, name in enumerate(names.of[g])
        if name == BATCH
    ]
    made = heavy.finish()
    return Program(
        grouping=grouping,
        names=names,
        firsts=firsts,
        tied=tied,
        count=count,
        times=times,
        batch=max(batch, default=1),
        moved=lists["moved"].pieces(),
        weights=lists["weights"].pieces(),
        moments=lists["moments"].pieces(),
        saved=lists["saved"].pieces(),
        inside=lists["inside"].pieces(),
        dots=lists["dots"].pieces(),
        largest=lists["large"].pieces(),
        attended=lists["attended"].pieces(),
        **made,
    )


def region_of(grouping: Grouping, g: int) -> int:
    """Region that a group runs in: that of most of its ops, or where its tensors live."""
    item = grouping.groups[g]
    graph = grouping.graph
    if item.ops:
        return _usual(item, graph)
    if item.views:
        return item.views[0].region
    return min((graph.tensors[t].region for t in item.tensors), default=0)


def _usual(item: Group, graph) -> int:
    regions = [graph.ops[o].region for o in item.ops]
    return max(set(regions), key=lambda r: (regions.count(r), -r))


def sizes_of(item: Group, roles: tuple[str, ...], classes) -> Sizes:
    """Sizes of these classes, by role."""
    found: dict[str, list[int]] = {role: [] for role in ROLES}
    for c in set(classes):
        if c != WHOLE and roles[c] in found:
            found[roles[c]].append(item.sizes[c])
    pairs = []
    for sizes in found.values():
        first, second, *_ = [*sorted(sizes, reverse=True), 1, 1]
        pairs.append((first, second))
    return pairs


def _place(grouping, item, roles, t, dims, state, trips, count, lists) -> None:
    """Note one tensor under what it is kept as."""
    graph = grouping.graph
    tensor = graph.tensors[t]
    if tensor.n_bytes < 64:
        return
    sizes = sizes_of(item, roles, dims)
    n_bytes = float(tensor.n_bytes) * count
    if t in state:
        lists["weights" if item.kind == LEAF else "moments"].add(n_bytes, sizes)
        return
    if sizes[0][0] <= 1 or tensor.producer < 0:
        return
    primitive = graph.ops[tensor.producer].primitive
    if primitive == "scan_stack":
        lists["saved"].add(n_bytes, sizes)
    elif tensor.region > 0 and item.kind in (HEAVY,):
        lists["inside"].add(n_bytes * trips[tensor.region], sizes)
    elif tensor.region > 0 and primitive not in ("carry_in", "carry_out", "scan_slice"):
        lists["inside"].add(n_bytes * trips[tensor.region] * 0.25, sizes)  # most are fused away
    elif tensor.region == 0 and primitive not in ("carry_in", "carry_out"):
        lists["large"].add(n_bytes, sizes)


class _Heavy:
    """Contractions, one row each."""

    def __init__(self) -> None:
        self.rows: list[tuple] = []

    def add(self, grouping, g, item, roles, times, lists) -> None:
        graph = grouping.graph
        index = next((o for o in item.ops if not grouping.rules[o].light), -1)
        if index < 0:
            return
        op, rule = graph.ops[index], grouping.rules[index]
        everything = [c for c in item.factors if c != WHOLE]
        result = next(iter(item.tensors), -1)
        n_bytes = graph.tensors[result].n_bytes * times if result >= 0 else 0.0
        if rule.flops <= 0:
            size = sum(graph.tensors[v.tensor].n_bytes for v in item.views[1:]) * times
            lists["moved"].add(4.0 * (n_bytes + size), sizes_of(item, roles, everything))
            return
        inside = {c for f in rule.results for c in (item.factors[x] for x in f if x != WHOLE)}
        summed = [c for c in everything if c not in inside]
        weights, weight_sizes = 0.0, NOTHING
        smaller = min(item.views, key=lambda v: graph.tensors[v.tensor].n_bytes, default=None)
        for view in item.views:
            if from_weights(grouping, g, view):
                weights += graph.tensors[view.tensor].n_bytes * times
                weight_sizes = sizes_of(item, roles, view.dims)
        sizes = sizes_of(item, roles, everything)
        out = sizes_of(item, roles, inside)
        reduced = sizes_of(item, roles, summed)
        gradient = reduced[0][0] > 1 and out[0][0] <= 1
        if weights == 0 and reduced[0][0] <= 1 and sizes[1][0] > 1 and smaller is not None:
            n_small = graph.tensors[smaller.tensor].n_bytes * times
            lists["attended"].add(n_small, sizes_of(item, roles, smaller.dims))
        if op.region > 0 and out[0][0] > 1:
            lists["dots"].add(n_bytes, out)
        self.rows.append(
            (rule.flops * times, sizes, reduced, n_bytes, out, gradient, weights, weight_sizes)
        )

    def finish(self) -> dict[str, Any]:
        rows = self.rows or [(0.0, NOTHING, NOTHING, 0.0, NOTHING, False, 0.0, NOTHING)]
        flops, sizes, reduced, n_bytes, out, gradient, weights, weight_sizes = zip(*rows)
        return dict(
            contractions=Pieces(amount=np.array(flops), sizes=np.array(sizes, np.int64)),
            reduced=np.array(reduced, np.int64),
            results=Pieces(amount=np.array(n_bytes, np.float64), sizes=np.array(out, np.int64)),
            is_gradient=np.array(gradient, bool),
            weights_read=Pieces(
                amount=np.array(weights, np.float64), sizes=np.array(weight_sizes, np.int64)
            ),
        )


def from_weights(grouping: Grouping, g: int, view) -> bool:
    """Whether a view reads a weight (through a shared copy or not)."""
    item = grouping.groups[grouping.source_group(g, view)]
    if item.kind == COPY:
        item = grouping.groups[grouping.group_of[item.source]]
    return item.kind == LEAF


def bits(n: float) -> float:
    """log2, 0 for numbers below one."""
    return math.log2(max(float(n), 1.0))
