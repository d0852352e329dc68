"""Collectives as XLA emits them: reduce-scatters made of all-reduces, sums that are added first,
gathers, reshardings; and the copies of the state."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from test_groups import arg
from test_tables import tables

from cost_model.cluster import parse_cluster
from cost_model.estimate import estimate
from cost_model.layout import layout_for
from cost_model.partial_sums import Sums
from cost_model.pricing import Pricing, reshard
from cost_model.simulate import Simulator
from cost_model.state_copies import state_copies_s, state_of
from graphs.groups import HEAVY


def update(weights, rows, errors):
    return weights - 0.1 * (rows.T @ errors)


@pytest.mark.parametrize(
    ("cluster", "mesh", "scattered"),
    [
        ("v5e:2x2", {"a": 4}, [True]),
        ("v5e:4x4", {"a": 16}, [False]),
        ("v5e:4x8", {"a": 32}, [True]),
        ("v5e:4x4", {"a": 4, "b": 4}, [True, True, False]),
        ("v5e:8x8", {"a": 4, "b": 16}, [True, True, False]),
        ("v5p:2x2x4", {"a": 16}, [False]),
        ("v5p:4x4x4", {"a": 4, "b": 16}, [True, True, False]),
        ("2*v5e:2x4", {"a": 2, "b": 8}, [False, True, False]),
        ("h100:8", {"a": 8}, [True]),
        ("cpu:8", {"a": 8}, [False]),
    ],
)
def test_where_the_compiler_scatters(cluster, mesh, scattered):
    found = Pricing.of(layout_for(parse_cluster(cluster), mesh)).becomes_scatter
    assert found[1:].tolist() == scattered


def estimates(shape, mesh, cluster, dtype=jnp.float32, step=update):
    """Of every assignment whose contraction is shared by rows and whose sum is whole."""
    m, n = shape
    rows = arg(4096, m, dtype=dtype) if step is update else arg(4096, dtype=jnp.int32)
    arguments = (arg(m, n, dtype=dtype), rows, arg(4096, n, dtype=dtype))
    t = tables(step, arguments, mesh, cluster, donate=(0,))
    simulator = Simulator.of(t)
    found = []
    for picks in itertools.product(*(range(k) for k in t.problem.n_strategies())):
        e = estimate(simulator, np.array(picks))
        if e.collectives["all_reduce"] or e.collectives["reduce_scatter"]:
            found.append(e)
    return found


def test_a_sum_that_is_read_in_slices_is_scattered_and_one_that_is_read_whole_is_not():
    n_bytes = 4 * 1024 * 2048
    found = estimates((1024, 2048), {"data": 8}, "v5e:2x4")
    kinds = {(e.collectives["all_reduce"], e.collectives["reduce_scatter"]) for e in found}
    assert kinds == {(0.0, n_bytes), (n_bytes, 0.0)}
    sliced = min(e.comm_time_s for e in found if not e.collectives["all_reduce"])
    whole = min(e.comm_time_s for e in found if e.collectives["all_reduce"])
    assert 1.5 * sliced < whole < 2.5 * sliced


def lookup(weights, rows, errors):
    return weights - 0.1 * jnp.zeros_like(weights).at[rows].add(errors)


# Read off programs of one contraction over eight shards, compiled for slices of 16 devices, and of
# lookups off steps of suite=compiled; XLA:GPU has no such rule. No axis divides the rows, so that
# only columns can be scattered.
@pytest.mark.parametrize(
    ("cluster", "rows", "width", "dtype", "step", "scatters"),
    [
        ("v5e:2x4", 1021, 128, jnp.bfloat16, update, False),
        ("v5e:2x4", 1021, 384, jnp.bfloat16, update, False),
        ("v5e:2x4", 1021, 256, jnp.bfloat16, update, True),
        ("v5e:2x4", 1021, 64, jnp.bfloat16, update, True),
        ("v5e:2x4", 1021, 128, jnp.float32, update, True),
        ("v5e:2x4", 151 * 128 - 1, 64, jnp.bfloat16, update, True),
        ("v5e:2x4", 157 * 128 - 1, 64, jnp.bfloat16, update, False),
        ("v5e:2x4", 157 * 128 - 1, 256, jnp.bfloat16, update, True),
        ("v6e:2x4", 313 * 128 - 1, 64, jnp.bfloat16, update, True),
        ("v6e:2x4", 331 * 128 - 1, 64, jnp.bfloat16, update, False),
        ("v5e:2x4", 1021, 64, jnp.bfloat16, lookup, False),
        ("v5e:2x4", 1021, 256, jnp.bfloat16, lookup, True),
        ("h100:8", 1021, 128, jnp.bfloat16, update, True),
    ],
)
def test_columns_that_the_compiler_scatters(cluster, rows, width, dtype, step, scatters):
    found = estimates((rows, 8 * width), {"data": 8}, cluster, dtype, step)
    assert any(not e.collectives["all_reduce"] for e in found) == scatters


def test_a_square_torus_all_reduces_whatever_is_read():
    found = estimates((1024, 4096), {"data": 16}, "v5e:4x4")
    assert {e.collectives["all_reduce"] for e in found} >= {4.0 * 1024 * 4096}


def gated_backward(x, gate, up, grads):
    """What a gated layer passes back: two products that are only added."""
    return x + (grads[0] @ gate.T + grads[1] @ up.T)


GATED = (arg(512, 256), arg(256, 1024), arg(256, 1024), (arg(512, 1024), arg(512, 1024)))


def reductions(mesh, cluster):
    """By the axes over which each product holds sums, and is sharded no further: bytes reduced."""
    t = tables(gated_backward, GATED, mesh, cluster, donate=(), tied="apart")
    assert Sums.of(t.grouping, t.layout.cluster.device).added, "the two products are added up"
    heavy = [n for n, g in enumerate(t.groups_of) if t.grouping.groups[g[0]].kind == HEAVY]
    heavy = [n for n in heavy if t.grouping.groups[t.groups_of[n][0]].reductions]
    assert len(heavy) == 2
    simulator = Simulator.of(t)
    sizes = t.problem.n_strategies()
    found = {}
    for picks in itertools.product(*(range(sizes[n]) for n in heavy)):
        chosen = np.zeros(len(sizes), int)
        chosen[heavy] = picks
        key = []
        for n, k in zip(heavy, picks):
            group = t.grouping.groups[t.groups_of[n][0]]
            summed = group.reductions[0].cls
            place = t.choices[n].place[k]
            key.append(tuple(int(c == summed) for c in place if c in (-1, summed)))
        if any(len(part) < len(mesh) for part in key):
            continue
        moved = estimate(simulator, chosen).collectives
        amount = moved["all_reduce"] + moved["reduce_scatter"]
        found.setdefault(tuple(key), set()).add(amount)
    return found


def test_sums_that_are_only_added_are_combined_once():
    found = reductions({"model": 8}, "h100:8")
    whole = 4.0 * 512 * 256
    assert min(found[(1,), (1,)]) == whole
    assert min(found[(1,), (0,)]) == whole  # one alone is not cheaper than both
    assert found[(0,), (0,)] == {0.0}


def test_sums_that_are_combined_in_different_ways_are_combined_apart():
    found = reductions({"a": 2, "b": 4}, "h100:8")
    whole = 4.0 * 512 * 256
    assert min(found[(1, 0), (0, 1)]) == 2 * whole
    assert min(found[(1, 1), (1, 1)]) == whole


@pytest.mark.parametrize(
    ("cluster", "mesh", "limits"),
    [
        ("v5e:4x8", {"a": 32}, [0.0]),
        ("v5e:8x8", {"a": 64}, [2.0**24]),
        ("v5e:8x8", {"a": 4, "b": 16}, [0.0, 0.0, 2.0**24]),
        ("v5p:4x4x4", {"a": 64}, [np.inf]),
        ("2*v5e:8x8", {"a": 128}, [0.0]),
        ("h100:8x16", {"a": 128}, [0.0]),
    ],
)
def test_where_the_compiler_gathers_by_an_all_reduce(cluster, mesh, limits):
    pricing = Pricing.of(layout_for(parse_cluster(cluster), mesh))
    assert pricing.reduced_gather_bytes[1:].tolist() == limits
    whole = (1 << len(mesh)) - 1
    spec = np.full((1, len(mesh)), 0, np.int8)
    for n_bytes in (2.0**24, 2.0**25):
        moved = reshard(spec, np.full_like(spec, -1), n_bytes, pricing, rank=1).bytes_by_kind[
            :, 0, 0
        ]
        reduces = n_bytes <= pricing.reduced_gather_bytes[whole]
        assert moved.tolist() == [0 if reduces else n_bytes, 0, n_bytes if reduces else 0, 0, 0]


def test_a_resharding_is_priced_in_the_order_of_its_steps():
    pricing = Pricing.of(layout_for(parse_cluster("h100:8x2"), {"data": 8, "model": 2}))
    n = 2.0**20

    def moved(p, q):
        found = reshard(np.array([p], np.int8), np.array([q], np.int8), n, pricing, rank=2)
        return found.bytes_by_kind[:, 0, 0].tolist()

    # the minor axis is in the way of the major one: gathered first, so that more is exchanged
    assert moved([0, 0], [1, -1]) == [n / 8, 0, 0, n / 8, 0]
    # the major one is not in the way of the minor one
    assert moved([0, 0], [-1, 1]) == [n / 2, 0, 0, n / 16, 0]
    # an axis that comes after one that moves there is cut at the end
    assert moved([0, -1], [1, 1]) == [0, 0, 0, n / 8, 0]
    # elsewhere it is cut at once
    assert moved([0, -1], [1, 2]) == [0, 0, 0, n / 16, 0]
    # and so it is where another axis has left
    assert moved([-1, 0], [0, 1]) == [0, 0, 0, n / 2, 0]
    assert moved([-1, 0], [0, -1]) == [n, 0, 0, 0, 0]
    # axes that go the same way go together, others one after the other
    assert moved([0, 0], [1, 1]) == [0, 0, 0, n / 16, 0]
    assert moved([0, 0], [1, 2]) == [0, 0, 0, 2 * n / 16, 0]


def test_replicated_state_is_copied_more_than_sharded_state():
    def update_all(weights, rows, errors):
        return weights - 0.1 * (rows.T @ errors)

    t = tables(
        update_all, (arg(4096, 4096), arg(64, 4096), arg(64, 4096)), {"a": 8}, "v5e:2x4",
        donate=(0,),
    )  # fmt: skip
    state = state_of(t.grouping.graph)
    (g,) = [g for g, item in enumerate(t.grouping.groups) if state & item.tensors.keys()]
    menu = t.choices[t.node_of[g]]
    seconds = state_copies_s(t.grouping, g, menu, t.pricing, state)
    ways = menu.shards(t.grouping.groups[g].tensors[next(iter(state))], (8,))
    whole, part = seconds[ways == 1], seconds[ways == 8]
    assert np.all(whole > 8 * part.max())
    once = 2 * 4 * 4096**2 / t.pricing.device.hbm_bandwidth_bytes_per_s
    assert np.all((whole > once) & (whole < 3 * once))
    other = tables(
        update_all, (arg(64, 64), arg(8, 64), arg(8, 64)), {"a": 8}, "h100:8", donate=(0,)
    )
    assert state_copies_s(other.grouping, g, other.choices[0], other.pricing, state) is None
