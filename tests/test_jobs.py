"""The whole-job model: accounting, monotonicity, published counts, search against brute force."""

from __future__ import annotations

import csv
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cost_model.jobs import constants, counts, runs
from cost_model.jobs import shape as shapes
from cost_model.jobs.columns import SCHEDULES, Jobs
from cost_model.jobs.memory import memory
from cost_model.jobs.step import StepTime, step_time
from placement.jobs import search, space
from placement.jobs.infeasible import changes, cheapest_change
from placement.jobs.timeline import job_timeline

CONSTANTS = constants.load()


@pytest.fixture(scope="module")
def published() -> Jobs:
    return runs.jobs_of(runs.read(runs.MEASURED_RUNS).rows)


def job_of(**change) -> Jobs:
    raw = {
        "id": "one",
        "source": "github:NVIDIA/NeMo@x",
        "model_name": "Llama 3 8B",
        "hardware": "h100",
        "seq_len": "8192",
        "global_batch_seqs": "128",
        "micro_batch_seqs": "1",
        "n_devices": "64",
        "tp": "1",
        "pp": "1",
        "cp": "1",
        "dp": "64",
        "recompute": "none",
        "dtype": "bf16",
    }
    raw.update(change)
    run, faults = runs.read_row(2, raw)
    assert not faults and run.record is not None, (faults, run.reason)
    return runs.jobs_of([run])


def _time(job: Jobs) -> float:
    return float(step_time(job, CONSTANTS).step_time_s[0])


def _peak(job: Jobs) -> float:
    return float(memory(job, CONSTANTS).peak_bytes[0])


def test_parameter_counts_are_the_zoo_s():
    with shapes.ZOO.open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["attention_type"] != "mha" or r["gated"]]
    checked = 0
    for row in rows:
        if "T5" in row["model"] or not row["computed_params_b"]:
            continue  # an encoder and a decoder; rows without a count of their own
        job = job_of(model_name=row["model"])
        total = float(counts.parameters(job).total(job)[0]) / 1e9
        assert total == pytest.approx(float(row["computed_params_b"]), rel=0.02), row["model"]
        checked += 1
    assert checked > 40


def test_parts_sum_to_the_step(published):
    time = step_time(published, CONSTANTS)
    names = [n for n in StepTime.__dataclass_fields__ if n != "step_time_s"]
    total = sum(getattr(time, name) for name in names)
    np.testing.assert_allclose(total, time.step_time_s, rtol=1e-9)
    for name in names:
        assert (getattr(time, name) >= -1e-9 * time.step_time_s).all(), name


def test_no_step_is_faster_than_its_matmuls_at_peak(published):
    flops = 6.0 * counts.parameters(published).active(published)
    flops = flops * published.global_batch * published.seq_len
    width = np.where(
        published.matmul_bytes < 1, 4.0, np.where(published.matmul_bytes < 2, 2.0, 1.0)
    )
    peak = published.device.peak_flops_per_s * published.n_devices * width
    assert (step_time(published, CONSTANTS).step_time_s > flops / peak).all()


@settings(max_examples=30, deadline=None)
@given(at=st.integers(0, 440), part=st.sampled_from("core qkv out up down pointwise".split()))
def test_recomputing_adds_time_and_takes_no_memory(published, at, part):
    job = published.take(np.array([at])).replace(caching_allocator=0.0)
    kept, redone = job.replace(**{f"remat_{part}": 0.0}), job.replace(**{f"remat_{part}": 1.0})
    assert _time(redone) >= _time(kept)
    assert _peak(redone) <= _peak(kept) * (1 + 1e-9)


@settings(max_examples=30, deadline=None)
@given(at=st.integers(0, 440), factor=st.floats(1.1, 8.0))
def test_faster_hardware_is_never_slower(published, at, factor):
    job = published.take(np.array([at]))
    for name in (
        "link_bytes_per_s",
        "network_bytes_per_s",
        "hbm_bytes_per_s",
        "matmul_flops_per_s",
    ):
        faster = job.device.replace(**{name: getattr(job.device, name) * factor})
        import dataclasses

        assert _time(dataclasses.replace(job, device=faster)) <= _time(job) * (1 + 1e-6), name


def test_sharding_divides_states():
    whole = job_of(zero_stage="0", dp="64")
    optimizer = job_of(zero_stage="1", dp="64")
    weights = job_of(zero_stage="3", fsdp="64", dp="64")
    assert _peak(whole) > _peak(optimizer) > _peak(weights)


def test_degrees_of_one_cost_no_traffic():
    time = step_time(job_of(n_devices="1", dp="1", zero_stage="0"), CONSTANTS)
    for part in ("tensor_s", "context_s", "expert_s", "sharded_s", "gradient_s"):
        assert getattr(time, part)[0] == pytest.approx(0.0, abs=1e-9), part


def test_bubble_follows_stages_and_chunks():
    def idle(pp: int, vpp: int) -> float:
        job = job_of(pp=str(pp), dp=str(64 // pp), virtual_pp=str(vpp), global_batch_seqs="1024")
        time = step_time(job, CONSTANTS)
        return float(time.bubble_s[0] / time.step_time_s[0])

    assert idle(8, 1) > idle(4, 1) > idle(2, 1)
    assert idle(8, 1) > idle(8, 2)


def test_activation_bytes_are_those_published_for_gpt():
    # arXiv:2205.05198, figure 1: bytes of saved activations on the first stage, GiB
    published = {
        "seqsel-fig1-mem-22B-none": 59.25,
        "seqsel-fig1-mem-22B-seqsel": 9.5625,
        "seqsel-fig1-mem-175B-none": 66.84375,
    }
    rows = [r for r in runs.read(runs.MEASURED_RUNS).rows if r.id in published]
    held = memory(runs.jobs_of(rows), CONSTANTS)
    for run, found in zip(rows, held.activations_bytes / 2**30):
        assert found == pytest.approx(published[run.id], rel=0.03), run.id


def test_search_finds_the_best_of_a_small_space():
    job = job_of(
        n_devices="16", dp="16", global_batch_seqs="32", model_name="Llama 2 13B", seq_len="4096"
    )
    found = search.plan_job(job)
    assert isinstance(found, search.JobPlan)
    best = np.inf
    all_groups = space.groups(job)
    for remat in space.REMAT:
        every = space.members(job, all_groups, remat)
        fits = memory(every, CONSTANTS).fits
        best = min(best, step_time(every, CONSTANTS).step_time_s[fits].min(initial=np.inf))
    assert found.step_time_s == pytest.approx(best, rel=1e-12)
    assert found.lower_bound_s <= found.step_time_s
    assert found.evaluations < len(space.REMAT) * all_groups.n_groups
    assert found.memory_bytes <= found.capacity_bytes
    d = found.degrees
    assert d["dp"] * d["tp"] * d["pp"] * d["cp"] == 16
    assert _time(found.job) == pytest.approx(found.step_time_s)


def test_a_stopped_search_still_bounds_the_space():
    job = job_of(n_devices="512", dp="512", global_batch_seqs="1024", model_name="Llama 3.1 405B")
    whole = search.plan_job(job, time_limit_s=60)
    stopped = search.plan_job(job, time_limit_s=0.0, given=whole.job)
    assert stopped.lower_bound_s <= whole.step_time_s * (1 + 1e-9)


def test_a_small_model_with_ample_memory_is_data_parallel():
    plan = search.plan_job(job_of(model_name="Qwen3 0.6B", n_devices="8", dp="8", seq_len="2048"))
    assert isinstance(plan, search.JobPlan)
    assert plan.degrees["dp"] == 8 and plan.degrees["tp"] == plan.degrees["pp"] == 1


def test_a_job_that_cannot_fit_names_changes_that_make_it_fit_cheapest_first():
    job = job_of(n_devices="8", dp="8", model_name="Llama 3.1 405B", global_batch_seqs="8")
    failed = search.plan_job(job)
    assert isinstance(failed, search.Infeasible)
    assert failed.least_bytes > failed.capacity_bytes
    found = changes(job)
    assert found, "enough devices hold any model"
    costs = [change.device_seconds_per_token for change in found]
    assert costs == sorted(costs)
    for change in found:
        assert change.plan.memory_bytes <= change.plan.capacity_bytes
        if change.what.endswith("devices"):
            again = search.plan_job(job.replace(n_devices=float(change.what.split()[0])))
            assert isinstance(again, search.JobPlan)
            # fewer than that do not do
            half = search.plan_job(job.replace(n_devices=float(change.what.split()[0]) / 2))
            assert isinstance(half, search.Infeasible)
    said = cheapest_change(job, failed)
    assert said.startswith("no plan fits") and found[0].what in said
    assert "optimizer state" in failed.binding


def test_rematerialisation_is_the_change_where_it_was_not_allowed():
    job = job_of(n_devices="8", dp="8", global_batch_seqs="8", seq_len="131072")
    assert isinstance(search.plan_job(job, remats=("none",)), search.Infeasible)
    what = [change.what for change in changes(job, remats=("none",))]
    assert any("rematerialisation" in w for w in what), what


@pytest.mark.parametrize("schedule", range(4))
@pytest.mark.parametrize("vpp", [1, 4])
@pytest.mark.parametrize("lockstep", [0, 1])
def test_the_drawn_step_takes_what_the_closed_form_says(schedule, vpp, lockstep):
    if (lockstep or vpp > 1) and schedule == SCHEDULES.index("zero_bubble_h2"):
        return  # not a schedule of lock step
    if vpp > 1 and schedule:
        return  # chunks are interleaved in 1F1B alone
    job = job_of(
        model_name="Llama 3 70B", n_devices="64", dp="8", tp="2", pp="4", global_batch_seqs="128",
        virtual_pp=str(vpp),
    ).replace(schedule=float(schedule), lockstep=float(lockstep))  # fmt: skip
    time = step_time(job, CONSTANTS)
    plan = _plan_of(job, time)
    drawn = job_timeline(plan, CONSTANTS)
    assert drawn.drawn_microbatches == 16
    lanes = {}
    for stretch in drawn.stretches:
        lanes.setdefault(stretch.lane, []).append(stretch)
    for lane, inside in lanes.items():
        if lane.endswith("compute"):
            for a, b in itertools.pairwise(sorted(inside, key=lambda s: s.start_s)):
                assert b.start_s >= a.end_s - 1e-9, "a stage does one thing at a time"
    spans = [
        max(s.end_s for s in inside) - min(s.start_s for s in inside)
        for lane, inside in lanes.items()
        if lane.endswith("compute")
    ]
    closed = float((time.step_time_s - time.spread_s)[0])
    assert max(spans) == pytest.approx(closed, rel=0.03)


def _plan_of(job, time):
    return search.JobPlan(
        degrees={},
        remat="as given",
        step_time_s=float(time.step_time_s[0]),
        memory_bytes=0.0,
        capacity_bytes=0.0,
        lower_bound_s=0.0,
        evaluations=0,
        planning_time_s=0.0,
        job=job,
    )


def test_schedules_trade_time_for_memory_as_published():
    """arXiv:2401.10241, table 1, and arXiv:1811.06965: bubbles and live microbatches."""
    job = job_of(
        model_name="Llama 3 70B", n_devices="64", dp="8", tp="2", pp="4", global_batch_seqs="128"
    )
    seconds, peak = {}, {}
    for index, name in enumerate(SCHEDULES):
        one = job.replace(schedule=float(index))
        seconds[name] = float(step_time(one, CONSTANTS).step_time_s[0])
        peak[name] = float(memory(one, CONSTANTS).peak_bytes[0])
    assert seconds["zero_bubble_h2"] < seconds["zero_bubble_h1"] < seconds["1f1b"]
    assert peak["zero_bubble_h1"] == peak["1f1b"] < peak["zero_bubble_h2"] < peak["gpipe"]
    assert seconds["gpipe"] >= seconds["1f1b"] * (1 - 1e-9)


@settings(max_examples=30, deadline=None)
@given(layers=st.integers(4, 130), pp=st.integers(2, 16))
def test_every_division_of_layers_holds_them_all(layers, pp):
    if pp > layers:
        return
    for vpp, _, first, last in space._pipelines(layers, pp, 4 * pp):
        job = job_of(dp="1", n_devices=str(pp), pp=str(pp), global_batch_seqs=str(4 * pp))
        job = job.replace(n_layers=layers, first_layers=first, last_layers=last, vpp=vpp)
        stages = counts.layers_per_stage(job)
        held = float(stages.first[0] + stages.last[0] + (pp - 2) * stages.middle[0])
        assert held == layers, (vpp, first, last)
        assert float(stages.middle[0]) == int(stages.middle[0])


def test_thousands_of_candidates_are_scored_in_a_second():
    import time

    job = job_of()
    every = job.take(np.zeros(5000, int))
    start = time.perf_counter()
    step_time(every, CONSTANTS)
    assert time.perf_counter() - start < 1.0


@pytest.mark.parametrize(
    ("model", "cluster", "batch"),
    [
        ("Llama 3 70B", "v5p:8x8x8", 512),
        ("Qwen3 30B-A3B", "h100:8x8", 256),
        ("Llama 3 8B", "2*v6e:16x16", 512),
    ],
)
def test_jobs_are_described_and_planned_from_a_name(model, cluster, batch):
    from placement.jobs.describe import describe_job

    job = describe_job(model, cluster=cluster, global_batch=batch, seq_len=4096)
    plan = search.plan_job(job)
    assert isinstance(plan, search.JobPlan)
    d = plan.degrees
    assert d["dp"] * d["tp"] * d["pp"] * d["cp"] == job.n_devices[0]
    assert plan.step_time_s <= _time(job)


def test_unknown_models_are_refused_with_a_list():
    from graphs.errors import MeshwrightError
    from placement.jobs.describe import describe_job

    with pytest.raises(MeshwrightError, match="zoo"):
        describe_job("nothing", cluster="v5e:4x4", global_batch=16, seq_len=128)


def test_explanations_add_up_and_neighbours_are_no_faster():
    from placement.jobs.explain import breakdown, explain, neighbours

    plan = search.plan_job(job_of(model_name="Llama 3 70B", global_batch_seqs="128"))
    assert isinstance(plan, search.JobPlan)
    assert sum(breakdown(plan).values()) == pytest.approx(plan.step_time_s, rel=1e-9)
    near = neighbours(plan)
    assert near
    for item in near:
        if item.step_time_s is not None:
            assert item.step_time_s >= plan.lower_bound_s * (1 - 1e-9), item
    assert "recomputed" in explain(plan)


@pytest.mark.parametrize("against", ["memory", "energy"])
def test_fronts_trade_and_start_at_the_fastest_plan(against):
    from placement.jobs.pareto import front

    job = job_of(
        n_devices="16", dp="16", global_batch_seqs="32", model_name="Llama 2 13B", seq_len="4096"
    )
    points = front(job, against)
    seconds = [p.step_time_s for p in points]
    other = [p.memory_bytes if against == "memory" else p.energy_j for p in points]
    assert seconds == sorted(seconds) and other == sorted(other, reverse=True)
    fastest = search.plan_job(job)
    assert isinstance(fastest, search.JobPlan)
    assert seconds[0] == pytest.approx(fastest.step_time_s)


def test_energy_of_a_device_without_published_power_is_an_error():
    from graphs.errors import MeshwrightError
    from placement.jobs.pareto import front

    with pytest.raises(MeshwrightError, match="power"):
        front(job_of(hardware="v5p", n_devices="64", dp="64"), "energy")
