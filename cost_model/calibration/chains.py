"""Contractions whose operand is computed inside their kernel: element-wise chains that XLA fuses.

XLA does not store the result of an element-wise chain that only contractions read: each computes it
again, block by block, for every block of the other operand. The programs here are such pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cost_model.fusion import BY_ROW

READS = {
    "plain": ("bfloat16",),
    "gain": ("bfloat16",),
    "relu2": ("bfloat16",),
    "gated": ("bfloat16",) * 2,
    "gatedgrad": ("bfloat16",) * 3,
    "gelu": ("bfloat16",),
    "gelugrad": ("bfloat16",) * 2,
    "weights": ("bfloat16",),
    "entropygrad": ("bfloat16",),
    "softmax": ("float32",),
    "softmaxgrad": ("float32", "bfloat16"),
}
"""By name, types of the arrays of the operand's size that it is computed from."""

INSTRUCTIONS = {
    "plain": 0,
    "gain": 3 + BY_ROW,
    "relu2": 4,
    "gated": 11,
    "gatedgrad": 17,
    "gelu": 15,
    "gelugrad": 29,
    "weights": 9 + BY_ROW,
    "entropygrad": 13,
    "softmax": 8 + BY_ROW,
    "softmaxgrad": 11 + 2 * BY_ROW,
}
"""By name, vector instructions of an element as :class:`cost_model.fusion.Chain` counts them:
six for a transcendental, one for a change of type."""


def chain(name: str, dtype: str) -> Callable[..., Any]:
    """The function of arrays [..., r, c] and, where :func:`by_row`, numbers of rows [..., r, 1]."""
    import jax
    import jax.numpy as jnp

    def f32(f: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *xs: f(*(x.astype(jnp.float32) for x in xs)).astype(dtype)

    def grad(f: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
        return lambda x, g: jax.vjp(f, x)[1](g)[0]

    functions: dict[str, Callable[..., Any]] = {
        "plain": lambda x: x,
        "gain": lambda x, r: (x.astype(jnp.float32) * r).astype(dtype),
        "relu2": f32(lambda x: jnp.square(jax.nn.relu(x))),
        "gated": f32(lambda x, y: jax.nn.silu(x) * y),
        "gatedgrad": f32(lambda x, y, g: grad(jax.nn.silu)(x, g * y)),
        "gelu": f32(jax.nn.gelu),
        "gelugrad": f32(grad(jax.nn.gelu)),
        "entropygrad": f32(lambda x: (jnp.exp(x) - jnp.where(x > 0, 1.0, 0.0)) * 2),
        "weights": lambda x, r: jnp.exp(x.astype(jnp.float32) - r).astype(dtype),
    }
    functions["softmax"] = functions["weights"]
    functions["softmaxgrad"] = lambda x, g, r: (jnp.exp(x - r) * (g - r)).astype(dtype)
    return functions[name]


def by_row(name: str) -> bool:
    """Whether the chain also reads one float32 number a row."""
    return name in ("gain", "weights", "softmax", "softmaxgrad")
