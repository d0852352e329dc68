"""Contractions whose operand is computed inside their kernel: element-wise chains that XLA fuses.

XLA does not store the result of an element-wise chain that only contractions read: each computes it
again, block by block, for every block of the other operand. The programs here are such pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

ARRAYS = {
    "plain": 1,
    "gain": 1,
    "relu2": 1,
    "gated": 2,
    "gatedgrad": 3,
    "gelu": 1,
    "gelugrad": 2,
    "weights": 1,
    "entropygrad": 1,
}
"""By name, 16-bit arrays of the operand's size that it is computed from."""


def chain(name: str, dtype: str) -> Callable[..., Any]:
    """The function of arrays [r, c] and, for ``gain`` and ``weights``, one number a row [r, 1]."""
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
    return functions[name]


def by_row(name: str) -> bool:
    """Whether the chain also reads one float32 number a row."""
    return name in ("gain", "weights")
