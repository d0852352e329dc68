r"""Seconds of a collective on a layout.

``V`` is the per-device size of the *full* buffer of the group: all-gather output, reduce-scatter
input, all-reduce buffer, all-to-all buffer, permuted buffer. The group is laid on factors of
physical axes; a factor has ``n`` devices, ``s`` apart, links of ``W`` bytes/s in one direction.

Torus (``ici``), per factor the bandwidth into a device is ``B = W (1 + ring) / s``:

- ``ring`` is 1 where the links close a ring over the factor, so that both directions work, else 0
  (a line: the device at its end receives over one link; scaling-book, sharding.md, pop quiz 2);
- ``s`` groups share the links of a strided factor.

All-gather and reduce-scatter of a group over several factors use them all at once
(``StrategyND``), ``T = V (N-1)/N / sum_f B_f``; an all-reduce is twice that (scaling-book,
sharding.md, "Case 3"). An all-to-all is bound by the bisection of each factor: ``V n s / 8 W`` on
a ring, ``V n s / 4 W`` on a line (scaling-book, "A Deeper Dive", bytes/4 over bidirectional W).

Switched networks (``nvlink``, ``network``, ``dcn``, ``core``, ``host``): every device has one port
of W; hierarchical groups do the inner level on V and the outer level on 1/g of V per device, where
g is the group's devices within one outer unit: ``T = max_i V (n_i-1)/n_i / (g_i W_i)``
(scaling-book, gpus.md, "Cross-node collectives": bytes * max_i (D_i - 1) / (D_i W_i), W_i the
egress of a whole unit; an all-reduce over more than two nodes runs on trees and sends all of V:
NVIDIA/nccl-tests issue 309 has 366 GB/s on 4 nodes). Levels are pipelined on GPUs (max) and
follow one another on TPUs (sum).

On parts whose NVLink switch reduces (``in_network_reduction`` above 1) the inner level of an
all-reduce is that much faster than a ring (scaling-book, gpus.md, "In network reductions").

Latency: ``collective_latency_s`` once, then one hop latency per step: n/2 on a ring, n - 1 on a
line and for gathers and scatters on switches (NCCL has only rings for them), 2 log2 n for an
all-reduce on switches (trees).
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
from numpy.typing import ArrayLike

from cost_model.layout import Factor, MeshLayout
from graphs.errors import MeshwrightError

KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "collective_permute")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaneRate:
    """How a kind of collective over a set of axes loads one lane: seconds are affine in bytes."""

    lane: str
    """kind of the physical axes: ici, nvlink, network, dcn, core or host."""
    axes: tuple[str, ...]
    """names of the physical axes whose links are busy."""
    seconds_per_byte: float
    """per byte of V."""
    wire_bytes_per_byte: float
    """bytes that each device sends on this lane per byte of V."""
    latency_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class CollectiveCost:
    """Time of one collective and what it puts on each lane."""

    time_s: np.ndarray | float
    """same shape as the payload; 0 where the group has one device."""
    lane: str
    """the slowest lane, "" for a group of one device."""
    bytes_on_wire: np.ndarray | float
    """bytes each device sends, all lanes together."""
    lane_time_s: dict[str, np.ndarray | float]
    """seconds during which each lane is busy."""
    lane_bytes: dict[str, np.ndarray | float]
    """bytes each device sends on each lane."""
    physical_axes: tuple[str, ...]
    """names of the physical axes in use: collectives with none in common do not contend."""


def collective_time_s(
    kind: str, payload_bytes: ArrayLike, layout: MeshLayout, axes: tuple[int, ...]
) -> np.ndarray | float:
    """Seconds; vectorised over payload_bytes. ``axes`` are indices of logical axes."""
    return collective_cost(kind, payload_bytes, layout, axes).time_s


def collective_cost(
    kind: str, payload_bytes: ArrayLike, layout: MeshLayout, axes: tuple[int, ...]
) -> CollectiveCost:
    """Cost with its lanes. Raises MeshwrightError for an unknown kind or axis."""
    rates = collective_rates(kind, layout, tuple(axes))
    v = np.asarray(payload_bytes, dtype=np.float64)
    base = layout.cluster.device.collective_latency_s
    lane_time: dict[str, np.ndarray | float] = {}
    lane_bytes: dict[str, np.ndarray | float] = {}
    for rate in rates:
        lane_time[rate.lane] = _scalar(v * rate.seconds_per_byte + rate.latency_s * (v > 0))
        lane_bytes[rate.lane] = _scalar(v * rate.wire_bytes_per_byte)
    if not rates:
        zero = _scalar(v * 0)
        return CollectiveCost(
            time_s=zero,
            lane="",
            bytes_on_wire=zero,
            lane_time_s={},
            lane_bytes={},
            physical_axes=(),
        )
    combine = sum if layout.cluster.device.family == "tpu" else functools.partial(_max)
    total = combine(lane_time.values())
    slowest = max(rates, key=lambda r: r.seconds_per_byte)
    return CollectiveCost(
        time_s=_scalar(np.asarray(total) + base * (v > 0)),
        lane=slowest.lane,
        bytes_on_wire=_scalar(np.asarray(sum(lane_bytes.values()))),
        lane_time_s=lane_time,
        lane_bytes=lane_bytes,
        physical_axes=tuple(name for r in rates for name in r.axes),
    )


@functools.lru_cache(maxsize=4096)
def collective_rates(kind: str, layout: MeshLayout, axes: tuple[int, ...]) -> tuple[LaneRate, ...]:
    """One rate per lane; the time of a payload is affine in it. Cached: a search asks often."""
    if kind not in KINDS:
        raise MeshwrightError(f"unknown collective {kind!r}; use one of {', '.join(KINDS)}")
    for a in axes:
        if not 0 <= a < len(layout.placement):
            raise MeshwrightError(
                f"mesh axis index {a} is not in a mesh of {len(layout.placement)} axes; "
                f"use 0 to {len(layout.placement) - 1}"
            )
    physical = layout.cluster.physical_axes
    factors = _merge([f for a in sorted(set(axes)) for f in layout.placement[a] if f.size > 1])
    lanes = dict.fromkeys(p.kind for p in physical)
    rates = []
    for lane in lanes:
        here = [f for f in factors if physical[f.axis].kind == lane]
        if not here:
            continue
        # devices of the group inside one unit of this level (faster axes come later)
        last = max(f.axis for f in here)
        inner = math.prod(f.size for f in factors if f.axis > last)
        rates.append(_lane_rate(kind, lane, here, inner, layout))
    return tuple(rates)


def _merge(factors: list[Factor]) -> list[Factor]:
    """Factors of one physical axis joined: together they have that axis' links once."""
    joined: dict[int, Factor] = {}
    for f in factors:
        g = joined.get(f.axis, f)
        if g is not f:
            g = Factor(axis=f.axis, size=f.size * g.size, stride=min(f.stride, g.stride))
        joined[f.axis] = g
    return [joined[axis] for axis in sorted(joined)]


def _lane_rate(
    kind: str, lane: str, here: list[Factor], inner: int, layout: MeshLayout
) -> LaneRate:
    physical = layout.cluster.physical_axes
    n = math.prod(f.size for f in here)
    torus = lane == "ici"
    passes = 2.0 if kind == "all_reduce" else 1.0
    share = (n - 1) / n
    if kind == "all_to_all":
        seconds = (
            max(_bisection_s(f, layout) for f in here)
            if torus
            else share / physical[here[0].axis].bandwidth_bytes_per_s
        )
        wire = share
    elif kind == "collective_permute":
        seconds = max(_port_s(f, layout) for f in here)
        wire = 1.0
    else:
        bandwidth = (
            sum(_inbound(f, layout) for f in here)
            if torus
            else physical[here[0].axis].bandwidth_bytes_per_s
        )
        if kind == "all_reduce" and lane == "nvlink":
            bandwidth *= layout.cluster.device.in_network_reduction
        if kind == "all_reduce" and lane == "network" and n > 2:
            share = 1.0  # trees send the whole buffer up and down
        seconds = passes * share / inner / bandwidth
        wire = passes * share / inner
    return LaneRate(
        lane=lane,
        axes=tuple(physical[f.axis].name for f in here),
        seconds_per_byte=seconds,
        wire_bytes_per_byte=wire,
        latency_s=_hop_latency_s(kind, here, layout),
    )


def _is_ring(f: Factor, layout: MeshLayout) -> bool:
    p = layout.cluster.physical_axes[f.axis]
    return p.wraps and f.size * f.stride == p.size


def _sharing(f: Factor, layout: MeshLayout) -> int:
    """Groups that share the links of this factor."""
    return f.stride if layout.cluster.physical_axes[f.axis].kind == "ici" else 1


def _inbound(f: Factor, layout: MeshLayout) -> float:
    w = layout.cluster.physical_axes[f.axis].bandwidth_bytes_per_s
    return w * (2 if _is_ring(f, layout) else 1) / _sharing(f, layout)


def _port_s(f: Factor, layout: MeshLayout) -> float:
    """Seconds per byte to the neighbour in this factor."""
    return _sharing(f, layout) / layout.cluster.physical_axes[f.axis].bandwidth_bytes_per_s


def _bisection_s(f: Factor, layout: MeshLayout) -> float:
    w = layout.cluster.physical_axes[f.axis].bandwidth_bytes_per_s
    return f.size * _sharing(f, layout) / ((8 if _is_ring(f, layout) else 4) * w)


def _hop_latency_s(kind: str, here: list[Factor], layout: MeshLayout) -> float:
    """Seconds that the last byte waits for hops on this lane."""
    physical = layout.cluster.physical_axes
    if kind == "collective_permute":
        return sum(_sharing(f, layout) * physical[f.axis].latency_s for f in here)
    n = math.prod(f.size for f in here)
    hop = physical[here[0].axis].latency_s
    if physical[here[0].axis].kind == "ici":
        hops = sum(
            (f.size // 2 if _is_ring(f, layout) else f.size - 1) * _sharing(f, layout) for f in here
        )
        return hops * hop * (2 if kind == "all_reduce" else 1)
    if kind == "all_reduce":
        return 2 * min(n - 1, math.log2(n)) * hop
    return (n - 1) * hop


def _max(values: object) -> np.ndarray:
    return functools.reduce(np.maximum, values)  # type: ignore[arg-type]


def _scalar(x: np.ndarray | float) -> np.ndarray | float:
    return float(x) if np.ndim(x) == 0 else x
