"""Peak bytes of a device in J whole jobs: the fullest pipeline stage.

states      weights, gradients and optimizer state of the stage (first: with the embedding; last:
            with the head), each divided by what shards it (ZeRO, arXiv:1910.02054)
activations what each part of a layer keeps for the backward pass, from its recomputed share,
            times the microbatches in flight (`_in_flight`): with 1F1B pp on the first stage and one
            fewer on each later; with interleaving (arXiv:2205.05198, section 4.2 and appendix)
            chunks of layers of them, most of them first chunks; all m with GPipe
            (arXiv:1811.06965), pp with zero bubble H1 and 2 pp - 1 with H2
            (arXiv:2401.10241, table 1); in lock step what entered each layer, until the chunk's
            backward pass a tick after the next stage's, and with zero bubble the inputs and output
            gradients of pp - 1 microbatches' matmuls (`placement.pipeline.chunk_backward`)
working set one layer's recomputed activations, gathered weights, keys and values of other devices,
            and the logits
allocator   fragmentation, which a full caching allocator gives back, and the runtime's own context
"""

from __future__ import annotations

import dataclasses

import numpy as np

from cost_model.jobs import counts, layer
from cost_model.jobs.columns import GATHERED, RING, SCHEDULES, Jobs
from cost_model.jobs.constants import Constants

_FUSED_LOSS = 4.0
"""bytes alive per logit: bf16, and a copy while it is read."""
_EXPANDABLE = 1.01
"""peak over the live bytes where nothing fragments, as for buffers packed ahead of time."""
GPIPE, ZERO_BUBBLE_H1, ZERO_BUBBLE_H2 = (
    SCHEDULES.index(name) for name in ("gpipe", "zero_bubble_h1", "zero_bubble_h2")
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes [J] of the fullest device and of what fills it."""

    peak_bytes: np.ndarray
    states_bytes: np.ndarray
    activations_bytes: np.ndarray
    working_bytes: np.ndarray
    capacity_bytes: np.ndarray

    @property
    def fits(self) -> np.ndarray:
        return self.peak_bytes <= self.capacity_bytes


def kept_bytes(jobs: Jobs) -> tuple[np.ndarray, np.ndarray]:
    """[J] bytes that a mean layer keeps of one microbatch, and that it would keep with no remat."""
    t, tp = layer.tokens(jobs), jobs.tp
    whole = np.where(jobs.sp > 0, tp, 1.0)
    moe = jobs.n_moe_layers / jobs.n_layers
    keys = np.maximum(jobs.n_kv_heads, tp)
    qkv = (jobs.n_heads * jobs.head_dim + keys * (jobs.head_dim + jobs.v_head_dim)) / tp
    context = jobs.n_heads * jobs.v_head_dim / tp
    d = jobs.d_model / whole
    sparse = jobs.experts_per_token / tp
    up = jobs.n_up * ((1 - moe) * jobs.d_ff / tp + moe * jobs.moe_d_ff * sparse)
    shared = moe * jobs.shared_experts * jobs.moe_d_ff / tp
    up = up + jobs.n_up * shared
    inner = (1 - moe) * jobs.d_ff / tp + moe * jobs.moe_d_ff * sparse + shared
    dispatched = moe * sparse * jobs.d_model
    eager = np.where(jobs.compiled > 0, 1.0, 1.0 + 1.0 * jobs.fp32_pointwise)
    # narrow matmuls keep their inputs in the narrow type
    narrow = jobs.matmul_bytes / 2.0
    pointwise = (2.0 * d * eager + inner + dispatched) * narrow
    # dropout masks of the models before 2022: one byte an element, after attention and the MLP
    masks = np.where(jobs.fused_attention > 0, 0.0, d)
    scores = np.where(
        jobs.fused_attention > 0, 0.0, 5.0 * jobs.n_heads / tp * jobs.seq_len / jobs.cp / 2.0
    )
    parts = (
        (qkv, jobs.remat_qkv),
        (context * narrow, jobs.remat_core * (jobs.fused_attention > 0)),
        (scores, jobs.remat_core),
        (d, jobs.remat_out),
        (up, jobs.remat_up),
        (pointwise + masks, jobs.remat_pointwise),
    )
    kept = d + sum(size * (1 - share) for size, share in parts)
    full = d + sum(size for size, _ in parts)
    return 2.0 * t * kept, 2.0 * t * full


def put_off_bytes(jobs: Jobs) -> np.ndarray:
    """[J] bytes that the gradients of a mean layer's weights need of one microbatch: inputs and output
    gradients of its matmuls."""
    whole, moe = np.where(jobs.sp > 0, jobs.tp, 1.0), jobs.n_moe_layers / jobs.n_layers
    keys = np.maximum(jobs.n_kv_heads, jobs.tp)
    heads = jobs.n_heads * (jobs.head_dim + jobs.v_head_dim)
    attention = (heads + keys * (jobs.head_dim + jobs.v_head_dim)) / jobs.tp
    routed = jobs.experts_per_token
    width = (1 - moe) * jobs.d_ff + moe * (routed + jobs.shared_experts) * jobs.moe_d_ff
    mlp = (jobs.n_up + 1) * width / jobs.tp
    dispatched = moe * routed * 2 * jobs.d_model / jobs.tp
    cross = 1 + counts.cross_share(jobs)
    kept = 2 * jobs.d_model / whole * (1 + cross) + attention * cross + mlp + dispatched
    return 2.0 * layer.tokens(jobs) * kept


def _keys_held(jobs: Jobs) -> np.ndarray:
    """[J] bytes of keys and values of other devices, and of their gradients.

    gathered: both whole. ring: the block in use and the one that arrives, and in float32 gradients that
    are summed, that arrive and that are added. The published runs' are within the allocator's share.
    """
    whole = layer.key_bytes(jobs) * (jobs.cp > 1)
    ring, gathered = jobs.context_form == RING, jobs.context_form == GATHERED
    return np.select([ring, gathered], [whole / jobs.cp * (2 + 3 * 2), 2 * whole], 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _InFlight:
    """[J] microbatches that a chunk of one stage keeps activations of."""

    chunks: np.ndarray
    first: np.ndarray
    inner: np.ndarray
    """each of the chunks between the first and the last."""
    last: np.ndarray
    mean: np.ndarray

    def layers(self, middle: np.ndarray, lacking: np.ndarray, chunk: np.ndarray) -> np.ndarray:
        """[J] layers times microbatches of a stage that has `lacking` layers fewer than the `middle`
        ones, in a chunk of so many microbatches and, beyond what that holds, in the inner ones."""
        own = np.minimum(lacking, middle / self.chunks)
        return middle * self.mean - own * chunk - (lacking - own) * self.inner


def _in_flight(jobs: Jobs, rank: float | np.ndarray) -> _InFlight:
    """Of the stage `rank` (from 0): one more than the forward passes before its first backward pass.

    Interleaved 1F1B makes 2 (pp - rank - 1) + (vpp - 1) pp of them, each of one chunk, pp microbatches
    of a chunk in turn (github:NVIDIA/Megatron-LM, megatron/core/pipeline_parallel/schedules.py).
    """
    m, pp, chunks = counts.microbatches(jobs), jobs.pp, jobs.vpp
    gpipe, longer = jobs.schedule == GPIPE, jobs.schedule == ZERO_BUBBLE_H2
    after = pp - rank - 1
    plain = np.where(longer, 2 * after + 1, after + 1)
    plain = np.where(gpipe, m, plain)
    interleaved = (chunks > 1) & ~gpipe
    beyond = 2 * after + 1  # (vpp - 1) pp: of the last chunk, and then of the first one again

    def of(passes: np.ndarray) -> np.ndarray:
        return np.minimum(np.where(interleaved, passes, plain), m)

    return _InFlight(
        chunks=chunks,
        first=of(np.maximum(beyond, pp)),
        inner=of(pp),
        last=of(np.minimum(beyond, pp)),
        mean=of((beyond + (chunks - 1) * pp) / chunks),
    )


def memory(jobs: Jobs, constants: Constants) -> Memory:
    """Predict the peak of J jobs."""
    params = counts.parameters(jobs)
    family = jobs.device.family
    gathered = (jobs.zero_stage >= 2) & (jobs.fsdp > 1)
    entry = jobs.entry_layers * counts.entry_layer(jobs, params) / jobs.tp
    repeated = jobs.n_layers / counts.staged_layers(jobs)
    dense = params.dense_layer_mean(jobs) / jobs.tp * repeated
    dense = dense - entry / counts.staged_layers(jobs)
    experts = params.expert_layer_mean(jobs) / counts.expert_ways(jobs) * repeated
    table = params.embedding / jobs.tp + entry  # held by every stage
    head = params.head * (1 - jobs.tied) / jobs.tp
    head = np.where((jobs.tied > 0) & (jobs.pp > 1), params.head / jobs.tp, head)
    stages = counts.layers_per_stage(jobs)
    first, middle, last = stages.first, stages.middle, stages.last

    replicas = jobs.dp * jobs.cp
    expert_replicas = np.maximum(replicas * jobs.tp / counts.expert_ways(jobs), 1.0)

    def states(layers: np.ndarray, tables: np.ndarray) -> np.ndarray:
        def of(size: np.ndarray, ways: np.ndarray) -> np.ndarray:
            weight = jobs.weight_bytes / np.where(gathered & (jobs.zero_stage >= 3), jobs.fsdp, 1.0)
            gradient = jobs.grad_store_bytes / np.where(gathered, jobs.fsdp, 1.0)
            shards = np.where(gathered, jobs.fsdp, np.where(jobs.zero_stage >= 1, ways, 1.0))
            return size * (weight + gradient + jobs.master_bytes / shards)

        return of(layers * dense + tables, replicas) + of(layers * experts, expert_replicas)

    kept, full = kept_bytes(jobs)
    kept = kept * (1 - jobs.offload)
    m = counts.microbatches(jobs)
    on_first, on_second, on_last = (_in_flight(jobs, rank) for rank in (0.0, 1.0, jobs.pp - 1))
    redone = full - kept / np.maximum(1 - jobs.offload, 1e-6)
    # PyTorch prefetches a whole layer beside the one in use; XLA gathers weight by weight
    ahead = np.where(jobs.caching_allocator > 0, 2.0, 1.0)
    working = np.maximum(redone, 0.0) + np.where(
        gathered, ahead * (2.0 + jobs.grad_bytes / 2) * (dense + experts), 0.0
    )
    working = working + layer.tokens(jobs) * jobs.d_model * 2.0 * 2.0
    working = working + _keys_held(jobs)
    logit_bytes = constants.of("logit_bytes", family)
    logit_bytes = np.where(jobs.fused_loss > 0, np.minimum(_FUSED_LOSS, logit_bytes), logit_bytes)
    logits = layer.tokens(jobs) * jobs.vocab / jobs.tp * logit_bytes
    alone = jobs.pp <= 1
    # the layers that the first stage lacks are its first chunk's, which most microbatches are in
    act_first = kept * on_first.layers(middle, middle - first, on_first.first)
    act_last = kept * on_last.layers(middle, middle - last, on_last.last)
    lockstep = (jobs.lockstep > 0) & ~alone
    inputs = np.where(jobs.vpp > 1, 3 * jobs.pp * jobs.vpp, 2 * jobs.pp - 1)
    beside = 1.0 + (jobs.encoder_share > 0)  # the encoder's output
    kept_inputs = kept * beside * np.minimum(inputs, m * jobs.vpp) * middle / jobs.vpp
    kept_inputs = kept_inputs + kept * jobs.entry_layers
    zero_bubble = jobs.schedule == ZERO_BUBBLE_H1
    waiting = np.where(zero_bubble, np.minimum(jobs.pp - 1, m), 0.0)
    kept_inputs = kept_inputs + waiting * middle * put_off_bytes(jobs)
    act_first, act_last = (np.where(lockstep, kept_inputs, a) for a in (act_first, act_last))
    everywhere = alone | lockstep
    # fp32 gradients of the tables by one microbatch, from the loss and from the lookup
    working = working + np.where(lockstep, 2 * 4.0 * (table + head) - 4.0 * entry, 0.0)
    logits = np.where(lockstep, logits / jobs.pp, logits)
    table_gathered = np.where(gathered, 2.0 * (table + head), 0.0)
    tables = table + np.where(everywhere, head, 0.0)
    first_total = states(first, tables) + act_first + working
    # XLA reuses the loss's buffers for the layers; a caching allocator keeps blocks of both sizes
    loss = logits + table_gathered
    loss = np.where(jobs.caching_allocator > 0, loss, np.maximum(loss - working, 0.0))
    first_total = first_total + np.where(alone, loss, 0.0)
    # XLA holds the gathered new weights beside the old where optimizer state is split
    updates = 4.0 * (first * dense + tables) * (replicas > 1)
    updates = updates + 4.0 * first * experts * (expert_replicas > 1)
    updates = np.where(lockstep & (jobs.zero_stage >= 1) & ~gathered, updates, 0.0)
    first_total = np.maximum(first_total, states(first, tables) + act_first + updates)
    last_total = states(last, np.where(everywhere, tables, head)) + act_last
    last_total = last_total + np.maximum(logits, working)
    # where the first stage holds fewer layers, the second may be the fullest
    act_second = kept * middle * on_second.mean
    second_total = states(middle, np.zeros_like(table)) + act_second + working
    second_total = np.where((jobs.pp > 2) & ~lockstep, second_total, 0.0)
    totals = np.stack([first_total, last_total, second_total])
    peak, fullest = totals.max(axis=0), totals.argmax(axis=0)
    slack = constants.of("allocator_share", family)
    slack = np.where(jobs.expandable_segments > 0, np.minimum(slack, _EXPANDABLE), slack)
    context = constants.of("context_bytes", family)
    capacity = jobs.device.hbm_bytes
    # a caching allocator that meets the end of the memory gives back what it has cached
    flushed = np.where(jobs.caching_allocator > 0, np.maximum(peak + context, capacity), np.inf)
    return Memory(
        peak_bytes=np.minimum(peak * slack + context, flushed),
        states_bytes=np.choose(
            fullest,
            [states(first, tables), states(last, head), states(middle, np.zeros_like(table))],
        ),
        activations_bytes=np.choose(fullest, [act_first, act_last, act_second]),
        working_bytes=working,
        capacity_bytes=capacity,
    )
