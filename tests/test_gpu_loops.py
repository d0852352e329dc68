"""Loops of a program on a GPU: what XLA:GPU does not fuse is read and written again."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import placement
from cost_model.analysis import Analysis
from cost_model.cluster import parse_cluster
from cost_model.device import load_device
from cost_model.events import COMPUTE
from cost_model.layout import layout_for
from cost_model.tables import build_tables
from graphs.groups import group
from graphs.trace import trace

STEPS = pathlib.Path(__file__).parents[1] / "benchmarks" / "results" / "gpu_steps"
BANDWIDTH = load_device("h200").hbm_bandwidth_bytes_per_s
SIDE = 8192
BYTES = 4.0 * SIDE * SIDE


def _seconds(function, *arguments, device="h200", donate=()):
    """Seconds by class of operator, of everything on one device."""
    grouping = group(trace(function, *arguments, donate_argnums=donate))
    layout = layout_for(parse_cluster(f"{device}:1x1"), {"data": 1})
    analysis = Analysis.of(grouping, layout.cluster.device)
    tables = build_tables(analysis, layout, usage_limit_bytes=1e12)
    trips = grouping.graph.multiplicities()
    found = dict.fromkeys(("vector", "matmul"), 0.0)
    for e in tables.events:
        if e.kind == COMPUTE:
            seconds = float(np.ravel(e.seconds)[0]) * trips[e.region]
            found[e.label] = found.get(e.label, 0.0) + seconds
    return found


def _array(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_chains_that_contractions_read_are_stored():
    def product(x, w):
        return x @ w

    def chain(x, w):
        return jnp.tanh(x * x) @ w

    square = _array(SIDE, SIDE)
    plain, computed = _seconds(product, square, square), _seconds(chain, square, square)
    assert computed["vector"] - plain["vector"] > 2 * BYTES / BANDWIDTH
    assert computed["matmul"] == pytest.approx(plain["matmul"])


def _softmax(x, w):
    s = x @ w
    e = jnp.exp(s - jnp.max(s, -1, keepdims=True))
    return e, e / jnp.sum(e, -1, keepdims=True)


def test_a_softmax_reads_its_rows_once_unless_more_of_it_is_kept():
    x = _array(SIDE, SIDE)
    once = _seconds(lambda x, w: _softmax(x, w)[1], x, x)["vector"]
    more = _seconds(_softmax, x, x)["vector"]
    # a result more, and a reduction that reads it again
    assert more - once > 1.8 * BYTES / BANDWIDTH


def test_a_reduction_of_a_product_reads_both_again():
    def gradient(x, w):
        s, d = x @ w, w @ x
        return s * (d - jnp.sum(s * d, -1, keepdims=True))

    def plain(x, w):
        s, d = x @ w, w @ x
        return s * (d - jnp.tanh(s))

    x = _array(SIDE, SIDE)
    extra = _seconds(gradient, x, x)["vector"] - _seconds(plain, x, x)["vector"]
    assert extra > 1.8 * BYTES / BANDWIDTH


def test_stacks_are_filled_and_then_updated_by_kernels_of_their_own():
    trips, rows = 16, 1024

    def running(x):
        return jax.lax.scan(lambda c, _: (c * 0.5, None), x, None, length=trips)[0]

    def stacked(x):
        return jax.lax.scan(lambda c, _: (c * 0.5, jnp.tanh(c)), x, None, length=trips)

    x = _array(rows, SIDE)
    extra = _seconds(stacked, x)["vector"] - _seconds(running, x)["vector"]
    moved = 3 * trips * 4.0 * rows * SIDE  # zeros, then a read and a write of every value
    assert extra > moved / BANDWIDTH


def test_what_runs_once_is_simulated_once():
    # zeros are written before the loop, not in every trip of it
    def stacked(x):
        return jax.lax.scan(lambda c, _: (c * 0.5, jnp.tanh(c)), x, None, length=64)

    plan = placement.optimize(stacked, _array(64, SIDE), cluster="h200:1x1", time_limit_s=1.0)
    assert plan.estimate.step_time_s == pytest.approx(
        sum(_seconds(stacked, _array(64, SIDE)).values()), rel=0.02
    )


def test_the_measured_step_is_predicted():
    # one step of one model: what it shows is that no large part is missing, not how good others are
    from graphs.zoo import build_train_step, load_model_config

    row = json.loads((STEPS / "h200-gpt2_small_16.json").read_text())
    step, arguments, donated = build_train_step(
        load_model_config(row["model"]),
        global_batch=row["batch"],
        seq_len=row["seq"],
        remat=row["remat"],
    )
    seconds = _seconds(step, *arguments, donate=donated)
    assert sum(seconds.values()) == pytest.approx(row["busy_s"], rel=0.25)
    library = ("nvjet", "cutlass", "xmma")
    matmul = sum(k[3] for k in row["kernels"] if any(name in k[0] for name in library))
    assert matmul < seconds["matmul"] < 1.8 * matmul
