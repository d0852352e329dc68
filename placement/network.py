"""Seconds of the compiler's collectives on a layout.

Device ids in compiled text are positions in the device assignment, which is the mesh in row-major
order. A replica group is mapped back to the mesh axes along which its members differ (a group that
covers only a part of an axis, to that part) and costed by :mod:`cost_model.collectives`. A group
that is no product of axes is costed over all the axes it touches.

A permute on a torus is routed: each pair takes the shortest way, dimension by dimension, and the
permute lasts as long as the busiest link needs, ``bytes * load / bandwidth``. A permute that closes
rings is loaded together with its inverse, because windowed matmuls run both directions at once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter

import numpy as np

from cost_model.cluster import PhysicalAxis
from cost_model.collectives import collective_cost
from cost_model.device import Device
from cost_model.layout import Factor, MeshLayout
from cost_model.matmul import matmul_time_s
from graphs.mesh import LogicalMesh
from placement.hlo_collectives import Collective
from placement.schedule import Chip, CollectiveTimer, Timed

_KINDS = {
    "all-reduce": "all_reduce",
    "all-gather": "all_gather",
    "reduce-scatter": "reduce_scatter",
    "all-to-all": "all_to_all",
    "ragged-all-to-all": "all_to_all",
    "collective-permute": "collective_permute",
    "collective-broadcast": "all_gather",
}


def chip_of(layout: MeshLayout) -> Chip:
    """What the schedule needs of the layout's device."""
    device = layout.cluster.device
    return Chip(
        clock_hz=device.core_clock_hz,
        memory_bandwidth_bytes_per_s=device.hbm_bandwidth_bytes_per_s,
        peak_flops_per_s=device.peak("bfloat16"),
        product_s=functools.partial(_product_s, device) if device.family == "gpu" else None,
    )


_TYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32", "f64": "float64", "s8": "int8"}


def _product_s(
    device: Device, batch: int, m: int, k: int, n: int, operands: str, result: str
) -> float:
    """Seconds of a library's product on a device."""
    dtype, out_dtype = (_TYPES.get(t, _other_type(t)) for t in (operands, result))
    return float(matmul_time_s(device, batch, m, k, n, dtype, out_dtype))


def _other_type(text: str) -> str:
    return "float8_e4m3fn" if text.startswith("f8") else "float32"


def layout_timer(layout: MeshLayout) -> CollectiveTimer:
    """A timer of compiled collectives on this layout; it remembers what it has costed."""
    cache: dict[tuple[object, ...], Timed] = {}

    def timer(what: Collective) -> Timed:
        groups = None if what.groups is None else what.groups.tobytes()
        key = (what.kind, what.payload_bytes, groups, what.pairs)
        if key not in cache:
            cache[key] = _time(what, layout)
        return cache[key]

    return timer


def axes_of_group(layout: MeshLayout, group: np.ndarray) -> tuple[MeshLayout, tuple[int, ...]]:
    """The mesh axes (of a layout that may split an axis) whose product is this group."""
    sizes = layout.mesh.axis_sizes
    coordinates = np.stack(np.unravel_index(np.sort(group), sizes))
    spans = [np.unique(row) for row in coordinates]
    touched = tuple(a for a, span in enumerate(spans) if len(span) > 1)
    if math.prod(len(spans[a]) for a in touched) != len(group):
        return layout, touched
    for a in touched:
        span = spans[a]
        if len(span) == sizes[a]:
            continue
        steps = np.unique(np.diff(span))
        if len(steps) != 1:
            return layout, touched
        parts = _split_axis(layout, a, (int(steps[0]), len(span)))
        if parts is None:
            return layout, touched
        finer, chosen = parts
        others = tuple(b if b < a else b + 2 for b in touched if b != a)
        if any(len(spans[b]) != sizes[b] for b in touched if b != a):
            return finer, tuple(sorted((*others, chosen)))
        return finer, tuple(sorted((*others, chosen)))
    return layout, touched


def _time(what: Collective, layout: MeshLayout) -> Timed:
    if what.kind == "collective-permute":
        return _permute(what, layout)
    if what.groups is None:
        where, axes = layout, tuple(range(len(layout.mesh.axis_sizes)))
    else:
        where, axes = axes_of_group(layout, what.groups[0])
    cost = collective_cost(_KINDS[what.kind], float(what.payload_bytes), where, axes)
    lanes = {f"{name}{sign}" for name in cost.physical_axes for sign in "+-"}
    return Timed(time_s=float(cost.time_s), lanes=frozenset(lanes))


def _split_axis(
    layout: MeshLayout, axis: int, part: tuple[int, int]
) -> tuple[MeshLayout, int] | None:
    """The layout with one axis split into (major, part, minor), and the index of the part."""
    stride, size = part
    total = layout.mesh.axis_sizes[axis]
    if total % (stride * size):
        return None
    pieces = (total // (stride * size), size, stride)
    factors: list[Factor] = list(layout.placement[axis])
    groups: list[tuple[Factor, ...]] = []
    for piece in reversed(pieces):
        taken: list[Factor] = []
        left = piece
        while left > 1:
            factor = factors.pop()
            if left % factor.size == 0:
                taken.insert(0, factor)
                left //= factor.size
            elif factor.size % left == 0:
                taken.insert(0, dataclasses.replace(factor, size=left))
                factors.append(
                    dataclasses.replace(
                        factor, size=factor.size // left, stride=factor.stride * left
                    )
                )
                left = 1
            else:
                return None
        groups.insert(0, tuple(taken))
    names, sizes = list(layout.mesh.axis_names), list(layout.mesh.axis_sizes)
    name = names[axis]
    names[axis : axis + 1] = [f"{name}.{i}" for i in range(3)]
    sizes[axis : axis + 1] = pieces
    placement = [*layout.placement[:axis], *groups, *layout.placement[axis + 1 :]]
    mesh = LogicalMesh(axis_names=tuple(names), axis_sizes=tuple(sizes))
    return dataclasses.replace(layout, mesh=mesh, placement=tuple(placement)), axis + 1


def _permute(what: Collective, layout: MeshLayout) -> Timed:
    physical = layout.cluster.physical_axes
    pairs = np.asarray([p for p in what.pairs if p[0] != p[1]])
    base = layout.cluster.device.collective_latency_s
    if not len(pairs):
        return Timed(time_s=0.0, lanes=frozenset())
    position = _positions(layout)
    moved = [a for a in range(len(physical)) if _differs(position, pairs, a)]
    if any(physical[a].kind != "ici" for a in moved):
        slow = [physical[a] for a in moved if physical[a].kind != "ici"]
        worst = max(what.result_bytes / a.bandwidth_bytes_per_s + a.latency_s for a in slow)
        return Timed(time_s=base + worst, lanes=frozenset(f"{a.name}+" for a in slow))
    loads: Counter[tuple[int, ...]] = Counter()
    hops = max(_route(position, s, t, physical, loads) for s, t in pairs)
    directions = Counter((link[-2], link[-1]) for link in loads)
    if _closes_rings(what.pairs):
        for s, t in pairs:
            _route(position, t, s, physical, loads)
    axis = {a: physical[a] for a in moved}
    worst = max(load / physical[link[-2]].bandwidth_bytes_per_s for link, load in loads.items())
    latency = max(a.latency_s for a in axis.values()) * hops
    main = {a: max("+-", key=lambda sign, a=a: directions[a, "+-".index(sign)]) for a in axis}
    return Timed(
        time_s=base + latency + what.result_bytes * worst,
        lanes=frozenset(f"{physical[a].name}{sign}" for a, sign in main.items()),
    )


def _positions(layout: MeshLayout) -> np.ndarray:
    """[N, physical axes] coordinates of the devices in mesh order."""
    sizes = layout.mesh.axis_sizes
    coordinates = np.indices(sizes).reshape(len(sizes), -1)
    position = np.zeros((coordinates.shape[1], len(layout.cluster.physical_axes)), dtype=np.int64)
    for axis, factors in enumerate(layout.placement):
        rest = coordinates[axis].copy()
        for factor in reversed(factors):
            position[:, factor.axis] += (rest % factor.size) * factor.stride
            rest //= factor.size
    return position


def _differs(position: np.ndarray, pairs: np.ndarray, axis: int) -> bool:
    return bool(np.any(position[pairs[:, 0], axis] != position[pairs[:, 1], axis]))


def _route(
    position: np.ndarray,
    source: int,
    target: int,
    physical: tuple[PhysicalAxis, ...],
    loads: Counter[tuple[int, ...]],
) -> int:
    """Add one to every link on the way, which is (where, axis, direction); the hops."""
    where = list(position[source])
    hops = 0
    for axis, wire in enumerate(physical):
        distance = int(position[target][axis]) - int(where[axis])
        if wire.wraps and abs(distance) > wire.size // 2:
            distance -= wire.size * (1 if distance > 0 else -1)
        for _ in range(abs(distance)):
            sign = 1 if distance > 0 else -1
            loads[(*map(int, where), axis, 0 if sign > 0 else 1)] += 1
            where[axis] = (where[axis] + sign) % wire.size
            hops += 1
    return hops


def _closes_rings(pairs: tuple[tuple[int, int], ...]) -> bool:
    sources, targets = {s for s, _ in pairs}, {t for _, t in pairs}
    following = dict(pairs)
    return sources == targets and any(following[following[s]] != s for s in sources)
