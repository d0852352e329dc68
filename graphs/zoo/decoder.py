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
from graphs.zoo.stack import LayerStack, run_layer


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
            x = run_layer(getattr(self, f"layer_{i}"), self.options, x, rotary)
        return x


def layer_stack(
    config: ModelConfig, options: RunOptions, segment: Segment, *, rngs: nnx.Rngs
) -> LayerStack:
    """The layers of a segment."""

    def create(rngs: nnx.Rngs) -> nnx.Module:
        if len(segment.kinds) == 1:
            return Layer(config, options, segment.kinds[0], rngs=rngs)
        return Period(config, options, segment.kinds, rngs=rngs)

    return LayerStack(
        create, segment.repeats, options, rematerialise=len(segment.kinds) == 1, rngs=rngs
    )


def rotary_of(config: ModelConfig, options: RunOptions, seq_len: int) -> Rotary | None:
    """Rotary tables of a decoder's layers, slots in the options' order; None if it has no such."""
    if config.position != "rope":
        return None
    width = config.qk_rope_dim if config.attention == "mla" else config.head_dim
    return rotary_tables(seq_len, width, config.rope_theta, options.order(seq_len))


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
            setattr(self, segment.name, layer_stack(config, options, segment, rngs=rngs))
        self.final_norm = Norm(d_model, config.norm)
        if not config.tied_embeddings:
            self.head = new_weight(rngs, (d_model, vocab), d_model)

    def hidden(self, tokens: jax.Array) -> jax.Array:
        """int32 [B, S] -> [B, S, D], what the head reads."""
        x, rotary = self.embed(tokens), self.rotary(tokens.shape[1])
        for segment in self.config.segments():
            x = getattr(self, segment.name)(x, rotary)
        return self.final_norm(x)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """int32 [B, S] -> [B, S, D], what the first layer reads; S in the options' order."""
        config, dtype = self.config, jnp.dtype(self.options.compute_dtype)
        x = weight(self.embedding, dtype)[tokens]
        if config.scale_embeddings:
            x = x * jnp.asarray(math.sqrt(config.d_model), dtype)
        if config.position == "learned":
            order = self.options.order(tokens.shape[1])
            which = slice(tokens.shape[1]) if order is None else order
            x = x + weight(self.position_embedding, dtype)[which]
        return self.embedding_norm(x) if config.embedding_norm else x

    def rotary(self, seq_len: int) -> Rotary | None:
        """Rotary tables of the layers, where the model has rotary positions."""
        return rotary_of(self.config, self.options, seq_len)

    def head_weight(self) -> jax.Array:
        """[D, V] in the compute type."""
        dtype = jnp.dtype(self.options.compute_dtype)
        if self.config.tied_embeddings:
            return weight(self.embedding, dtype).T
        return weight(self.head, dtype)
