"""The T5 (v1.1) encoder-decoder: relative positions, cross-attention, shared token embedding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from graphs.zoo.attention import Attention, Mask
from graphs.zoo.config import ModelConfig
from graphs.zoo.layers import FeedForward, Norm, new_weight, weight
from graphs.zoo.options import RunOptions
from graphs.zoo.stack import LayerStack


class EncoderLayer(nnx.Module):
    """Bidirectional attention and feed-forward."""

    def __init__(self, config: ModelConfig, options: RunOptions, *, rngs: nnx.Rngs) -> None:
        self.attention_norm = Norm(config.d_model, config.norm)
        self.attention = Attention(config, options, _mask(config, causal=False), rngs=rngs)
        self.mlp_norm = Norm(config.d_model, config.norm)
        self.mlp = FeedForward(config, config.d_ff, rngs=rngs)

    def __call__(self, x: jax.Array, relative_table: jax.Array) -> jax.Array:
        x = x + self.attention(self.attention_norm(x), None, relative_table=relative_table)
        return x + self.mlp(self.mlp_norm(x))


class DecoderLayer(nnx.Module):
    """Causal attention, attention over the encoder's output, feed-forward."""

    def __init__(self, config: ModelConfig, options: RunOptions, *, rngs: nnx.Rngs) -> None:
        self.attention_norm = Norm(config.d_model, config.norm)
        self.attention = Attention(config, options, _mask(config, causal=True), rngs=rngs)
        self.cross_norm = Norm(config.d_model, config.norm)
        self.cross_attention = Attention(config, options, Mask(causal=False), rngs=rngs)
        self.mlp_norm = Norm(config.d_model, config.norm)
        self.mlp = FeedForward(config, config.d_ff, rngs=rngs)

    def __call__(self, x: jax.Array, memory: jax.Array, relative_table: jax.Array) -> jax.Array:
        x = x + self.attention(self.attention_norm(x), None, relative_table=relative_table)
        x = x + self.cross_attention(self.cross_norm(x), None, memory=memory)
        return x + self.mlp(self.mlp_norm(x))


class EncoderDecoder(nnx.Module):
    """Encoder layers read one sequence, decoder layers another and the encoder's output."""

    def __init__(self, config: ModelConfig, options: RunOptions, *, rngs: nnx.Rngs) -> None:
        self.config, self.options = config, options
        d_model, vocab = config.d_model, config.vocab_size
        buckets = (config.relative_buckets, config.n_heads)
        self.embedding = new_weight(rngs, (vocab, d_model), d_model)
        self.encoder_positions = new_weight(rngs, buckets, d_model)
        self.encoder = LayerStack(
            lambda rngs: EncoderLayer(config, options, rngs=rngs),
            config.encoder_layers,
            options,
            rngs=rngs,
        )
        self.encoder_norm = Norm(d_model, config.norm)
        self.decoder_positions = new_weight(rngs, buckets, d_model)
        self.decoder = LayerStack(
            lambda rngs: DecoderLayer(config, options, rngs=rngs),
            config.n_layers,
            options,
            rngs=rngs,
        )
        self.final_norm = Norm(d_model, config.norm)
        if not config.tied_embeddings:
            self.head = new_weight(rngs, (d_model, vocab), d_model)

    def hidden(self, encoder_tokens: jax.Array, tokens: jax.Array) -> jax.Array:
        """int32 [B, T] and [B, S] -> [B, S, D], what the head reads."""
        memory = self.encode(encoder_tokens)
        x = self.decoder(self.embed(tokens), memory, self.decoder_positions[...])
        return self.final_norm(x)

    def encode(self, tokens: jax.Array) -> jax.Array:
        """int32 [B, T] -> [B, T, D], what decoder layers attend to."""
        x = self.encoder(self.embed(tokens), self.encoder_positions[...])
        return self.encoder_norm(x)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """int32 [B, S] -> [B, S, D], what the first layer reads."""
        return weight(self.embedding, jnp.dtype(self.options.compute_dtype))[tokens]

    def head_weight(self) -> jax.Array:
        """[D, V] in the compute type."""
        dtype = jnp.dtype(self.options.compute_dtype)
        if self.config.tied_embeddings:
            return weight(self.embedding, dtype).T
        return weight(self.head, dtype)


def _mask(config: ModelConfig, *, causal: bool) -> Mask:
    return Mask(
        causal=causal,
        relative_buckets=config.relative_buckets,
        relative_max_distance=config.relative_max_distance,
    )
