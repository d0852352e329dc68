"""Stages: schedules respect dependencies, no layer is lost, steps equal the unsharded step."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, PartitionSpec

import placement
from cost_model.cluster import parse_cluster
from cost_model.jobs.memory import put_off_bytes
from cost_model.layout import layout_for
from graphs.errors import InfeasibleError, MeshwrightError
from graphs.zoo import load_model_config
from graphs.zoo.options import RunOptions
from graphs.zoo.train_step import abstract_model
from placement.compile import compile_for_cluster, lower
from placement.jobs.describe import describe_job, shape_of
from placement.pipeline.chunk_backward import split_backward, whole_backward
from placement.pipeline.compile import compile_stage, stage_layout
from placement.pipeline.plan import pipelined_plan
from placement.pipeline.reduction import reduce_gradients, reduced_specs
from placement.pipeline.schedule import Schedule
from placement.pipeline.stage_program import stage_program
from placement.pipeline.stages import Layout, pipelined_segment, stage_functions

SPARSE = {"n_experts": 4, "experts_per_token": 2, "moe_d_ff": 64}
TINY = dataclasses.replace(load_model_config("tiny"), n_layers=4, vocab_size=64)


@st.composite
def schedules(draw):
    stages, chunks = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    rounds = draw(st.integers(1, 4))
    microbatches = rounds * stages if chunks > 1 else draw(st.integers(1, 12))
    kinds = ("gpipe", "1f1b", "interleaved", *("zero_bubble_h1",) * (chunks == 1))
    kind = draw(st.sampled_from(kinds))
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
    if schedule.kind in ("1f1b", "zero_bubble_h1") and schedule.chunks == 1:
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
    if schedule.kind != "zero_bubble_h1":
        assert schedule.bubble == pytest.approx((p - 1) / v / (m + (p - 1) / v))


@settings(max_examples=60, deadline=None)
@given(stages=st.integers(1, 7), microbatches=st.integers(1, 16))
def test_zero_bubble_computes_every_gradient_of_weights_once_in_less_time(stages, microbatches):
    options = dict(stages=stages, microbatches=microbatches)
    split = Schedule(kind="zero_bubble_h1", **options)
    plain = Schedule(kind="1f1b", **options)
    of_inputs = times(split)[1]
    for s in range(stages):
        done, waiting = [], {}
        for phase in split.phases():
            for t in range(phase.start, phase.stop):
                valid, _, j = split.backward(t, s)
                assert phase.backward or not valid
                if phase.backward and phase.weights:
                    assert valid, "both parts only in ticks in which no stage waits"
                    done.append(j)
                elif phase.backward:
                    has, place = split.weights_put_off(t, s)
                    assert has == valid
                    if has:
                        assert 0 <= place < split.put_off and place not in waiting
                        waiting[place] = j
                elif phase.weights:
                    j = waiting.pop(split.weights_done(t))
                    assert of_inputs[s, 0, j] < t
                    done.append(j)
        assert sorted(done) == list(range(microbatches)) and not waiting
    # live microbatches as 1F1B; one pass of weights less for every stage but one
    assert split.slots == plain.slots
    assert plain.work - split.work == stages - 1


@pytest.mark.parametrize("name", ["dense", "sparse"])
def test_the_parts_of_a_backward_pass_are_the_whole_and_nothing_is_done_twice(name):
    config = dataclasses.replace(TINY, **SPARSE if name == "sparse" else {})
    parts = stage_functions(config, RunOptions(compute_dtype="float32"), 16)
    _, abstract = abstract_model(config, RunOptions())
    stacked = abstract[parts.segment]
    keys = iter(jax.random.split(jax.random.key(0), 40))
    weights = jax.tree.map(lambda w: 0.1 * jax.random.normal(next(keys), w.shape), stacked)
    x, dy = (jax.random.normal(next(keys), (2, 16, config.d_model)) for _ in range(2))
    mask = np.array([True] * (config.n_layers - 1) + [False])
    _, entered = parts.layers(weights, mask, x, {})
    d_weights, _, dx = whole_backward(parts.layer, weights, {}, mask, entered, dy)
    one = jax.tree.map(lambda w: w[0], weights)
    split = split_backward(parts.plain_layer, one, {}, x)
    dx_first, _, small, crossing = split.inputs(weights, {}, mask, entered, dy)
    put_off = split.weights(weights, crossing)
    np.testing.assert_allclose(dx_first, dx, rtol=1e-5, atol=1e-6)
    leaves = jax.tree.leaves(d_weights)
    assert {*small, *put_off} == set(range(len(leaves))) and not {*small} & {*put_off}
    for i, d in {**small, **put_off}.items():
        np.testing.assert_allclose(d, leaves[i], rtol=1e-4, atol=1e-5)
    # the second part is one product for each matmul's weights, and no more
    second = jax.make_jaxpr(split.weights_of_layer)(one, [c[0] for c in crossing])
    products = [e for e in second.eqns if e.primitive.name == "dot_general"]
    assert len(products) == len(put_off) == sum(w.ndim > 1 for w in jax.tree.leaves(one))


@pytest.mark.parametrize("name", ["llama3_8b", "gpt3_175b", "mixtral_8x7b"])
def test_what_waits_between_the_parts_is_what_the_job_model_says(name):
    config = dataclasses.replace(load_model_config(name), n_layers=2)
    parts = stage_functions(config, RunOptions(), 2048)
    _, abstract = abstract_model(config, RunOptions())
    one = jax.tree.map(
        lambda w: jax.ShapeDtypeStruct(w.shape[1:], w.dtype), abstract[parts.segment]
    )
    x = jax.ShapeDtypeStruct((1, 2048, config.d_model), "bfloat16")
    split = split_backward(parts.plain_layer, one, {}, x)
    valid = jax.ShapeDtypeStruct((), bool)
    *_, crossing = jax.eval_shape(split.inputs_of_layer, one, {}, x, valid, x)
    held = sum(c.size * c.dtype.itemsize for c in crossing)
    job = describe_job(shape_of(config), cluster="h100:8x1", global_batch=8, seq_len=2048)
    # experts' slots are more than their tokens by the capacity factor
    assert held == pytest.approx(
        float(put_off_bytes(job)[0]), rel=0.25 if config.n_experts else 0.01
    )


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
    with pytest.raises(MeshwrightError, match="another kind"):
        pipelined_segment(load_model_config("gemma3_27b"))
    with pytest.raises(MeshwrightError, match="rounds"):
        Schedule(kind="interleaved", stages=4, microbatches=6, chunks=2)
    with pytest.raises(MeshwrightError, match=r"zero_bubble_h2.*zero_bubble_h1"):
        Schedule(kind="zero_bubble_h2", stages=4, microbatches=6)
    with pytest.raises(MeshwrightError, match="1 chunk a stage"):
        Schedule(kind="zero_bubble_h1", stages=4, microbatches=8, chunks=2)


@pytest.mark.parametrize(
    ("name", "asked", "schedule"),
    [
        # nine microbatches are in no rounds of two, so that chunks are not interleaved
        (
            "llama2_13b",
            dict(cluster="a100:8x4", global_batch=36, seq_len=4096, stages=2, microbatches=9),
            "zero_bubble_h1",
        ),
        # one leading dense layer, 59 layers of experts
        (
            "deepseek_v2_236b",
            dict(cluster="h100:8x64", global_batch=256, seq_len=4096, stages=4),
            "interleaved",
        ),
        # an encoder-decoder, for which the job model says that stages pay
        ("t5_xxl", dict(cluster="h100:8x16", global_batch=32, seq_len=512), "interleaved"),
    ],
)
def test_split_backward_passes_and_layers_before_the_stages_are_planned(name, asked, schedule):
    plan = placement.optimize_model(name, **asked)
    assert plan.mesh_shape["stage"] > 1 and plan.program["schedule"] == schedule
    segment = pipelined_segment(load_model_config(name)).name
    staged = [leaf for leaf in plan.inputs if f"[0]['{segment}']" in leaf.name]
    assert staged and all(leaf.spec[0] == ("stage",) for leaf in staged)
    assert "without stages" in plan.explain()


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


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble_h1"])
def test_a_stage_compiles_for_its_sub_topology(schedule):
    pytest.importorskip("libtpu")
    mesh = {"stage": 2, "data": 2, "model": 2}
    plan = pipelined_plan(
        TINY, cluster="v5e:2x4", mesh_shape=mesh, global_batch=32, seq_len=64, microbatches=4,
        schedule=schedule,
    )  # fmt: skip
    found = compile_stage(plan, TINY)
    assert found.cluster == "v5e:2x2" and found.status == "ok", found.message
    assert found.fits and 0 < found.held_bytes < found.peak_bytes < found.capacity_bytes
    assert found.tick_time_s >= found.compute_time_s > 0
    assert sum(found.collectives.values()) > 0


def test_gradients_that_are_scattered_along_an_inner_dimension_compile():
    """One reduction of this stack ends XLA:TPU with "No feasible span count"."""
    pytest.importorskip("libtpu")
    layout = layout_for(parse_cluster("v5p:2x2x1"), {"data": 4})
    mesh, width = AbstractMesh((4,), ("data",)), (8, 14336, 4096)
    shapes = {"layers": {"mlp": {"down": jax.ShapeDtypeStruct(width, jnp.float32)}}}
    state = {"segment": "layers", "zero_stage": 1}
    specs = reduced_specs(shapes, mesh.shape, ("data",), **state)
    assert specs["layers"]["mlp"]["down"] == PartitionSpec(None, "data", None)

    def reduced(sums):
        def one(sums):
            own = jax.tree.map(lambda g: g[0], sums)
            return reduce_gradients(own, shapes, mesh.shape, ("data",), **state)

        return jax.shard_map(
            one, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=specs, check_vma=False
        )(sums)

    given = jax.tree.map(lambda s: jax.ShapeDtypeStruct((4, *s.shape), s.dtype), shapes)
    found = compile_for_cluster(
        reduced,
        (given,),
        in_specs=(jax.tree.map(lambda _: PartitionSpec("data"), shapes),),
        out_specs=specs,
        layout=layout,
    )
    assert found.status == "ok", found.message
    assert found.temp_bytes < 4 * math.prod(width), "no device holds the whole sum"


def test_a_mesh_without_stages_is_refused():
    with pytest.raises(MeshwrightError, match="has no axis 'stage'"):
        pipelined_plan(
            TINY, cluster="v5e:2x2", mesh_shape={"model": 4}, global_batch=8, microbatches=2
        )
