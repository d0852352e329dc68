"""Seconds of collectives: closed forms, monotonicity, published measurements."""

import csv
import importlib.resources
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cost_model.cluster import parse_cluster
from cost_model.collectives import KINDS, collective_cost, collective_time_s
from cost_model.layout import enumerate_layouts, layout_for
from graphs.errors import MeshwrightError

BIG = 1e10
"""bytes at which latency does not matter."""


def time_s(notation, shape, kind, axes, payload=BIG):
    return collective_time_s(kind, payload, layout_for(parse_cluster(notation), shape), axes)


def link(notation):
    return parse_cluster(notation).physical_axes[-1].bandwidth_bytes_per_s


def test_ring_with_wrap_uses_both_directions():
    got = time_s("v5e:16x16", {"a": 16, "b": 16}, "all_gather", (1,))
    assert got == pytest.approx(BIG * 15 / 16 / (2 * link("v5e:16x16")), rel=1e-3)


def test_a_line_is_as_slow_as_one_direction():
    got = time_s("v5e:8x8", {"a": 8, "b": 8}, "all_gather", (1,))
    assert got == pytest.approx(BIG * 7 / 8 / link("v5e:8x8"), rel=1e-3)


def test_two_torus_axes_at_once_double_the_bandwidth():
    one = time_s("v5e:16x16", {"a": 16, "b": 16}, "all_gather", (0,))
    both = time_s("v5e:16x16", {"a": 16, "b": 16}, "all_gather", (0, 1))
    merged = time_s("v5e:16x16", {"a": 256}, "all_gather", (0,))
    assert both == pytest.approx(merged)
    assert both == pytest.approx(one / 2 * (255 / 256) / (15 / 16), rel=1e-3)


def test_splitting_an_axis_loses_the_wrap():
    whole = time_s("v5e:16x16", {"a": 16, "b": 16}, "all_gather", (1,))
    split = time_s("v5e:16x16", {"a": 32, "b": 8}, "all_gather", (1,))
    assert split == pytest.approx(2 * whole * (7 / 8) / (15 / 16), rel=1e-3)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["v5e:16x16", "v5e:4x8", "v5p:4x4x8", "h100:8x4", "2*v5e:4x8", "tpu7x:4x4x4"]),
    st.sampled_from(KINDS),
    st.data(),
)
def test_more_bytes_never_take_less_time(notation, kind, data):
    layout = data.draw(st.sampled_from(enumerate_layouts(parse_cluster(notation))))
    n = len(layout.mesh.axis_sizes)
    axes = data.draw(st.sets(st.integers(0, n - 1), min_size=1).map(lambda s: tuple(sorted(s))))
    payload = np.sort(data.draw(st.lists(st.floats(0, 1e11), min_size=2, max_size=8)))
    cost = collective_cost(kind, payload, layout, axes)
    assert np.all(np.diff(cost.time_s) >= 0) and np.all(cost.time_s >= 0)
    assert np.all(np.asarray(cost.time_s)[payload == 0] == 0)
    busy = np.max([np.asarray(t) for t in cost.lane_time_s.values()], axis=0)
    assert np.all(np.asarray(cost.time_s) >= busy - 1e-12)
    assert sum(np.asarray(b) for b in cost.lane_bytes.values()) == pytest.approx(cost.bytes_on_wire)
    one = collective_time_s(kind, float(payload[-1]), layout, axes)
    assert one == pytest.approx(np.asarray(cost.time_s)[-1])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["v5e:16x16", "v5p:4x8x8", "tpu7x:4x4x4"]), st.data())
def test_all_reduce_is_a_reduce_scatter_and_an_all_gather(notation, data):
    layout = data.draw(st.sampled_from(enumerate_layouts(parse_cluster(notation))))
    axes = (data.draw(st.integers(0, len(layout.mesh.axis_sizes) - 1)),)
    both = sum(collective_time_s(k, BIG, layout, axes) for k in ("reduce_scatter", "all_gather"))
    assert collective_time_s("all_reduce", BIG, layout, axes) == pytest.approx(both, rel=1e-3)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["v5e:16x16", "v5e:8x8", "v5p:4x8x8"]), st.data())
def test_an_all_gather_is_never_faster_than_its_links_allow(notation, data):
    cluster = parse_cluster(notation)
    layout = data.draw(st.sampled_from(enumerate_layouts(cluster)))
    axes = tuple(range(len(layout.mesh.axis_sizes)))
    ports = sum(a.bandwidth_bytes_per_s * (2 if a.wraps else 1) for a in cluster.physical_axes)
    received = BIG * (1 - 1 / cluster.n_devices)
    assert collective_time_s("all_gather", BIG, layout, axes) >= received / ports * 0.999


def test_all_to_all_is_bound_by_the_bisection():
    n, w = 16, link("v5e:16x16")
    got = time_s("v5e:16x16", {"a": 16, "b": 16}, "all_to_all", (1,))
    # half of the bytes of half of the devices cross two cuts of the ring, each way
    assert got == pytest.approx(BIG / 2 * n / 2 / (2 * w), rel=1e-3)


def test_a_large_group_of_gpus_uses_every_nic_of_its_nodes():
    whole = collective_cost(
        "all_gather", BIG, layout_for(parse_cluster("h100:8x8"), {"a": 64}), (0,)
    )
    across = time_s("h100:8x8", {"a": 8, "b": 8}, "all_gather", (0,))
    assert whole.lane_time_s["network"] == pytest.approx(across / 8, rel=1e-2)
    assert set(whole.lane_time_s) == {"nvlink", "network"}
    inside = collective_cost(
        "all_gather", BIG, layout_for(parse_cluster("h100:8x8"), {"a": 8, "b": 8}), (1,)
    )
    assert inside.lane == "nvlink" and inside.physical_axes == ("gpu",)


def test_slices_exchange_a_shard_over_the_data_centre_network():
    layout = layout_for(parse_cluster("4*v5e:16x16"), {"data": 64, "model": 16})
    cost = collective_cost("all_reduce", BIG, layout, (0,))
    assert cost.lane == "dcn"
    assert cost.lane_bytes["dcn"] == pytest.approx(2 * BIG * 3 / 4 / 16)
    assert cost.time_s == pytest.approx(sum(cost.lane_time_s.values()), rel=1e-3)


def test_latency_bounds_small_collectives():
    small = time_s("v5e:16x16", {"a": 16, "b": 16}, "all_gather", (1,), 1024)
    device = parse_cluster("v5e:16x16").device
    assert small >= 8 * device.link_latency_s
    line = time_s("v5e:8x8", {"a": 8, "b": 8}, "all_gather", (1,), 1024)
    assert line >= 7 * device.link_latency_s


def test_a_group_of_one_is_free():
    layout = layout_for(parse_cluster("v5e:4x4"), {"data": 16, "model": 1})
    cost = collective_cost("all_reduce", BIG, layout, (1,))
    assert cost.time_s == 0 and cost.lane == "" and cost.lane_time_s == {}


def test_swapping_equal_axes_changes_nothing():
    for kind in KINDS:
        a = time_s("v5e:16x16", {"a": 16, "b": 16}, kind, (0,))
        assert a == pytest.approx(time_s("v5e:16x16", {"a": 16, "b": 16}, kind, (1,)))


def test_bad_requests_are_refused():
    layout = layout_for(parse_cluster("v5e:4x4"), {"data": 16})
    with pytest.raises(MeshwrightError, match="all_gather"):
        collective_time_s("gather", 1.0, layout, (0,))
    with pytest.raises(MeshwrightError, match="axis index 1"):
        collective_time_s("all_gather", 1.0, layout, (1,))


def _published():
    path = importlib.resources.files("cost_model") / "calibration" / "collectives_published.csv"
    return list(csv.DictReader(path.read_text().splitlines()))


@pytest.mark.parametrize("row", _published(), ids=lambda r: f"{r['cluster']}-{r['kind']}")
def test_published_measurements(row):
    cluster, n = parse_cluster(row["cluster"]), int(row["devices"])
    shape = {"a": n} if n == cluster.n_devices else {"a": n, "b": cluster.n_devices // n}
    payload, measured = float(row["payload_bytes"]), float(row["measured"])
    predicted = collective_time_s(row["kind"], payload, layout_for(cluster, shape), (0,))
    if row["unit"] == "busbw_gb_per_s":
        passes = 2 if row["kind"] == "all_reduce" else 1
        measured_s = passes * (n - 1) / n * payload / (measured * 1e9)
    else:
        measured_s = measured * 1e-6
    assert abs(math.log(predicted / measured_s)) < math.log(1.25)
