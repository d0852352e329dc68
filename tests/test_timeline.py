"""The drawn-out step agrees with the simulation that it draws."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cost_model.analysis import Analysis
from cost_model.cluster import parse_cluster
from cost_model.layout import layout_for
from cost_model.simulate import Simulator
from cost_model.tables import build_tables
from cost_model.timeline import COMPUTE_LANE, NETWORK_LANE, timeline
from graphs.groups import group
from graphs.trace import trace


def train_step(weights, batch):
    """Layers in a scan, as language models have them, and a gradient step."""

    def loss(weights, batch):
        def layer(x, w):
            return jnp.tanh(x @ w["up"]) @ w["down"] + x, None

        x, _ = jax.lax.scan(layer, batch, weights)
        return jnp.mean(x * x)

    value, gradient = jax.value_and_grad(loss)(weights, batch)
    return jax.tree.map(lambda w, g: w - 0.1 * g, weights, gradient), value


@pytest.fixture(scope="module")
def simulator() -> Simulator:
    weights = {
        "up": jax.ShapeDtypeStruct((6, 512, 2048), jnp.bfloat16),
        "down": jax.ShapeDtypeStruct((6, 2048, 512), jnp.bfloat16),
    }
    batch = jax.ShapeDtypeStruct((4096, 512), jnp.bfloat16)
    grouping = group(trace(train_step, weights, batch, donate_argnums=(0,)))
    layout = layout_for(parse_cluster("v5e:4x4"), {"data": 4, "model": 4})
    analysis = Analysis.of(grouping, layout.cluster.device)
    return Simulator.of(build_tables(analysis, layout, usage_limit_bytes=16e9, exposure=1.0))


def assignments(simulator: Simulator, count: int):
    sizes = simulator.tables.problem.n_strategies()
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield rng.integers(0, sizes)


def test_it_ends_when_the_simulation_ends(simulator):
    for assignment in assignments(simulator, 40):
        step_s, _, _ = simulator(assignment)[0]
        assert timeline(simulator, assignment).end_s == pytest.approx(step_s, rel=1e-9)


def test_a_lane_does_one_thing_at_a_time(simulator):
    for assignment in assignments(simulator, 20):
        drawn = timeline(simulator, assignment)
        for lane in (COMPUTE_LANE, NETWORK_LANE):
            mine = sorted((s for s in drawn.stretches if s.lane == lane), key=lambda s: s.start_s)
            for before, after in itertools.pairwise(mine):
                assert after.start_s >= before.end_s - 1e-12
            assert all(0 <= s.start_s < s.end_s <= drawn.end_s * (1 + 1e-9) for s in mine)


def test_memory_peaks_where_the_profile_peaks(simulator):
    for assignment in assignments(simulator, 20):
        drawn = timeline(simulator, assignment)
        times = [time_s for time_s, _ in drawn.memory]
        assert times == sorted(times)
        peak = simulator.peak_memory_bytes(assignment)
        assert max(live for _, live in drawn.memory) == pytest.approx(peak)
