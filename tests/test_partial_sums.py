"""All-reduces that XLA:TPU makes reduce-scatters: where, and what they cost."""

import itertools

import numpy as np
import pytest
from test_groups import arg
from test_tables import tables

from cost_model.cluster import parse_cluster
from cost_model.estimate import estimate
from cost_model.layout import layout_for
from cost_model.pricing import Pricing
from cost_model.simulate import Simulator


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


def estimates(shape, mesh, cluster):
    """Of every assignment whose contraction is shared by rows and whose sum is whole."""
    m, n = shape
    t = tables(update, (arg(m, n), arg(4096, m), arg(4096, n)), mesh, cluster, donate=(0,))
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


def test_slices_of_an_odd_number_of_tiles_are_cut_from_an_all_reduce():
    rows_only = estimates((1024, 8 * 128), {"data": 8}, "v5e:2x4")
    both = estimates((1024, 8 * 256), {"data": 8}, "v5e:2x4")

    def scattered(found):
        return sum(not e.collectives["all_reduce"] for e in found)

    assert 0 < scattered(rows_only) < scattered(both)


def test_a_square_torus_all_reduces_whatever_is_read():
    found = estimates((1024, 4096), {"data": 16}, "v5e:4x4")
    assert {e.collectives["all_reduce"] for e in found} >= {4.0 * 1024 * 4096}
