"""Seconds of what a choice does, vectorised over choices: collectives, resharding, operators.

Specs are rows of ``int8``: for each mesh axis the tensor dimension it shards, or -1
(:meth:`graphs.choices.Choices.specs`).
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numba
import numpy as np

from cost_model.collectives import collective_time_s
from cost_model.device import Device
from cost_model.fitted import load_calibration
from cost_model.gpu_matmul import tiled
from cost_model.layout import MeshLayout

KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "collective_permute")
_SMALL, _LARGE = 1e4, 1e9
_COPY_CYCLES = 22.5
"""Of XLA:TPU for a register of 8 x 128 that a copy writes when it changes the order of blocks: what
most such copies in the compiled steps of suite=compiled state (v5e, v5p and v6e)."""
_REDUCED_GATHER_DEVICES = 64
_REDUCED_GATHER_BYTES = 2.0**24


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pricing:
    """Affine collective times on one layout, by kind and set of axes."""

    layout: MeshLayout
    axis_sizes: tuple[int, ...]
    latency_s: np.ndarray
    """[kinds, 2^A] seconds at zero bytes; the set of axes is a bit mask."""
    seconds_per_byte: np.ndarray
    """[kinds, 2^A]."""
    copy_s_per_byte: float = 0.0
    """Of a copy that puts blocks in order (16-bit types); 0 where the compiler is not known to make
    a kernel of it."""
    contractions: dict[tuple, float] = dataclasses.field(default_factory=dict, compare=False)
    """Memo of contraction seconds by (type, batch, m, k, n); may be shared between layouts of one
    device."""

    @classmethod
    def of(cls, layout: MeshLayout, contractions: dict[tuple, float] | None = None) -> Pricing:
        sizes = layout.mesh.axis_sizes
        n_sets = 1 << len(sizes)
        latency = np.zeros((len(KINDS), n_sets))
        slope = np.zeros((len(KINDS), n_sets))
        for k, kind in enumerate(KINDS):
            for mask in range(1, n_sets):
                axes = tuple(a for a in range(len(sizes)) if mask >> a & 1 and sizes[a] > 1)
                if not axes:
                    continue
                small, large = (
                    float(collective_time_s(kind, v, layout, axes)) for v in (_SMALL, _LARGE)
                )
                slope[k, mask] = (large - small) / (_LARGE - _SMALL)
                latency[k, mask] = max(small - slope[k, mask] * _SMALL, 0.0)
        return cls(
            layout=layout,
            axis_sizes=sizes,
            latency_s=latency,
            seconds_per_byte=slope,
            copy_s_per_byte=_copy_s_per_byte(layout.cluster.device),
            contractions={} if contractions is None else contractions,
        )

    @property
    def device(self) -> Device:
        return self.layout.cluster.device

    @functools.cached_property
    def fuses(self) -> bool:
        """Whether contractions are priced as kernels that compute their operands."""
        return "contraction" in load_calibration(self.device.calibration).constants

    @functools.cached_property
    def timed(self) -> bool:
        """Whether operators are priced as the timed kernels of a GPU."""
        return times_kernels(self.device)

    def collective_s(self, kind: int, mask: np.ndarray, payload_bytes: np.ndarray) -> np.ndarray:
        """Seconds; zero where the set of axes is empty."""
        time = self.latency_s[kind][mask] + self.seconds_per_byte[kind][mask] * payload_bytes
        return np.where(mask > 0, time, 0.0)

    @functools.cached_property
    def becomes_scatter(self) -> np.ndarray:
        """[2^A] by the set of axes, whether XLA scatters an all-reduce that is only read in slices.

        XLA:GPU does. XLA:TPU does within a slice, but not over all devices of one that is a square
        of four by four or more, or that has three dimensions (steps of one contraction compiled for
        v5e, v6e and v5p slices of four to 256 devices, and for parts of them).
        """
        found = np.zeros(1 << len(self.axis_sizes), bool)
        if self.device.family != "tpu":
            found[1:] = self.device.family == "gpu"
            return found
        physical = self.layout.cluster.physical_axes
        sides = [p.size for p in physical if p.kind == "ici" and p.size > 1]
        square = len(sides) == 2 and sides[0] == sides[1] >= 4
        for mask in range(1, len(found)):
            axes = [a for a, n in enumerate(self.axis_sizes) if mask >> a & 1 and n > 1]
            factors = [f for a in axes for f in self.layout.placement[a]]
            near = all(physical[f.axis].kind == "ici" for f in factors)
            ways = math.prod(self.axis_sizes[a] for a in axes)
            whole = ways == self.layout.cluster.n_devices
            found[mask] = bool(axes) and near and not (whole and (square or len(sides) > 2))
        return found

    @functools.cached_property
    def reduced_gather_bytes(self) -> np.ndarray:
        """[2^A] by the set of axes, up to how many gathered bytes XLA:TPU gathers by an all-reduce.

        It adds up what each device holds, with zeros elsewhere, over all devices of a slice of 64 or
        more: up to 16 MiB on a torus of two dimensions, whatever the size on one of three (programs of
        one gather compiled for slices of 16 to 256 v5e, v6e and v5p, and for parts of them).
        """
        found = np.zeros(1 << len(self.axis_sizes))
        physical = self.layout.cluster.physical_axes
        dimensions = sum(p.kind == "ici" and p.size > 1 for p in physical)
        if self.device.family != "tpu" or any(p.kind != "ici" and p.size > 1 for p in physical):
            return found
        for mask in range(1, len(found)):
            ways = math.prod(n for a, n in enumerate(self.axis_sizes) if mask >> a & 1)
            if ways == self.layout.cluster.n_devices and ways >= _REDUCED_GATHER_DEVICES:
                found[mask] = np.inf if dimensions > 2 else _REDUCED_GATHER_BYTES
        return found

    def windowed_s(self, mask: np.ndarray, payload_bytes: np.ndarray) -> np.ndarray:
        """Seconds to pass blocks of a buffer once around the group, as windowed matmuls do.

        One ring over all devices of the group, both directions: its slowest factor rules, where
        several groups share strided links and where a line has no link back.
        """
        per_byte = np.array([self._ring_s_per_byte(m) for m in range(1 << len(self.axis_sizes))])
        return per_byte[mask] * payload_bytes

    def _ring_s_per_byte(self, mask: int) -> float:
        physical = self.layout.cluster.physical_axes
        slowest = 0.0
        for axis, factors in enumerate(self.layout.placement):
            for f in factors if mask >> axis & 1 else ():
                along = physical[f.axis]
                if f.size > 1:
                    both = 2.0 if along.wraps and f.size == along.size else 1.0
                    shared = f.stride if along.kind == "ici" else 1
                    slowest = max(slowest, shared / (both * along.bandwidth_bytes_per_s))
        return slowest

    def shards(self, specs: np.ndarray) -> np.ndarray:
        """[S] number of shards of a tensor with each spec."""
        sizes = np.array(self.axis_sizes, np.float64)
        return np.where(specs >= 0, sizes, 1.0).prod(axis=-1)

    def masks(self, flags: np.ndarray) -> np.ndarray:
        """[..., A] booleans -> bit masks."""
        return (flags * (1 << np.arange(flags.shape[-1]))).sum(axis=-1).astype(np.int64)


def times_kernels(device: Device) -> bool:
    """Whether the device is a GPU whose kernels were timed."""
    return tiled(load_calibration(device.calibration).constants["matmul"])


def _copy_s_per_byte(device: Device) -> float:
    return _COPY_CYCLES / device.core_clock_hz / 2048 if device.family == "tpu" else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reshard:
    """Collectives that turn one spec into another, for every pair of specs."""

    seconds: np.ndarray
    """[P, Q]."""
    bytes_by_kind: np.ndarray
    """[kinds, P, Q] payload bytes."""
    copies_s: np.ndarray
    """[P, Q] seconds of kernels that put gathered blocks in order, which nothing hides."""


def reshard(
    p: np.ndarray, q: np.ndarray, n_bytes: float, pricing: Pricing, *, rank: int
) -> Reshard:
    """Price going from specs p [P, A] to specs q [Q, A] for a tensor of n_bytes and ``rank``
    dimensions.

    In the order of :func:`placement.apply.steps`, axes of a dimension in the order of the mesh:
    slices, which are local and free; a gather of dropped axes that are in the way; all-to-alls for
    axes that change dimension, one for all that go from one dimension to one other; a gather of the
    other dropped axes. An axis that joins a dimension as a more minor one than an axis that moves onto
    it, or a dimension that another axis leaves, is sliced at the end, when all is paid. Where an axis
    leaves or joins a dimension on which a more minor axis stays, blocks are out of order and are
    permuted as well. A gather along two dimensions at once leaves blocks that a copy puts in order, in
    smaller registers where few of them lie along the last dimension; some gathers are all-reduces
    (:attr:`Pricing.reduced_gather_bytes`).
    """
    seconds, bytes_by_kind, copies_s = _reshard(
        np.ascontiguousarray(p, np.int8),
        np.ascontiguousarray(q, np.int8),
        n_bytes / pricing.shards(p),
        np.array(pricing.axis_sizes, np.float64),
        pricing.latency_s,
        pricing.seconds_per_byte,
        pricing.copy_s_per_byte,
        pricing.reduced_gather_bytes,
        rank - 1,
    )
    return Reshard(seconds=seconds, bytes_by_kind=bytes_by_kind, copies_s=copies_s)


@numba.njit(cache=True)
def _moves_onto(p, q, dim):
    """The most major axis that moves onto a dimension, its number; -1 where none does."""
    for axis in range(len(p)):
        if q[axis] == dim and p[axis] >= 0 and p[axis] != dim:
            return axis
    return -1


@numba.njit(cache=True)
def _leaves(p, q, dim):
    """Whether an axis leaves a dimension; what is cut from it before would be of other blocks."""
    for axis in range(len(p)):
        if p[axis] == dim and q[axis] != dim:
            return True
    return False


@numba.njit(cache=True)
def _exchanged(p, q, axis, sizes):
    """The axes, a bit mask, that change their dimension together with an axis, if it is the first of
    them; else 0."""
    if p[axis] < 0 or q[axis] < 0 or p[axis] == q[axis]:
        return 0
    mask = 0
    for other in range(len(p)):
        if p[other] == p[axis] and q[other] == q[axis] and sizes[other] > 1.0:
            mask |= 1 << other
    return mask if mask & -mask == 1 << axis else 0


@numba.njit(cache=True)
def _in_the_way(p, q, axis):
    """Whether a dropped axis has to be gathered before others change their dimension."""
    for other in range(len(p)):
        moves = p[other] >= 0 and q[other] >= 0 and p[other] != q[other]
        if moves and (q[other] == p[axis] or (p[other] == p[axis] and other < axis)):
            return True
    return False


@numba.njit(cache=True)
def _reshard(p, q, start, sizes, latency_s, seconds_per_byte, copy_s_per_byte, reduced, last):
    """(seconds [P, Q], bytes [kinds, P, Q], seconds of copies [P, Q]); start [P] is the local size
    under p, ``last`` the last dimension."""
    n_axes = p.shape[1]
    seconds = np.zeros((len(p), len(q)))
    copies = np.zeros((len(p), len(q)))
    moved = np.zeros((len(latency_s), len(p), len(q)))
    gathered = np.zeros(2)
    gather = np.zeros(2, np.int64)
    for i in range(len(p)):
        for j in range(len(q)):
            cut = 1.0
            gathered[:] = 1.0
            gather[:] = 0
            along = -1
            mixed = False
            ways = 1.0  # blocks along the last dimension
            for axis in range(n_axes):
                if p[i, axis] < 0 and q[j, axis] >= 0:
                    mover = _moves_onto(p[i], q[j], q[j, axis])
                    if (mover < 0 or mover > axis) and not _leaves(p[i], q[j], q[j, axis]):
                        cut *= sizes[axis]
                elif p[i, axis] >= 0 and q[j, axis] < 0 and sizes[axis] > 1.0:
                    late = 0 if _in_the_way(p[i], q[j], axis) else 1
                    gathered[late] *= sizes[axis]
                    gather[late] |= 1 << axis
                    mixed = mixed or (along >= 0 and p[i, axis] != along)
                    along = p[i, axis]
                    if along == last:
                        ways *= sizes[axis]
            local = start[i] / cut
            total = 0.0
            for late in range(2):
                if gather[late]:
                    local *= gathered[late]
                    mask = gather[late]
                    kind = 2 if local <= reduced[mask] else 0
                    total += latency_s[kind, mask] + seconds_per_byte[kind, mask] * local
                    if mixed and kind == 0:
                        rows = 8.0 if ways == 1.0 else min(ways, 8.0)
                        copies[i, j] += copy_s_per_byte * local * 8.0 / rows
                    moved[kind, i, j] += local
                if late:
                    continue
                for axis in range(n_axes):
                    mask = _exchanged(p[i], q[j], axis, sizes)
                    if mask:
                        total += latency_s[3, mask] + seconds_per_byte[3, mask] * local
                        moved[3, i, j] += local
            for major in range(n_axes):
                for minor in range(major + 1, n_axes):
                    if sizes[major] == 1.0 or sizes[minor] == 1.0:
                        continue
                    if p[i, minor] < 0 or p[i, minor] != q[j, minor]:
                        continue
                    leaves = p[i, major] == p[i, minor] and q[j, major] != p[i, major]
                    joins = q[j, major] == q[j, minor] and p[i, major] != q[j, major]
                    if leaves or joins:
                        mask = (1 << major) | (1 << minor)
                        total += 2 * (latency_s[4, mask] + seconds_per_byte[4, mask] * start[i])
                        moved[4, i, j] += start[i]
            seconds[i, j] = total
    return seconds, moved, copies
