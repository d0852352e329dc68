"""A compiled step pays nothing for plan.apply: XLA makes the same program without it."""

from __future__ import annotations

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import pytest

import placement

PATH = pathlib.Path(__file__).parent.parent / "benchmarks" / "apply.py"
SPEC = importlib.util.spec_from_file_location("apply_benchmark", PATH)
assert SPEC is not None and SPEC.loader is not None
benchmark = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(benchmark)


def train_step(params, batch):
    def loss(params):
        hidden = jax.nn.relu(batch @ params["up"])
        hidden, _ = jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), hidden, params["layers"])
        return jnp.mean((hidden @ params["down"]) ** 2)

    value, gradients = jax.value_and_grad(loss)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), value


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


ARGUMENTS = (
    {"up": shape(16, 32), "layers": shape(2, 32, 32), "down": shape(32, 16)},
    shape(8, 16),
)


@pytest.mark.parametrize(("n_devices", "optimizer"), [(1, "data_parallel"), (8, "fsdp_tp")])
def test_it_compiles_to_the_program_without_it(n_devices, optimizer):
    plan = placement.optimize(
        train_step,
        *ARGUMENTS,
        cluster=f"cpu:{n_devices}",
        optimizer=optimizer,
        mesh_shape={"data": 2, "model": 4} if n_devices > 1 else None,
    )
    mesh = plan.mesh(jax.devices()[:n_devices])
    places = {"in_shardings": plan.in_shardings(mesh), "out_shardings": plan.out_shardings(mesh)}
    applied = plan.apply(train_step)
    # On one device nothing is constrained; on several the constraints are written into the step.
    plain = train_step if n_devices == 1 else benchmark.written_out(applied, ARGUMENTS, mesh)
    ours, theirs = (
        benchmark.program(jax.jit(f, **places).lower(*ARGUMENTS).compile())
        for f in (applied, plain)
    )
    assert ours == theirs
    whole = "".join(ours)
    assert "dot(" in whole and ("all-reduce" in whole) == (n_devices > 1)
