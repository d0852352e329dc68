"""Cluster notation and mesh layouts, against jax.experimental.mesh_utils."""

import math
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import mesh_utils

from cost_model.cluster import parse_cluster
from cost_model.layout import (
    arrange_devices,
    device_order,
    enumerate_layouts,
    layout_for,
    make_mesh,
)
from graphs.errors import MeshwrightError

_KINDS = {"v5e": "TPU v5 lite", "v6e": "TPU v6 lite", "v5p": "TPU v5", "tpu7x": "TPU7x"}
TORI = ("v5e:4x8", "v5e:16x16", "v6e:8x16", "v5p:2x4x4", "v5p:4x4x8", "v5p:4x8x16", "tpu7x:4x4x4")


def fake_devices(notation, shuffle=0):
    """What jax.experimental.topologies lists for this slice, in shuffled order."""
    cluster = parse_cluster(notation)
    x, y, z = (*cluster.slice_shape, 1)[:3]
    cores = cluster.device.jax_devices_per_chip
    devices = [
        types.SimpleNamespace(
            id=c + cores * (i + x * (j + y * (k + z * s))),
            coords=(i, j, k),
            core_on_chip=c,
            slice_index=s,
            process_index=0,
            platform="tpu",
            device_kind=_KINDS.get(cluster.device.name, "TPU v4"),
        )
        for s in range(cluster.n_slices)
        for k in range(z)
        for j in range(y)
        for i in range(x)
        for c in range(cores)
    ]
    return [devices[i] for i in np.random.default_rng(shuffle).permutation(len(devices))]


def ids(devices):
    return np.vectorize(lambda d: d.id)(devices)


@pytest.mark.parametrize(
    ("notation", "devices", "axes"),
    [
        ("v5e:16x16", 256, [("x", 16, True), ("y", 16, True)]),
        ("v5e:4x16", 64, [("x", 4, False), ("y", 16, True)]),
        ("4*v5e:16x16", 1024, [("slice", 4, False), ("x", 16, True), ("y", 16, True)]),
        ("v5p:4x4x8", 128, [("x", 4, True), ("y", 4, True), ("z", 8, True)]),
        ("v5p:2x2x4", 16, [("x", 2, False), ("y", 2, False), ("z", 4, False)]),
        ("tpu7x:2x2x1", 8, [("x", 2, False), ("y", 2, False), ("core", 2, False)]),
        ("h100:8x64", 512, [("node", 64, False), ("gpu", 8, False)]),
        ("h100:8", 8, [("gpu", 8, False)]),
        ("gb200:72x2", 144, [("node", 2, False), ("gpu", 72, False)]),
        ("cpu:8", 8, [("host", 8, False)]),
        ("v5e:1x1", 1, [("x", 1, False)]),
    ],
)
def test_notation(notation, devices, axes):
    cluster = parse_cluster(notation)
    assert cluster.n_devices == devices
    assert [(a.name, a.size, a.wraps) for a in cluster.physical_axes] == axes
    assert parse_cluster(cluster.notation) == cluster


def test_slower_networks_come_first():
    for notation in ("4*v5e:16x16", "h100:8x4", "tpu7x:4x4x4"):
        speeds = [a.bandwidth_bytes_per_s for a in parse_cluster(notation).physical_axes]
        assert speeds == sorted(speeds)


@pytest.mark.parametrize(
    ("notation", "words"),
    [
        ("v5x:4x4", "v5e"),
        ("v5e:3x3", "1, 2, 4, 8, 16"),
        ("v5e:16x32", "1, 2, 4, 8, 16"),
        ("v5p:4x4", "multiple of 4"),
        ("v5p:4x4x6", "multiple of 4"),
        ("v5p:32x32x32", "8960"),
        ("v4:20x16x16", "4096"),
        ("h100:64", "h100:8x8"),
        ("h100:8x8x8", "PERNODExNODES"),
        ("2*h100:8x8", "only TPUs"),
        ("cpu:2x2", "cpu:N"),
        ("v5e:0x4", "between 1 and"),
        ("v5e", "notation"),
        ("v5e:4x4 ; rm", "notation"),
        ("", "notation"),
    ],
)
def test_bad_notation_says_what_exists(notation, words):
    with pytest.raises(MeshwrightError, match=words.replace("*", r"\*")) as caught:
        parse_cluster(notation)
    assert "\n" not in str(caught.value)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_layout_for_gives_the_devices_that_jax_gives(data):
    notation = data.draw(st.sampled_from(TORI))
    left, sizes = parse_cluster(notation).n_devices, []
    for _ in range(data.draw(st.integers(0, 3))):
        sizes.append(data.draw(st.sampled_from([d for d in range(1, left + 1) if left % d == 0])))
        left //= sizes[-1]
    sizes.append(left)
    devices = fake_devices(notation)
    theirs = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    layout = layout_for(parse_cluster(notation), {f"a{i}": n for i, n in enumerate(sizes)})
    assert np.array_equal(device_order(layout), ids(theirs))
    if not layout.splits:
        whole = mesh_utils.create_device_mesh(sizes, devices)
        assert np.array_equal(ids(whole), ids(theirs))


def test_slices_are_laid_as_jax_hybrid_meshes():
    devices = fake_devices("4*v5e:4x8")
    layout = layout_for(parse_cluster("4*v5e:4x8"), {"data": 16, "model": 8})
    theirs = mesh_utils.create_hybrid_device_mesh((4, 8), (4, 1), devices)
    assert np.array_equal(device_order(layout), ids(theirs))


@pytest.mark.parametrize("notation", [*TORI, "v5e:4x4", "h100:8x4", "2*v5e:4x8", "v4:4x4x4"])
def test_enumerated_layouts_are_composable_and_distinct(notation):
    cluster = parse_cluster(notation)
    layouts = enumerate_layouts(cluster, max_axes=3)
    assert len({(lo.mesh.axis_sizes, lo.key) for lo in layouts}) == len(layouts)
    assert {len(lo.mesh.axis_sizes) for lo in layouts} == {1, 2, 3}
    for layout in layouts:
        order = device_order(layout)
        assert order.shape == layout.mesh.axis_sizes
        assert sorted(order.ravel()) == list(range(cluster.n_devices))
        assert min(layout.mesh.axis_sizes) > 1
    if cluster.device.family == "tpu" and cluster.n_slices == 1 and cluster.device.name != "v4":
        devices = fake_devices(notation)
        for layout in layouts:
            split = layout.splits
            mesh_utils.create_device_mesh(
                layout.mesh.axis_sizes, devices, allow_split_physical_axes=split
            )


def test_without_splits_every_axis_is_a_product_of_whole_axes():
    layouts = enumerate_layouts(parse_cluster("v5p:4x8x16"), allow_splits=False)
    assert layouts and not any(lo.splits for lo in layouts)
    shapes = {tuple(sorted(lo.mesh.axis_sizes)) for lo in layouts}
    assert shapes == {(512,), (16, 32), (8, 64), (4, 128), (4, 8, 16)}


@pytest.mark.parametrize("notation", ["v5e:4x8", "2*v5e:4x8", "tpu7x:4x4x4", "v4:2x2x1"])
def test_devices_are_placed_by_their_coordinates(notation):
    layout = enumerate_layouts(parse_cluster(notation), max_axes=2)[-1]
    devices = arrange_devices(layout, fake_devices(notation, shuffle=3))
    assert np.array_equal(ids(devices), device_order(layout))


def test_make_mesh_names_the_axes():
    import jax

    mesh = make_mesh(layout_for(parse_cluster("cpu:1"), {"data": 1, "model": 1}), jax.devices()[:1])
    assert mesh.axis_names == ("data", "model")


def test_one_device():
    (layout,) = enumerate_layouts(parse_cluster("v5e:1x1"))
    assert layout.mesh.axis_sizes == (1,)
    assert device_order(layout).tolist() == [0]
    assert layout_for(parse_cluster("cpu:1"), {"data": 1, "model": 1}).mesh.n_devices == 1


@pytest.mark.parametrize(
    ("notation", "shape", "words"),
    [
        ("v5e:4x4", {"data": 4, "model": 8}, "product is 16"),
        ("v5e:4x4", {}, "product 16"),
        ("v5e:4x4", {"data": -4, "model": -4}, "positive integer"),
        ("v5e:4x4", {"data": 16.0}, "positive integer"),
        ("gb200:72x2", {"data": 9, "model": 16}, "cannot be composed"),
    ],
)
def test_impossible_meshes_are_refused(notation, shape, words):
    with pytest.raises(MeshwrightError, match=words):
        layout_for(parse_cluster(notation), shape)


def test_wrong_number_of_devices_is_refused():
    layout = layout_for(parse_cluster("v5e:4x4"), {"data": 16})
    with pytest.raises(MeshwrightError, match="v5e:4x4"):
        make_mesh(layout, fake_devices("v5e:4x8"))


def test_every_physical_axis_is_used_once():
    for notation in TORI:
        cluster = parse_cluster(notation)
        for layout in enumerate_layouts(cluster):
            for a, axis in enumerate(cluster.physical_axes):
                parts = [f.size for fs in layout.placement for f in fs if f.axis == a]
                assert math.prod(parts) == axis.size
