"""What takes time in a program, for every choice: operators, partial results, reshardings.

Collectives that only wait for weights, and gradient reductions that only the optimizer waits for, are
marked as such: they can hide behind computation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from cost_model.analysis import Analysis
from cost_model.live import fragmentation
from cost_model.mapped import map_events
from cost_model.operands import Operand, held_bytes
from cost_model.operators import compute_events, contracts
from cost_model.partial_sums import (
    SCATTER,
    combine_events,
    finish_s,
    reduced_whole,
    ways_of_combining,
    windowed_s,
)
from cost_model.pricing import KINDS, Pricing, Reshard, reshard
from cost_model.state_copies import GATHERED_SHARE, state_copies_s
from graphs.choices import Choices
from graphs.groups import COPY, HEAVY, Group, Grouping

COMPUTE, COLLECTIVE, RESHARD = 0, 1, 2
_FEW_AXES = 3
"""Axes up to which specs are counted by their code rather than sorted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """Something that takes time once per trip of its region."""

    kind: int
    """COMPUTE, COLLECTIVE (combining partial results) or RESHARD (an operand changes spec)."""
    op: int
    """Position in program order; a reshard comes before its op, a collective after."""
    region: int
    node: int
    """Node whose choice decides, for a reshard the reader."""
    source: int
    """For a reshard the node it reads from, else -1."""
    seconds: np.ndarray
    """[S] or, for a reshard, [P, Q] over distinct specs."""
    n_bytes: np.ndarray | None
    """[kinds, ...] payload bytes of collectives by kind, same trailing shape; None for compute."""
    rows: np.ndarray | None
    """[S_source] row of each choice of the source, for a reshard."""
    columns: np.ndarray | None
    """[S_node] column of each choice of the reader, for a reshard."""
    hides: bool
    """May overlap computation that does not need it: weights and weight gradients."""
    label: str
    """What it is reported under."""
    late: bool = False
    """Where it hides: from its operand on to the end of the loop body, else from the start of the
    body to its reader."""
    waits: np.ndarray | None = None
    """Same shape as seconds: choices that stop the computation although the event may hide."""


def own_events(analysis: Analysis, g: int, n: int, menu: Choices, pricing: Pricing) -> list[Event]:
    """What group g, node n, takes by itself: its operators, and combining its partial results."""
    grouping, sums = analysis.grouping, analysis.sums
    hides = g in analysis.gradients
    events = [
        Event(
            kind=COMPUTE, op=e.op, region=e.region, node=n, source=-1, seconds=e.seconds,
            n_bytes=None, rows=None, columns=None, hides=False, label=e.kind,
        )
        for e in compute_events(grouping, g, menu, pricing, analysis.fusion)
    ]  # fmt: skip
    copies = state_copies_s(grouping, g, menu, pricing, analysis.state)
    if copies is not None:
        events.append(
            Event(
                kind=COMPUTE, op=len(grouping.graph.ops) - 1, region=0, node=n, source=-1,
                seconds=copies, n_bytes=None, rows=None, columns=None, hides=False, label="copies",
            )
        )  # fmt: skip
    for op, region, seconds, exposed, n_bytes in map_events(grouping, g, menu, pricing):
        own = Event(
            kind=COMPUTE, op=op, region=region, node=n, source=-1, seconds=seconds,
            n_bytes=None, rows=None, columns=None, hides=False, label="matmul",
        )  # fmt: skip
        events.append(own)
        events.append(
            dataclasses.replace(
                own, kind=COLLECTIVE, seconds=exposed, n_bytes=n_bytes, label="maps"
            )
        )
    windowed = hides and pricing.device.family == "tpu" and contracts(grouping, g)
    if windowed:
        first = events[0]
        extra = windowed_s(grouping, g, menu, pricing)
        if extra.any():
            events.append(dataclasses.replace(first, seconds=extra, label="windowed"))
    around = not hides and pricing.device.family == "tpu" and contracts(grouping, g)
    computed = events[0].seconds if around else None
    sliced = g in sums.sliced
    whole = reduced_whole(grouping, g, menu, pricing) > 0 if sliced else None
    for op, region, seconds, n_bytes in combine_events(
        grouping, g, menu, pricing, windowed, computed, sliced, sums.summands.get(g, 1)
    ):
        events.append(
            Event(
                kind=COLLECTIVE, op=op, region=region, node=n, source=-1, seconds=seconds,
                n_bytes=n_bytes, rows=None, columns=None, hides=hides,
                label="gradient" if hides else "partial sums", late=True, waits=whole,
            )
        )  # fmt: skip
    return events


def apart(
    grouping: Grouping,
    groups: tuple[int, int],
    nodes: tuple[int, int],
    menus: tuple[Choices, Choices],
    owns: tuple[list[Event], list[Event]],
    pricing: Pricing,
) -> Event | None:
    """What two groups that are added up take more where their sums are not combined in one go.

    Each is charged its part of one combination (:func:`cost_model.partial_sums.combine_events`); of
    two that differ, both pay theirs once more. None where nothing differs.
    """
    kept, numbers = [], []
    for g, menu, own in zip(groups, menus, owns):
        event = next((e for e in own if e.kind == COLLECTIVE), None)
        code = ways_of_combining(grouping, g, menu, pricing)
        seconds, n_bytes = np.zeros(len(menu)), np.zeros((len(KINDS), len(menu)))
        if event is not None and event.n_bytes is not None:
            seconds, n_bytes = event.seconds, event.n_bytes
        _, first, inverse = np.unique(
            np.stack([code, seconds, *n_bytes], 1), axis=0, return_index=True, return_inverse=True
        )
        kept.append((code[first], seconds[first], n_bytes[:, first]))
        numbers.append(inverse.reshape(-1).astype(np.int32))
    (code, seconds, n_bytes), (other_code, other_seconds, other_bytes) = kept
    differ = (code[:, None] != other_code) | (code[:, None] < 0)
    both = np.where(differ, seconds[:, None] + other_seconds, 0.0)
    if not both.any():
        return None
    last = grouping.groups[groups[1]].reductions[0].op
    return Event(
        kind=RESHARD, op=last, region=grouping.graph.ops[last].region, node=nodes[1],
        source=nodes[0], seconds=both,
        n_bytes=np.where(differ, n_bytes[:, :, None] + other_bytes[:, None], 0.0),
        rows=numbers[0], columns=numbers[1], hides=False, label="partial sums",
    )  # fmt: skip


def moved(own: list[Event], first: Group, other: Group) -> list[Event]:
    """The events of a tied group: those of the first one at the other's ops."""
    where = dict(zip(first.ops, other.ops))
    regions = {}
    for a, b in zip(first.views, other.views):
        regions[a.region] = b.region
        where.update(zip(a.ops, b.ops))
    return [
        dataclasses.replace(e, op=where.get(e.op, e.op), region=regions.get(e.region, e.region))
        for e in own
    ]


def _specs_of(grouping: Grouping, g: int, tensor: int, menu: Choices) -> np.ndarray:
    """[S, A] spec of a tensor as group g (owner or copy) holds it."""
    item = grouping.groups[g]
    if item.kind == COPY:
        return menu.specs(item.views[0].dims)
    return menu.specs(item.tensors[tensor], result=item.kind == HEAVY)


def _unique(specs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    code = (specs.astype(np.int64) + 1) @ 9 ** np.arange(specs.shape[1])
    if specs.shape[1] > _FEW_AXES:
        _, first, inverse = np.unique(code, return_index=True, return_inverse=True)
        return specs[first], inverse.astype(np.int32)
    at = np.full(9 ** specs.shape[1], -1)
    at[code[::-1]] = np.arange(len(code))[::-1]  # the first of each
    present = np.flatnonzero(at >= 0)
    number = np.zeros(len(at), np.int32)
    number[present] = np.arange(len(present))
    return specs[at[present]], number[code]


def reshards(
    analysis: Analysis, node_of: np.ndarray, choices: Sequence[Choices], pricing: Pricing
) -> Iterator[tuple[Event | None, float, Operand | None]]:
    """Every resharding that takes time or memory: (event, trips, what it leaves in memory)."""
    grouping, sums, times = analysis.grouping, analysis.sums, analysis.times
    graph = grouping.graph
    priced: dict[tuple, Reshard] = {}
    finished: dict[tuple, tuple] = {}
    copies: dict[int, np.ndarray] = {}
    distinct: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    spread = fragmentation(pricing.device)

    def unique(specs):
        """Choices keep their specs, so that an array stands for its contents."""
        if id(specs) not in distinct:
            distinct[id(specs)] = _unique(specs)
        return distinct[id(specs)]

    def price(source, tensor, j, dims):
        """From how group ``source`` holds a tensor to ``dims`` of node j."""
        i = int(node_of[source])
        t = graph.tensors[tensor]
        p, rows = unique(_specs_of(grouping, source, tensor, choices[i]))
        q, columns = unique(choices[j].specs(dims))
        key = (id(p), id(q), t.n_bytes, len(t.shape))
        if key not in priced:
            priced[key] = reshard(p, q, t.n_bytes, pricing, rank=len(t.shape))
        return priced[key], rows, columns

    def copy_of(pair, view, j):
        """Bytes of the copy that node j reads."""
        if id(pair) not in copies:
            specs, _ = unique(choices[j].specs(view.dims))
            n_bytes = spread * graph.tensors[view.tensor].n_bytes
            copies[id(pair)] = held_bytes(pair.seconds, n_bytes, pricing.shards(specs))
        return copies[id(pair)]

    def finish(source, view, j):
        """What partial sums of ``source`` cost more where node j does not take slices of them."""
        i = int(node_of[source])
        t = graph.tensors[view.tensor]
        summed = tuple(r.cls for r in grouping.groups[source].reductions)
        specs = _specs_of(grouping, source, view.tensor, choices[i])
        q, columns = unique(choices[j].specs(view.dims))
        parts = sums.summands.get(source, 1)
        fixed = graph.ops[grouping.groups[source].reductions[0].op].primitive == SCATTER
        key = (id(choices[i]), summed, fixed, id(specs), id(q), t.shape, t.n_bytes, parts)
        if key not in finished:
            reduced = reduced_whole(grouping, source, choices[i], pricing)
            p, rows = _unique(np.concatenate([specs, reduced[:, None]], 1))
            seconds, n_bytes, scattered = finish_s(
                p[:, :-1], p[:, -1], q, t.shape, t.n_bytes, pricing, fixed=fixed
            )
            slices = np.where(scattered, pricing.shards(q), pricing.shards(p[:, :-1])[:, None])
            finished[key] = (rows, seconds / parts, n_bytes / parts, t.n_bytes / slices)
        rows, seconds, n_bytes, held = finished[key]
        event = Event(
            kind=RESHARD, op=min(view.ops or (0,)), region=view.region, node=j, source=i,
            seconds=seconds, n_bytes=n_bytes, rows=rows, columns=columns, hides=False,
            label="partial sums",
        )  # fmt: skip
        span = analysis.waiting.get(source)
        if span is None:
            return event, None
        kept = Operand(source=i, node=j, interval=span, held_bytes=held, rows=rows, columns=columns)
        return event, kept

    for g, item in enumerate(grouping.groups):
        j = int(node_of[g])
        for view in item.views:
            source = grouping.source_group(g, view)
            i = int(node_of[source])
            priced_pair, rows, columns = price(source, view.tensor, j, view.dims)
            weights = grouping.leaf_of(source) >= 0
            hides = weights and bool(pricing.device.overlapped_gathers)
            if priced_pair.seconds.any():
                ops = view.ops or analysis.readers.get((view.tensor, view.region), [0])
                event = Event(
                    kind=RESHARD, op=min(ops), region=view.region, node=j, source=i,
                    seconds=priced_pair.seconds, n_bytes=priced_pair.bytes_by_kind, rows=rows,
                    columns=columns, hides=hides, label="weights" if weights else "activations",
                )  # fmt: skip
                copy = None
                if not weights:
                    held = copy_of(priced_pair, view, j)
                    copy = Operand(
                        source=i, node=j, interval=(event.op, max(ops) + 1), held_bytes=held,
                        rows=rows, columns=columns,
                    )  # fmt: skip
                yield event, times[view.region], copy
                if priced_pair.copies_s.any():
                    yield _in_order(event, priced_pair), times[view.region], None
            if source in sums.sliced:
                event, kept = finish(source, view, j)
                if kept is not None or event.seconds.any():
                    yield event if event.seconds.any() else None, times[view.region], kept
    last = len(graph.ops) - 1
    updates = 1 + max((o for g in grouping.groups if g.kind == HEAVY for o in g.ops), default=last)
    for a, b in graph.aliases:
        t_in, t_out = graph.inputs[a], graph.outputs[b]
        source, target = grouping.group_of[t_out], grouping.group_of[t_in]
        i, j = int(node_of[source]), int(node_of[target])
        dims_in = grouping.groups[target].tensors[t_in]
        pair, rows, columns = price(source, t_out, j, dims_in)
        if pair.seconds.any():
            event = Event(
                kind=RESHARD, op=min(graph.tensors[t_out].producer, last), region=0, node=j, source=i,
                seconds=pair.seconds, n_bytes=pair.bytes_by_kind, rows=rows, columns=columns,
                hides=bool(pricing.device.overlapped_gathers), label="updated weights", late=True,
            )  # fmt: skip
            copy = None
            if target in analysis.contracted and pricing.device.family == "tpu":
                shards = pricing.shards(unique(choices[j].specs(dims_in))[0])
                n_bytes = GATHERED_SHARE * graph.tensors[t_in].n_bytes
                held = held_bytes(pair.seconds, n_bytes, shards)
                copy = Operand(
                    source=i, node=j, interval=(0, updates), held_bytes=held, rows=rows,
                    columns=columns,
                )  # fmt: skip
            yield event, 1.0, copy
            if pair.copies_s.any():
                yield _in_order(event, pair), 1.0, None


def _in_order(gathers: Event, pair: Reshard) -> Event:
    """The copies that put in order what an event gathers."""
    nothing = np.broadcast_to(0.0, pair.bytes_by_kind.shape)
    return dataclasses.replace(
        gathers, seconds=pair.copies_s, n_bytes=nothing, hides=False, late=False, label="copies"
    )
