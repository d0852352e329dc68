"""Tables, simulation and memory: oracles and invariants."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_groups import arg, mlp_step

from cost_model import kept
from cost_model.analysis import Analysis
from cost_model.cluster import parse_cluster
from cost_model.estimate import estimate, table_cost
from cost_model.fusion import materialised
from cost_model.layout import layout_for
from cost_model.operands import with_operands
from cost_model.pricing import Pricing, reshard
from cost_model.simulate import Simulator
from cost_model.tables import build_tables
from graphs.groups import group
from graphs.trace import trace
from placement.solver import solve


def tables(step, args, mesh=None, cluster="v5e:2x4", donate=(0, 1), tied=None, limit=np.inf):
    grouping = group(trace(step, *args, donate_argnums=donate))
    layout = layout_for(parse_cluster(cluster), mesh or {"data": 2, "model": 4})
    if tied == "apart":
        tied = tuple(range(len(grouping.groups)))
    analysis = Analysis.of(grouping, layout.cluster.device, tied=tied)
    return build_tables(analysis, layout, usage_limit_bytes=limit)


def test_the_solver_finds_the_brute_force_optimum_of_a_small_program():
    t = tables(lambda a, b: jnp.tanh(a @ b), (arg(64, 128), arg(128, 256)), {"x": 8}, donate=())
    sizes = t.problem.n_strategies()
    assert np.prod(sizes.astype(float)) < 2e5
    simulator = Simulator.of(t)
    best = min(
        table_cost(simulator, np.array(a)) for a in itertools.product(*(range(n) for n in sizes))
    )
    found = solve(t.problem, time_limit_s=5.0)
    assert found.cost == pytest.approx(best, rel=1e-9)
    assert found.lower_bound <= best * (1 + 1e-9)


def test_scanned_and_unrolled_layers_cost_the_same():
    costs = []
    for scan in (False, True):
        step, args = mlp_step(4, scan, scale=64)
        t = tables(step, args)
        costs.append(solve(t.problem, time_limit_s=5.0).cost)
    # a loop fills, stores and slices its stacked values, written-out layers do not
    assert costs[0] == pytest.approx(costs[1], rel=0.25)


def test_folding_repeated_layers_does_not_change_the_optimum():
    step, args = mlp_step(4)
    folded = solve(tables(step, args).problem, time_limit_s=5.0)
    apart = solve(tables(step, args, tied="apart").problem, time_limit_s=5.0)
    assert folded.cost == pytest.approx(apart.cost, rel=1e-6)


def test_swapping_equal_mesh_axes_does_not_change_the_optimum():
    step, args = mlp_step(2)
    one = solve(tables(step, args, {"a": 4, "b": 2}, "h100:8x1").problem, time_limit_s=5.0)
    two = solve(tables(step, args, {"b": 2, "a": 4}, "h100:8x1").problem, time_limit_s=5.0)
    assert one.cost == pytest.approx(two.cost, rel=1e-6)


def test_resharding_costs_nothing_where_nothing_moves_and_slicing_is_free():
    pricing = Pricing.of(layout_for(parse_cluster("v5e:2x4"), {"data": 2, "model": 4}))
    specs = np.array([[-1, -1], [0, -1], [-1, 1], [0, 1], [1, 0]], np.int8)
    price = reshard(specs, specs, 1e6, pricing, rank=2)
    assert (np.diag(price.seconds) == 0).all()
    assert (price.seconds[0] == 0).all(), "from replicated everything is a slice"
    assert price.seconds[1, 0] > 0 and price.seconds[3, 4] > 0
    assert price.bytes_by_kind[0][1, 0] == 1e6, "an all-gather's payload is the whole buffer"


def test_a_megatron_mlp_has_one_all_reduce_and_no_resharding():
    """Column then row parallel: partial sums of the second contraction are all that moves."""
    t = tables(
        lambda x, up, down: jax.nn.relu(x @ up) @ down,
        (arg(64, 32), arg(32, 128), arg(128, 32)),
        {"model": 8},
        donate=(),
    )
    g = t.grouping.graph
    want = {(32, 128): 1, (128, 32): 0}
    costs = t.problem.node_costs.copy()
    for node, groups in enumerate(t.groups_of):
        item = t.grouping.groups[groups[0]]
        for tensor, dims in item.tensors.items():
            shape = g.tensors[tensor].shape
            if g.tensors[tensor].producer < 0 and shape in want:
                bad = t.choices[node].specs(dims)[:, 0] != want[shape]
                a = t.problem.strategy_offsets[node]
                costs[a : a + len(bad)][bad] = 1e18
            if g.tensors[tensor].producer < 0 and shape == (64, 32):
                bad = t.choices[node].specs(dims)[:, 0] != -1
                a = t.problem.strategy_offsets[node]
                costs[a : a + len(bad)][bad] = 1e18
    import dataclasses

    fixed = dataclasses.replace(t.problem, node_costs=costs)
    found = solve(fixed, time_limit_s=5.0)
    bytes_by_kind = estimate(Simulator.of(t), found.assignment).collectives
    moved = {k for k, v in bytes_by_kind.items() if v > 0}
    assert moved in ({"all_reduce"}, {"reduce_scatter"})


def test_simulated_time_lies_between_its_parts():
    step, args = mlp_step(3, scan=True)
    t = tables(step, args)
    simulator = Simulator.of(t)
    rng = np.random.default_rng(0)
    picks = rng.integers(0, t.problem.n_strategies(), size=(50, t.problem.n_nodes))
    out = simulator(picks)
    assert (out[:, 0] >= out[:, 1] - 1e-12).all()
    assert (out[:, 0] <= out[:, 1] + out[:, 2] + 1e-12).all()
    full = t.at(1.0)
    costs = [table_cost(Simulator.of(full), p) for p in picks[:5]]
    np.testing.assert_allclose(costs, out[:5, 1] + out[:5, 2], rtol=1e-6)


def test_a_loop_costs_its_body_times_its_trips():
    def fn(n):
        def loop(x, w):
            return jax.lax.scan(lambda c, v: (c @ v, None), x, w)[0]

        t = tables(loop, (arg(256, 256), arg(n, 256, 256)), {"x": 8}, donate=())
        whole = np.zeros(t.problem.n_nodes, np.int64)
        return Simulator.of(t)(whole)[0, 0]

    assert fn(12) - fn(8) == pytest.approx(fn(8) - fn(4), rel=1e-6)


def test_tight_memory_shards_the_state():
    step, args = mlp_step(4, scan=True)
    state = 2 * 4 * 2 * 16 * 64 * 4  # weights and momentum, four bytes each
    tight = tables(step, args, limit=state * 0.6)
    found = solve(tight.problem, time_limit_s=5.0)
    assert found.feasible
    assert estimate(Simulator.of(tight), found.assignment).peak_memory_bytes <= state * 0.6
    per_class = estimate(Simulator.of(tight), found.assignment).memory_by_class_bytes
    assert per_class["state"] < state


def test_a_gathered_operand_is_in_memory_while_it_is_read():
    step, args = mlp_step(2, False, scale=64)
    t = tables(step, args)
    assert t.operands
    simulator = Simulator.of(t)
    counted = with_operands(t.problem, t.operands)
    rng = np.random.default_rng(0)
    gathered = 0
    for _ in range(50):
        x = rng.integers(0, t.problem.n_strategies())
        profile = simulator.memory_profile(x)
        for o in t.operands:
            copy = o.held_bytes[o.rows[x[o.source]], o.columns[x[o.node]]]
            gathered += copy > 0
            assert (profile[slice(*o.interval)] >= copy).all()
        exact = profile.max()
        assert t.problem.peak_usage(x) <= (exact + simulator.on_chip_bytes) * (1 + 1e-9)
        assert exact <= counted.peak_usage(x) * (1 + 1e-9)
    assert gathered


def test_what_stays_on_chip_takes_no_device_memory_and_state_never_does():
    step, args = mlp_step(2, False, scale=64)
    t = tables(step, args)
    simulator = Simulator.of(t)
    x = np.zeros(len(t.choices), np.int64)
    without = dataclasses.replace(simulator)
    object.__setattr__(without, "on_chip_bytes", 0.0)
    whole, left = without.memory_profile(x), simulator.memory_profile(x)
    assert (left <= whole + 1.0).all() and (left < whole).any()
    assert (whole - left).max() <= simulator.on_chip_bytes
    labels = np.array(t.usage_labels)
    assert not simulator.passing[np.isin(labels, ("state", "gradients"))].any()


def test_logits_stay_until_the_gradient_of_the_loss_is_made_from_them():
    def step(w, x):
        return jax.grad(lambda w: jax.nn.logsumexp((x @ w).astype(jnp.float32), -1).sum())(w)

    args = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((64, 512), (128, 64)))
    grouping = group(trace(step, *args))
    graph = grouping.graph
    logits, backward = [o for o in graph.ops if o.primitive == "dot_general"]
    gradient = next(t for t in backward.inputs if graph.tensors[t].shape == (128, 512))
    made = graph.tensors[gradient].producer
    t = logits.outputs[0]
    held = materialised(grouping)
    assert gradient in held
    assert kept.last_uses(graph)[t] < made < kept.read_until(grouping, held, set(), early=True)[t]
