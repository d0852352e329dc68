"""Seconds of the parts of one transformer layer, forward, backward and recomputed, on J devices.

t tokens of one microbatch are on a device. Matmuls: qkv (D -> (H + 2 K) h / tp), out, up, down, the
experts' grouped matmuls. Attention core: 4 t s H h flops forward, half of it causal; with scores
kept on chip (arXiv:2307.08691) the backward pass recomputes them, 2.5 times the forward flops; with
scores in memory (before 2022) each score element is moved by softmax, mask and dropout kernels,
13 bytes forward and 19 backward (arXiv:2205.05198, section 4, counts the same tensors).
Pointwise: norms, residuals, activations and rotary embeddings at two bytes an element.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from cost_model.jobs.columns import GATHERED, RING, Jobs
from cost_model.jobs.constants import Constants
from cost_model.jobs.counts import cross_share
from cost_model.jobs.matmul import linear_s, matmul_s

SCORE_BYTES_FORWARD = 13.0
SCORE_BYTES_BACKWARD = 19.0
FLASH_BACKWARD = 2.5
LOGIT_BYTES = 26.0
"""bytes moved per logit: written in bf16, cast to fp32, reduced, exponentiated, its gradient."""
# kernels of a layer's forward pass: fused by a compiler, or one by one; what an expert layer adds
_KERNELS_COMPILED, _KERNELS_EAGER, _KERNELS_EXPERT = 16.0, 28.0, 40.0
_ATTENTION_BLOCK, _ATTENTION_BLOCK_TPU = 256.0, 3072.0
"""keys beyond the window that a kernel's blocks of queries and keys cover: blocks of 128 on GPUs,
of 2048 by 2048 (1024 of them masked off on average) in splash attention."""
_NVFP4_GAIN = 1.6
"""nvfp4 over fp8 in a job: twice the rate, with the first and last layers in bf16."""
_EXPERT_TILE = 128.0
"""rows of a grouped matmul that are wasted where one expert's rows end."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Seconds [J] of a part of a layer for one microbatch."""

    forward: np.ndarray
    backward: np.ndarray
    redone: np.ndarray
    """forward work done again in the backward pass."""

    def __add__(self, other: Part) -> Part:
        return Part(
            forward=self.forward + other.forward,
            backward=self.backward + other.backward,
            redone=self.redone + other.redone,
        )

    def __mul__(self, count: np.ndarray | float) -> Part:
        return Part(
            forward=self.forward * count,
            backward=self.backward * count,
            redone=self.redone * count,
        )

    @property
    def total(self) -> np.ndarray:
        return self.forward + self.backward + self.redone


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """What a device sustains, [J] each."""

    matmul: np.ndarray
    """flops/s of wide matmuls in the job's matmul type."""
    matmul16: np.ndarray
    """flops/s of wide matmuls in bf16."""
    grouped: np.ndarray
    """flops/s of wide matmuls in the job's type where many small operands are quantised."""
    hbm: np.ndarray
    """bytes/s."""


def rates(jobs: Jobs, constants: Constants) -> Rates:
    """Sustained rates of each job's device."""
    d = jobs.device
    wide = d.matmul_flops_per_s * constants.of("matmul_share", d.family)
    low = jobs.matmul_bytes < 2
    gain = np.where(jobs.integer > 0, d.integer_gain, d.low_precision_gain) * np.where(
        jobs.matmul_bytes < 1, _NVFP4_GAIN, 1.0
    )
    kept = 1 + (gain - 1) * constants.of("low_precision_share", d.family)
    kept_grouped = 1 + (gain - 1) * constants.of("expert_low_precision_share", d.family)
    return Rates(
        grouped=np.where(low, wide * kept_grouped, wide),
        matmul=np.where(low, wide * kept, wide),
        matmul16=wide,
        hbm=d.hbm_bytes_per_s * constants.of("hbm_share", d.family),
    )


def tokens(jobs: Jobs) -> np.ndarray:
    """[J] tokens of one microbatch on a device, before any sharding over tp."""
    return jobs.micro_batch * jobs.seq_len / jobs.cp


def key_bytes(jobs: Jobs) -> np.ndarray:
    """[J] bytes of a layer's keys and values, two each, of one microbatch's whole sequences."""
    heads = np.maximum(jobs.n_kv_heads / jobs.tp, 1.0)
    return 2.0 * tokens(jobs) * jobs.cp * heads * (jobs.head_dim + jobs.v_head_dim)


def _how(jobs: Jobs, rate: Rates, constants: Constants, *, low: bool) -> dict[str, np.ndarray]:
    return {
        "flops_per_s": rate.matmul if low else rate.matmul16,
        "hbm_bytes_per_s": rate.hbm,
        "sm_count": jobs.device.sm_count,
        "array_width": jobs.device.array_width,
        "fill_k": constants.of("fill_k", jobs.device.family),
        "element_bytes": jobs.matmul_bytes if low else np.full(jobs.n_jobs, 2.0),
    }


def _linear(t, n, k, how, redo) -> Part:
    forward, backward = linear_s(t, n, k, **how)
    return Part(forward=forward, backward=backward, redone=forward * redo)


def projections(jobs: Jobs, rate: Rates, constants: Constants) -> Part:
    """Query, key, value and output projections, latent attention's where it is used."""
    how = _how(jobs, rate, constants, low=True)
    t, d, tp = tokens(jobs), jobs.d_model, jobs.tp
    keys = np.maximum(jobs.n_kv_heads / tp, np.minimum(jobs.n_kv_heads, 1.0))
    width = (jobs.n_heads / tp) * jobs.head_dim + keys * (jobs.head_dim + jobs.v_head_dim)
    plain = _linear(t, width, d, how, jobs.remat_qkv)
    out = _linear(t, d, jobs.n_heads * jobs.v_head_dim / tp, how, jobs.remat_out)
    latent = jobs.kv_lora_rank > 0
    if not latent.any():
        return (plain + out) * (1 + cross_share(jobs))
    q_rank = np.maximum(jobs.q_lora_rank, 1.0)
    kv_rank = np.maximum(jobs.kv_lora_rank, 1.0)
    nope = jobs.head_dim - jobs.qk_rope_dim
    low_rank = (
        _linear(t, q_rank, d, how, jobs.remat_qkv)
        + _linear(t, jobs.n_heads * jobs.head_dim / tp, q_rank, how, jobs.remat_qkv)
        + _linear(t, kv_rank + jobs.qk_rope_dim, d, how, jobs.remat_qkv)
        + _linear(t, jobs.n_heads * (nope + jobs.v_head_dim) / tp, kv_rank, how, jobs.remat_qkv)
    )
    return (_choose(latent, low_rank, plain) + out) * (1 + cross_share(jobs))


def core(jobs: Jobs, rate: Rates, constants: Constants) -> Part:
    """softmax(Q K^T) V of the heads and the part of the sequence that a device holds."""
    heads = jobs.n_heads / jobs.tp
    s = jobs.seq_len
    beyond = np.where(jobs.device.array_width > 0, _ATTENTION_BLOCK_TPU, _ATTENTION_BLOCK)
    window = np.where(jobs.window > 0, np.minimum(jobs.window + beyond, s), s)
    seen_window = window - window * window / (2 * s)
    # queries of a split sequence that meet gathered keys meet the hidden ones too
    everything = (jobs.context_form == GATHERED) & (jobs.cp > 1)
    causal = np.where(everything, s, s / 2)
    seen = jobs.window_share * seen_window + (1 - jobs.window_share) * causal
    # half the sequence in a causal layer, all of it in an encoder's and in attention to its output
    whole = np.where(everything, 1.0, 1 + jobs.encoder_share)
    seen = seen * (whole + np.where(everything, 1.0, 2.0) * cross_share(jobs))
    width = jobs.head_dim + jobs.v_head_dim
    flops = 2.0 * tokens(jobs) * seen * heads * width
    share = constants.of("attention_share", jobs.device.family) * jobs.attention_speed
    # a head narrower than the matmul unit wastes part of it; a short sequence does not fill it
    array = np.maximum(jobs.device.array_width, 1.0)
    padded = np.ceil(jobs.head_dim / array) * array
    narrow = np.where(
        jobs.device.array_width > 0,
        jobs.head_dim / padded,
        1.25 * jobs.head_dim / (jobs.head_dim + 32.0),
    )
    block = np.where(jobs.context_form == RING, s / jobs.cp, s)  # a ring meets block after block
    share = share * narrow * block / (block + 512.0)
    fused = flops / (rate.matmul16 * share)
    flash = Part(forward=fused, backward=fused * FLASH_BACKWARD, redone=fused * jobs.remat_core)
    if jobs.fused_attention.all():
        return flash
    how = _how(jobs, rate, constants, low=False)
    # rows that do not start on 16 bytes keep a batched matmul off the fast matrix kernels
    aligned = np.mod(jobs.head_dim, 8.0) == 0
    how["flops_per_s"] = how["flops_per_s"] * np.where(
        aligned, 1.0, constants.of("unaligned_share", jobs.device.family)
    )
    count = jobs.micro_batch * heads / jobs.cp
    scores = matmul_s(s, s, jobs.head_dim, batch=count, **how)
    values = matmul_s(s, jobs.v_head_dim, s, batch=count, **how)
    traffic = count * s * s / rate.hbm
    forward = scores + values + SCORE_BYTES_FORWARD * traffic
    backward = 2 * (scores + values) + SCORE_BYTES_BACKWARD * traffic
    stored = Part(forward=forward, backward=backward, redone=forward * jobs.remat_core)
    return _choose(jobs.fused_attention > 0, flash, stored)


def dense_mlp(jobs: Jobs, rate: Rates, constants: Constants) -> Part:
    how = _how(jobs, rate, constants, low=True)
    t, d, f = tokens(jobs), jobs.d_model, jobs.d_ff / jobs.tp
    return _linear(t, jobs.n_up * f, d, how, jobs.remat_up) + _linear(t, d, f, how, jobs.remat_down)


def expert_mlp(jobs: Jobs, rate: Rates, constants: Constants) -> Part:
    """Grouped matmuls of the experts on a device, the shared experts, routing of the tokens.

    Balanced routing: each expert of an expert-parallel group sees the group's tokens times the
    experts per token over the number of experts.
    """
    how = _how(jobs, rate, constants, low=True)
    # tensor ranks either split the tokens or, with experts split over them, the experts' width
    split = np.where(jobs.expert_tp > 0, jobs.tp, 1.0)
    t, d, f = tokens(jobs) * split / jobs.tp, jobs.d_model, jobs.moe_d_ff / split
    experts = np.maximum(jobs.n_experts, 1.0)
    here = np.maximum(experts / jobs.ep, 1.0)
    rows = t * np.maximum(jobs.experts_per_token, 1.0) * jobs.ep / experts
    share = constants.of("expert_share", jobs.device.family) * rows / (rows + _EXPERT_TILE)
    # the tiles of a narrow expert are few: the kernel moves on before it is in its stride
    wide = np.maximum(f, 1.0)
    share = share * wide / (wide + constants.of("expert_half_width", jobs.device.family))
    gain = np.where(jobs.fused_experts > 0, constants.of("expert_gain", jobs.device.family), 1.0)
    share = share * gain
    grouped = {**how, "flops_per_s": rate.grouped * share}
    routed = _grouped(rows, jobs.n_up * f, d, here, grouped, jobs.remat_up) + _grouped(
        rows, d, f, here, grouped, jobs.remat_down
    )
    shared_width = jobs.shared_experts * f
    shared = _linear(t, jobs.n_up * np.maximum(shared_width, 1.0), d, how, jobs.remat_up) + _linear(
        t, d, np.maximum(shared_width, 1.0), how, jobs.remat_down
    )
    copies = t * jobs.experts_per_token * d * 2.0
    moved = constants.of("routing_traffic", jobs.device.family) * copies * 6.0 / rate.hbm / gain
    routing = Part(forward=moved, backward=moved, redone=moved * jobs.remat_pointwise * 0.5)
    # biases and clamped activations of the experts are kernels of their own: ten more passes
    passes = 2.0 * (jobs.n_up + 1) + 20.0 * jobs.n_up * jobs.expert_bias
    activation = t * jobs.experts_per_token * passes * f / rate.hbm
    pointwise = Part(
        forward=activation, backward=2 * activation, redone=activation * jobs.remat_pointwise
    )
    return routed + shared * np.minimum(shared_width, 1.0) + routing + pointwise


def pointwise(jobs: Jobs, rate: Rates, constants: Constants) -> Part:
    """Norms, residuals, rotary embedding, dense activation; bytes over the memory bandwidth."""
    t = tokens(jobs)
    spread = np.where(jobs.sp > 0, jobs.tp, 1.0)
    norms = 20.0 * t * jobs.d_model / spread
    rotary = 4.0 * t * (jobs.n_heads + jobs.n_kv_heads) * jobs.head_dim / jobs.tp
    dense_share = 1 - jobs.n_moe_layers / jobs.n_layers
    active = 2.0 * (jobs.n_up + 1) * t * jobs.d_ff / jobs.tp * dense_share
    # quantising a matmul's operands: read two bytes, write one, once or along both directions
    low = np.where(jobs.matmul_bytes < 2, 3.0 + 1.0 * jobs.scaled_blocks, 0.0)
    casts = low * t * (2 * jobs.d_model + (jobs.d_ff * dense_share) / jobs.tp)
    eager = constants.of("eager_traffic", jobs.device.family)
    one_by_one = jobs.compiled == 0
    wide = np.where(one_by_one & (jobs.fp32_pointwise > 0), 3.0, 1.0)
    moved = np.where(
        one_by_one, ((norms + rotary) * wide + active) * eager, norms + rotary + active
    )
    forward = (moved + casts) / rate.hbm
    forward = forward + kernels(jobs) * constants.of("kernel_gap_s", jobs.device.family)
    return Part(forward=forward, backward=2 * forward, redone=forward * jobs.remat_pointwise)


def kernels(jobs: Jobs) -> np.ndarray:
    """[J] kernels of one layer's forward pass."""
    dense = np.where(jobs.compiled > 0, _KERNELS_COMPILED, _KERNELS_EAGER)
    return dense + _KERNELS_EXPERT * jobs.n_moe_layers / jobs.n_layers


def head(jobs: Jobs, rate: Rates, constants: Constants) -> Part:
    """Final projection and cross-entropy on the last stage."""
    how = _how(jobs, rate, constants, low=False)
    t = tokens(jobs)
    logits = _linear(t, jobs.vocab / jobs.tp, jobs.d_model, how, 0.0)
    moved = LOGIT_BYTES * t * jobs.vocab / jobs.tp / rate.hbm
    return logits + Part(forward=0.5 * moved, backward=0.5 * moved, redone=np.zeros_like(moved))


def _grouped(rows, n, k, count, how, redo) -> Part:
    """`count` matmuls side by side: tiles of one expert, rounds shared by all."""
    forward = matmul_s(rows, n, k, batch=count, **how)
    backward = matmul_s(rows, k, n, batch=count, **how) + matmul_s(k, n, rows, batch=count, **how)
    return Part(forward=forward, backward=backward, redone=forward * redo)


def _choose(where: np.ndarray, yes: Part, no: Part) -> Part:
    return Part(
        forward=np.where(where, yes.forward, no.forward),
        backward=np.where(where, yes.backward, no.backward),
        redone=np.where(where, yes.redone, no.redone),
    )
