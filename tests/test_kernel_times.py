"""Kernel times of a GPU are read from a trace: overlapping kernels count once, others not at all."""

import types

import numpy as np
import pytest

from cost_model.calibration.kernels import arguments_of, kernel_seconds, union
from cost_model.calibration.programs import build, case


def _events(*spans):
    return [
        types.SimpleNamespace(name=n, start_ns=a, end_ns=b, duration_ns=b - a) for n, a, b in spans
    ]


def _line(name, *spans):
    return types.SimpleNamespace(name=name, events=_events(*spans))


def _plane(name, *lines):
    return types.SimpleNamespace(name=name, lines=lines)


def test_overlapping_pieces_are_joined():
    assert union([(5, 8), (0, 2), (1, 3), (8, 9)]) == [(0, 3), (5, 9)]


def test_a_case_has_the_time_in_which_any_stream_works():
    trace = types.SimpleNamespace(
        planes=[
            _plane("/host:CPU", _line("python", ("case a", 0, 100), ("other", 0, 500))),
            _plane("/host:CPU", _line("python", ("case b", 100, 200), ("case c", 300, 400))),
            _plane(
                "/device:GPU:0",
                _line("Stream #1", ("k1", 10, 30), ("k2", 110, 150)),
                _line("Stream #2", ("k3", 20, 40)),
                _line("XLA Ops", ("op", 0, 90)),
            ),
        ]
    )
    found = kernel_seconds(trace)
    assert found == pytest.approx({"a": 30e-9, "b": 40e-9})


@pytest.mark.parametrize(
    "item",
    [
        case("matmul", "tn", "bfloat16", b=2, m=16, k=8, n=24),
        case("ragged_dot", "plain", "bfloat16", g=4, m=64, k=8, n=16),
        case("index", "scatter_add", "float32", v=50, c=8, r=20),
        case("reduce", "cross_entropy", "bfloat16", r=16, c=30),
    ],
)
def test_arguments_have_the_shapes_and_values_that_the_program_needs(item):
    values, (_, wanted) = arguments_of(item), build(item)
    assert [(v.shape, str(v.dtype)) for v in values] == [(w.shape, str(w.dtype)) for w in wanted]
    dims = dict(item.dims)
    for value in values:
        if value.dtype == np.int32 and item.kind == "ragged_dot":
            assert value.sum() == dims["m"]
        elif value.dtype == np.int32:
            assert 0 <= value.min() and value.max() < dims.get("v", dims.get("c"))
            assert len(np.unique(value)) > 1
        else:
            assert np.std(value.astype(np.float32)) > 0.5
