"""The configurable decoder: embedding, layers scanned or unrolled, final norm, head."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from graphs.zoo.attention import Attention, LatentAttention, Mask
from graphs.zoo.config import LayerKind, ModelConfig, Segment
from graphs.zoo.layers import FeedForward, Norm, new_weight, weight
from graphs.zoo.moe import ExpertFeedForward
from graphs.zoo.options import RunOptions
from graphs.zoo.positions import Rotary, rotary_tables


def checkpoint(body, options: RunOptions):
    """The layer under the remat policy; `attention` checkpoints inside the layer instead."""
    if options.remat in ("none", "attention"):
        return body
    policy = None
    if options.remat == "dots":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(body, policy=policy, prevent_cse=not options.scan)


class Layer(nnx.Module):
    """Attention and feed-forward, each added to the residual stream."""

    def __init__(
        self, config: ModelConfig, options: RunOptions, kind: LayerKind, *, rngs: nnx.Rngs
    ) -> None:
        self.config = config
        mask = Mask(window=kind.window, alibi=config.position == "alibi")
        attention = LatentAttention if config.attention == "mla" else Attention
        self.attention = attention(config, options, mask, rngs=rngs)
        if kind.moe:
            self.experts = ExpertFeedForward(config, options, rngs=rngs)
        else:
            self.mlp = FeedForward(config, config.d_ff, rngs=rngs)
        self.moe = kind.moe
        if config.norm_placement != "post":
            self.attention_norm = Norm(config.d_model, config.norm)
            if not config.parallel_block or config.norm == "layernorm":
                self.mlp_norm = Norm(config.d_model, config.norm)
        if config.norm_placement != "pre":
            self.attention_post_norm = Norm(config.d_model, config.norm)
            self.mlp_post_norm = Norm(config.d_model, config.norm)

    def __call__(self, x: jax.Array, rotary: Rotary | None) -> jax.Array:
        """[B, S, D] -> [B, S, D]."""
        config = self.config
        pre, post = config.norm_placement != "post", config.norm_placement != "pre"
        feed_forward = self.experts if self.moe else self.mlp
        if config.parallel_block:
            read = self.attention_norm(x)
            mlp_read = self.mlp_norm(x) if config.norm == "layernorm" else read
            return x + self.attention(read, rotary) + feed_forward(mlp_read)
        out = self.attention(self.attention_norm(x) if pre else x, rotary)
        x = x + (self.attention_post_norm(out) if post else out)
        out = feed_forward(self.mlp_norm(x) if pre else x)
        return x + (self.mlp_post_norm(out) if post else out)


class Period(nnx.Module):
    """The layers that a scan repeats, where they are of several kinds."""

    def __init__(
        self,
        config: ModelConfig,
        options: RunOptions,
        kinds: tuple[LayerKind, ...],
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self.options, self.n_layers = options, len(kinds)
        for i, kind in enumerate(kinds):
            setattr(self, f"layer_{i}", Layer(config, options, kind, rngs=rngs))

    def __call__(self, x: jax.Array, rotary: Rotary | None) -> jax.Array:
        for i in range(self.n_layers):
            x = run_layer(getattr(self, f"layer_{i}"), x, rotary, self.options)
        return x


def run_layer(layer: nnx.Module, x: jax.Array, *args) -> jax.Array:
    """One layer under its remat policy; its weights are saved as they are, not as copies."""
    *args, options = args
    graphdef, state = nnx.split(layer)

    def body(params, x):
        return nnx.merge(graphdef, params)(x, *args)

    return checkpoint(body, options)(state, x)


class Stack(nnx.Module):
    """The layers of a segment with stacked weights [repeats, ...], or one attribute for each."""

    def __init__(
        self, config: ModelConfig, options: RunOptions, segment: Segment, *, rngs: nnx.Rngs
    ) -> None:
        self.options, self.segment = options, segment

        def create(rngs: nnx.Rngs) -> nnx.Module:
            if len(segment.kinds) == 1:
                return Layer(config, options, segment.kinds[0], rngs=rngs)
            return Period(config, options, segment.kinds, rngs=rngs)

        if options.scan and segment.repeats > 1:
            stacked = nnx.vmap(create, in_axes=0, out_axes=0)
            self.layer = nnx.split_rngs(splits=segment.repeats)(stacked)(rngs)
        else:
            for i in range(segment.repeats):
                setattr(self, f"layer_{i:03d}", create(rngs))

    def __call__(self, x: jax.Array, rotary: Rotary | None) -> jax.Array:
        one_kind = len(self.segment.kinds) == 1
        if not (self.options.scan and self.segment.repeats > 1):
            for i in range(self.segment.repeats):
                layer = getattr(self, f"layer_{i:03d}")
                if one_kind:
                    x = run_layer(layer, x, rotary, self.options)
                else:
                    x = layer(x, rotary)
            return x
        graphdef, state = nnx.split(self.layer)

        def body(x, params):
            return nnx.merge(graphdef, params)(x, rotary), None

        body = checkpoint(body, self.options) if one_kind else body
        return jax.lax.scan(body, x, state)[0]


class Decoder(nnx.Module):
    """A decoder-only language model."""

    def __init__(self, config: ModelConfig, options: RunOptions, *, rngs: nnx.Rngs) -> None:
        self.config, self.options = config, options
        d_model, vocab = config.d_model, config.vocab_size
        self.embedding = new_weight(rngs, (vocab, d_model), d_model)
        if config.position == "learned":
            self.position_embedding = new_weight(rngs, (config.seq_len, d_model), d_model)
        if config.embedding_norm:
            self.embedding_norm = Norm(d_model, config.norm)
        for segment in config.segments():
            setattr(self, segment.name, Stack(config, options, segment, rngs=rngs))
        self.final_norm = Norm(d_model, config.norm)
        if not config.tied_embeddings:
            self.head = new_weight(rngs, (d_model, vocab), d_model)

    def hidden(self, tokens: jax.Array) -> jax.Array:
        """int32 [B, S] -> [B, S, D], what the head reads."""
        config, dtype = self.config, jnp.dtype(self.options.compute_dtype)
        seq_len = tokens.shape[1]
        x = weight(self.embedding, dtype)[tokens]
        if config.scale_embeddings:
            x = x * jnp.asarray(math.sqrt(config.d_model), dtype)
        if config.position == "learned":
            x = x + weight(self.position_embedding, dtype)[:seq_len]
        if config.embedding_norm:
            x = self.embedding_norm(x)
        rotary = None
        if config.position == "rope":
            width = config.qk_rope_dim if config.attention == "mla" else config.head_dim
            rotary = rotary_tables(seq_len, width, config.rope_theta)
        for segment in config.segments():
            x = getattr(self, segment.name)(x, rotary)
        return self.final_norm(x)

    def head_weight(self) -> jax.Array:
        """[D, V] in the compute type."""
        dtype = jnp.dtype(self.options.compute_dtype)
        if self.config.tied_embeddings:
            return weight(self.embedding, dtype).T
        return weight(self.head, dtype)
