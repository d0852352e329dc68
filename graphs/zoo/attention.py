"""Softmax attention and its projections.

out[b, s, k, g] = sum_t softmax_t(scale q[b, s, k, g] . key[b, t, k] + bias) value[b, t, k]

B batch, S queries, T keys, K key heads, G queries per key head. The *naive* form holds the whole
score matrix [B, K, G, S, T]. The *chunked* form scans over blocks of C queries and recomputes each
in the backward pass, so it holds one block of scores. A block of a global layer takes every
(S / C)-th query: where the sequence is sharded, each device then has its share of every block, and
no more causal work than the others. A block of a local layer is contiguous and reads only the keys
that its windows touch. The *ring* is for a sequence that a mesh axis splits (`graphs.zoo.ring`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from graphs.errors import MeshwrightError
from graphs.zoo.config import ModelConfig
from graphs.zoo.layers import Norm, new_constant, new_weight, weight
from graphs.zoo.options import RunOptions
from graphs.zoo.positions import Rotary, alibi_slopes, relative_bucket, rotate
from graphs.zoo.ring import MASKED, Ring, ring_attention, ring_mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mask:
    """Which keys a query sees, and what position adds to the score."""

    causal: bool = True
    """Keys after the query are hidden."""
    window: int | None = None
    """Keys this far behind the query, or farther, are hidden."""
    alibi: bool = False
    """Linear bias per head."""
    relative_buckets: int = 0
    """> 0: T5 bias per head and bucket, read from a table [buckets, H]."""
    relative_max_distance: int = 128
    """See ModelConfig."""


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: Mask,
    options: RunOptions,
    scale: float,
    softcap: float | None = None,
    sink: jax.Array | None = None,
    relative_table: jax.Array | None = None,
) -> jax.Array:
    """q [B, S, H, hd], k [B, T, K, hd], v [B, T, K, vd] -> [B, S, H, vd]."""
    b, s, h, hd = q.shape
    t, kv = k.shape[1], k.shape[2]
    q = q.reshape(b, s, kv, h // kv, hd)
    if options.attention == "ring":
        if relative_table is not None:
            raise MeshwrightError(
                "attention=ring has no relative position buckets; use another attention"
            )
        out = _attend_on_ring(q, k, v, mask, options, scale, softcap, sink)
        return out.reshape(b, s, h, v.shape[-1])
    core = functools.partial(
        _attend_block,
        mask=mask,
        scale=scale,
        softcap=softcap,
        sink=sink,
        relative_table=relative_table,
    )
    positions = jnp.arange(t, dtype=jnp.int32)
    if not options.chunked(s):
        if options.remat == "attention":
            core = jax.checkpoint(core)
        out = core(q, k, v, jnp.arange(s, dtype=jnp.int32), positions)
        return out.reshape(b, s, h, v.shape[-1])

    chunk = options.query_chunk
    n_blocks = s // chunk
    n_keys = t
    if mask.causal and mask.window is not None and s == t:
        n_keys = min(t, -(-(mask.window + chunk) // chunk) * chunk)
    contiguous = n_keys < t
    split = (b, n_blocks, chunk) if contiguous else (b, chunk, n_blocks)
    block_axis = 1 if contiguous else 2
    blocks = jnp.moveaxis(q.reshape(*split, *q.shape[2:]), block_axis, 0)
    within = jnp.arange(chunk, dtype=jnp.int32)

    def body(_, xs):
        block, q_block = xs
        if not contiguous:
            return None, core(q_block, k, v, within * n_blocks + block, positions)
        query = within + block * chunk
        first_key = jnp.maximum((block + 1) * chunk - n_keys, 0)
        k_block = jax.lax.dynamic_slice_in_dim(k, first_key, n_keys, axis=1)
        v_block = jax.lax.dynamic_slice_in_dim(v, first_key, n_keys, axis=1)
        key = first_key + jnp.arange(n_keys, dtype=jnp.int32)
        return None, core(q_block, k_block, v_block, query, key)

    indices = jnp.arange(n_blocks, dtype=jnp.int32)
    _, out = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), None, (indices, blocks))
    return jnp.moveaxis(out, 0, block_axis).reshape(b, s, h, v.shape[-1])


def _attend_on_ring(q, k, v, mask, options, scale, softcap, sink) -> jax.Array:
    """q [B, S, K, G, hd], k [B, T, K, hd], v [B, T, K, vd] -> [B, S, K, G, vd]."""
    kv, group = q.shape[2:4]
    ring = Ring(
        mesh=ring_mesh(options.mesh_shape),
        zigzag=options.zigzag,
        query_block=options.query_chunk,
        causal=mask.causal,
        window=mask.window if mask.causal else None,
        scale=scale,
        softcap=softcap,
        slopes=tuple(alibi_slopes(kv * group)) if mask.alibi else None,
    )
    found: Any = ring_attention(ring, q, k, v)
    out, lse = found
    if sink is None:
        return out
    # one more term in the denominator: total / (total + e^sink)
    share = jax.nn.sigmoid(lse - sink.reshape(kv, group, 1))
    share = jnp.moveaxis(share, -1, 1)
    return (out.astype(jnp.float32) * share[..., None]).astype(out.dtype)


def _attend_block(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query: jax.Array,
    key: jax.Array,
    *,
    mask: Mask,
    scale: float,
    softcap: float | None,
    sink: jax.Array | None,
    relative_table: jax.Array | None,
) -> jax.Array:
    """q [B, S, K, G, hd], k [B, T, K, hd], v [B, T, K, vd] -> [B, S, K, G, vd].

    query int32 [S] and key int32 [T]: positions in the sequence.
    """
    n_kv, group = q.shape[2], q.shape[3]
    scores = jnp.einsum("bskgh,btkh->bkgst", q, k, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    s, t = scores.shape[-2:]
    query, key = query[:, None], key[None, :]
    if mask.alibi:
        slopes = jnp.asarray(alibi_slopes(n_kv * group), jnp.float32).reshape(n_kv, group, 1, 1)
        scores = scores + slopes * (key - query).astype(jnp.float32)
    if relative_table is not None:
        bucket = relative_bucket(
            key - query,
            causal=mask.causal,
            n_buckets=mask.relative_buckets,
            max_distance=mask.relative_max_distance,
        )
        bias = relative_table[bucket].transpose(2, 0, 1)
        scores = scores + bias.reshape(n_kv, group, s, t)
    if mask.causal:
        visible = key <= query
        if mask.window is not None:
            visible = visible & (key > query - mask.window)
        scores = jnp.where(visible, scores, MASKED)
    if sink is None:
        probabilities = jax.nn.softmax(scores, axis=-1)
    else:
        extra = sink.reshape(n_kv, group, 1, 1)
        peak = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), extra)
        peak = jax.lax.stop_gradient(peak)
        unnormalised = jnp.exp(scores - peak)
        total = jnp.sum(unnormalised, axis=-1, keepdims=True) + jnp.exp(extra - peak)
        probabilities = unnormalised / total
    return jnp.einsum("bkgst,btkh->bskgh", probabilities.astype(v.dtype), v)


class Attention(nnx.Module):
    """Multi-head, grouped-query or multi-query attention."""

    def __init__(
        self, config: ModelConfig, options: RunOptions, mask: Mask, *, rngs: nnx.Rngs
    ) -> None:
        self.config, self.options, self.mask = config, options, mask
        d_model, heads, kv, width = (
            config.d_model,
            config.n_heads,
            config.n_kv_heads,
            config.head_dim,
        )
        self.query = new_weight(rngs, (d_model, heads, width), d_model)
        self.key = new_weight(rngs, (d_model, kv, width), d_model)
        self.value = new_weight(rngs, (d_model, kv, width), d_model)
        self.output = new_weight(rngs, (heads, width, d_model), heads * width)
        if config.attention_bias:
            self.query_bias = new_constant((heads, width), 0.0)
            self.key_bias = new_constant((kv, width), 0.0)
            self.value_bias = new_constant((kv, width), 0.0)
        if config.output_bias:
            self.output_bias = new_constant((d_model,), 0.0)
        if config.qk_norm == "head":
            self.query_norm, self.key_norm = Norm(width, "rmsnorm"), Norm(width, "rmsnorm")
        elif config.qk_norm == "full":
            self.query_norm = Norm(heads * width, "rmsnorm")
            self.key_norm = Norm(kv * width, "rmsnorm")
        if config.attention_sink:
            self.sink = new_constant((heads,), 0.0)

    def __call__(
        self,
        x: jax.Array,
        rotary: Rotary | None,
        *,
        memory: jax.Array | None = None,
        relative_table: jax.Array | None = None,
    ) -> jax.Array:
        """x [B, S, D], memory [B, T, D] (cross-attention) or None -> [B, S, D]."""
        config, dtype = self.config, x.dtype
        source = x if memory is None else memory
        q = jnp.einsum("bsd,dhk->bshk", x, weight(self.query, dtype))
        k = jnp.einsum("bsd,dhk->bshk", source, weight(self.key, dtype))
        v = jnp.einsum("bsd,dhk->bshk", source, weight(self.value, dtype))
        if config.attention_bias:
            q = q + weight(self.query_bias, dtype)
            k = k + weight(self.key_bias, dtype)
            v = v + weight(self.value_bias, dtype)
        if config.qk_norm == "head":
            q, k = self.query_norm(q), self.key_norm(k)
        elif config.qk_norm == "full":
            q = self.query_norm(q.reshape(*q.shape[:2], -1)).reshape(q.shape)
            k = self.key_norm(k.reshape(*k.shape[:2], -1)).reshape(k.shape)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        out = attend(
            q,
            k,
            v,
            mask=self.mask,
            options=self.options,
            # T5 folds the scale into its initialisation (Raffel et al. 2020)
            scale=1.0 if config.position == "relative" else 1.0 / math.sqrt(config.head_dim),
            softcap=config.attention_softcap,
            sink=self.sink[...] if config.attention_sink else None,
            relative_table=relative_table,
        )
        out = jnp.einsum("bshk,hkd->bsd", out, weight(self.output, dtype))
        return out + weight(self.output_bias, dtype) if config.output_bias else out


class LatentAttention(nnx.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1)."""

    def __init__(
        self, config: ModelConfig, options: RunOptions, mask: Mask, *, rngs: nnx.Rngs
    ) -> None:
        self.config, self.options, self.mask = config, options, mask
        d_model, heads = config.d_model, config.n_heads
        q_rank, kv_rank = config.q_lora_rank, config.kv_lora_rank
        nope, rope, v_dim = config.qk_nope_dim, config.qk_rope_dim, config.v_head_dim
        self.query_down = new_weight(rngs, (d_model, q_rank), d_model)
        self.query_norm = Norm(q_rank, "rmsnorm")
        self.query_up = new_weight(rngs, (q_rank, heads, nope + rope), q_rank)
        self.kv_down = new_weight(rngs, (d_model, kv_rank), d_model)
        self.kv_norm = Norm(kv_rank, "rmsnorm")
        self.key_rope = new_weight(rngs, (d_model, rope), d_model)
        self.key_up = new_weight(rngs, (kv_rank, heads, nope), kv_rank)
        self.value_up = new_weight(rngs, (kv_rank, heads, v_dim), kv_rank)
        self.output = new_weight(rngs, (heads, v_dim, d_model), heads * v_dim)

    def __call__(self, x: jax.Array, rotary: Rotary | None) -> jax.Array:
        """[B, S, D] -> [B, S, D]."""
        config, dtype = self.config, x.dtype
        nope, rope = config.qk_nope_dim, config.qk_rope_dim
        q = self.query_norm(jnp.einsum("bsd,dr->bsr", x, weight(self.query_down, dtype)))
        q = jnp.einsum("bsr,rhk->bshk", q, weight(self.query_up, dtype))
        latent = self.kv_norm(jnp.einsum("bsd,dr->bsr", x, weight(self.kv_down, dtype)))
        k = jnp.einsum("bsr,rhk->bshk", latent, weight(self.key_up, dtype))
        v = jnp.einsum("bsr,rhk->bshk", latent, weight(self.value_up, dtype))
        k_rope = jnp.einsum("bsd,dk->bsk", x, weight(self.key_rope, dtype))[:, :, None, :]
        q_nope, q_rope = q[..., :nope], q[..., nope:]
        if rotary is not None:
            q_rope, k_rope = rotate(q_rope, rotary), rotate(k_rope, rotary)
        k_rope = jnp.broadcast_to(k_rope, (*k.shape[:3], rope))
        out = attend(
            jnp.concatenate([q_nope, q_rope], axis=-1),
            jnp.concatenate([k, k_rope], axis=-1),
            v,
            mask=self.mask,
            options=self.options,
            scale=1.0 / math.sqrt(nope + rope),
        )
        return jnp.einsum("bshk,hkd->bsd", out, weight(self.output, dtype))
