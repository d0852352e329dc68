"""Combining the partial results of a group whose choice shards what is summed over.

By all-reduce, or by reduce-scatter along a dimension of the result. XLA:TPU makes some
reduce-scatters part of the contraction: one block after the other is multiplied and passed on.
An all-reduce whose only reader takes a slice XLA makes a plain reduce-scatter: the group is charged
the reduce-scatter, and what an all-reduce takes more is charged where the reader takes the whole.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from cost_model.device import Device
from cost_model.operators import contraction_s, contracts, local_contraction, roles_of
from cost_model.pricing import Pricing
from graphs.choices import Choices
from graphs.graph import Graph
from graphs.groups import HEAVY, Grouping, View

_WINDOWED_OVERHEAD = 1.1
"""Slices, copies and sums of a windowed loop, in times of its contraction (compiled v5e:4x4 steps
of a dense model that is in no suite: 22 against 11 ms)."""


SCATTER = "scatter-add"
"""Primitive whose result keeps its layout."""
_LANES = 128
"""Elements of a tile along the minor dimension, on all generations."""
_WINDOW_TILES = {"v5e": 154, "v6e": 322, "tpu7x": 322}
"""Most tiles that one window of a reduce-scatter holds: 151 of them did and 157 did not on v5e, 313
and 331 on v6e. Of tpu7x it is a guess; all others are taken as v5e."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sums:
    """What XLA does with the sums of partial results of a program."""

    sliced: frozenset[int]
    """Groups of :func:`only_read_once`; none on a device whose compiler is not known to scatter."""
    added: tuple[tuple[int, ...], ...]
    """:func:`added_up`."""

    @functools.cached_property
    def summands(self) -> Mapping[int, int]:
        """Group -> how many are added up with it, itself included, where there are others."""
        return {g: len(parts) for parts in self.added for g in parts}

    @classmethod
    def of(cls, grouping: Grouping, device: Device) -> Sums:
        scatters = device.family in ("tpu", "gpu")
        return cls(
            sliced=only_read_once(grouping) if scatters else frozenset(),
            added=added_up(grouping),
        )


def only_read_once(grouping: Grouping) -> frozenset[int]:
    """Groups with one sum of partial results, which one other group reads once, in its region."""
    readers: dict[int, list[View]] = {}
    for g, item in enumerate(grouping.groups):
        for view in item.views:
            readers.setdefault(grouping.source_group(g, view), []).append(view)
    outputs = {grouping.group_of[t] for t in grouping.graph.outputs}
    found = set()
    for g, read in readers.items():
        summed = {(r.op, r.result) for r in grouping.groups[g].reductions}
        if len(read) == 1 and len(summed) == 1 and g not in outputs:
            op, _ = next(iter(summed))
            if grouping.graph.ops[op].region == read[0].region:
                found.add(g)
    return frozenset(found)


def added_up(grouping: Grouping) -> tuple[tuple[int, ...], ...]:
    """Groups of contractions whose results are only added to each other.

    Where their partial results are to be combined in the same way XLA adds them first, and combines
    the sum (its passes that reassociate all-reduces and reduce-scatters).
    """
    graph = grouping.graph
    read = [*graph.outputs]
    for op in graph.ops:
        read += set(op.inputs)
    once = {t for t, n in Counter(read).items() if n == 1}
    made: dict[int, tuple[int, ...]] = {}
    """Tensor -> the groups whose sums it is made of."""
    for g, item in enumerate(grouping.groups):
        results = {(r.op, r.result) for r in item.reductions}
        if item.kind == HEAVY and len(results) == 1:
            made[next(iter(results))[1]] = (g,)
    passed_on = set()
    for op in graph.ops:
        own = set(op.inputs)
        if not own or not all(t in once and t in made for t in own):
            continue
        parts = tuple(g for t in op.inputs for g in made[t])
        tensors = [graph.tensors[t] for t in own]
        alike = {(t.region, t.shape) for t in tensors} == {(op.region, tensors[0].shape)}
        adds = op.primitive in ("add", "add_any") and len(own) == 2 and alike
        if adds or op.primitive == "transpose":
            made[op.outputs[0]] = parts
            passed_on |= own
    ends = [parts for t, parts in made.items() if t not in passed_on and len(parts) > 1]
    return tuple(parts for parts in ends if len(set(parts)) == len(parts))


def ways_of_combining(grouping: Grouping, g: int, choices: Choices, pricing: Pricing) -> np.ndarray:
    """[S] a number for how partial results of group g are combined: over which axes, and along which
    dimension of the result each is scattered; 0 where there are none, -1 where XLA:TPU passes them on
    block by block, which it does for each contraction by itself."""
    item = grouping.groups[g]
    result = item.reductions[0].result
    on = choices.sharding([r.cls for r in item.reductions])
    dims = item.tensors[result]
    found = np.zeros(len(choices), np.int64)
    for axis in range(on.shape[1]):
        scatter = choices.scatter[:, axis]
        digit = np.ones(len(choices), np.int64)
        for d, cls in enumerate(dims):
            digit = np.where((scatter >= 0) & (scatter == cls), 2 + d, digit)
        found = found * (2 + len(dims)) + np.where(on[:, axis], digit, 0)
    if pricing.device.family == "tpu" and contracts(grouping, g):
        found = np.where(passes_sums_on(grouping, g, choices, pricing.axis_sizes), -1, found)
    return found


def reduced_whole(grouping: Grouping, g: int, choices: Choices, pricing: Pricing) -> np.ndarray:
    """[S] bit mask of the axes over which group g all-reduces; 0 where it scatters some."""
    classes = [r.cls for r in grouping.groups[g].reductions]
    on = choices.sharding(classes)
    whole = ~(on & (choices.scatter >= 0)).any(axis=1)
    return np.where(whole, pricing.masks(on), 0)


def finish_s(
    p: np.ndarray,
    reduced: np.ndarray,
    q: np.ndarray,
    shape: Sequence[int],
    n_bytes: float,
    pricing: Pricing,
    *,
    fixed: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(seconds [P, Q], bytes [kinds, P, Q]) of making a reduce-scatter an all-reduce after all, and
    [P, Q] whether it stays one, so that devices hold their slices only.

    Zero where the reader's specs q [Q, A] take the slices that devices hold after a reduce-scatter
    over ``reduced`` [P] (bit masks) of a tensor with specs p [P, A]. ``fixed``: its layout is that of
    a scatter.
    """
    payload = n_bytes / pricing.shards(p)
    extra = pricing.collective_s(2, reduced, payload) - pricing.collective_s(1, reduced, payload)
    deferred = pricing.becomes_scatter[reduced]
    cut = (p[:, None] < 0) & (q[None] >= 0)
    sliced = pricing.masks(cut) == reduced[:, None]
    top = np.where(cut, q[None], -1).max(-1)
    sliced &= ~(cut & (q[None] != top[..., None])).any(-1)
    if pricing.device.family == "tpu":
        itemsize = n_bytes / max(math.prod(shape), 1)
        held = np.where(cut, q[None], p[:, None])  # axes change dimension after the slice
        sliced &= (top != len(shape) - 1) | ~_uneven(held, shape, itemsize, pricing, fixed=fixed)
    for axis in range(p.shape[1]):  # sliced only after another axis has moved there
        for mover in range(axis):
            onto = (p[:, None, mover] >= 0) & (p[:, None, mover] != q[None, :, mover])
            onto &= q[None, :, mover] == q[None, :, axis]
            sliced &= ~(cut[..., axis] & onto)
    pays = deferred[:, None] & ~sliced
    seconds = np.where(pays, np.maximum(extra, 0.0)[:, None], 0.0)
    moved = np.zeros((5, *seconds.shape))
    moved[2] = np.where(pays, payload[:, None], 0.0)
    moved[1] = -moved[2]
    return seconds, moved, deferred[:, None] & sliced


def _uneven(
    specs: np.ndarray,
    shape: Sequence[int],
    itemsize: float,
    pricing: Pricing,
    *,
    fixed: bool = False,
) -> np.ndarray:
    """[...] whether XLA:TPU makes no reduce-scatter along the last dimension into shards of these
    specs [..., A], but all-reduces and slices.

    Of 16-bit types a packed tile is two tiles wide. Shards of an odd number of whole tiles do not
    fill it. Others that do not are laid out the other way round, unless the layout is ``fixed`` as
    that of scatters is, or the tiles of the other dimension cannot be cut into small enough windows
    (programs of one contraction compiled for v5e, v6e and v5p, and steps of suite=compiled).
    """
    if not shape or itemsize != 2:
        return np.zeros(specs.shape[:-1], bool)
    sizes = np.array(pricing.axis_sizes, np.float64)
    width = shape[-1] / np.where(specs == len(shape) - 1, sizes, 1.0).prod(-1)
    over = width % (2 * _LANES)
    if fixed:
        return over > 0
    found = over == _LANES
    if len(shape) == 2:
        rows = shape[0] / np.where(specs == 0, sizes, 1.0).prod(-1)
        for n in np.unique(rows):
            tiles = math.ceil(n / _LANES)
            if _largest_prime(tiles) > _WINDOW_TILES.get(pricing.device.name, _WINDOW_TILES["v5e"]):
                found |= (over > 0) & (rows == n)
    return found


@functools.cache
def _largest_prime(n: int) -> int:
    """Largest prime factor; 1 of 1."""
    factor = 2
    while factor * factor <= n:
        if n % factor == 0:
            n //= factor
        else:
            factor += 1
    return n


def windowed_s(grouping: Grouping, g: int, choices: Choices, pricing: Pricing) -> np.ndarray:
    """Extra computation where XLA:TPU turns a contraction and its reduce-scatter into one loop.

    The loop multiplies one block of the scattered dimension per device and passes partial sums on,
    so the matrix unit sees blocks 1 / ways as wide (read from compiled schedules: the
    ``windowed_dot_general`` loops of weight gradients).
    """
    item = grouping.groups[g]
    _, local, classes = local_contraction(grouping, item, choices, pricing)
    sizes = np.array(pricing.axis_sizes, np.float64)
    dtype = grouping.graph.tensors[next(iter(item.tensors))].dtype
    ways = np.where(choices.scatter >= 0, sizes, 1.0).prod(-1)
    ways = np.where(_over_dimensions(choices), 1.0, ways)
    block = dict(local)
    for name in ("m", "n"):
        on = choices.scattering(classes[name])
        block[name] = local[name] / np.where(on, sizes, 1.0).prod(-1)

    def seconds(x):
        return contraction_s(pricing, x, dtype)

    narrow = np.maximum(0.0, ways * seconds(block) - seconds(local))
    return np.where(ways > 1, narrow + _WINDOWED_OVERHEAD * seconds(local), 0.0)


def _over_dimensions(choices: Choices) -> np.ndarray:
    """[S] whether partial sums would be scattered along several dimensions.

    XLA does not: it all-reduces and slices (read from compiled GPU and TPU programs).
    """
    top = np.max(choices.scatter, axis=1)
    other = (choices.scatter >= 0) & (choices.scatter != top[:, None])
    return other.any(axis=1)


def passes_sums_on(
    grouping: Grouping, g: int, choices: Choices, axis_sizes: tuple[int, ...]
) -> np.ndarray:
    """[S] whether XLA:TPU makes a reduce-scatter of partial sums a loop of permutes.

    It does where one dimension is contracted and none is a batch, the scattered one is sharded by no
    other axis, and more than two devices take part (read from compiled schedules); else it fuses
    all-reduce and slice, or leaves both.
    """
    item = grouping.groups[g]
    op, roles = roles_of(grouping, item)
    shared = {f for f in roles["b"] | roles["k"] if grouping.rules[op].sizes[f] > 1}
    if len(shared) != 1 or shared & roles["b"]:
        return np.zeros(len(choices), bool)
    scattered = choices.scatter >= 0
    free = np.where(scattered, axis_sizes, 1).prod(axis=1) > 2
    for a in range(choices.scatter.shape[1]):
        for b in range(choices.scatter.shape[1]):
            if a != b:
                free &= ~(scattered[:, a] & (choices.place[:, b] == choices.scatter[:, a]))
    return free & ~_over_dimensions(choices)


def combine_events(
    grouping: Grouping,
    g: int,
    choices: Choices,
    pricing: Pricing,
    windowed: bool = False,
    loop_s: np.ndarray | None = None,
    sliced: bool = False,
    summands: int = 1,
) -> list[tuple[int, int, np.ndarray, np.ndarray]]:
    """Combining partial results of group g: (op, region, seconds [S], bytes [kinds, S]).

    ``windowed`` says that XLA makes reduce-scatters part of the contraction's loop;
    ``loop_s`` [S] is how long that loop computes, where its sums are passed on. ``sliced``: one
    group reads the result, and :func:`finish_s` is charged to it. ``summands``: of how many sums one
    combination is made (:func:`added_up`); each is charged its part.
    """
    graph: Graph = grouping.graph
    item = grouping.groups[g]
    by_op: dict[tuple[int, int], list[int]] = {}
    for r in item.reductions:
        by_op.setdefault((r.op, r.result), []).append(r.cls)
    events = []
    for (o, result), classes in by_op.items():
        op = graph.ops[o]
        on = choices.sharding(classes)
        if not on.any():
            continue
        tensor = graph.tensors[result]
        final = choices.shards(item.tensors[result], pricing.axis_sizes, result=True)
        scattered = on & (choices.scatter >= 0) & ~_over_dimensions(choices)[:, None]
        sizes = np.array(pricing.axis_sizes, np.float64)
        scatter_ways = np.where(scattered, sizes, 1.0).prod(-1)
        after = tensor.n_bytes / final
        spread = np.where(on & (choices.scatter >= 0) & ~scattered, sizes, 1.0).prod(-1)
        scatter_mask = pricing.masks(scattered)
        reduce_mask = pricing.masks(on & ~scattered)
        n_bytes = np.zeros((5, len(choices)))
        n_bytes[1] = np.where(scatter_mask > 0, after * scatter_ways, 0.0)
        n_bytes[2] = np.where(reduce_mask > 0, after * spread, 0.0)
        passed = np.zeros(len(choices), bool)
        if windowed or loop_s is not None:
            passed = passes_sums_on(grouping, g, choices, pricing.axis_sizes)
        if pricing.device.family == "tpu":  # an explicit slice is no more than a reader's
            specs = choices.specs(item.tensors[result], result=True)
            last = (scattered & (specs == len(tensor.shape) - 1)).any(-1)
            uneven = _uneven(
                specs, tensor.shape, tensor.itemsize, pricing, fixed=op.primitive == SCATTER
            )
            whole = ~pricing.becomes_scatter[scatter_mask] & ~passed
            whole = (whole | (last & uneven)) & (scatter_mask > 0)
            n_bytes[2] = np.where(whole, after * scatter_ways * spread, n_bytes[2])
            n_bytes[1] = np.where(whole, 0.0, n_bytes[1])
            reduce_mask = np.where(whole, reduce_mask | scatter_mask, reduce_mask)
            scatter_mask = np.where(whole, 0, scatter_mask)
        seconds = pricing.collective_s(1, scatter_mask, n_bytes[1])
        if windowed:
            seconds = np.maximum(seconds, pricing.windowed_s(scatter_mask, n_bytes[1]))
        elif loop_s is not None:
            around = 2 * pricing.windowed_s(scatter_mask, n_bytes[1])
            around = around * (1 + 1 / np.maximum(scatter_ways, 1)) - loop_s
            seconds = np.where(passed, np.maximum(seconds, around), seconds)
        if tensor.n_bytes > 8:  # scalars are combined together
            reduced = pricing.collective_s(2, reduce_mask, n_bytes[2])
            if sliced:
                deferred = pricing.becomes_scatter[reduced_whole(grouping, g, choices, pricing)]
                halved = pricing.collective_s(1, reduce_mask, n_bytes[2])
                reduced = np.where(deferred, np.minimum(halved, reduced), reduced)
                n_bytes[1] = np.where(deferred, n_bytes[2], n_bytes[1])
                n_bytes[2] = np.where(deferred, 0.0, n_bytes[2])
            seconds = seconds + reduced
        events.append((o, op.region, seconds / summands, n_bytes / summands))
    return events
