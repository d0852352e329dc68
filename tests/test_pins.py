"""What the user has sharded by hand is honoured."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

import placement
from graphs.errors import MeshwrightError

MESH = AbstractMesh((2, 4), ("rows", "columns"))


def arg(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def constrained(w, x):
    pinned = NamedSharding(MESH, PartitionSpec(None, "columns"))
    h = jax.lax.with_sharding_constraint(jnp.tanh(x @ w), pinned)
    return w - 0.1 * (x.T @ h), h.sum()


def test_a_constraint_is_a_pin_and_its_mesh_is_the_mesh():
    plan = placement.optimize(
        constrained, arg(64, 64), arg(64, 64), cluster="cpu:8", donate_argnums=(0,)
    )
    assert plan.mesh_shape == {"rows": 2, "columns": 4}
    from graphs.trace import trace

    graph = trace(constrained, arg(64, 64), arg(64, 64), donate_argnums=(0,))
    pin = next(op for op in graph.ops if op.primitive == "sharding_constraint")
    assert plan.results[pin.outputs[0]] == ((), ("columns",))


def test_the_constrained_function_still_gives_the_same_result():
    rng = np.random.default_rng(0)
    w, x = (jnp.asarray(rng.normal(size=(64, 64)), jnp.float32) for _ in range(2))
    plan = placement.optimize(constrained, w, x, cluster="cpu:8", donate_argnums=(0,))
    mesh = plan.mesh()
    shardings = plan.in_shardings(mesh)
    got = jax.jit(plan.apply(constrained), in_shardings=shardings)(
        *jax.device_put((w, x), shardings)
    )
    h = jnp.tanh(x @ w)
    np.testing.assert_allclose(got[0], w - 0.1 * (x.T @ h), rtol=1e-4, atol=1e-4)


def test_a_mesh_without_the_named_axis_is_refused():
    with pytest.raises(MeshwrightError, match="mesh axis 'columns'"):
        placement.optimize(
            constrained, arg(64, 64), arg(64, 64), cluster="cpu:8", donate_argnums=(0,),
            mesh_shape={"a": 8},
        )  # fmt: skip


def test_a_size_that_does_not_divide_is_refused():
    with pytest.raises(MeshwrightError, match="does not divide"):
        placement.optimize(
            constrained, arg(64, 6), arg(64, 64), cluster="cpu:8", donate_argnums=(0,)
        )


def test_shard_map_keeps_its_specs():
    def fn(w, x):
        local = jax.shard_map(
            lambda a, b: jax.lax.psum(a @ b, "columns"),
            mesh=MESH,
            in_specs=(PartitionSpec("rows", "columns"), PartitionSpec("columns", None)),
            out_specs=PartitionSpec("rows", None),
        )
        return local(x, w).sum()

    plan = placement.optimize(fn, arg(64, 64), arg(64, 64), cluster="cpu:8", donate_argnums=())
    assert plan.mesh_shape == {"rows": 2, "columns": 4}
    assert not plan.warnings
    assert plan.estimate.collectives["all_gather"] == 0
