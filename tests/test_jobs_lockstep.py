"""Whole jobs as `placement.pipeline` runs them: stages in lock step, layers before them in turn."""

import pytest
from test_jobs import CONSTANTS, job_of

from cost_model.jobs import counts
from cost_model.jobs.columns import SCHEDULES
from cost_model.jobs.memory import memory, put_off_bytes
from cost_model.jobs.pieces import pieces
from cost_model.jobs.step import step_time
from graphs.zoo import load_model_config, parameter_count
from placement.jobs.describe import describe_job, shape_of


def test_in_lock_step_zero_bubble_saves_one_gradient_of_weights_a_stage():
    job = job_of(
        model_name="Llama 3 70B", n_devices="64", dp="8", tp="2", pp="4", global_batch_seqs="128",
        recompute="full",
    ).replace(lockstep=1.0)  # fmt: skip
    plain, split = (job.replace(schedule=float(SCHEDULES.index(s))) for s in SCHEDULES[::2])
    piece = pieces(job, CONSTANTS)
    saved = step_time(plain, CONSTANTS).bubble_s - step_time(split, CONSTANTS).bubble_s
    weights = piece.weight_gradient * job.n_layers / 4
    assert saved == pytest.approx(3 * weights)
    # what waits between the two parts, of 3 microbatches
    more = memory(split, CONSTANTS).activations_bytes - memory(plain, CONSTANTS).activations_bytes
    assert more == pytest.approx(3 * job.n_layers / 4 * put_off_bytes(job))


def test_layers_before_the_first_stage_are_shared_out_in_turn():
    """Time of a step is that of stages with as much work each, but for a bubble of fewer layers; their
    weights are on every stage."""
    job = job_of(
        model_name="Llama 3 70B", n_devices="64", dp="8", tp="2", pp="4", global_batch_seqs="128"
    ).replace(lockstep=1.0)
    entry = job.replace(entry_layers=8.0)
    layer = pieces(job, CONSTANTS).layer
    a, b = (step_time(j, CONSTANTS) for j in (job, entry))
    extra_sends = pieces(job, CONSTANTS).hop * pieces(job, CONSTANTS).hop_exposed * 2 * 16
    reduced = pieces(entry, CONSTANTS).gradient + pieces(entry, CONSTANTS).optimizer
    reduced = reduced - pieces(job, CONSTANTS).gradient - pieces(job, CONSTANTS).optimizer
    inside_a, inside_b = a.step_time_s - a.spread_s, b.step_time_s - b.spread_s
    assert inside_b == pytest.approx(inside_a - 3 * 8 / 4 * layer + extra_sends + reduced)
    assert memory(entry, CONSTANTS).states_bytes > memory(job, CONSTANTS).states_bytes


def test_an_encoder_decoder_has_the_parameters_of_the_model_as_built():
    config = load_model_config("t5_xxl")
    job = describe_job(shape_of(config), cluster="h100:8x4", global_batch=32, seq_len=512)
    found = float(counts.parameters(job).total(job)[0])
    assert found == pytest.approx(parameter_count(config), rel=1e-3)
