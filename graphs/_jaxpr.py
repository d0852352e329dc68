"""Which jaxpr an equation calls: shared by tracing and by rewriting (:mod:`placement.apply`)."""

from __future__ import annotations

from jax.extend import core

INLINED = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "xla_call": "call_jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "custom_lin": "jaxpr",
    "run_state": "jaxpr",
    "core_closed_call": "call_jaxpr",
    "custom_transpose_call": "call_jaxpr",
    "custom_batching_call": "call",
    "composite": "jaxpr",
}
"""Primitives that call one jaxpr on their operands, and the parameter that holds it."""


def called_jaxpr(eqn) -> tuple[core.Jaxpr, tuple] | None:
    """The (jaxpr, constants) that an inlined equation calls, or None."""
    name = INLINED.get(eqn.primitive.name)
    if name is None or name not in eqn.params:
        return None
    return open_jaxpr(eqn.params[name])


def live_eqns(jaxpr) -> list:
    """The equations that have a result or an effect (JAX leaves maps of nothing where it hoists)."""
    return [eqn for eqn in jaxpr.eqns if eqn.outvars or eqn.effects]


def open_jaxpr(jaxpr) -> tuple[core.Jaxpr, tuple]:
    """(jaxpr, constants) of an open or closed jaxpr."""
    if hasattr(jaxpr, "jaxpr"):
        return jaxpr.jaxpr, tuple(jaxpr.consts)
    return jaxpr, ()
