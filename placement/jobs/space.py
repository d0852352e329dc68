"""The plan space of a whole job: every combination of degrees, schedule, microbatch and memory use.

A *group* fixes what decides the lower bounds: tensor, context, pipeline and expert degrees, whether
keys and values of a split sequence go round a ring or are gathered, chunks per stage, microbatch, and
how weights are sharded. Its *members* differ in rematerialisation and
offload, which only add time and only take away memory.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import NamedTuple

import numpy as np

from cost_model.jobs.columns import GATHERED, RING, SCHEDULES, Jobs

_ATTENTION = ("core", "qkv", "pointwise")
_FULL = ("core", "qkv", "out", "up", "down", "pointwise")


class Remat(NamedTuple):
    """A rematerialisation policy."""

    parts: tuple[str, ...]
    """Parts of a layer that are computed again."""
    offload: float = 0.0
    """Share of the kept activations that goes to the host."""
    layers: float = 1.0
    """Share of a stage's layers that do so, rounded up to whole ones; the others keep all."""


_WHOLE = {
    "none": Remat(()),
    "pointwise": Remat(("pointwise",)),
    "mlp": Remat(("up", "pointwise")),
    "attention": Remat(_ATTENTION),
    "full": Remat(_FULL),
    "none, offloaded": Remat((), 1.0),
    "mlp, rest offloaded": Remat(("up", "pointwise"), 1.0),
    "full, offloaded": Remat(_FULL, 1.0),
}
_SHARES = {"a quarter": 0.25, "half": 0.5, "three quarters": 0.75}
PARTIAL = {
    f"{name}, {words} of the layers": Remat(_WHOLE[name].parts, 0.0, share)
    for name in ("mlp", "attention", "full")
    for words, share in _SHARES.items()
}
"""Policies of a part of the layers."""
REMAT = _WHOLE | PARTIAL
"""All policies by name; of whole layers first, least recomputation first."""
_PARTS = ("core", "qkv", "out", "up", "down", "pointwise")
_MAX_TENSOR, _MAX_CONTEXT, _MAX_CHUNKS = 64, 64, 16
_MAX_MICRO = 64.0
_ZERO_BUBBLE = (SCHEDULES.index("zero_bubble_h1"), SCHEDULES.index("zero_bubble_h2"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Groups:
    """G groups as columns, whole numbers as float64."""

    tp: np.ndarray
    cp: np.ndarray
    pp: np.ndarray
    vpp: np.ndarray
    ep: np.ndarray
    dp: np.ndarray
    micro_batch: np.ndarray
    zero_stage: np.ndarray
    fsdp: np.ndarray
    schedule: np.ndarray
    """index into `cost_model.jobs.columns.SCHEDULES`."""
    first_layers: np.ndarray
    """layers of the first stage, -1: as even as stages are."""
    last_layers: np.ndarray
    context_form: np.ndarray
    """index into `cost_model.jobs.columns.CONTEXT_FORMS`."""

    @property
    def n_groups(self) -> int:
        return len(self.tp)

    def take(self, index: np.ndarray) -> Groups:
        return Groups(**{f.name: getattr(self, f.name)[index] for f in dataclasses.fields(self)})


def groups(job: Jobs) -> Groups:
    """All groups of one job (a table of one row)."""
    one = {
        f.name: float(getattr(job, f.name)[0])
        for f in dataclasses.fields(Jobs)
        if f.name != "device"
    }
    n, batch = int(one["n_devices"]), one["global_batch"]
    domain = int(min(job.device.domain[0], n / one["n_slices"]))
    heads, layers = int(one["n_heads"]), int(one["n_layers"] - one["entry_layers"])
    experts = int(one["n_experts"])
    rows: list[tuple[float, ...]] = []
    tensor = [t for t in _divisors(n, _MAX_TENSOR) if heads % t == 0 and t <= domain]
    context = [c for c in _powers(_MAX_CONTEXT) if one["seq_len"] % (2 * c) == 0]
    stages = _divisors(n, layers)
    for tp, cp, pp in itertools.product(tensor, context, stages):
        if n % (tp * cp * pp):
            continue
        dp = n // (tp * cp * pp)
        if batch % dp:
            continue
        local = batch / dp
        # a published run's framework decides for it: it has one form
        form = one["context_form"]
        forms = (RING, GATHERED) if cp > 1 and form in (RING, GATHERED) else (form,)
        micros = [b for b in _divisors(int(local), int(_MAX_MICRO))]
        expert = [e for e in _divisors(experts, dp * cp * tp) if dp * cp * tp % e == 0] or [1]
        for micro in micros:
            m = local / micro
            shapes = _pipelines(layers, pp, m, lockstep=one["lockstep"] > 0)
            for shape, ep in itertools.product(shapes, expert):
                vpp, *rest = shape
                rows.extend(
                    (tp, cp, pp, vpp, ep, dp, micro, zero, fsdp, *rest, form)
                    for zero, fsdp in _shardings(dp * cp, pp, domain // max(tp, 1))
                    for form in forms
                )
    columns = np.array(rows, float).reshape(-1, len(dataclasses.fields(Groups))).T
    names = [f.name for f in dataclasses.fields(Groups)]
    return Groups(**dict(zip(names, columns)))


def members(job: Jobs, chosen: Groups, remat: str) -> Jobs:
    """The jobs of these groups with one rematerialisation policy."""
    redone, offload, share = REMAT[remat]
    base = job.take(np.zeros(chosen.n_groups, int))
    # XLA and PyTorch leave out a recomputed layer's last matmul where the job's own software does
    skips = float(job.caching_allocator[0] == 0 or job.skips_last[0] > 0)
    shares = {f"remat_{part}": float(part in redone) for part in _PARTS}
    if redone and skips:
        shares["remat_down"] = 0.0
    if not job.fused_attention[0] and not redone:
        shares["remat_core"] = 0.0
    if share < 1.0:
        own = np.ceil((base.n_layers - base.entry_layers) / (chosen.pp * chosen.vpp))
        shares = {name: x * np.ceil(own * share) / own for name, x in shares.items()}
    return base.replace(
        tp=chosen.tp,
        cp=chosen.cp,
        pp=chosen.pp,
        vpp=chosen.vpp,
        ep=chosen.ep,
        dp=chosen.dp,
        micro_batch=chosen.micro_batch,
        zero_stage=chosen.zero_stage,
        fsdp=chosen.fsdp,
        schedule=chosen.schedule,
        first_layers=chosen.first_layers,
        last_layers=chosen.last_layers,
        context_form=chosen.context_form,
        sp=(chosen.tp > 1).astype(float),
        offload=offload,
        **shares,
    )


def _shardings(ways: int, pp: int, near: int) -> list[tuple[float, float]]:
    """(ZeRO stage, sharding group): optimizer state only; weights over all ways or one fast
    domain. With stages, weights stay whole: gathering them for each microbatch does not pay."""
    if ways == 1:
        return [(1.0, 1.0)]
    found = [(1.0, 1.0), (3.0, float(ways)), (2.0, float(ways))] if pp == 1 else [(1.0, 1.0)]
    if pp == 1 and 1 < near < ways and ways % near == 0:
        found.append((3.0, float(near)))
    return found


def _pipelines(
    layers: int, pp: int, m: float, *, lockstep: bool = False
) -> list[tuple[int, int, int, int]]:
    """(chunks, schedule, layers of the first stage, of the last) of pp stages.

    GPipe takes as long as 1F1B and never less memory, so that it is no plan of its own. In lock step
    no stage gains from fewer layers than the others, and any number of layers is divided."""
    if pp == 1:
        return [(1, 0, -1, -1)]
    found = []
    if lockstep:
        found += [(v, 0, -1, -1) for v in _chunks(layers, pp, m) if pp * v <= layers + 2]
        return found + [(1, k, -1, -1) for k in _ZERO_BUBBLE]
    if _stages_even(layers, pp):
        found += [(v, 0, -1, -1) for v in _chunks(layers, pp, m)]
        found += [(1, k, -1, -1) for k in _ZERO_BUBBLE]
    found += [(1, k, *ends) for ends in _ends(layers, pp) for k in (0, *_ZERO_BUBBLE)]
    return found


def _ends(layers: int, pp: int) -> list[tuple[int, int]]:
    """Layers of the first and the last stage where those between are equal: 0 and 0, the embedding
    and the head on their own stages; or the remainder, even or with fewer beside the head."""
    if pp < 3:
        return [(layers - layers // 2 + k, layers // 2 - k) for k in (0, 1) if layers // 2 > k]
    found = set()
    if layers % (pp - 2) == 0:
        found.add((0, 0))
    even = math.ceil(layers / pp)
    for middle in (even, even + 1):
        rest = layers - middle * (pp - 2)
        for last in (rest // 2, rest // 2 - 1):
            first = rest - last
            if 0 <= last and 0 <= first <= middle and (first, last) != (middle, middle):
                found.add((first, last))
    return sorted(found)


def _stages_even(layers: int, pp: int) -> bool:
    return layers % pp == 0 or (layers + 2) % pp == 0


def _chunks(layers: int, pp: int, m: float) -> list[int]:
    """Chunks per stage of the interleaved schedule: microbatches in rounds of pp."""
    if m % pp:
        return [1]
    total = layers + 2 if layers % pp and (layers + 2) % pp == 0 else math.ceil(layers / pp) * pp
    return [v for v in range(1, _MAX_CHUNKS + 1) if (total // pp) % v == 0]


def _divisors(n: int, most: int) -> list[int]:
    if n < 1:
        return []
    return [d for d in range(1, min(n, most) + 1) if n % d == 0]


def _powers(most: int) -> list[int]:
    return [2**i for i in range(most.bit_length()) if 2**i <= most]
