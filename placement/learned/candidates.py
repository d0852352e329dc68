"""Features of outer candidates: a mesh, a rematerialisation policy, a number of microbatches.

Meshes are *sets* of axes; an axis is described by its wires and by what it would do to each class of
the program. The closed form (:mod:`placement.learned.closed_form`) gives each candidate an estimate
under its best assignment of roles; the network corrects that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from cost_model.layout import MeshLayout
from placement.learned.closed_form import EXPOSURE, Terms, terms
from placement.learned.features import Observation, squash
from placement.learned.program import bits
from placement.learned.wires import Axes, axes_of

REMAT = ("full", "attention", "dots", "none")
"""The zoo's policies; a program given as a function counts as the first."""
N_AXIS, N_PAIR, N_CANDIDATE = 12, 8, 38
_FLOPS = {"full": 1.0, "attention": 0.85, "dots": 0.8, "none": 0.75}
"""Arithmetic against full recomputation, where forward is a quarter of all."""
_FORWARD = 0.25
"""Share of what is made inside loops that is made by the forward pass and may be kept."""
_ROOM = 0.94
"""Share of available memory that a plan may use."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidates:
    """K candidates over U distinct axes, each of at most A axes."""

    axes: np.ndarray
    """[U, N_AXIS] float32."""
    pairs: np.ndarray
    """[C, U, N_PAIR] float32, what each axis would do to each class."""
    of: np.ndarray
    """[K, A] int64, axis of each place, -1 for none."""
    rows: np.ndarray
    """[K, N_CANDIDATE] float32."""
    estimate: np.ndarray
    """[K] float32, log of the closed form's step time over the ideal one."""
    pressure: np.ndarray
    """[K] float32, log of the closed form's memory over the limit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """What a candidate is, for callers that have no class of their own."""

    remat: str | None
    microbatches: int
    layout: MeshLayout


def candidates_of(seen: Observation, outers: Sequence[Any]) -> Candidates:
    """Features of outers (each with ``remat``, ``microbatches``, ``layout``)."""
    layouts: list[MeshLayout] = []
    index: dict[int, int] = {}
    which = np.empty(len(outers), np.int64)
    for k, o in enumerate(outers):
        at = index.setdefault(id(o.layout), len(layouts))
        if at == len(layouts):
            layouts.append(o.layout)
        which[k] = at
    axes = axes_of(layouts)
    device = seen.cluster.device
    strict = terms(seen.program, axes, device)
    tables = (strict, terms(seen.program, axes, device, free=True, like=strict))
    variants = sorted({(o.remat or "full", o.microbatches) for o in outers})
    number = {v: n for n, v in enumerate(variants)}
    variant = np.array([number[o.remat or "full", o.microbatches] for o in outers], np.int64)
    rows = np.zeros((len(outers), N_CANDIDATE), np.float32)
    estimate = np.zeros(len(outers), np.float32)
    pressure = np.zeros(len(outers), np.float32)
    for n, (remat, count) in enumerate(variants):
        at = np.flatnonzero(variant == n)
        priced = _price(seen, tables[0], remat, count)
        free = _price(seen, tables[1], remat, count)
        extra = [free[0][:, [2, 6, 14]], squash(np.exp(free[1] - priced[1]))[:, None]]
        priced = (np.concatenate([priced[0], *extra], axis=1), *priced[1:])
        for out, values in ((rows, priced[0]), (estimate, priced[1]), (pressure, priced[2])):
            out[at] = values[which[at]]
    splits = np.array([float(x.splits) for x in layouts], np.float32)
    rows[:, 0] = splits[which]
    rows[:, 1] = (axes.of >= 0).sum(1)[which] / 3
    return Candidates(
        axes=_axis_rows(axes),
        pairs=_pairs(seen, axes),
        of=axes.of[which],
        rows=rows,
        estimate=estimate,
        pressure=pressure,
    )


def _axis_rows(axes: Axes) -> np.ndarray:
    per_byte = np.where(
        axes.bandwidth_bytes_per_s > 0, 1e9 / np.maximum(axes.bandwidth_bytes_per_s, 1.0), 0.0
    )
    rows = np.concatenate(
        [
            np.log2(axes.size)[:, None] / 10,
            np.log2(axes.ways) / 10,
            squash(per_byte + 1e-9) * (axes.ways > 1),
            squash(axes.exchange_s_per_byte * 1e9)[:, None],
            squash(axes.latency_s * 1e5)[:, None],
            axes.ring[:, None],
            np.full((len(axes.size), 1), float(axes.torus)),
            (axes.ways[:, 2] > 1).astype(float)[:, None],
        ],
        axis=1,
    )
    return rows.astype(np.float32)


def _pairs(seen: Observation, axes: Axes) -> np.ndarray:
    """[C, U, N_PAIR]: divisibility, and seconds of moving the class' bytes over the axis."""
    sizes = seen.class_sizes[:, None]
    ways = axes.size[None].round().astype(np.int64)
    level = np.where(axes.bandwidth_bytes_per_s > 0, axes.bandwidth_bytes_per_s, np.inf).min(1)
    moved = seen.class_bytes[:, None, :3] / seen.cluster.n_devices
    seconds = moved * axes.size[None, :, None] / level[None, :, None]
    exchange = seen.class_bytes[:, 1][:, None] / seen.cluster.n_devices * axes.exchange_s_per_byte
    share = seen.class_bytes[:, 3] / max(seen.class_bytes[:, 3].max(), 1.0)
    rows = np.stack(
        [
            (sizes % ways == 0).astype(float),
            np.clip(np.log2(np.maximum(sizes / ways, 1e-3)) / 10, -1, 1.5),
            *(squash(seconds[..., i] / seen.ideal_s) for i in range(3)),
            squash(exchange / seen.ideal_s),
            share[:, None] * (1.0 - 1.0 / np.gcd(sizes, ways)),
            (np.gcd(sizes, ways) / ways).astype(float),
        ],
        axis=-1,
    )
    return rows.astype(np.float32)


def _price(
    seen: Observation, t: Terms, remat: str, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """([L, columns], [L] estimate, [L] pressure) of one variant of the program."""
    program, device, ideal = seen.program, seen.cluster.device, seen.ideal_s
    batch = max(program.batch // count, 1)
    one = np.ones(2, np.int64)
    shared = t.whole_axes.share(np.array([program.batch, batch]), one)[:, t.data_mask]
    unused = shared[..., 0] / shared[..., 1]
    flops = _FLOPS.get(remat, 1.0)
    parts = {
        "compute": t.compute_s * flops * unused,
        "traffic": t.traffic_s * (0.5 + 0.5 * flops) * unused,
        "gradient": t.gradient_s * count,
        "gather": t.gather_s * count * (2 + flops) / 3,
        "activation": t.activation_s * flops * unused,
        "attention": t.attention_s * flops * unused,
        "update": t.update_s,
    }
    weights = {"gradient": EXPOSURE, "gather": EXPOSURE, "update": EXPOSURE}
    total = sum(weights.get(k, 1.0) * v for k, v in parts.items())
    kept = t.saved_bytes + {
        "full": 0.0 * t.saved_bytes,
        "attention": _FORWARD * t.inside_bytes,
        "dots": _FORWARD * t.dots_bytes,
        "none": 1.5 * _FORWARD * t.inside_bytes,
    }.get(remat, 0.0)
    activations = unused * (kept + 0.5 * t.large_bytes) / count
    memory = t.state_bytes + activations
    limit = device.hbm_available_bytes * _ROOM
    fits = memory <= limit
    forbidden = np.where(t.valid, 0.0, np.inf)
    rank = np.where(fits, total, total * 1e3 * memory / limit) + forbidden
    best = rank.argmin(1)
    line = np.arange(len(best))

    def at(x: np.ndarray) -> np.ndarray:
        return x[line, best]

    step = at(np.asarray(total))
    free = (total + forbidden).min(1)
    plain = (rank + np.where(t.parallel > 1, np.inf, 0.0)).min(1)
    mixed = (rank + np.where((t.parallel > 1) | (t.sequence > 1), 0.0, np.inf)).min(1)
    least = (memory + forbidden).min(1)
    single = np.full(len(best), 1.0)
    columns = [
        0 * step,
        0 * step,
        *(squash(at(v) / ideal) for v in parts.values()),
        squash(step / ideal),
        squash(free / step),
        np.clip(np.log10(plain / step), -1, 3) / 3,
        np.clip(np.log10(mixed / step), -1, 3) / 3,
        np.clip(np.log2(at(memory) / limit), -4, 4) / 4,
        np.clip(np.log2(least / limit), -4, 4) / 4,
        np.clip(np.log2(at(t.state_bytes) / limit), -6, 4) / 4,
        np.clip(_log2(at(activations) / limit), -6, 4) / 4,
        np.clip(_log2(at(kept) / count / limit), -8, 4) / 4,
        np.clip(_log2(at(t.large_bytes) / count / limit), -8, 4) / 4,
        *(single * float(remat == k) for k in REMAT),
        single * bits(count) / 5,
        single * bits(batch) / 12,
        np.log2(at(t.data)) / 12,
        np.log2(at(t.parallel)) / 12,
        np.log2(at(t.sequence)) / 12,
        np.log2(at(unused)) / 4,
        np.log2(batch / np.maximum(at(t.data), 1)) / 8,
        fits[line, best].astype(float),
        (fits & t.valid).mean(1),
        np.log2(np.gcd(batch, seen.cluster.n_devices)) / 12 * single,
        single * float(count > 1),
    ]
    rows = np.nan_to_num(np.stack(columns, axis=1))
    pressure = np.log(np.maximum(at(memory), 1.0) / limit)
    return rows, np.log(step / ideal), np.clip(pressure, -4, 4)


def _log2(x: np.ndarray) -> np.ndarray:
    return np.log2(np.maximum(x, 1e-6))
