"""A closed-form estimate of every mesh under every assignment of roles to its axes.

Each axis of a mesh takes one of four roles: data with replicated weights (ZeRO-1), data with sharded
weights (ZeRO-3, Rajbhandari et al. 2020), parallel classes (Megatron, Shoeybi et al. 2019), or the
sequence (Korthikanti et al. 2022). With ``d``, ``p``, ``s`` the devices per role, in each
contraction of F flops

    computation   F / (d' p' s') / peak
    gradients     reduce-scatter of its weight gradient over data and sequence axes
    gathering     all-gather of the weight it reads over axes that shard weights
    activations   all-reduce of its result over p where it sums a parallel class
    attention     all-gather of keys and values over s

where d', p' and s' are as many of the devices as the classes let share: a mesh axis shards a
dimension as a whole or not at all, so the largest product of axes that divides it. Added are the
traffic of fused loops, the gathering of updated weights, and the bytes of state and saved
activations. What a rematerialisation policy and microbatches change is a factor on these terms. It
knows nothing of overlap, of resharding between operators, or of what the solver finds; it is the
feature that the network corrects.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from cost_model.device import Device
from cost_model.rows import distinct_rows
from placement.learned.program import Pieces, Program
from placement.learned.wires import Axes, gather_s_per_byte

REPLICATED, SHARDED, PARALLEL, SEQUENCE = 0, 1, 2, 3
N_ROLES = 4
EXPOSURE = 0.3
"""Share of weight traffic that is charged, as the solver's tables charge it."""
_HBM_SHARE = 0.85


@dataclasses.dataclass(frozen=True, kw_only=True)
class Terms:
    """Seconds and bytes of L layouts under Q assignments, for one microbatch and full recomputation.

    All [L, Q].
    """

    data: np.ndarray
    """devices over which the batch is laid."""
    parallel: np.ndarray
    sequence: np.ndarray
    compute_s: np.ndarray
    traffic_s: np.ndarray
    gradient_s: np.ndarray
    gather_s: np.ndarray
    activation_s: np.ndarray
    attention_s: np.ndarray
    update_s: np.ndarray
    state_bytes: np.ndarray
    saved_bytes: np.ndarray
    """stacked by the loops of the traced program."""
    inside_bytes: np.ndarray
    dots_bytes: np.ndarray
    large_bytes: np.ndarray
    valid: np.ndarray
    """bool: no place that a layout lacks has a role but the first."""
    whole_axes: WholeAxes
    data_mask: np.ndarray
    """[Q] int, places that the batch is laid on, as bits."""


def terms(
    program: Program, axes: Axes, device: Device, *, free: bool = False, like: Terms | None = None
) -> Terms:
    """All terms of all layouts.

    With ``free`` an axis that is idle under its role in an operator may shard any other class of
    it, and the operator's result is moved: a less faithful estimate for most programs, a better one
    for those whose operators differ much, as mixtures of experts.
    """
    width = axes.of.shape[1]
    roles = np.array(list(itertools.product(range(N_ROLES), repeat=width)), np.int8)
    present = axes.of >= 0
    sizes = np.where(present, axes.size[axes.of], 1.0)

    def mask(*which: int) -> np.ndarray:
        return (np.isin(roles, which) << np.arange(width)).sum(-1)

    whole = like.whole_axes if like else WholeAxes(sizes.round().astype(np.int64))

    def devices(*which: int) -> np.ndarray:
        return whole.devices[:, mask(*which)]

    def rate(*which: int) -> np.ndarray:
        chosen = np.isin(roles, which)[:, None, :] & np.ones(axes.of.shape, bool)
        return gather_s_per_byte(axes, chosen).T

    data = devices(REPLICATED, SHARDED)
    parallel, sequence = devices(PARALLEL), devices(SEQUENCE)
    by_role = (mask(REPLICATED, SHARDED), mask(SEQUENCE), mask(PARALLEL))
    split = _Split(whole, by_role, data.shape, free)
    peak = device.peak("bfloat16")
    work = program.contractions
    sums = (program.reduced[:, 2, 0] > 1) & ~program.is_gradient
    combined = _only(program.results, sums)
    gradients = _only(program.results, program.is_gradient)
    hbm = device.hbm_bandwidth_bytes_per_s * _HBM_SHARE
    scatter = rate(REPLICATED, SHARDED, SEQUENCE)
    weights_alone = split.weights(program.weights)
    moments_alone = split.weights(program.moments)
    under, anyhow = split.ways(work), split.anyhow(work)
    moving = np.where(anyhow > under, program.results.amount / np.maximum(under, anyhow), 0.0).sum(
        -1
    )
    moving = moving * rate(REPLICATED, SHARDED, PARALLEL, SEQUENCE)[:, -1:]
    zero3 = devices(SHARDED, SEQUENCE).astype(np.float64)
    zero1 = devices(REPLICATED, SHARDED, SEQUENCE).astype(np.float64)
    return Terms(
        data=data,
        parallel=parallel,
        sequence=sequence,
        compute_s=split.total(work) / peak,
        traffic_s=split.total(program.moved) / hbm,
        gradient_s=split.weights(gradients) * scatter,
        gather_s=split.weights(program.weights_read) * rate(SHARDED, SEQUENCE),
        activation_s=2.0 * (combined.amount / split.ways(combined)).sum(-1) * rate(PARALLEL)
        + moving,
        attention_s=(program.attended.amount / split.ways(program.attended, sequence=False)).sum(-1)
        * rate(SEQUENCE),
        update_s=weights_alone * rate(REPLICATED),
        state_bytes=weights_alone / zero3 + moments_alone / zero1 + weights_alone / zero1,
        saved_bytes=split.total(program.saved),
        inside_bytes=split.total(program.inside),
        dots_bytes=split.total(program.dots),
        large_bytes=split.total(program.largest),
        valid=~((roles[None] != REPLICATED) & ~present[:, None, :]).any(-1),
        whole_axes=whole,
        data_mask=mask(REPLICATED, SHARDED),
    )


def _only(pieces: Pieces, keep: np.ndarray) -> Pieces:
    return Pieces(amount=pieces.amount * keep, sizes=pieces.sizes)


class WholeAxes:
    """How many devices of a set of axes can share classes of given sizes."""

    def __init__(self, sizes: np.ndarray) -> None:
        """sizes: [L, A] int64."""
        width = sizes.shape[1]
        on = (np.arange(1 << width)[:, None] >> np.arange(width)) & 1 > 0
        self.devices = np.where(on[None], sizes[:, None, :], 1).prod(-1)
        """[L, 2^A] devices of each set of places."""
        self._known: dict[tuple[int, int], np.ndarray] = {}

    def share(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """[L, 2^A, P] most devices of each set that divide two classes of P sizes each."""
        pairs = list(zip(first.tolist(), second.tolist()))
        missing = sorted(set(pairs) - set(self._known))
        if missing:
            found = self._shared(*np.array(missing, np.int64).T)
            self._known |= {pair: found[..., n] for n, pair in enumerate(missing)}
        return np.stack([self._known[p] for p in pairs], axis=-1)

    def _shared(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        n_sets = self.devices.shape[1]
        one, two = (self.devices[..., None] * (n % self.devices[..., None] == 0)
                    for n in (first, second))  # fmt: skip
        best = np.ones(one.shape)
        for a in range(n_sets):
            for b in range(n_sets):
                if not a & b:
                    both = best[:, a | b]
                    np.maximum(both, one[:, a] * two[:, b], out=both)
        for within in range(n_sets):  # a set can do what its parts can
            for part in range(within):
                if part & within == part:
                    np.maximum(best[:, within], best[:, part], out=best[:, within])
        return best


class _Split:
    """Totals per device: each amount over the devices that its role sizes let share it."""

    def __init__(
        self, whole: WholeAxes, masks: tuple[np.ndarray, ...], shape: tuple[int, ...], free: bool
    ) -> None:
        self.whole, self.masks, self.shape, self.free = whole, masks, shape, free

    def ways(self, pieces: Pieces, *, batch: bool = True, sequence: bool = True) -> np.ndarray:
        """[L, Q, P] devices that share each piece under the roles."""
        ways = np.ones((*self.shape, len(pieces.amount)))
        for role, used in enumerate((batch, sequence, True)):
            if used:
                pairs, index = distinct_rows(pieces.sizes[:, role])
                table = self.whole.share(pairs[:, 0], pairs[:, 1])[..., index]
                ways = ways * table[:, self.masks[role]]
        return ways

    def anyhow(self, pieces: Pieces) -> np.ndarray:
        """[L, 1, P] devices that share each piece where its two largest classes take any axes;
        ones if that is not free to them."""
        if not self.free:
            return np.ones((self.shape[0], 1, len(pieces.amount)))
        flat = np.sort(pieces.sizes.reshape(len(pieces.sizes), -1), axis=1)[:, :-3:-1]
        pairs, index = distinct_rows(flat)
        return self.whole.share(pairs[:, 0], pairs[:, 1])[:, -1:, index]

    def weights(self, pieces: Pieces) -> np.ndarray:
        """[L, Q] total per device of what has no batch and no sequence to share."""
        return (pieces.amount / self.ways(pieces, batch=False, sequence=False)).sum(-1)

    def total(self, pieces: Pieces) -> np.ndarray:
        """[L, Q] total per device."""
        return (pieces.amount / np.maximum(self.ways(pieces), self.anyhow(pieces))).sum(-1)
