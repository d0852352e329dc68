"""Random small programs under random plans give the results that they give unplanned."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import placement

ROWS, WIDTHS = 8, (8, 16, 6)


@pytest.fixture(scope="module", autouse=True)
def quick_compiler():
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def _scan(x, w):
    def body(carry, row):
        carry = jnp.tanh(carry + row)
        return carry, carry * 2

    last, stacked = jax.lax.scan(body, jnp.zeros(x.shape[1:]), x)
    return stacked + last


def _while(x, w):
    return jax.lax.fori_loop(0, 3, lambda i, c: jnp.sin(c) + x, x)


def _cond(x, w):
    return jax.lax.cond(jnp.sum(x) > 0, lambda v: v * 2, lambda v: v - 1, x)


def _attend(x, w):
    scores = jax.nn.softmax(x @ x.T / x.shape[1], axis=-1)
    return scores @ x


def _split(x, w):
    left, right = jnp.split(x, 2, axis=1)
    return jnp.concatenate([right, left], axis=1)


def _fold(x, w):
    return x.reshape(2, ROWS // 2, -1).transpose(1, 0, 2).reshape(ROWS, -1)


def _expert(x, w):
    weights = jax.nn.one_hot(jnp.argmax(x, axis=1), 4)
    return jnp.einsum("be,bd,e->bd", weights, x, jnp.arange(1.0, 5.0))


STEPS = {
    "matmul": lambda x, w: jnp.tanh(x @ w) @ w.T,
    "through": lambda x, w: jax.nn.gelu(x @ w)[:, : x.shape[1]] if w.shape[1] >= x.shape[1] else x,
    "norm": lambda x, w: (x - x.mean(-1, keepdims=True)) / (x.std(-1, keepdims=True) + 1),
    "attend": _attend,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "split": _split,
    "fold": _fold,
    "expert": _expert,
    "cumsum": lambda x, w: jnp.cumsum(x, axis=0) / ROWS,
    "sort": lambda x, w: jnp.sort(x, axis=1),
    "gather": lambda x, w: x[jnp.array([3, 0, 7, 1, 2, 6, 5, 4])],
    "slice": lambda x, w: jax.lax.dynamic_update_slice(x, x[:2, :2] * 2, (1, 1)),
    "pad": lambda x, w: jnp.pad(x, ((1, 1), (0, 0)))[:-2] + x,
    "where": lambda x, w: jnp.where(x > 0, x, jnp.exp(x) - 1),
    "remat": lambda x, w: jax.checkpoint(lambda v: jnp.sin(v) @ (w @ w.T))(x),
    "rows": lambda x, w: jax.vmap(lambda v: v / (1 + jnp.abs(v).max()))(x),
    "flip": lambda x, w: x[::-1] + jnp.roll(x, 1, axis=1),
}


def program(names: tuple[str, ...], trained: bool):
    def forward(weights, x):
        for name, w in zip(names, weights):
            x = STEPS[name](x, w)
        return x

    if not trained:
        return forward

    def step(weights, x):
        loss, gradients = jax.value_and_grad(lambda w: jnp.mean(forward(w, x) ** 2))(weights)
        return jax.tree.map(lambda w, g: w - 0.1 * g, weights, gradients), loss

    return step


programs = st.tuples(
    st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=5).map(tuple),
    st.sampled_from([8, 16]),
    st.lists(st.sampled_from(WIDTHS), min_size=5, max_size=5),
    st.booleans(),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    programs,
    st.sampled_from(["random", "random", "fsdp", "fsdp_tp", "search"]),
    st.sampled_from([{"data": 8}, {"data": 2, "model": 4}, {"data": 4, "model": 2}]),
    st.integers(0, 1000),
)
def test_a_plan_never_changes_the_result(drawn, optimizer, mesh_shape, seed):
    names, width, inner, trained = drawn
    rng = np.random.default_rng(seed)
    weights = [rng.normal(size=(width, n)).astype(np.float32) / width for n in inner[: len(names)]]
    x = rng.normal(size=(ROWS, width)).astype(np.float32)
    fn = program(names, trained)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (weights, x))
    plan = placement.optimize(
        fn,
        *shapes,
        cluster="cpu:8",
        mesh_shape=mesh_shape,
        optimizer=optimizer,
        max_evaluations=1 if optimizer == "random" else None,
        time_limit_s=1.0,
        seed=seed,
        throw=False,
    )
    mesh = plan.mesh()
    planned = jax.jit(
        plan.apply(fn),
        in_shardings=plan.in_shardings(mesh),
        out_shardings=plan.out_shardings(mesh),
    )
    got = planned(*jax.device_put((weights, x), plan.in_shardings(mesh)))
    expected = jax.jit(fn)(weights, x)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=1e-4)
    jax.tree.map(close, got, expected)
