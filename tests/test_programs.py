"""Each program of the collection is a train step: it traces, runs, and learns its batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from programs import PROGRAMS, loss_of, next_args

N_STEPS = 3
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""The programs run for milliseconds and compile for seconds."""


@pytest.mark.parametrize("name", PROGRAMS)
def test_traces_runs_and_learns(name):
    train_step, args, donate_argnums = PROGRAMS[name]()
    assert donate_argnums == tuple(range(len(donate_argnums)))
    shapes = jax.tree.map(jnp.shape, args)
    step = jax.jit(train_step, compiler_options=QUICK)
    losses = []
    for _ in range(N_STEPS):
        results = step(*args)
        losses.append(float(loss_of(results)))
        args = next_args(args, donate_argnums, results)
        # a state that changes its structure or shapes could not be trained, nor donated
        assert jax.tree.map(jnp.shape, args) == shapes
    assert all(jnp.isfinite(jnp.array(losses)))
    assert losses[-1] < losses[0]
