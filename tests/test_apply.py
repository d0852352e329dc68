"""Planned train steps on eight devices give the unsharded program's results.

Each program takes three steps unplanned and three planned; losses and parameters must agree within
floating-point tolerance. Rules that shard everything are used as well as the search, which on this
machine's slow links may leave much unsharded.
"""

import jax
import numpy as np
import pytest
from programs import PROGRAMS, next_args

import placement

CASES = [
    ("plain_sgd_without_a_library", "fsdp"),
    ("unrolled_layers_tied_embeddings", "fsdp_tp_sp"),
    ("adamw_clipped", "search"),
    ("adafactor", "fsdp"),
    ("lion", "fsdp_tp"),
    ("accumulation_by_scan", "fsdp"),
    ("dropout_with_typed_key", "fsdp"),
    ("encoder_decoder_attention", "fsdp_tp_sp"),
    ("rematerialised_layers_bfloat16", "megatron_sp"),
    ("while_loop_and_cond", "fsdp"),
    ("state_space_scan", "fsdp_tp"),
    ("zoo_llama", "megatron_sp"),
    ("zoo_moe_capacity", "search"),
    ("nnx_split_and_merge", "fsdp"),
    ("linen_train_state", "zero1"),
    ("equinox_partitioned", "fsdp_tp"),
    ("haiku_transformed", "fsdp"),
]


def numbers(tree):
    """Arrays of a pytree as float64; typed keys as their words."""
    out = []
    for x in jax.tree.leaves(tree):
        if jax.dtypes.issubdtype(getattr(x, "dtype", None), jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        out.append(np.asarray(x).astype(np.float64))
    return out


@pytest.mark.parametrize(("name", "optimizer"), CASES)
def test_three_planned_steps_equal_three_unplanned_ones(name, optimizer):
    step, args, donated = PROGRAMS[name]()
    mesh_shape = {"data": 2, "model": 4} if "tp" in optimizer or "megatron" in optimizer else None
    plan = placement.optimize(
        step,
        *args,
        cluster="cpu:8",
        donate_argnums=donated,
        optimizer=optimizer,
        mesh_shape=mesh_shape or ({"data": 8} if optimizer != "search" else None),
        time_limit_s=5.0,
    )
    mesh = plan.mesh()
    shardings = plan.in_shardings(mesh)
    planned = jax.jit(
        plan.apply(step), in_shardings=shardings, out_shardings=plan.out_shardings(mesh)
    )
    unplanned = jax.jit(step)
    ours, theirs = args, args
    for _ in range(3):
        expected = unplanned(*theirs)
        got = planned(*jax.device_put(ours, shardings))
        theirs, ours = next_args(args, donated, expected), next_args(args, donated, got)
    tolerance = 3e-2 if "bfloat16" in name else 2e-3
    for a, b in zip(numbers(expected), numbers(got), strict=True):
        np.testing.assert_allclose(b, a, rtol=tolerance, atol=tolerance)
    if optimizer == "fsdp":
        sharded = [leaf for leaf in plan.inputs if any(leaf.spec)]
        assert sharded, "fsdp shards something, so the comparison is of sharded computation"
