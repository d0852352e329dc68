"""Where a token is: rotary (Su et al. 2021), ALiBi (Press et al. 2022), T5 relative buckets."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

Rotary = tuple[jax.Array, jax.Array]
"""(cos, sin), each [S, width / 2] float32."""


def rotary_tables(
    seq_len: int, width: int, theta: float, order: np.ndarray | None = None
) -> Rotary:
    """order: int [S] positions of the slots, where they are not 0, 1, ... (`RunOptions.order`)."""
    exponent = jnp.arange(0, width, 2, dtype=jnp.float32) / width
    positions = jnp.arange(seq_len) if order is None else jnp.asarray(order)
    angle = positions.astype(jnp.float32)[:, None] * (theta**-exponent)[None, :]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, rotary: Rotary) -> jax.Array:
    """[B, S, heads, width] -> the same; halves of a head are the pairs that rotate."""
    cos, sin = (t[None, :, None, :] for t in rotary)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    out = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return out.astype(x.dtype)


def alibi_slopes(n_heads: int) -> list[float]:
    """[H], paper section 3; head counts that are no power of two interleave the next one's."""
    power = 2 ** math.floor(math.log2(n_heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    slopes += [2.0 ** (-4.0 * (2 * i + 1) / power) for i in range(n_heads - power)]
    return slopes


def relative_bucket(
    distance: jax.Array, *, causal: bool, n_buckets: int, max_distance: int
) -> jax.Array:
    """Bucket of key position minus query position (Raffel et al. 2020, section 2.1)."""
    offset = jnp.zeros_like(distance)
    if causal:
        distance = jnp.maximum(-distance, 0)
    else:
        n_buckets //= 2
        offset = jnp.where(distance > 0, n_buckets, 0)
        distance = jnp.abs(distance)
    exact = n_buckets // 2
    ratio = jnp.maximum(distance, 1).astype(jnp.float32) / exact
    coarse = exact + (jnp.log(ratio) / math.log(max_distance / exact) * (n_buckets - exact)).astype(
        jnp.int32
    )
    return offset + jnp.where(distance < exact, distance, jnp.minimum(coarse, n_buckets - 1))
