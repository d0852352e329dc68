"""Norms, projections and feed-forwards: the parts that every architecture shares.

Weights are float32; `weight(param, dtype)` casts them where they are used, so that a compiler may
gather the narrow copy.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from graphs.zoo.config import ModelConfig


def new_weight(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int) -> nnx.Param:
    """Normal weights of variance 1 / fan_in, float32; zeros where there are no random streams, which
    is enough for shapes and several times faster to trace."""
    if not len(rngs):
        return new_constant(shape, 0.0)
    scale = 1.0 / math.sqrt(fan_in)
    return nnx.Param(jax.random.normal(rngs.params(), shape, jnp.float32) * scale)


def new_constant(shape: tuple[int, ...], value: float) -> nnx.Param:
    return nnx.Param(jnp.full(shape, value, jnp.float32))


def weight(param: nnx.Param, dtype: jnp.dtype) -> jax.Array:
    return param[...].astype(dtype)


class Norm(nnx.Module):
    """RMSNorm (Zhang and Sennrich 2019) or LayerNorm over the last dimension, in float32."""

    def __init__(self, width: int, kind: str) -> None:
        self.kind = kind
        self.scale = new_constant((width,), 1.0)
        if kind == "layernorm":
            self.bias = new_constant((width,), 0.0)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., width] -> [..., width], same type."""
        y = x.astype(jnp.float32)
        if self.kind != "rmsnorm":
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + 1e-6)
        y = y * self.scale[...]
        if self.kind == "layernorm":
            y = y + self.bias[...]
        return y.astype(x.dtype)


def activate(x: jax.Array, activation: str) -> jax.Array:
    if activation == "silu":
        return jax.nn.silu(x)
    return jax.nn.gelu(x) if activation == "gelu" else jax.nn.relu(x)


class FeedForward(nnx.Module):
    """down(act(gate x) * up x), or down(act(up x)) where the model is not gated."""

    def __init__(self, config: ModelConfig, width: int, *, rngs: nnx.Rngs) -> None:
        self.activation = config.activation
        self.gated = config.gated
        self.bias = config.mlp_bias
        d_model = config.d_model
        if config.gated:
            self.gate = new_weight(rngs, (d_model, width), d_model)
        self.up = new_weight(rngs, (d_model, width), d_model)
        self.down = new_weight(rngs, (width, d_model), width)
        if config.mlp_bias:
            if config.gated:
                self.gate_bias = new_constant((width,), 0.0)
            self.up_bias = new_constant((width,), 0.0)
            self.down_bias = new_constant((d_model,), 0.0)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, S, D] -> [B, S, D]."""
        up = jnp.einsum("bsd,df->bsf", x, weight(self.up, x.dtype))
        if self.bias:
            up = up + weight(self.up_bias, x.dtype)
        if self.gated:
            gate = jnp.einsum("bsd,df->bsf", x, weight(self.gate, x.dtype))
            if self.bias:
                gate = gate + weight(self.gate_bias, x.dtype)
            hidden = activate(gate, self.activation) * up
        else:
            hidden = activate(up, self.activation)
        out = jnp.einsum("bsf,fd->bsd", hidden, weight(self.down, x.dtype))
        return out + weight(self.down_bias, x.dtype) if self.bias else out
