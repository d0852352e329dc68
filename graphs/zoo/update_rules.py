"""The optimizers of the zoo's train steps: optax, with clipping and a narrow state."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import optax

from graphs.errors import MeshwrightError

OPTIMIZERS = ("adamw", "adafactor", "lion", "sgd")


def learning_rates(
    peak: float, *, warmup_steps: int, decay_steps: int | None
) -> float | optax.Schedule:
    """A straight rise to ``peak`` over the first steps, then a cosine fall to a tenth of it at
    ``decay_steps``; constant where decay_steps is None.

    Raises MeshwrightError where the rise does not end before the fall does.
    """
    if decay_steps is None and warmup_steps == 0:
        return peak
    if decay_steps is None or not 0 <= warmup_steps < decay_steps:
        raise MeshwrightError(
            f"warmup_steps={warmup_steps} and decay_steps={decay_steps} are no schedule; "
            "make warmup_steps at least 0 and less than decay_steps"
        )
    return optax.warmup_cosine_decay_schedule(
        0.0 if warmup_steps else peak, peak, warmup_steps, decay_steps, 0.1 * peak
    )


@functools.lru_cache(maxsize=64)
def update_rule(
    name: str,
    *,
    learning_rate: float | optax.Schedule,
    clip_norm: float | None,
    state_dtype: str,
) -> optax.GradientTransformation:
    """Gradient transformation over a tree of float32 parameters.

    JAX keeps the traced update, which the variants of a step (rematerialisation, microbatches)
    share. The hundreds of small functions that it calls are traced in line: a jit of each by itself
    takes twice as long. The steps hold the same operations either way.
    """
    if name == "adamw":
        rule = optax.adamw(learning_rate, b1=0.9, b2=0.95, weight_decay=0.1)
    elif name == "adafactor":
        rule = optax.adafactor(learning_rate)
    elif name == "lion":
        rule = optax.lion(learning_rate)
    elif name == "sgd":
        rule = optax.sgd(learning_rate, momentum=0.9)
    else:
        raise MeshwrightError(
            f"optimizer {name!r} is unknown; choose one of {', '.join(OPTIMIZERS)}"
        )
    if jnp.dtype(state_dtype) != jnp.float32:
        rule = _stored_as(rule, jnp.dtype(state_dtype))
    if clip_norm is not None:
        rule = optax.chain(optax.clip_by_global_norm(clip_norm), rule)
    # adafactor's constants are converted by the jitted functions that take them
    in_line = name != "adafactor"

    def update(updates, state, params=None):
        with jax.disable_jit(in_line):
            return rule.update(updates, state, params)

    return optax.GradientTransformation(rule.init, jax.jit(update, inline=True))


def _stored_as(
    rule: optax.GradientTransformation, dtype: jnp.dtype
) -> optax.GradientTransformation:
    """The same rule with its floating-point state kept in another type between steps."""

    def cast(state, to: jnp.dtype):
        return jax.tree.map(
            lambda x: x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) else x, state
        )

    def init(params):
        return cast(rule.init(params), dtype)

    def update(updates, state, params=None):
        updates, state = rule.update(updates, cast(state, jnp.dtype(jnp.float32)), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)
