"""Rematerialisation of a share of the layers: the same numbers, less memory than none of it."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import placement
from cost_model.jobs import constants
from cost_model.jobs.memory import memory
from cost_model.jobs.step import step_time
from graphs.errors import MeshwrightError
from graphs.trace import trace
from graphs.zoo import build_train_step, load_model_config
from placement.jobs import space
from placement.jobs.describe import describe_job

TINY = dataclasses.replace(load_model_config("tiny"), n_layers=4)
STEP = dict(global_batch=2, seq_len=32, compute_dtype="float32")


def step_of(config=TINY, **options):
    return build_train_step(config, **{**STEP, **options})


def matmuls(**options) -> float:
    step, args, donated = step_of(**options)
    graph = trace(step, *args, donate_argnums=donated)
    times = graph.multiplicities()
    return sum(times[op.region] for op in graph.ops if op.primitive == "dot_general")


@pytest.mark.parametrize("scan", [True, False])
def test_each_layer_of_the_share_is_computed_again(scan):
    full, dots = matmuls(scan=scan), matmuls(scan=scan, remat="dots")
    assert full > dots
    for share in (0.25, 0.5, 0.75):
        assert matmuls(scan=scan, remat_layers=share) == dots + share * (full - dots)


def test_a_share_changes_no_number():
    rng = np.random.default_rng(0)

    def run(share):
        step, args, _ = step_of(remat_layers=share)
        leaves, tree = jax.tree.flatten(args)
        drawn = [
            jnp.asarray(rng.integers(0, 8, x.shape), x.dtype)
            if jnp.issubdtype(x.dtype, jnp.integer)
            else jnp.asarray(np.abs(np.sin(np.arange(x.size))).reshape(x.shape) * 0.05, x.dtype)
            for x in leaves
        ]
        rng.bit_generator.state = np.random.default_rng(0).bit_generator.state
        return jax.jit(step)(*jax.tree.unflatten(tree, drawn))

    for a, b in zip(jax.tree.leaves(run(1.0)), jax.tree.leaves(run(0.5)), strict=True):
        assert np.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_plan_of_a_share_is_built_and_bound():
    plan = placement.optimize_model(
        TINY, cluster="v5e:2x2", global_batch=8, seq_len=64, remat="full", microbatches=1,
        step_options={"remat_layers": 0.5},
    )  # fmt: skip
    assert plan.program["remat_layers"] == 0.5
    step, arguments, _ = placement.build(plan, TINY)
    assert plan.bind(step, *arguments).in_specs


@pytest.mark.parametrize(
    "options, says",
    [
        ({"remat_layers": 0.3}, "choose one of 0.25, 0.5, 0.75, 1.0"),
        ({"remat_layers": 0.5, "remat": "none"}, "goes with remat=full"),
        ({"remat_layers": 0.25, "config": dataclasses.replace(TINY, n_layers=6)}, "6 are repeated"),
    ],
)
def test_a_share_that_cannot_be_is_one_sentence(options, says):
    with pytest.raises(MeshwrightError, match=says):
        step_of(**options)


def test_jobs_recompute_a_share_of_each_stage():
    job = describe_job("Llama 2 13B", cluster="h100:8x2", global_batch=32, seq_len=4096)
    all_groups = space.groups(job)
    fitted = constants.load()
    held, took = {}, {}
    for name in ("none", "full, a quarter of the layers", "full, half of the layers", "full"):
        jobs = space.members(job, all_groups, name)
        held[name] = memory(jobs, fitted).peak_bytes
        took[name] = step_time(jobs.replace(caching_allocator=0.0), fitted).step_time_s
    names = list(held)
    for less, more in itertools.pairwise(names):
        assert (held[more] <= held[less] * (1 + 1e-9)).all()
        assert (took[more] >= took[less] * (1 - 1e-9)).all()
    one_layer = all_groups.pp * all_groups.vpp >= job.n_layers[0]
    assert one_layer.any()
    half = space.members(job, all_groups, "full, half of the layers").remat_qkv
    assert (half[one_layer] == 1.0).all(), "a stage of one layer has no half"
