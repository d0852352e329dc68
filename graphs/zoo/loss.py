"""Cross-entropy of the next token, in float32.

loss = mean over tokens of  logsumexp_v(logits) - logits[target].  The target's logit is a masked
sum rather than a gather, so that a sharded vocabulary needs one small all-reduce.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *,
    softcap: float | None = None,
    chunks: int = 1,
) -> jax.Array:
    """hidden [B, S, D], head [D, V], targets int32 [B, S] -> mean loss, float32 scalar.

    With chunks > 1 the logits exist for S / chunks positions at a time, and again in the backward
    pass. A block takes every chunks-th position, so that a sharded sequence stays where it is.
    """
    b, s, _ = hidden.shape
    if chunks == 1:
        return _summed(hidden, head, targets, softcap) / (b * s)
    blocks = jnp.moveaxis(hidden.reshape(b, s // chunks, chunks, -1), 2, 0)
    target_blocks = jnp.moveaxis(targets.reshape(b, s // chunks, chunks), 2, 0)

    def body(total, block):
        return total + _summed(block[0], head, block[1], softcap), None

    body = jax.checkpoint(body, prevent_cse=False)
    total, _ = jax.lax.scan(body, jnp.float32(0.0), (blocks, target_blocks))
    return total / (b * s)


def _summed(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, softcap: float | None
) -> jax.Array:
    logits = jnp.einsum("bsd,dv->bsv", hidden, head).astype(jnp.float32)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    vocabulary = jax.lax.broadcasted_iota(targets.dtype, logits.shape, 2)
    at_target = jnp.where(vocabulary == targets[..., None], logits, 0.0)
    losses = jax.nn.logsumexp(logits, axis=-1) - jnp.sum(at_target, axis=-1)
    return jnp.sum(losses)
