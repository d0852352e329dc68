"""Sharding rules: factors of operators, checked against what the operator computes.

A rule says that slicing a factor of the operands slices the results along the same factor, or, for
a reduced factor, that the partial results combine. Both are executed here on small arrays.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from graphs.rules import WHOLE, registered, rule_of
from graphs.rules.structural import reshape_runs

KEY = np.random.default_rng(0)


def f(*shape):
    return jnp.asarray(KEY.normal(size=shape), jnp.float32)


CASES = {
    "matmul": (lambda a, b: a @ b, (f(4, 6), f(6, 8))),
    "batched": (lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (f(2, 4, 6), f(2, 6, 8))),
    "two contracted": (lambda a, b: jnp.einsum("bhk,hkd->bd", a, b), (f(4, 2, 6), f(2, 6, 8))),
    "elementwise": (lambda a, b: jax.lax.add(a, b), (f(4, 6), f(4, 6))),
    "transpose": (lambda a: jnp.transpose(a, (1, 0, 2)), (f(4, 6, 2),)),
    "merge": (lambda a: a.reshape(8, 6), (f(4, 2, 6),)),
    "split dims": (lambda a: a.reshape(4, 2, 6), (f(8, 6),)),
    "reduce": (lambda a: jax.lax.reduce_sum_p.bind(a, axes=(1,), out_sharding=None), (f(4, 6),)),
    "reduce max": (lambda a: jax.lax.reduce_max_p.bind(a, axes=(0,), out_sharding=None), (f(4, 6),)),
    "cumsum": (lambda a: jax.lax.cumsum(a, axis=1), (f(4, 6),)),
    "sort": (lambda a: jax.lax.sort(a, dimension=1), (f(4, 6),)),
    "top_k": (lambda a: jax.lax.top_k(a, 2), (f(4, 6),)),
    "concatenate": (lambda a, b: jax.lax.concatenate([a, b], 1), (f(4, 6), f(4, 2))),
    "pad": (lambda a: jax.lax.pad(a, 0.0, ((0, 0, 0), (1, 1, 0))), (f(4, 6),)),
    "slice": (lambda a: jax.lax.slice(a, (0, 1), (4, 5)), (f(4, 6),)),
    "rev": (lambda a: jax.lax.rev(a, (1,)), (f(4, 6),)),
    "embedding": (lambda t, i: t[i], (f(10, 6), jnp.array([[1, 2], [3, 4], [0, 9], [5, 5]]))),
    "label pick": (
        lambda x, i: jnp.take_along_axis(x, i, axis=-1, mode="promise_in_bounds"),
        (f(4, 6, 10), jnp.arange(24).reshape(4, 6, 1) % 10),
    ),
    "scatter add": (
        lambda u, i: jnp.zeros((10, 6)).at[i].add(u),
        (f(4, 6), jnp.array([1, 2, 1, 7])),
    ),
    "convolution": (
        lambda x, k: jax.lax.conv_general_dilated(
            x, k, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        ),
        (f(4, 8, 6), f(3, 6, 2)),
    ),
    "depthwise": (
        lambda x, k: jax.lax.conv_general_dilated(
            x, k, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=6
        ),
        (f(4, 8, 6), f(3, 1, 6)),
    ),
    "ragged dot": (
        lambda x, w, g: jax.lax.ragged_dot(x, w, g),
        (f(8, 6), f(2, 6, 4), jnp.array([3, 5], jnp.int32)),
    ),
}  # fmt: skip


def equations(fn, args):
    """Equations of the program with concrete operands and results, calls inlined."""
    closed = jax.make_jaxpr(fn)(*args)

    def run(jaxpr, consts, values):
        env = dict(zip(jaxpr.constvars, consts)) | dict(zip(jaxpr.invars, values))
        for eqn in jaxpr.eqns:
            ins = [v.val if hasattr(v, "val") else env[v] for v in eqn.invars]
            inner = eqn.params.get("jaxpr")
            if eqn.primitive.name in ("jit", "pjit") and inner is not None:
                outs = yield from run(inner.jaxpr, inner.consts, ins)
            else:
                out = eqn.primitive.bind(*ins, **eqn.params)
                outs = out if eqn.primitive.multiple_results else [out]
                yield eqn, ins, outs
            env |= dict(zip(eqn.outvars, outs))
        return [v.val if hasattr(v, "val") else env[v] for v in jaxpr.outvars]

    yield from run(closed.jaxpr, closed.consts, list(args))


def cut(x, factors, factor, half, size):
    """The half of an array along a factor (the major part of a merged dimension)."""
    for d, g in enumerate(factors):
        if g == factor:
            n = x.shape[d] // 2
            x = jax.lax.slice_in_dim(x, half * n, half * n + n, axis=d)
    return x


REWRITTEN = {"reshape", "broadcast_in_dim", "iota", "dynamic_slice", "gather", "scatter-add"}
"""Primitives whose parameters hold shapes: cut operands need other parameters."""


@pytest.mark.parametrize("name", CASES)
def test_slicing_a_factor_slices_or_splits_the_result(name):
    fn, args = CASES[name]
    checked = 0
    for eqn, ins, outs in equations(fn, args):
        prim = eqn.primitive.name
        rule = rule_of(
            prim,
            eqn.params,
            tuple(np.shape(x) for x in ins),
            tuple(np.shape(x) for x in outs),
        )
        assert rule.known, prim
        for x, factors in zip(ins, rule.operands):
            assert len(factors) == np.ndim(x)
        for x, factors in zip(outs, rule.results):
            assert len(factors) == np.ndim(x)
        if prim in REWRITTEN or prim == "pad":
            continue
        for factor, size in enumerate(rule.sizes):
            if size % 2:
                continue
            halves = []
            for half in (0, 1):
                parts = [
                    cut(jnp.asarray(x), fs, factor, half, size) for x, fs in zip(ins, rule.operands)
                ]
                params = dict(eqn.params)
                if prim == "slice":
                    params = _slice_params(params, parts[0].shape, ins[0].shape)
                if "feature_group_count" in params and params["feature_group_count"] > 1:
                    params["feature_group_count"] = parts[0].shape[-1]
                out = eqn.primitive.bind(*parts, **params)
                halves.append(out if eqn.primitive.multiple_results else [out])
            for k, whole in enumerate(outs):
                if factor in rule.reduced:
                    join = jnp.add if rule.reduced[factor] == "sum" else jnp.maximum
                    got = join(halves[0][k], halves[1][k])
                elif factor in rule.results[k]:
                    axis = rule.results[k].index(factor)
                    got = jnp.concatenate([halves[0][k], halves[1][k]], axis)
                else:
                    continue
                np.testing.assert_allclose(got, whole, rtol=1e-5, atol=1e-5)
                checked += 1
    assert checked or name in (
        "merge", "split dims", "embedding", "label pick", "scatter add", "pad"
    )  # fmt: skip


def _slice_params(params, now, before):
    limits = tuple(n if n != b else e for n, b, e in zip(now, before, params["limit_indices"]))
    return params | {"limit_indices": limits}


def test_an_embedding_table_is_sharded_on_its_width_and_not_on_what_is_looked_up():
    fn, args = CASES["embedding"]
    eqn, ins, outs = next(e for e in equations(fn, args) if e[0].primitive.name == "gather")
    rule = rule_of("gather", eqn.params, tuple(np.shape(x) for x in ins), (outs[0].shape,))
    table, _ = rule.operands
    assert table[0] == WHOLE and table[1] == rule.results[0][2] != WHOLE


def test_a_scatter_that_adds_reduces_over_its_updates():
    fn, args = CASES["scatter add"]
    eqn, ins, outs = next(e for e in equations(fn, args) if e[0].primitive.name == "scatter-add")
    rule = rule_of("scatter-add", eqn.params, tuple(np.shape(x) for x in ins), (outs[0].shape,))
    updates = rule.operands[2]
    assert rule.reduced[updates[0]] == "sum"
    assert updates[1] == rule.results[0][1]


@pytest.mark.parametrize(
    ("source", "target", "runs"),
    [
        ((8, 6), (4, 2, 6), [([0], [0, 1]), ([1], [2])]),
        ((4, 2, 6), (8, 6), [([0, 1], [0]), ([2], [1])]),
        ((6, 4), (4, 6), [([0, 1], [0, 1])]),
        ((3, 1), (3,), [([0], [0]), ([1], [])]),
    ],
)
def test_reshape_runs_have_equal_products(source, target, runs):
    found = reshape_runs(source, target)
    for a, b in found:
        assert np.prod([source[i] for i in a]) == np.prod([target[j] for j in b])
    if runs[-1] != ([1], []):
        assert found == runs


def test_primitives_of_real_train_steps_have_rules():
    needed = (
        "dot_general ragged_dot_general conv_general_dilated add reduce_sum cumsum reshape transpose "
        "broadcast_in_dim concatenate pad slice dynamic_slice dynamic_update_slice gather scatter-add "
        "sort top_k argmax iota random_bits convert_element_type select_n split rng_bit_generator "
        "optimization_barrier sharding_constraint custom_lin"
    ).split()
    assert set(needed) - {"custom_lin"} <= set(registered())
