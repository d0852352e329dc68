"""Mixture of experts: a router, E feed-forwards, k of them for each token.

Two ways to bring tokens to experts (T = B S tokens):

- *capacity*: within each sequence an expert takes its first C = ceil(factor k S / E) tokens, the
  others skip it (GShard, arXiv:2006.16668). Tokens are gathered into [B, E, C, D], so that the
  experts are one batched matmul and the exchange is one all-to-all between B and E.
- *dropless*: the T k (token, expert) pairs are sorted by expert and `ragged_dot` multiplies each
  run by its expert (MegaBlocks, arXiv:2211.15841).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from graphs.zoo.config import ModelConfig
from graphs.zoo.layers import FeedForward, activate, new_constant, new_weight, weight
from graphs.zoo.options import RunOptions


def capacity(config: ModelConfig, seq_len: int) -> int:
    """C, slots of one expert for one sequence; a multiple of 8 where that is not wasteful."""
    slots = math.ceil(
        config.capacity_factor * config.experts_per_token * seq_len / config.n_experts
    )
    return min(seq_len, slots if slots < 16 else -(-slots // 8) * 8)


class ExpertFeedForward(nnx.Module):
    """Router, experts and the shared experts beside them."""

    def __init__(self, config: ModelConfig, options: RunOptions, *, rngs: nnx.Rngs) -> None:
        self.config, self.options = config, options
        experts, d_model, width = config.n_experts, config.d_model, config.moe_d_ff
        self.router = new_weight(rngs, (d_model, experts), d_model)
        if config.gated:
            self.gate = new_weight(rngs, (experts, d_model, width), d_model)
        self.up = new_weight(rngs, (experts, d_model, width), d_model)
        self.down = new_weight(rngs, (experts, width, d_model), width)
        if config.mlp_bias:
            self.router_bias = new_constant((experts,), 0.0)
            if config.gated:
                self.gate_bias = new_constant((experts, width), 0.0)
            self.up_bias = new_constant((experts, width), 0.0)
            self.down_bias = new_constant((experts, d_model), 0.0)
        if config.shared_experts:
            self.shared = FeedForward(config, config.shared_experts * width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, S, D] -> [B, S, D]."""
        expert, mixture = self._route(x)
        if self.options.moe == "capacity":
            out = self._capacity(x, expert, mixture)
        else:
            out = self._dropless(x, expert, mixture)
        return out + self.shared(x) if self.config.shared_experts else out

    def _route(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B, S, D] -> experts int32 [B, S, k] and their mixture weights float32 [B, S, k]."""
        config = self.config
        logits = jnp.einsum(
            "bsd,de->bse", x, weight(self.router, x.dtype), preferred_element_type=jnp.float32
        )
        if config.mlp_bias:
            logits = logits + self.router_bias[...]
        if config.router_score == "sigmoid":
            score, expert = jax.lax.top_k(jax.nn.sigmoid(logits), config.experts_per_token)
            return expert, score / (jnp.sum(score, axis=-1, keepdims=True) + 1e-9)
        score, expert = jax.lax.top_k(logits, config.experts_per_token)
        if config.experts_per_token == 1:
            return expert, jax.nn.sigmoid(score)
        return expert, jax.nn.softmax(score, axis=-1)

    def _capacity(self, x: jax.Array, expert: jax.Array, mixture: jax.Array) -> jax.Array:
        config, dtype = self.config, x.dtype
        b, s, d = x.shape
        n, k, c = config.n_experts, config.experts_per_token, capacity(config, s)
        pair_expert = expert.reshape(b, s * k)
        chosen = jax.nn.one_hot(pair_expert, n, dtype=jnp.int32)
        rank = jnp.sum(jnp.cumsum(chosen, axis=1) * chosen, axis=-1) - 1
        kept = rank < c
        # index n c is out of bounds: such pairs are neither written nor read
        slot = jnp.where(kept, pair_expert * c + rank, n * c)
        token = jnp.broadcast_to(jnp.arange(s * k, dtype=jnp.int32) // k, (b, s * k))
        token_of_slot = jax.vmap(
            lambda index, value: jnp.full((n * c,), s, jnp.int32).at[index].set(value, mode="drop")
        )(slot, token)
        taken = jnp.take_along_axis(x, token_of_slot[..., None], axis=1, mode="fill", fill_value=0)
        inputs = taken.reshape(b, n, c, d)

        up = jnp.einsum("becd,edf->becf", inputs, weight(self.up, dtype))
        if config.mlp_bias:
            up = up + weight(self.up_bias, dtype)[:, None, :]
        if config.gated:
            gate = jnp.einsum("becd,edf->becf", inputs, weight(self.gate, dtype))
            if config.mlp_bias:
                gate = gate + weight(self.gate_bias, dtype)[:, None, :]
            hidden = activate(gate, config.activation) * up
        else:
            hidden = activate(up, config.activation)
        out = jnp.einsum("becf,efd->becd", hidden, weight(self.down, dtype))
        if config.mlp_bias:
            out = out + weight(self.down_bias, dtype)[:, None, :]

        back = jnp.take_along_axis(
            out.reshape(b, n * c, d), slot[..., None], axis=1, mode="fill", fill_value=0
        ).reshape(b, s, k, d)
        mixture = mixture * kept.reshape(b, s, k)
        return jnp.einsum("bskd,bsk->bsd", back, mixture.astype(dtype))

    def _dropless(self, x: jax.Array, expert: jax.Array, mixture: jax.Array) -> jax.Array:
        config, dtype = self.config, x.dtype
        b, s, d = x.shape
        n, k = config.n_experts, config.experts_per_token
        pair_expert = expert.reshape(b * s * k)
        order = jnp.argsort(pair_expert)
        sorted_expert = pair_expert[order]
        sizes = jnp.sum(jax.nn.one_hot(pair_expert, n, dtype=jnp.int32), axis=0)
        inputs = x.reshape(b * s, d)[order // k]

        up = jax.lax.ragged_dot(inputs, weight(self.up, dtype), sizes)
        if config.mlp_bias:
            up = up + weight(self.up_bias, dtype)[sorted_expert]
        if config.gated:
            gate = jax.lax.ragged_dot(inputs, weight(self.gate, dtype), sizes)
            if config.mlp_bias:
                gate = gate + weight(self.gate_bias, dtype)[sorted_expert]
            hidden = activate(gate, config.activation) * up
        else:
            hidden = activate(up, config.activation)
        out = jax.lax.ragged_dot(hidden, weight(self.down, dtype), sizes)
        if config.mlp_bias:
            out = out + weight(self.down_bias, dtype)[sorted_expert]

        back = out[jnp.argsort(order)].reshape(b, s, k, d)
        return jnp.einsum("bskd,bsk->bsd", back, mixture.astype(dtype))
