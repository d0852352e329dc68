"""Stages: schedules respect dependencies, no layer is lost, steps equal the unsharded step."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import placement
from graphs.errors import InfeasibleError, MeshwrightError
from graphs.zoo import load_model_config
from placement.compile import lower
from placement.pipeline.compile import compile_stage, stage_layout
from placement.pipeline.plan import pipelined_plan
from placement.pipeline.schedule import Schedule
from placement.pipeline.stage_program import stage_program
from placement.pipeline.stages import Layout, pipelined_segment


@st.composite
def schedules(draw):
    stages, chunks = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    rounds = draw(st.integers(1, 4))
    microbatches = rounds * stages if chunks > 1 else draw(st.integers(1, 12))
    kind = draw(st.sampled_from(("gpipe", "1f1b", "interleaved")))
    return Schedule(kind=kind, stages=stages, microbatches=microbatches, chunks=chunks)


def times(schedule: Schedule):
    """{(stage, chunk, microbatch): tick} of forward and of backward."""
    found = ({}, {})
    for t in range(schedule.ticks):
        for s in range(schedule.stages):
            for where, of in zip(found, (schedule.forward, schedule.backward)):
                valid, chunk, microbatch = of(t, s)
                if valid:
                    assert (s, chunk, microbatch) not in where, "done twice"
                    where[s, chunk, microbatch] = t
    return found


@settings(max_examples=60, deadline=None)
@given(schedules())
def test_every_chunk_of_every_microbatch_is_computed_after_what_it_needs(schedule):
    p, v, m = schedule.stages, schedule.chunks, schedule.microbatches
    forward, backward = times(schedule)
    assert len(forward) == len(backward) == p * v * m
    for (s, c, j), t in forward.items():
        if s or c:
            # what a stage computes at a tick is received at the next one, and not kept there
            before = ((s - 1) % p, c - (s == 0), j)
            assert forward[before] == t - 1
        assert backward[s, c, j] >= t
    for (s, c, j), t in backward.items():
        if s < p - 1 or c < v - 1:
            after = ((s + 1) % p, c + (s == p - 1), j)
            assert backward[after] == t - 1


@settings(max_examples=60, deadline=None)
@given(schedules())
def test_kept_inputs_are_not_overwritten_before_they_are_used(schedule):
    forward, backward = times(schedule)
    for s, c, j in forward:
        for other in range(j + 1, schedule.microbatches):
            if other % schedule.slots == j % schedule.slots:
                assert forward[s, c, other] > backward[s, c, j]
    assert schedule.slots <= schedule.microbatches
    if schedule.kind == "1f1b" and schedule.chunks == 1:
        assert schedule.slots <= 2 * schedule.stages - 1


@settings(max_examples=60, deadline=None)
@given(schedules())
def test_phases_hold_all_work_and_the_bubble_is_the_literature_s(schedule):
    p, v, m = schedule.stages, schedule.chunks, schedule.microbatches
    passes = {"forward": 0, "backward": 0}
    at = 0
    for phase in schedule.phases():
        assert phase.start == at < phase.stop
        at = phase.stop
        for name, of in (("forward", schedule.forward), ("backward", schedule.backward)):
            busy = any(of(t, s)[0] for t in range(phase.start, phase.stop) for s in range(p))
            assert getattr(phase, name) or not busy
            passes[name] += (phase.stop - phase.start) * getattr(phase, name)
    assert at == schedule.ticks
    # m + (p - 1) / v passes of a stage, each of v chunks (arXiv:2104.04473, section 2.2)
    assert passes == {"forward": m * v + p - 1, "backward": m * v + p - 1}
    assert schedule.bubble == pytest.approx((p - 1) / v / (m + (p - 1) / v))


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 40), stages=st.integers(1, 5), chunks=st.integers(1, 3))
def test_layers_are_arranged_and_restored(n, stages, chunks):
    if n < stages * chunks:
        with pytest.raises(MeshwrightError, match="do not fill"):
            Layout.even(n, stages, chunks)
        return
    layout = Layout.even(n, stages, chunks)
    leaf = np.arange(1, n + 1, dtype=np.float32)[:, None] * np.ones(3, np.float32)
    arranged = np.asarray(layout.arrange(leaf))
    assert arranged.shape[0] == stages * chunks * layout.slots
    np.testing.assert_array_equal(np.asarray(layout.restore(arranged)), leaf)
    # consecutive virtual stages hold consecutive layers
    held = arranged[:, 0].reshape(stages, chunks, layout.slots).swapaxes(0, 1).reshape(-1)
    np.testing.assert_array_equal(held[held > 0], np.arange(1, n + 1))
    np.testing.assert_array_equal(layout.mask().reshape(-1), arranged[:, 0] > 0)


def test_what_cannot_have_stages_is_refused_in_a_sentence():
    for name, match in (("t5_xxl", "encoder-decoder"), ("gemma3_27b", "another kind")):
        with pytest.raises(MeshwrightError, match=match):
            pipelined_segment(load_model_config(name))
    with pytest.raises(MeshwrightError, match="rounds"):
        Schedule(kind="interleaved", stages=4, microbatches=6, chunks=2)
    with pytest.raises(MeshwrightError, match="zero_bubble"):
        Schedule(kind="zero_bubble", stages=4, microbatches=6)


def test_stages_are_planned_where_the_job_model_says_that_they_pay(tmp_path):
    wanted = dict(cluster="h100:8x64", global_batch=256, seq_len=2048)
    plan = placement.optimize_model("gpt3_175b", **wanted)
    assert plan.mesh_shape["stage"] > 1 and plan.program["microbatches"] > 1
    assert plan.lower_bound_s <= plan.estimate.step_time_s
    assert "without stages" in plan.explain()
    state = [leaf for leaf in plan.inputs if "['layers']" in leaf.name]
    assert state and all(leaf.spec[0] == ("stage",) for leaf in state)
    loaded = placement.Plan.load(plan.save(tmp_path / "plan.json"))
    assert dataclasses.replace(loaded, trees=None) == dataclasses.replace(plan, trees=None)
    # a small model on a fast network has no use for stages
    small = placement.optimize_model(
        "gpt2_small", cluster="h100:8x1", global_batch=64, time_limit_s=2.0
    )
    assert "stage" not in small.mesh_shape


def test_asked_for_stages_that_do_not_fit_are_infeasible():
    with pytest.raises(InfeasibleError, match="no pipelined plan fits"):
        placement.optimize_model(
            "llama3_405b", cluster="v5e:4x4", global_batch=16, seq_len=8192, stages=2
        )


@pytest.mark.parametrize(
    ("cluster", "mesh", "stage_on"),
    [
        ("v5e:4x4", {"stage": 2, "data": 4, "model": 2}, 8),
        ("v5p:2x2x4", {"stage": 4, "data": 2, "model": 2}, 4),
        ("h100:8x4", {"stage": 4, "data": 2, "model": 4}, 8),
        ("2*v5e:4x4", {"stage": 2, "data": 4, "model": 4}, 16),
    ],
)
def test_a_stage_has_its_share_of_the_cluster_and_lowers_for_it(cluster, mesh, stage_on):
    plan = pipelined_plan(
        TINY, cluster=cluster, mesh_shape=mesh, global_batch=32, seq_len=64, microbatches=4
    )
    layout = stage_layout(plan)
    assert layout.mesh.n_devices == stage_on
    assert layout.mesh.shape == {k: v for k, v in mesh.items() if k != "stage"}
    fn, args, in_specs, out_specs, donated = stage_program(plan, TINY)
    text = lower(
        fn, args, in_specs=in_specs, out_specs=out_specs, donate_argnums=donated, layout=layout
    )[1]
    assert f"num_partitions = {stage_on} " in text


def test_a_stage_compiles_for_its_sub_topology():
    pytest.importorskip("libtpu")
    mesh = {"stage": 2, "data": 2, "model": 2}
    plan = pipelined_plan(
        TINY, cluster="v5e:2x4", mesh_shape=mesh, global_batch=32, seq_len=64, microbatches=4
    )
    found = compile_stage(plan, TINY)
    assert found.cluster == "v5e:2x2" and found.status == "ok", found.message
    assert found.fits and 0 < found.held_bytes < found.peak_bytes < found.capacity_bytes
    assert found.tick_time_s >= found.compute_time_s > 0
    assert sum(found.collectives.values()) > 0


TINY = dataclasses.replace(load_model_config("tiny"), n_layers=4, vocab_size=64)

RUN = """
import dataclasses, json, sys
import placement
from graphs.zoo import load_model_config
from placement.pipeline.check import compare
from placement.pipeline.plan import pipelined_plan

tiny = dataclasses.replace(load_model_config("tiny"), n_layers=4, vocab_size=64)
found = {}
for name, mesh, options in json.loads(sys.argv[1]):
    plan = pipelined_plan(
        tiny, cluster="cpu:8", mesh_shape=mesh, global_batch=8, seq_len=16,
        compute_dtype="float32", **options)
    found[name] = dataclasses.asdict(compare(plan, tiny))
print(json.dumps(found))
"""

EXECUTED = [
    ("two stages", {"stage": 2, "data": 2, "model": 2}, {"microbatches": 2}),
    ("ring", {"stage": 2, "context": 2, "model": 2}, {"microbatches": 2, "attention": "ring"}),
    ("four stages", {"stage": 4, "data": 2}, {"microbatches": 4, "schedule": "gpipe"}),
    (
        "interleaved",
        {"stage": 2, "data": 4},
        {"microbatches": 2, "schedule": "interleaved", "chunks": 2},
    ),
]


def test_pipelined_steps_equal_the_unsharded_step():
    # XLA:CPU's concurrent order lets devices wait for each other's collectives on a loaded machine
    flags = (
        "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
        "--xla_cpu_enable_concurrency_optimized_scheduler=false"
    )
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(EXECUTED)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {name for name, *_ in EXECUTED}
    for name, differences in found.items():
        assert len(set(differences["losses"])) == 3, "the steps changed the parameters"
        assert differences["collectives"]["collective-permute"] >= 2, "forward and backward"
        assert differences["loss_difference"] < 1e-5, name
        allowed = max(1e-4, 10 * differences["rounding_difference"])
        assert differences["parameter_difference"] < allowed, (name, differences)
