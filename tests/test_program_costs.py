"""What XLA does to whole programs, as the estimate has it: blocking gathers, rings, bare kernels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_groups import arg

from cost_model.analysis import Analysis
from cost_model.cluster import parse_cluster
from cost_model.device import load_device
from cost_model.estimate import estimate, ring_s
from cost_model.fitted import load_calibration
from cost_model.fusion import CONTRACTIONS, Fusion
from cost_model.layout import layout_for
from cost_model.matmul import matmul_time_s
from cost_model.pricing import Pricing, reshard
from cost_model.simulate import Simulator
from cost_model.tables import build_tables
from graphs.groups import group
from graphs.trace import trace
from placement.optimizers import HAND_TUNED, Budget

ARGS = ({"up": arg(2048, 8192), "down": arg(8192, 2048)}, arg(1024, 2048))


def step(params, x):
    def loss(params):
        w = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
        return ((jax.nn.relu(x.astype(jnp.bfloat16) @ w["up"]) @ w["down"]) ** 2).mean()

    grads = jax.grad(loss)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)


def planned(cluster, mesh, rule="fsdp"):
    grouping = group(trace(step, *ARGS, donate_argnums=(0,)))
    layout = layout_for(parse_cluster(cluster), mesh)
    analysis = Analysis.of(grouping, layout.cluster.device)
    tables = build_tables(analysis, layout, usage_limit_bytes=np.inf)
    found = HAND_TUNED[rule](tables, 0, Budget(time_limit_s=5.0))
    return Simulator.of(tables), found.choices


def weights_s(simulator, choices):
    return estimate(simulator, choices).comm_by_purpose_s.get("weights", 0.0)


def test_gathers_of_weights_hold_up_only_where_the_compiler_does_not_overlap_them():
    for cluster in ("v5p:2x2x2", "v5e:2x4"):
        simulator, choices = planned(cluster, {"data": 8})
        found = estimate(simulator, choices)
        assert weights_s(simulator, choices) > 0
        waits = found.exposed_comm_time_s >= found.comm_time_s * (1 - 1e-9)
        assert waits == (cluster == "v5p:2x2x2")


def test_weights_left_to_the_compiler_go_around_a_ring_of_more_than_four():
    simulator, choices = planned("v5e:2x4", {"data": 8})
    alone = estimate(simulator, choices).step_time_s
    left = estimate(simulator, choices, pinned=False).step_time_s
    assert left == pytest.approx(alone + ring_s(simulator, choices))
    assert left > alone
    assert ring_s(*planned("v5e:2x2", {"data": 4})) == 0.0
    assert ring_s(*planned("v5e:2x4", {"data": 4, "model": 2})) == 0.0


@pytest.mark.parametrize("device", ["v4", "v5e", "v5p", "v6e", "tpu7x"])
def test_every_tpu_has_constants_of_its_own_for_kernels_that_are_not_fused(device):
    constants = load_calibration(device).constants
    assert constants["program"]["bare_cycles"] > constants["program"]["pass_cycles"] > 0
    chip, side = load_device(device), 8192
    at_peak = 2 * side**3 / chip.peak("bfloat16")
    assert 0.9 < float(matmul_time_s(chip, 1, side, side, side)) / at_peak < 1.5


def test_a_gather_along_two_dimensions_costs_a_copy_more():
    layout = layout_for(parse_cluster("v6e:4x4"), {"data": 4, "model": 4})
    pricing = Pricing.of(layout)
    whole = np.array([[-1, -1]], np.int8)
    one = reshard(np.array([[0, 0]], np.int8), whole, 1e8, pricing, rank=2)
    two = reshard(np.array([[0, 1]], np.int8), whole, 1e8, pricing, rank=2)
    three = reshard(np.array([[0, 1]], np.int8), whole, 1e8, pricing, rank=3)
    assert one.seconds[0, 0] == pytest.approx(two.seconds[0, 0]) and one.copies_s[0, 0] == 0
    assert three.copies_s[0, 0] == pytest.approx(pricing.copy_s_per_byte * 1e8)
    assert two.copies_s[0, 0] == pytest.approx(2 * three.copies_s[0, 0])  # 4 rows of a register's 8
    assert pricing.copy_s_per_byte > 0


def test_results_whose_kernel_goes_on_in_float32_stay_in_it():
    def scores(q, k):
        scaled = (q @ k.T).astype(jnp.float32) * 0.1
        return jax.nn.softmax(scaled), jax.nn.softmax((q @ k.T).astype(jnp.float32))

    half = jax.ShapeDtypeStruct((64, 32), jnp.bfloat16)
    grouping = group(trace(scores, half, half))
    graph = grouping.graph
    dots = [op.outputs[0] for op in graph.ops if op.primitive in CONTRACTIONS]
    assert Fusion.of(grouping).wide == {dots[0]}
