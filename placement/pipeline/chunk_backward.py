"""Backward passes of a chunk of layers: whole, or the gradient of the input first.

Each layer's input is kept, and a layer is run forward again before its gradient: full
rematerialisation, one forward pass (without the last matmul) beside the two passes of the gradients.

With B the part that the stage before waits for and W the rest (arXiv:2401.10241, section 2), the
backward pass of one layer is traced to a jaxpr and its equations are divided:

    B   what the gradient of the input depends on, and small results (gradients of norms and biases)
    W   what only gradients of matmuls' weights depend on: for y = x w, the product of x and dy

B hands to W the values that cross: inputs and output gradients of the matmuls. They are kept, so that
W recomputes nothing; W from the layer's input and output gradient alone would run the layer forward
and B again, which costs more than the bubble that it fills. The price is memory: for a gated layer of
width D, with H heads of width h, K of them keys and values, and feed-forward width F they are
4 D + 2 H h + 2 K h + 3 F elements a token, about what a layer without rematerialisation keeps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

_INLINED = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call")
_HEAVY = (
    "dot_general",
    "ragged_dot",
    "ragged_dot_general",
    "conv_general_dilated",
    "scan",
    "while",
)
"""Primitives worth putting off; a gradient without any of them is computed with B."""

Layer = Callable[[Any, Any, jax.Array, jax.Array], jax.Array]
"""(weights, shared, x [B, S, W], whether the slot holds a layer) -> [B, S, W]."""


def whole_backward(
    layer: Layer, weights: Any, shared: Any, mask: jax.Array, entered: jax.Array, dy: jax.Array
) -> tuple[Any, Any, jax.Array]:
    """weights [slots, ...], mask [slots], what entered each layer [slots, B, S, W], dy [B, S, W] ->
    (gradients [slots, ...] of weights, of shared, dx [B, S, W])."""

    def backward(carry, at):
        dy, d_shared = carry
        own, valid, x = at
        _, pull = jax.vjp(lambda own, shared, x: layer(own, shared, x, valid), own, shared, x)
        d_own, more, dx = pull(dy)
        return (dx, jax.tree.map(jnp.add, d_shared, more)), d_own

    none = jax.tree.map(jnp.zeros_like, shared)
    carry, d_weights = jax.lax.scan(backward, (dy, none), (weights, mask, entered), reverse=True)
    return d_weights, carry[1], carry[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitBackward:
    """B and W of a chunk; gradients of weights by the position of their leaf."""

    inputs_of_layer: Callable[..., tuple[Any, Any, dict[int, jax.Array], list[jax.Array]]]
    weights_of_layer: Callable[[Any, list[jax.Array]], dict[int, jax.Array]]

    def inputs(
        self, weights: Any, shared: Any, mask: jax.Array, entered: jax.Array, dy: jax.Array
    ) -> tuple[jax.Array, Any, dict[int, jax.Array], list[jax.Array]]:
        """B, arguments as of `whole_backward` -> (dx, gradients of shared, small gradients
        [slots, ...], what :meth:`weights` needs [slots, ...])."""

        def backward(carry, at):
            dy, d_shared = carry
            own, valid, x = at
            dx, more, small, crossing = self.inputs_of_layer(own, shared, x, valid, dy)
            return (dx, jax.tree.map(jnp.add, d_shared, more)), (small, crossing)

        none = jax.tree.map(jnp.zeros_like, shared)
        (dx, d_shared), (small, crossing) = jax.lax.scan(
            backward, (dy, none), (weights, mask, entered), reverse=True
        )
        return dx, d_shared, small, crossing

    def weights(self, weights: Any, crossing: list[jax.Array]) -> dict[int, jax.Array]:
        """W: the gradients [slots, ...] that B put off."""

        def one(_, at):
            return None, self.weights_of_layer(*at)

        return jax.lax.scan(one, None, (weights, crossing))[1]


def split_backward(layer: Layer, weights: Any, shared: Any, x: Any) -> SplitBackward:
    """Divide the backward pass of `layer` at abstract weights, shared parameters and x [B, S, D]."""

    def pull_back(weights, shared, x, valid, dy):
        def run(weights, shared, x):
            return layer(weights, shared, x, valid)

        d_weights, d_shared, dx = jax.vjp(run, weights, shared, x)[1](dy)
        return dx, d_shared, d_weights

    valid = jax.ShapeDtypeStruct((), bool)
    traced = _inlined(jax.make_jaxpr(pull_back)(weights, shared, x, valid, x))
    n_weights, n_shared = len(jax.tree.leaves(weights)), len(jax.tree.leaves(shared))
    jaxpr, consts = traced.jaxpr, traced.consts
    now, later = jaxpr.outvars[: 1 + n_shared], jaxpr.outvars[1 + n_shared :]
    first = _needed(jaxpr.eqns, now)
    put_off = {}
    for i, out in enumerate(later):
        rest = [jaxpr.eqns[e] for e in _needed(jaxpr.eqns, [out]) - first]
        if any(eqn.primitive.name in _HEAVY for eqn in rest):
            put_off[i] = out
    small = {i: out for i, out in enumerate(later) if i not in put_off}
    first = _needed(jaxpr.eqns, [*now, *small.values()])
    second = _from_heavy(jaxpr.eqns, _needed(jaxpr.eqns, put_off.values()) - first)
    own = jaxpr.invars[:n_weights]
    crossing = _read_from_outside([jaxpr.eqns[e] for e in sorted(second)], {*own, *jaxpr.constvars})
    outs = [*now, *small.values(), *crossing]
    first = _needed(jaxpr.eqns, outs)
    run_first = _function(jaxpr, consts, jaxpr.invars, outs, sorted(first))
    run_second = _function(jaxpr, consts, [*own, *crossing], list(put_off.values()), sorted(second))

    def inputs_of_layer(*args):
        found = run_first(*jax.tree.leaves(args))
        d_shared = jax.tree.unflatten(jax.tree.structure(shared), found[1 : 1 + n_shared])
        rest = found[1 + n_shared :]
        return found[0], d_shared, dict(zip(small, rest)), list(rest[len(small) :])

    def weights_of_layer(weights, crossing):
        return dict(zip(put_off, run_second(*jax.tree.leaves(weights), *crossing)))

    return SplitBackward(inputs_of_layer=inputs_of_layer, weights_of_layer=weights_of_layer)


def _inlined(traced: core.ClosedJaxpr) -> core.ClosedJaxpr:
    """The same function without calls, so that a call is no reason to compute all of it at once."""

    def run(*args):
        jaxpr = traced.jaxpr
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*traced.consts, *args]))
        _evaluate(jaxpr.eqns, values)
        return [_read(values, v) for v in jaxpr.outvars]

    return jax.make_jaxpr(run)(*traced.in_avals)


def _evaluate(eqns: Iterable[core.JaxprEqn], values: dict[core.Var, Any]) -> None:
    """Compute equations in order, calls by what they call, and add their results to `values`."""
    for eqn in eqns:
        operands = [_read(values, v) for v in eqn.invars]
        called = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        if eqn.primitive.name in _INLINED and called is not None:
            jaxpr = called.jaxpr
            inner = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*called.consts, *operands]))
            _evaluate(jaxpr.eqns, inner)
            found = [_read(inner, v) for v in jaxpr.outvars]
        else:
            found = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
            found = found if eqn.primitive.multiple_results else [found]
        values.update(zip(eqn.outvars, found))


def _read(values: dict[core.Var, Any], atom: Any) -> Any:
    return atom.val if isinstance(atom, core.Literal) else values[atom]


def _needed(eqns: Sequence[core.JaxprEqn], outs: Iterable[Any]) -> set[int]:
    """Positions of the equations that these results depend on."""
    wanted = {v for v in outs if isinstance(v, core.Var)}
    found = set()
    for i in range(len(eqns) - 1, -1, -1):
        if wanted.intersection(eqns[i].outvars):
            found.add(i)
            wanted.update(v for v in eqns[i].invars if isinstance(v, core.Var))
    return found


def _from_heavy(eqns: Sequence[core.JaxprEqn], among: set[int]) -> set[int]:
    """Of these equations the heavy ones and all that follow from them; B does what is before them,
    which is quick (an activation out of its two factors, whose product is kept instead of both)."""
    made, found = set(), set()
    for i in sorted(among):
        if eqns[i].primitive.name in _HEAVY or made.intersection(eqns[i].invars):
            found.add(i)
            made.update(eqns[i].outvars)
    return found


def _read_from_outside(eqns: Sequence[core.JaxprEqn], known: set[core.Var]) -> list[core.Var]:
    made, found = set(known), {}
    for eqn in eqns:
        found.update({v: None for v in eqn.invars if isinstance(v, core.Var) and v not in made})
        made.update(eqn.outvars)
    return list(found)


def _function(
    jaxpr: core.Jaxpr,
    consts: Sequence[Any],
    invars: Sequence[core.Var],
    outvars: Sequence[Any],
    eqns: Sequence[int],
) -> Callable[..., list[jax.Array]]:
    def run(*args):
        values = dict(zip([*jaxpr.constvars, *invars], [*consts, *args]))
        _evaluate((jaxpr.eqns[i] for i in eqns), values)
        return [_read(values, v) for v in outvars]

    return run
