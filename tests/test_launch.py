"""Training under plans: the curve does not depend on the plan, on being killed, or on the mesh.

Small runs of the command on eight forced host devices, in this process but for the one that is
killed.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import signal
import struct
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from graphs.errors import MeshwrightError
from graphs.zoo import active_parameter_count, load_model_config
from placement.experiments import cli
from placement.training.batches import Batches, Prefetch
from placement.training.checkpoint import Checkpoints, Position
from placement.training.corpus import load_corpus
from placement.training.loop import Schedule, train
from placement.training.metrics import MetricsFile, Yardstick, model_flops, read_metrics
from placement.training.program import Program
from placement.training.tensorboard import EventFile

STEPS = 24
SMALL = (
    "train.global_batch=16",
    "train.seq_len=32",
    "train.warmup_steps=4",
    f"train.decay_steps={STEPS}",
    "train.learning_rate=0.01",
    f"steps={STEPS}",
    "checkpoint_every=8",
    "eval_every=12",
    "eval_batches=2",
)


def launch(out: pathlib.Path, *overrides: str) -> list[dict]:
    given = {text.split("=")[0] for text in overrides}
    kept = [text for text in SMALL if text.split("=")[0] not in given]
    assert cli.main(["launch", "--traceback", *kept, *overrides, f"out={out}"]) == 0
    return read_metrics(out / "metrics.jsonl")


def losses(rows: list[dict]) -> np.ndarray:
    return np.array([row["loss"] for row in rows])


@pytest.fixture(scope="module", autouse=True)
def quick_compiler(tmp_path_factory):
    """Compiling is nearly all of these runs: with less effort, and once for equal programs."""
    settings = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield {name.upper(): str(value) for name, value in settings.items()}
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, rows) of an uninterrupted run under fsdp."""
    out = tmp_path_factory.mktemp("fsdp")
    return out, launch(out, "optimizer=fsdp")


def test_the_curve_falls_and_has_every_step(whole):
    _, rows = whole
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert losses(rows)[-4:].mean() < 0.8 * losses(rows)[0]
    held_out = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert len(held_out) == 2 and held_out[1] < held_out[0] < np.log(256)
    for row in rows:
        assert row["tokens_per_s"] * row["step_time_s"] == pytest.approx(16 * 32)
        assert row["mfu"] * row["step_time_s"] == pytest.approx(
            row["predicted_mfu"] * row["predicted_step_time_s"]
        )


def test_another_plan_gives_the_same_curve(whole, tmp_path):
    _, rows = whole
    other = launch(tmp_path, "optimizer=data_parallel")
    np.testing.assert_allclose(losses(other), losses(rows), rtol=0.01)


def test_a_killed_run_goes_on_as_if_nothing_happened(whole, tmp_path, quick_compiler):
    _, rows = whole
    command = [sys.executable, "-m", "placement.experiments.cli", "launch", *SMALL]
    running = subprocess.Popen(
        [*command, "optimizer=fsdp", f"out={tmp_path}"],
        env=os.environ | quick_compiler | {"XLA_FLAGS": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 200
        while len(read_metrics(tmp_path / "metrics.jsonl")) < 12:
            assert running.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()
    before = read_metrics(tmp_path / "metrics.jsonl")
    assert 12 <= len(before) < STEPS
    resumed = launch(tmp_path, "optimizer=fsdp")
    assert [row["step"] for row in resumed] == [row["step"] for row in rows]
    np.testing.assert_allclose(losses(resumed), losses(rows), rtol=1e-5)
    kept = [row for row in resumed if row in before]
    assert len(kept) >= len(before) - 8, "a kill loses at most the interval of checkpoints"


def test_a_checkpoint_goes_on_under_another_mesh_and_device_count(whole, tmp_path):
    folder, rows = whole
    shutil.copytree(folder / "checkpoints" / "16", tmp_path / "checkpoints" / "16")
    rest = launch(tmp_path, "cluster=cpu:4", "optimizer=fsdp_tp", "mesh_shape={data:2,model:2}")
    assert [row["step"] for row in rest] == list(range(17, STEPS + 1))
    np.testing.assert_allclose(losses(rest), losses(rows)[16:], rtol=0.01)


def test_a_plan_file_is_trained_as_it_was_planned(whole, tmp_path, capsys):
    folder, rows = whole
    trained = launch(tmp_path, f"plan={folder / 'plan.json'}", "steps=4", "train.decay_steps=24")
    np.testing.assert_allclose(losses(trained), losses(rows)[:4], rtol=1e-5)
    assert "data 8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("steps=0", "steps=0"),
        ("text=no/such/file", "no/such/file"),
        ("model.vocab_size=100", "model.vocab_size=256"),
        ("plan=no_such_plan.json", "no_such_plan.json"),
        ("train.warmup_steps=5000", "warmup_steps=5000"),
        ("train.seq_len=9000000", "train.seq_len"),
        ("optimizer=fsdpp", "did you mean"),
        ("cluster=cpu:64", "64 devices"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_a_sentence(override, says, tmp_path, capsys):
    assert cli.main(["launch", "optimizer=fsdp", override, f"out={tmp_path}"]) == 1
    said = capsys.readouterr().err
    assert says in said and said.startswith("error: ") and said.count("\n") == 1


def test_checkpoints_of_another_run_are_refused(whole, tmp_path, capsys):
    folder, _ = whole
    shutil.copytree(folder / "checkpoints", tmp_path / "checkpoints")
    assert cli.main(["launch", *SMALL, "optimizer=fsdp", "seed=1", f"out={tmp_path}"]) == 1
    assert "seed=0" in capsys.readouterr().err


def test_a_loss_that_is_no_number_ends_the_run_before_a_checkpoint(tmp_path):
    """A stand-in for the program whose sixth step fails; checkpoints are due every second."""
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    state = (jax.numpy.zeros(2), jax.numpy.zeros(2))

    def step(params, opt_state, batch):
        loss = float("nan") if params[0] == 5 else 1.0
        return params + 1, opt_state, {"loss": loss}

    program = Program(
        init=lambda seed: state,
        step=step,
        evaluate=lambda params, batch: 0.0,
        abstract_state=jax.eval_shape(lambda: state),
        state_shardings=(one, one),
        batch_shardings={"inputs": one, "targets": one},
    )
    with pytest.raises(MeshwrightError, match="step 6 is nan"):
        train(
            program,
            batches=batches(),
            validation=batches(),
            schedule=Schedule(steps=10, checkpoint_every=2, eval_every=5, eval_batches=1),
            yardstick=Yardstick(
                tokens=50,
                model_flops=1.0,
                peak_flops_per_s=1.0,
                predicted_step_time_s=1.0,
                predicted_energy_j=None,
            ),
            start=Position(step=0, windows=0, seed=3, seq_len=10, text="t", model="m"),
            out=tmp_path,
        )
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        found = checkpoints.latest()
    assert found is not None and (found.step, found.windows) == (4, 20)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 5


def test_held_out_text_is_not_trained_on():
    corpus = load_corpus("documentation")
    assert corpus.fingerprint == load_corpus("documentation").fingerprint
    assert len(corpus.train) > 4 * len(corpus.validation) > 40_000
    trained, held_out = (
        {p.strip() for p in text.tobytes().split(b"\n\n")}
        for text in (corpus.train, corpus.validation)
    )
    assert not {p for p in trained & held_out if p}


def batches(**changes) -> Batches:
    text = np.arange(101, dtype=np.uint8)
    given = {"names": ("inputs", "targets"), "global_batch": 5, "seq_len": 10, "seed": 3}
    return Batches(text=text, **(given | changes))


def test_an_epoch_visits_every_window_once_and_the_next_in_another_order():
    made = batches()
    epochs = [
        np.concatenate([made.at(p)["inputs"] for p in (start, start + 5)]) for start in (0, 10)
    ]
    for epoch in epochs:
        assert sorted(epoch.ravel()) == list(range(100))
    assert (epochs[0] != epochs[1]).any()
    for name in ("inputs", "targets"):
        np.testing.assert_array_equal(made.at(7)[name], batches().at(7)[name])
    np.testing.assert_array_equal(made.at(7)["targets"], made.at(7)["inputs"] + 1)


def test_the_stream_depends_on_windows_taken_and_not_on_the_batch():
    small, large = batches(global_batch=2), batches(global_batch=6)
    parts = [small.at(p)["inputs"] for p in (8, 10, 12)]
    np.testing.assert_array_equal(np.concatenate(parts), large.at(8)["inputs"])


def test_a_decoder_goes_on_where_the_encoder_stops():
    made = batches(names=("encoder_inputs", "inputs", "targets"), global_batch=5).at(0)
    np.testing.assert_array_equal(made["encoder_inputs"][:, -1] + 1, made["inputs"][:, 0])


def test_prefetch_keeps_the_order_and_hands_over_errors():
    with Prefetch(lambda n: n * n, range(5)) as ahead:
        assert list(ahead) == [0, 1, 4, 9, 16]

    def fails(n: int) -> int:
        raise MeshwrightError(f"no batch {n}")

    with pytest.raises(MeshwrightError, match="no batch 0"), Prefetch(fails, range(3)) as ahead:
        list(ahead)


def test_metrics_cut_short_by_a_kill_are_read_and_continued(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]
    with MetricsFile(path, resumed_step=2) as metrics:
        metrics.write({"step": 3, "loss": 1.0})
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 1.0}]


def test_tensorboard_reads_what_is_written(tmp_path):
    """Parsed with protocol buffers from the published field numbers."""
    descriptor_pb2 = pytest.importorskip("google.protobuf.descriptor_pb2")
    from google.protobuf import descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="event.proto", package="t", syntax="proto3")
    fields = {
        "Value": [("tag", 1, 9, ""), ("simple_value", 2, 2, "")],
        "Summary": [("value", 1, 11, "Value")],
        "SessionLog": [("status", 1, 5, "")],
        "Event": [
            ("wall_time", 1, 1, ""),
            ("step", 2, 3, ""),
            ("file_version", 3, 9, ""),
            ("summary", 5, 11, "Summary"),
            ("session_log", 7, 11, "SessionLog"),
        ],
    }
    for name, members in fields.items():
        message = file.message_type.add(name=name)
        for field, number, kind, of in members:
            label = 3 if field == "value" else 1
            added = message.field.add(name=field, number=number, type=kind, label=label)
            if of:
                added.type_name = f".t.{of}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    event_class = message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Event"))

    with EventFile(tmp_path, first_step=300) as events:
        events.write(300, {"loss": 2.5, "mfu": 0.25})
        path = events.path
    content, found = path.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        found.append(event_class.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    version, start, row = found
    assert version.file_version == "brain.Event:2"
    assert start.session_log.status == 1 and start.step == 300
    assert row.step == 300
    assert {v.tag: v.simple_value for v in row.summary.value} == {"loss": 2.5, "mfu": 0.25}


def test_tensorboard_itself_shows_a_run_and_what_a_resumed_one_replaces(tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    ).EventAccumulator
    for first, steps in ((1, range(1, 7)), (5, range(5, 9))):
        with EventFile(tmp_path, first_step=first) as events:
            for step in steps:
                events.write(step, {"loss": 10.0 * first + step})
            events.path.rename(tmp_path / f"events.out.tfevents.{first:010d}.1")
    shown = accumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [e.step for e in shown] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [e.value for e in shown] == [11, 12, 13, 14, 55, 56, 57, 58]


def test_joules_follow_the_time_and_are_left_out_where_power_is_unknown():
    values = {"tokens": 100, "model_flops": 1.0, "peak_flops_per_s": 1.0}
    known = Yardstick(**values, predicted_step_time_s=2.0, predicted_energy_j=300.0)
    assert known.row(1, 1.0, 3.0)["energy_j"] == pytest.approx(450.0)
    unknown = Yardstick(**values, predicted_step_time_s=2.0, predicted_energy_j=None)
    assert unknown.row(1, 1.0, 3.0)["energy_j"] is None


def test_mfu_of_palm_is_the_published_one():
    """arXiv:2204.02311, section 4.1: 238.3K tokens/s on 6144 TPU v4 are 46.2 % MFU."""
    palm = load_model_config("palm_540b")
    tokens = 2048 * 2048
    flops = model_flops(
        palm, active_parameters=active_parameter_count(palm), tokens=tokens, seq_len=2048
    )
    yardstick = Yardstick(
        tokens=tokens,
        model_flops=flops,
        peak_flops_per_s=6144 * 275e12,
        predicted_step_time_s=1.0,
        predicted_energy_j=None,
    )
    assert yardstick.row(1, 1.0, tokens / 238.3e3)["mfu"] == pytest.approx(0.462, abs=0.003)
