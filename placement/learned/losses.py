"""What training minimises, as functions of logits and recorded outcomes.

Imitation. A candidate's share of the target is ``softmax(-log t / T)`` over the recorded candidates
that keep the memory limit, so that near-equals share; the listwise loss is the cross entropy of the
policy to it (ListNet, Cao et al. 2007).

Reinforcement. Proximal policy optimisation (Schulman et al. 2017) on groups of candidates that the
policy itself drew: with G rewards of one problem the advantage of each is its reward less the mean
of the others (leave-one-out, Ahmadian et al. 2024). The reward is ``-log(t / best known)``. Memory is
a constraint: the objective is the Lagrangian ``reward - m (violation - allowed)`` and the multiplier
m climbs while violations are more frequent than allowed (dual ascent).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

NEVER = -1e9


def imitation_target(log_time, fits, recorded, temperature: float):
    """[..., K] target distribution; zeros where nothing recorded fits."""
    allowed = fits * recorded
    logits = jnp.where(allowed > 0, -log_time / temperature, NEVER)
    return jax.nn.softmax(logits, axis=-1) * allowed


def listwise_loss(preference, target, recorded):
    """[...] cross entropy of the policy over the recorded candidates."""
    logits = jnp.where(recorded > 0, preference, NEVER)
    return -(target * jax.nn.log_softmax(logits, axis=-1)).sum(-1)


def fit_loss(logit, fits, recorded):
    """[...] mean binary cross entropy."""
    each = jnp.maximum(logit, 0.0) - logit * fits + jnp.log1p(jnp.exp(-jnp.abs(logit)))
    return (each * recorded).sum(-1) / jnp.maximum(recorded.sum(-1), 1.0)


def value_loss(value, log_time, fits, recorded):
    """[...] mean Huber loss of the log step time where it has a meaning."""
    weight = fits * recorded
    error = jnp.abs(value - log_time)
    each = jnp.where(error < 0.2, 0.5 * error**2, 0.2 * (error - 0.1))
    return (each * weight).sum(-1) / jnp.maximum(weight.sum(-1), 1.0)


def rewards(log_time, fits, recorded):
    """[..., K] ``-log(t / best)``, at most 0: faster than what fits is no gain where it does not."""
    best = jnp.where(fits * recorded > 0, log_time, jnp.inf).min(-1, keepdims=True)
    best = jnp.where(jnp.isfinite(best), best, 0.0)
    return jnp.clip(best - log_time, -3.0, 0.0)


def leave_one_out(reward):
    """[..., G] advantage of each draw over the mean of the others in its group."""
    n = reward.shape[-1]
    return (reward - reward.mean(-1, keepdims=True)) * (n / (n - 1))


def clipped_policy_loss(new_log_p, old_log_p, advantage, clip: float):
    """[..., G] PPO's pessimistic surrogate, to be minimised."""
    ratio = jnp.exp(new_log_p - old_log_p)
    bounded = jnp.clip(ratio, 1.0 - clip, 1.0 + clip)
    return -jnp.minimum(ratio * advantage, bounded * advantage)


def log_policy(preference, recorded):
    """[..., K] log probabilities over the recorded candidates."""
    return jax.nn.log_softmax(jnp.where(recorded > 0, preference, NEVER), axis=-1)


def entropy(log_p, recorded):
    """[...] of the policy."""
    return -(jnp.exp(log_p) * jnp.where(recorded > 0, log_p, 0.0)).sum(-1)


def weighted_mean(values: Any, weights: Any):
    """Mean over problems that count."""
    return (values * weights).sum() / jnp.maximum(weights.sum(), 1.0)
