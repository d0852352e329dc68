"""What a mesh axis is made of, in numbers that any device has.

A logical axis lies on factors of physical axes (:mod:`cost_model.layout`). Three levels matter: the
cores of a chip, the fast network (torus links or NVLink) and the slow one (between slices or
nodes). An axis is its number of devices and its bandwidth on each level; sets of axes combine as in
:mod:`cost_model.collectives`: torus links add up, a switched port does not, and the outer level
carries the share of the inner devices.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from cost_model.layout import Factor, MeshLayout

CORE, FAST, SLOW = 0, 1, 2
_LEVEL = {"core": CORE, "ici": FAST, "nvlink": FAST, "host": FAST, "dcn": SLOW, "network": SLOW}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axes:
    """U distinct axes, and which of them each of L layouts has."""

    size: np.ndarray
    """[U] devices."""
    ways: np.ndarray
    """[U, 3] devices on each level, 1 where the axis is not on it."""
    bandwidth_bytes_per_s: np.ndarray
    """[U, 3] into a device; 0 where the axis is not on the level."""
    exchange_s_per_byte: np.ndarray
    """[U] of an all-to-all."""
    latency_s: np.ndarray
    """[U] of a gather's hops."""
    ring: np.ndarray
    """[U] share of torus factors that close a ring; 1 on switches."""
    of: np.ndarray
    """[L, A] int, axis of each place of each layout, in mesh order; -1 where it has fewer."""
    torus: bool
    """Fast links add up over axes, and levels follow one another."""


def axes_of(layouts: list[MeshLayout]) -> Axes:
    """The distinct axes of layouts on one cluster."""
    width = max(len(x.placement) for x in layouts)
    number: dict[tuple, int] = {}
    rows: list[tuple] = []
    of = np.full((len(layouts), width), -1, np.int64)
    for k, layout in enumerate(layouts):
        for a, factors in enumerate(layout.placement):
            key = tuple((f.axis, f.size, f.stride) for f in factors)
            if key not in number:
                number[key] = len(rows)
                rows.append(_axis(factors, layout))
            of[k, a] = number[key]
    size, ways, bandwidth, exchange, latency, ring = (np.array(x, np.float64) for x in zip(*rows))
    return Axes(
        size=size,
        ways=ways,
        bandwidth_bytes_per_s=bandwidth,
        exchange_s_per_byte=exchange,
        latency_s=latency,
        ring=ring,
        of=of,
        torus=layouts[0].cluster.device.family == "tpu",
    )


def _axis(factors: tuple[Factor, ...], layout: MeshLayout) -> tuple:
    physical = layout.cluster.physical_axes
    ways, bandwidth = [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]
    exchange = latency = 0.0
    rings = []
    for f in factors:
        if f.size == 1:
            continue
        p = physical[f.axis]
        level, w = _LEVEL[p.kind], p.bandwidth_bytes_per_s
        ways[level] *= f.size
        if p.kind == "ici":
            ring = p.wraps and f.size * f.stride == p.size
            rings.append(float(ring))
            bandwidth[level] += w * (2 if ring else 1) / f.stride
            exchange = max(exchange, f.size * f.stride / ((8 if ring else 4) * w))
            latency += (f.size // 2 if ring else f.size - 1) * f.stride * p.latency_s
        else:
            bandwidth[level] = w
            exchange = max(exchange, (f.size - 1) / f.size / w)
            latency += (f.size - 1) * p.latency_s
    size = math.prod(f.size for f in factors)
    return size, ways, bandwidth, exchange, latency, sum(rings) / len(rings) if rings else 1.0


def gather_s_per_byte(axes: Axes, chosen: np.ndarray) -> np.ndarray:
    """Seconds per byte of an all-gather over sets of axes.

    Args:
      chosen: [..., L, A] booleans, places of each layout that take part (A as in ``axes.of``).
    """
    on = chosen & (axes.of >= 0)
    ways = np.where(on[..., None], axes.ways[axes.of], 1.0).prod(axis=-2)
    bandwidth = np.where(on[..., None], axes.bandwidth_bytes_per_s[axes.of], 0.0)
    total = bandwidth.sum(axis=-2) if axes.torus else bandwidth.max(axis=-2)
    share = (ways - 1.0) / ways
    inner = np.ones_like(ways)
    inner[..., FAST] = ways[..., CORE]
    inner[..., SLOW] = ways[..., CORE] * ways[..., FAST]
    seconds = np.where(ways > 1, share / inner / np.maximum(total, 1.0), 0.0)
    return seconds.sum(axis=-1) if axes.torus else seconds.max(axis=-1)
