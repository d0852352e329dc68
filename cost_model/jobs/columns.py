"""Whole training jobs as columns: J jobs side by side, so that thousands are scored at once.

A job is a model, a batch, a device and the degrees of every parallelism. Counts are formed from
these columns alone (`layer`, `memory`); seconds come after (`step`).
"""

from __future__ import annotations

import dataclasses
import typing

import numpy as np

from cost_model.jobs.hardware import DeviceColumns
from cost_model.jobs.shape import ModelShape

REMAT = ("none", "selective", "full")
SCHEDULES = ("1f1b", "gpipe", "zero_bubble_h1", "zero_bubble_h2")
"""Orders of forward and backward passes (`step`); 1F1B with vpp > 1 is the interleaved schedule."""
CONTEXT_FORMS = ("beside", "ring", "gathered")
"""How keys and values of a split sequence meet the queries (`pieces`). beside: as the published runs
are, whose traffic passes beside the attention core in their frameworks' kernels; ring and gathered:
as a step of `placement.pipeline` has them."""
RING, GATHERED = CONTEXT_FORMS.index("ring"), CONTEXT_FORMS.index("gathered")
DTYPE_BYTES = {"fp16": 2.0, "bf16": 2.0, "fp8": 1.0, "int8": 1.0, "mxfp8": 1.0, "nvfp4": 0.5}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Jobs:
    """J jobs. Every field is an array [J]; degrees and sizes are float64 whole numbers."""

    # model
    n_layers: np.ndarray
    d_model: np.ndarray
    n_heads: np.ndarray
    n_kv_heads: np.ndarray
    head_dim: np.ndarray
    v_head_dim: np.ndarray
    d_ff: np.ndarray
    """width of the dense MLP, 0 where no layer has one."""
    vocab: np.ndarray
    n_up: np.ndarray
    """up projections of an MLP: 2 gated, 1 plain."""
    tied: np.ndarray
    """1 where the head is the embedding."""
    n_experts: np.ndarray
    experts_per_token: np.ndarray
    moe_d_ff: np.ndarray
    shared_experts: np.ndarray
    n_moe_layers: np.ndarray
    expert_bias: np.ndarray
    """1 where experts have biases and clamped activations."""
    q_lora_rank: np.ndarray
    kv_lora_rank: np.ndarray
    qk_rope_dim: np.ndarray
    window: np.ndarray
    window_share: np.ndarray
    encoder_share: np.ndarray
    """share of the layers that are an encoder's: they see the whole sequence, and the others attend to
    their output as well; 0 for a decoder alone."""
    # batch
    seq_len: np.ndarray
    global_batch: np.ndarray
    """sequences in one optimizer step."""
    micro_batch: np.ndarray
    """sequences of one data-parallel rank in one forward pass; below 1 with context parallelism."""
    # layout
    n_devices: np.ndarray
    """JAX devices (two per chip on tpu7x)."""
    dp: np.ndarray
    """all ways that split the batch, the sharded ones included."""
    fsdp: np.ndarray
    """group inside dp * cp that shards states (and parameters with zero_stage 3); 1 for none."""
    zero_stage: np.ndarray
    tp: np.ndarray
    sp: np.ndarray
    """1: norms and residuals are sharded over tp along the sequence."""
    pp: np.ndarray
    vpp: np.ndarray
    """model chunks per stage of the interleaved schedule; 1 for plain 1F1B."""
    schedule: np.ndarray
    """index into SCHEDULES."""
    first_layers: np.ndarray
    """layers of the first stage, beside the embedding; -1: as the software divides them."""
    last_layers: np.ndarray
    """layers of the last stage, beside the head; -1 as above, 0: the head is alone."""
    lockstep: np.ndarray
    """1: stages run one SPMD program in lock step (`placement.pipeline`): every stage holds embedding
    and head and computes its share of the loss; it keeps what entered each layer and no more."""
    entry_layers: np.ndarray
    """of n_layers those before the first stage, which stages of such a program compute in turn, each
    whole microbatches; every stage holds their weights."""
    cp: np.ndarray
    context_form: np.ndarray
    """index into CONTEXT_FORMS; of no account where cp is 1."""
    ep: np.ndarray
    n_slices: np.ndarray
    """domains of the fast network that the job spans on TPUs."""
    # rematerialisation: the share of each part of a layer that is computed again
    remat_core: np.ndarray
    """softmax(QK)V."""
    remat_qkv: np.ndarray
    remat_out: np.ndarray
    remat_up: np.ndarray
    remat_down: np.ndarray
    remat_pointwise: np.ndarray
    """norms, activations, residuals."""
    offload: np.ndarray
    """share of the saved activations kept in host memory."""
    # numbers
    matmul_bytes: np.ndarray
    """bytes of an element in the matmuls: 2 bf16 / fp16, 1 fp8 / int8, 0.5 nvfp4."""
    scaled_blocks: np.ndarray
    """1 for block-scaled types (mxfp8, nvfp4), which quantise along both directions."""
    integer: np.ndarray
    """1 for int8 matmuls."""
    fp16: np.ndarray
    """1 for fp16 with loss scaling."""
    # software
    fused_attention: np.ndarray
    """1: scores stay on chip (flash attention); 0: they travel to memory and back."""
    compiled: np.ndarray
    """1: pointwise chains are fused by a compiler; 0: one kernel each."""
    tp_overlap: np.ndarray
    """1: tensor-parallel collectives run in chunks beside their matmuls."""
    dp_overlap: np.ndarray
    """1: gradient reduction runs beside the backward pass."""
    grad_bytes: np.ndarray
    """bytes of a gradient element as reduced."""
    grad_store_bytes: np.ndarray
    """bytes of a gradient element as kept until the optimizer step."""
    weight_bytes: np.ndarray
    """bytes of a weight element as stored."""
    master_bytes: np.ndarray
    """bytes per parameter of optimizer state: 12 for an fp32 copy and two moments."""
    attention_speed: np.ndarray
    """speed of the fused attention kernel against the best of its device."""
    engine_sync: np.ndarray
    """1: host and device wait for each other at every layer."""
    caching_allocator: np.ndarray
    """1: freed memory is cached and flushed when memory runs short."""
    expandable_segments: np.ndarray
    """1: that cache maps memory where it is needed, so that it does not fragment."""
    fused_loss: np.ndarray
    """1: the loss's gradient takes the place of the logits, in their type."""
    fused_experts: np.ndarray
    """1: grouped matmuls are fused with activation, quantisation and permutation."""
    expert_tp: np.ndarray
    """1: experts are split over the tensor ranks as well as over the expert ranks."""
    skips_last: np.ndarray
    """1: recomputation stops before a layer's last matmul."""
    staged_network: np.ndarray
    """1: network transfers pass through host memory."""
    fp32_pointwise: np.ndarray
    """1: an uncompiled program casts norms and rotary embeddings to fp32 and back."""
    cuda_graphs: np.ndarray
    """1: kernels are launched from a recorded graph."""
    # device
    device: DeviceColumns

    @property
    def n_jobs(self) -> int:
        return len(self.n_layers)

    def take(self, index: np.ndarray | slice) -> Jobs:
        """The jobs at these positions, repeated where an index repeats."""
        parts: dict[str, typing.Any] = {
            field.name: getattr(self, field.name)[index]
            for field in dataclasses.fields(self)
            if field.name != "device"
        }
        return Jobs(**parts, device=self.device.take(index))

    def replace(self, **columns: typing.Any) -> Jobs:
        """With some columns changed; scalars are spread over all jobs."""
        arrays = {
            name: np.broadcast_to(np.asarray(value, float), (self.n_jobs,)).copy()
            for name, value in columns.items()
        }
        return dataclasses.replace(self, **arrays)


def model_columns(shape: ModelShape) -> dict[str, float]:
    """The model's part of a job, as numbers by column name."""
    sparse = max(shape.n_layers - shape.first_dense_layers, 0) // shape.moe_period
    return {
        "n_layers": shape.n_layers,
        "d_model": shape.d_model,
        "n_heads": shape.n_heads,
        "n_kv_heads": shape.n_kv_heads,
        "head_dim": shape.head_dim,
        "v_head_dim": shape.v_head_dim,
        "d_ff": shape.d_ff,
        "vocab": shape.vocab,
        "n_up": 2.0 if shape.gated else 1.0,
        "tied": float(shape.tied),
        "n_experts": shape.n_experts,
        "experts_per_token": shape.experts_per_token,
        "moe_d_ff": shape.moe_d_ff,
        "shared_experts": shape.shared_experts,
        "n_moe_layers": float(sparse if shape.n_experts else 0),
        "expert_bias": float(shape.attention_bias and shape.n_experts > 0),
        "q_lora_rank": shape.q_lora_rank,
        "kv_lora_rank": shape.kv_lora_rank,
        "qk_rope_dim": shape.qk_rope_dim,
        "window": shape.window,
        "window_share": shape.window_share,
        "encoder_share": shape.encoder_layers / shape.n_layers,
    }


def stack(records: typing.Sequence[dict[str, float]], device: DeviceColumns) -> Jobs:
    """J records of numbers, one per job, as columns; every column must be there."""
    names = [f.name for f in dataclasses.fields(Jobs) if f.name != "device"]
    arrays = {name: np.array([record[name] for record in records], float) for name in names}
    return Jobs(**arrays, device=device)
