"""Logical mesh axes laid on physical axes.

A logical axis is an ordered product (major to minor) of whole physical axes or of factors of
them. The order of devices follows ``jax.experimental.mesh_utils.create_device_mesh``: on a torus
the last logical axis chooses first and prefers many whole physical axes; where no product of whole
axes fits, physical axes are split (``allow_split_physical_axes=True``), later logical axes taking
the minor, contiguous part. GPU and CPU devices are numbered node by node and reshaped. Several TPU
slices follow ``create_hybrid_device_mesh``: the slice factor is the major part of one logical axis.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cost_model.cluster import Cluster
from graphs.errors import MeshwrightError
from graphs.mesh import LogicalMesh

if TYPE_CHECKING:
    import jax

_NAMES = {
    1: ("data",),
    2: ("data", "model"),
    3: ("data", "fsdp", "model"),
    4: ("replica", "data", "fsdp", "model"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Factor:
    """A part of a physical axis: devices ``stride`` apart, ``size`` of them."""

    axis: int
    """index into cluster.physical_axes."""
    size: int
    """> 1 unless the whole physical axis has size 1."""
    stride: int
    """distance of neighbours along the physical axis; 1 for the minor (contiguous) part."""


Placement = tuple[tuple[Factor, ...], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshLayout:
    """A logical mesh and where each of its axes lies."""

    mesh: LogicalMesh
    cluster: Cluster
    placement: Placement
    """[A] for each logical axis its factors, major to minor; the product is the axis size."""

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        sizes = tuple(math.prod(f.size for f in fs) for fs in self.placement)
        if sizes != self.mesh.axis_sizes:
            raise ValueError(
                f"placement has axis sizes {sizes} and the mesh {self.mesh.axis_sizes}; "
                "they must agree"
            )
        for a, axis in enumerate(self.cluster.physical_axes):
            parts = [f.size for fs in self.placement for f in fs if f.axis == a]
            if math.prod(parts) != axis.size:
                raise ValueError(
                    f"physical axis {axis.name} of size {axis.size} is covered by factors {parts}; "
                    "their product must be the size"
                )

    @property
    def splits(self) -> bool:
        """Whether some torus axis is shared by several logical axes (bandwidth is lost)."""
        axes = self.cluster.physical_axes
        return any(
            f.size != axes[f.axis].size and axes[f.axis].kind == "ici"
            for fs in self.placement
            for f in fs
        )

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for layouts that cost the same whatever the axes are called."""
        axes = self.cluster.physical_axes

        def wire(f: Factor) -> tuple[Any, ...]:
            p = axes[f.axis]
            return (p.kind, p.size, p.wraps, p.bandwidth_bytes_per_s, f.size, f.stride)

        return tuple(tuple(map(wire, fs)) for fs in self.placement)


def enumerate_layouts(
    cluster: Cluster, max_axes: int = 3, allow_splits: bool = True
) -> list[MeshLayout]:
    """All sensible layouts with 1..max_axes logical axes, each larger than 1, deduplicated.

    On a torus: every assignment of whole physical axes to logical axes, then, for every shape that
    needs it, the split that JAX chooses. Slowest axis first in each mesh.
    """
    found: dict[Any, MeshLayout] = {}
    for n_axes in range(1, max_axes + 1):
        for placement in _candidates(cluster, n_axes, allow_splits):
            layout = _layout(cluster, _NAMES.get(n_axes) or _numbered(n_axes), placement)
            key = layout.key if layout.splits else tuple(sorted(layout.key))
            found.setdefault(key, layout)
    return list(found.values())


def layout_for(cluster: Cluster, shape: Mapping[str, int]) -> MeshLayout:
    """The layout that JAX gives this mesh shape (names to sizes, slowest axis first).

    Raises MeshwrightError if the product is not the device count or no factors compose it.
    """
    if not shape:
        raise MeshwrightError(
            f"mesh shape is empty; give axis names and sizes with product {cluster.n_devices}"
        )
    for name, size in shape.items():
        if not isinstance(size, (int, np.integer)) or size < 1:
            raise MeshwrightError(f"mesh axis {name!r} has size {size!r}; give a positive integer")
    sizes = tuple(int(v) for v in shape.values())
    product = math.prod(sizes)
    if product != cluster.n_devices:
        raise MeshwrightError(
            f"mesh {dict(shape)} has {product} devices and {cluster.notation} has "
            f"{cluster.n_devices}; choose sizes whose product is {cluster.n_devices}"
        )
    placement = _place(cluster, sizes, allow_splits=True)
    if placement is None:
        raise MeshwrightError(
            f"mesh {dict(shape)} cannot be composed from the axes "
            f"{'x'.join(str(a.size) for a in cluster.physical_axes)} of {cluster.notation}; "
            "choose sizes that are products of their factors"
        )
    return _layout(cluster, tuple(shape), placement)


def device_order(layout: MeshLayout) -> np.ndarray:
    """Device indices in the shape of the mesh.

    The index is ``core + cores * (x + X * (y + Y * (z + Z * slice)))`` for TPUs (the device id of
    a one-slice topology), ``node * gpus_per_node + gpu`` for GPUs, the device number for cpu.
    """
    axes = layout.cluster.physical_axes
    torus = layout.cluster.device.family == "tpu"
    # weight of a step along each physical axis in the device index
    weights = [0] * len(axes)
    order = [i for i, p in enumerate(axes) if p.kind not in ("ici", "dcn")][::-1]
    order += [i for i, p in enumerate(axes) if p.kind == "ici"]
    order += [i for i, p in enumerate(axes) if p.kind == "dcn"]
    if not torus:
        order = list(range(len(axes)))[::-1]
    weight = 1
    for i in order:
        weights[i] = weight
        weight *= axes[i].size
    index = np.zeros((), dtype=np.int64)
    for factors in layout.placement:
        line = np.zeros(1, dtype=np.int64)
        for f in factors:
            step = np.arange(f.size, dtype=np.int64) * (f.stride * weights[f.axis])
            line = (line[:, None] + step).reshape(-1)
        index = index[..., None] + line
    return index


def arrange_devices(layout: MeshLayout, devices: Sequence[Any]) -> np.ndarray:
    """The given devices in the shape of the mesh, whatever order they come in."""
    if len(devices) != layout.cluster.n_devices:
        raise MeshwrightError(
            f"{len(devices)} devices were given and {layout.cluster.notation} has "
            f"{layout.cluster.n_devices}; give the devices of that cluster"
        )
    array = np.empty(len(devices), dtype=object)
    array[:] = sorted(devices, key=_device_key)
    return array[device_order(layout)]


def make_mesh(layout: MeshLayout, devices: Sequence[Any]) -> jax.sharding.Mesh:
    """The jax mesh of this layout over real devices or those of a compile-only topology."""
    import jax

    return jax.sharding.Mesh(arrange_devices(layout, devices), layout.mesh.axis_names)


def _device_key(device: Any) -> tuple[Any, ...]:
    core = getattr(device, "core_on_chip", None)
    if core is None:  # GPUs and CPUs are numbered in order; their coordinates are not a torus
        return (device.id,)
    slice_index = getattr(device, "slice_index", None) or 0
    return (slice_index, *reversed(tuple(device.coords)), core)


def _layout(cluster: Cluster, names: tuple[str, ...], placement: Placement) -> MeshLayout:
    sizes = tuple(math.prod(f.size for f in fs) for fs in placement)
    mesh = LogicalMesh(axis_names=names, axis_sizes=sizes)
    return MeshLayout(mesh=mesh, cluster=cluster, placement=placement)


def _numbered(n: int) -> tuple[str, ...]:
    return tuple(f"axis{i}" for i in range(n))


@functools.cache
def _factorizations(n: int, parts: int) -> tuple[tuple[int, ...], ...]:
    """Ordered factorisations of n into factors above 1."""
    if parts == 1:
        return ((n,),) if n > 1 else ()
    return tuple(
        (d, *rest)
        for d in range(2, n // 2 + 1)
        if n % d == 0
        for rest in _factorizations(n // d, parts - 1)
    )


def _candidates(cluster: Cluster, n_axes: int, allow_splits: bool) -> Iterator[Placement]:
    if cluster.n_devices == 1:
        if n_axes == 1:
            yield ((Factor(axis=0, size=1, stride=1),),)
        return
    if cluster.device.family == "tpu":
        yield from _whole_axes(cluster, n_axes)
    if cluster.device.family != "tpu" or allow_splits:
        for sizes in _factorizations(cluster.n_devices, n_axes):
            placement = _place(cluster, sizes, allow_splits)
            if placement is not None:
                yield placement


def _whole_axes(cluster: Cluster, n_axes: int) -> Iterator[Placement]:
    """Every partition of whole physical axes into n_axes logical axes, slowest first."""
    axes = cluster.physical_axes
    for owner in itertools.product(range(n_axes), repeat=len(axes)):
        if len(set(owner)) != n_axes or list(dict.fromkeys(owner)) != sorted(set(owner)):
            continue
        yield tuple(
            tuple(
                Factor(axis=i, size=axes[i].size, stride=1)
                for i in range(len(axes))
                if owner[i] == logical
            )
            for logical in range(n_axes)
        )


def _place(cluster: Cluster, sizes: tuple[int, ...], allow_splits: bool) -> Placement | None:
    if cluster.device.family != "tpu":
        return _row_major(cluster, sizes)
    axes = cluster.physical_axes
    if axes[0].kind != "dcn":
        return _torus(tuple(a.size for a in axes), sizes, allow_splits, 0)
    # the first logical axes take the slices, as experts lay data parallelism over the slow network
    left = axes[0].size
    dcn = []
    for size in sizes:
        dcn.append(math.gcd(size, left))
        left //= dcn[-1]
    if left != 1:
        return None
    inner = tuple(s // d for s, d in zip(sizes, dcn))
    torus = _torus(tuple(a.size for a in axes[1:]), inner, allow_splits, 1)
    if torus is None:
        return None
    out = []
    stride = axes[0].size
    for n, factors in zip(dcn, torus):
        stride //= n
        outer = (Factor(axis=0, size=n, stride=stride),) if n > 1 else ()
        out.append(outer + factors)
    return tuple(out)


def _row_major(cluster: Cluster, sizes: tuple[int, ...]) -> Placement | None:
    """Devices numbered with the last physical axis minor, reshaped to the logical sizes."""
    axes = cluster.physical_axes
    placement: list[tuple[Factor, ...]] = []
    axis, used = len(axes) - 1, 1
    for size in reversed(sizes):
        factors: list[Factor] = []
        while size > 1:
            free = axes[axis].size // used
            if free == 1:
                axis, used = axis - 1, 1
                continue
            part = min(size, free)
            if size % part or free % part:
                return None
            factors.insert(0, Factor(axis=axis, size=part, stride=used))
            size, used = size // part, used * part
        placement.insert(0, tuple(factors))
    return tuple(placement)


def _torus(
    physical: tuple[int, ...], sizes: tuple[int, ...], allow_splits: bool, first: int
) -> Placement | None:
    """JAX's assignment; ``first`` is the index of the first torus axis in the cluster."""
    whole = _torus_whole(physical, sizes)
    if whole is None and allow_splits:
        whole = _torus_split(physical, sizes)
    if whole is None:
        return None
    placement = []
    for logical in range(len(sizes)):
        factors = []
        for axis, row in enumerate(whole):
            if row[logical] > 1:
                stride = math.prod(row[logical + 1 :])
                factors.append(Factor(axis=first + axis, size=row[logical], stride=stride))
        placement.append(tuple(factors))
    return tuple(placement)


def _torus_whole(physical: tuple[int, ...], sizes: tuple[int, ...]) -> list[list[int]] | None:
    """[physical axis][logical axis] sizes, whole physical axes only."""
    table = [[1] * len(sizes) for _ in physical]
    free = set(range(len(physical)))
    for logical in reversed(range(len(sizes))):
        if sizes[logical] == 1:
            continue
        choice = next(
            (
                combo
                for n in range(len(free), 0, -1)
                for combo in itertools.combinations(sorted(free), n)
                if math.prod(physical[i] for i in combo) == sizes[logical]
            ),
            None,
        )
        if choice is None:
            return None
        for i in choice:
            table[i][logical] = physical[i]
        free -= set(choice)
    return table


def _torus_split(physical: tuple[int, ...], sizes: tuple[int, ...]) -> list[list[int]] | None:
    """[physical axis][logical axis] sizes when physical axes must be shared.

    Preference, in order: devices on whole axes, number of whole axes, devices on axes already
    taken (as JAX 0.10 scores it), then the first physical axes.
    """
    table = [[1] * len(sizes) for _ in physical]
    for logical in reversed(range(len(sizes))):
        taken = [math.prod(row) for row in table]
        free = [p // t for p, t in zip(physical, taken)]
        options = [()]
        for f in free:
            options = [(*o, d) for o in options for d in _divisors(f)]
        options = [o for o in options if math.prod(o) == sizes[logical]]
        if not options:
            return None

        def score(option: tuple[int, ...], taken: list[int] = taken) -> tuple[Any, ...]:
            whole = [d for d, p in zip(option, physical) if d == p]
            return (
                math.prod(whole),
                sum(d > 1 for d in whole),
                math.prod(d for d, t in zip(option, taken) if t > 1),
                option,
            )

        best = max(options, key=score)
        for i, d in enumerate(best):
            table[i][logical] = d
    return table


@functools.cache
def _divisors(n: int) -> tuple[int, ...]:
    return tuple(d for d in range(1, n + 1) if n % d == 0)
