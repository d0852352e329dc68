"""A job from a model, a cluster and a batch: what a search needs, before any degrees."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from cost_model.cluster import parse_cluster
from cost_model.jobs import shape as shapes
from cost_model.jobs.columns import DTYPE_BYTES, RING, Jobs, model_columns
from cost_model.jobs.runs import jobs_of, read_row
from graphs.errors import MeshwrightError

if TYPE_CHECKING:
    from graphs.zoo.config import ModelConfig

OPTIMIZER_STATES = {"float32": 0.0, "bfloat16": 4.0, "adafactor": 7.9}
"""Types of the optimizer's state, and the bytes a parameter that each saves against two fp32
moments; Adafactor (arXiv:1804.04235) keeps row and column means in their place."""
_DEVICE = {"v4_megacore": "v4"}


def shape_of(config: ModelConfig) -> shapes.ModelShape:
    """The dimensions of a model configuration that a job needs."""
    mla = config.attention == "mla"
    kinds = config.layer_kinds()
    dense = not all(kind.moe for kind in kinds)
    windowed = sum(kind.window is not None for kind in kinds)
    return shapes.ModelShape(
        name=config.name,
        n_layers=config.encoder_layers + config.n_layers,
        encoder_layers=config.encoder_layers,
        d_model=config.d_model,
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        head_dim=config.qk_nope_dim + config.qk_rope_dim if mla else config.head_dim,
        v_head_dim=config.v_head_dim if mla else config.head_dim,
        d_ff=config.d_ff if dense else 0,
        vocab=config.vocab_size,
        gated=config.gated,
        tied=config.tied_embeddings,
        n_experts=config.n_experts,
        experts_per_token=config.experts_per_token,
        moe_d_ff=config.moe_d_ff,
        shared_experts=config.shared_experts,
        first_dense_layers=config.first_dense_layers if config.n_experts else 0,
        moe_period=config.moe_every if config.n_experts else 1,
        attention_bias=config.attention_bias,
        q_lora_rank=config.q_lora_rank if mla else 0,
        kv_lora_rank=config.kv_lora_rank if mla else 0,
        qk_rope_dim=config.qk_rope_dim if mla else 0,
        window=config.sliding_window or 0,
        window_share=windowed / config.n_layers,
        seq_len_default=config.seq_len,
    )


def describe_job(
    model: str | shapes.ModelShape,
    *,
    cluster: str,
    global_batch: int,
    seq_len: int,
    dtype: str = "bf16",
    optimizer_state: str = "float32",
) -> Jobs:
    """One job in a JAX program, fully sharded over the cluster until a search changes that.

    Args:
      model: a model of the zoo (`cost_model.jobs.shape.zoo`), by its name there or one like it, or
        its dimensions (`shape_of`).
      cluster: in the cluster notation, ``v5p:8x8x16`` or ``h100:8x64``.
      global_batch: sequences of one optimizer step.
      seq_len: tokens of a sequence.
      dtype: of the matmuls: bf16, fp16, fp8, int8, mxfp8 or nvfp4.
      optimizer_state: one of OPTIMIZER_STATES.

    Raises:
      MeshwrightError: an unknown model, cluster or type, or a batch that no degrees divide.
    """
    known = shapes.find(model) if isinstance(model, str) else model
    if known is None:
        near = ", ".join(sorted(shapes.zoo()))
        raise MeshwrightError(f"model {model!r} is not in the zoo; use one of {near}")
    if optimizer_state not in OPTIMIZER_STATES:
        raise MeshwrightError(
            f"optimizer state {optimizer_state!r} is not known; use one of "
            f"{', '.join(OPTIMIZER_STATES)}"
        )
    if dtype not in DTYPE_BYTES:
        raise MeshwrightError(f"dtype {dtype!r} is not known; use one of {', '.join(DTYPE_BYTES)}")
    if global_batch < 1 or seq_len < 1:
        raise MeshwrightError(
            f"a batch of {global_batch} sequences of {seq_len} tokens is empty; give at least 1"
        )
    found = parse_cluster(cluster)
    devices = found.n_devices
    dp = devices
    while dp > 1 and global_batch % dp:
        dp = next(d for d in range(dp - 1, 0, -1) if devices % d == 0)
    rest = devices // dp
    heads = known.n_heads
    tp = max(t for t in range(1, rest + 1) if rest % t == 0 and heads % t == 0)
    if seq_len % (rest // tp):
        raise MeshwrightError(
            f"a batch of {global_batch} sequences cannot be spread over {devices} devices; "
            "give a larger batch or fewer devices"
        )
    chips = devices / found.device.jax_devices_per_chip
    run, faults = read_row(
        1,
        {
            "id": known.name,
            "source": "maxtext",
            "model_name": known.name,
            "n_layers": str(known.n_layers),
            "d_model": str(known.d_model),
            "n_heads": str(known.n_heads),
            "n_kv_heads": str(known.n_kv_heads),
            "d_ff": str(known.d_ff or known.moe_d_ff),
            "vocab": str(known.vocab),
            "hardware": _DEVICE.get(found.device.name, found.device.name),
            "seq_len": str(seq_len),
            "global_batch_seqs": str(global_batch),
            "micro_batch_seqs": f"{global_batch / dp:g}",
            "n_devices": f"{chips:g}",
            "dp": str(dp),
            "tp": str(tp),
            "cp": str(rest // tp),
            "pp": "1",
            "zero_stage": "3",
            "recompute": "full",
            "dtype": dtype,
            "notes": f"{found.n_slices} slices",
        },
    )
    if faults or run.record is None:
        problem = str(faults[0]) if faults else re.sub(r"\s+", " ", run.reason)
        raise MeshwrightError(f"job {known.name!r} on {cluster!r} cannot be described: {problem}")
    job = jobs_of([run])
    saved = OPTIMIZER_STATES[optimizer_state]
    return job.replace(
        **model_columns(known), master_bytes=job.master_bytes - saved, context_form=RING
    )
