"""Full disks, folders that cannot be written, processes side by side: one sentence, nothing lost."""

from __future__ import annotations

import concurrent.futures
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from placement import compile_cache
from placement.experiments import cli
from placement.plan import Plan

PLAN = (
    *("plan", "model=tiny", "cluster=cpu:8", "optimizer=fsdp", "train.global_batch=16"),
    *("train.seq_len=32", "time_limit_s=1"),
)


def can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    tried = subprocess.run(
        ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False
    )
    return tried.returncode == 0


mounts = pytest.mark.skipif(not can_mount(), reason="no right to mount a small file system here")

IN_A_SMALL_FILE_SYSTEM = """
import dataclasses, json, os, pathlib, sys
import jax, numpy
from graphs.errors import MeshwrightError
from placement.experiments import cli
from placement.plan import Plan
from placement.training.checkpoint import Checkpoints, Position
from placement.training.metrics import MetricsFile, read_metrics
from placement.training.tensorboard import EventFile

root, source = pathlib.Path(sys.argv[1]), sys.argv[2]
found = {}

def fails(name, act):
    try:
        found[name] = "" if act() == 1 else "nothing happened"
    except MeshwrightError as error:
        found[name] = str(error)

plan = Plan.load(source)
plan.save(root / "plan.json")
page = root / "report.html"
assert cli.main(["report", source, "--out", str(page)]) == 0
before = page.read_bytes()
state = {"weights": jax.numpy.arange(100_000.0)}
at = Position(step=1, windows=1, seed=0, seq_len=1, text="t", model="m")
with (
    Checkpoints(root / "checkpoints") as checkpoints,
    MetricsFile(root / "metrics.jsonl", resumed_step=0) as metrics,
    EventFile(root / "tensorboard", first_step=1) as events,
):
    checkpoints.save(state, at)
    metrics.write({"step": 1, "loss": 1.0})
    room = os.statvfs(root)
    with open(root / "filler", "wb", buffering=0) as filler:
        try:
            while filler.write(numpy.random.bytes(4096)):
                pass
        except OSError:
            pass
    fails("plan", lambda: plan.save(root / "plan.json"))
    fails("report", lambda: cli.main(["report", source, "--out", str(page), "--traceback"]))
    fails("export", lambda: cli.main(
        ["export", source, "--to", "maxtext", "--out", str(root / "maxtext.yml"), "--traceback"]))
    fails("checkpoint", lambda: checkpoints.save(state, dataclasses.replace(at, step=2)))
    def until_full(write):
        for n in range(2, 200):
            write(n)
    fails("metrics", lambda: until_full(
        lambda n: metrics.write({"step": n, "loss": 1.0, "note": "x" * 500})))
    fails("events", lambda: until_full(lambda n: events.write(n, {"t" * 500: 1.0})))
os.unlink(root / "filler")
assert Plan.load(root / "plan.json") == plan
assert page.read_bytes() == before
with Checkpoints(root / "checkpoints") as checkpoints:
    assert checkpoints.latest() == at
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    kept = checkpoints.restore(1, jax.eval_shape(lambda: state), {"weights": one})
    numpy.testing.assert_array_equal(kept["weights"], state["weights"])
    checkpoints.save(state, dataclasses.replace(at, step=2))
    assert checkpoints.latest().step == 2
with MetricsFile(root / "metrics.jsonl", resumed_step=1) as metrics:
    metrics.write({"step": 2, "loss": 0.5})
assert [row["step"] for row in read_metrics(root / "metrics.jsonl")] == [1, 2]
left = [p.name for p in root.rglob("*.part")]
print(json.dumps({"found": found, "left": left}))
"""


@pytest.fixture(scope="module")
def plan_path(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    assert cli.main([*PLAN, f"out={path}"]) == 0
    return path


def inside(options: str, script: str, *arguments: str, at: pathlib.Path):
    """A Python script in a mount name space where ``at`` is a file system of its own."""
    mount = f'mount -t tmpfs -o {options} none "$1" && shift && exec "$@"'
    command = ["unshare", "-m", "sh", "-c", mount, "sh", str(at)]
    return subprocess.run(
        [*command, sys.executable, "-c", script, *arguments],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@mounts
def test_a_full_disk_loses_nothing(plan_path, tmp_path):
    done = inside("size=4m", IN_A_SMALL_FILE_SYSTEM, str(tmp_path), str(plan_path), at=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert set(said["found"]) == {"plan", "report", "export", "checkpoint", "metrics", "events"}
    for what, sentence in said["found"].items():
        assert "No space left on device" in sentence, (what, sentence)
        assert "room" in sentence and "\n" not in sentence, (what, sentence)
    assert said["left"] == []


READ_ONLY = """
import json, sys
from placement.experiments import cli
for argv in json.loads(sys.argv[1]):
    print("==", cli.main(argv), file=sys.stderr, flush=True)
"""


@mounts
def test_a_read_only_folder_is_one_sentence(plan_path, tmp_path):
    """Found out before any planning; all verbs in one process, because starting it takes longest."""
    wanted = [
        [*PLAN, f"out={tmp_path}/plan.json"],
        [*PLAN, f"out={plan_path}.again", f"report={tmp_path}/report.html"],
        ["launch", "optimizer=fsdp", "steps=2", f"out={tmp_path}/run"],
        ["launch", "--multirun", "optimizer=fsdp,zero1", f"out={tmp_path}/sweep"],
        ["report", str(plan_path), "--out", f"{tmp_path}/report.html"],
        ["export", str(plan_path), "--to", "maxtext", "--out", f"{tmp_path}/job.yml"],
    ]
    done = inside("ro", READ_ONLY, json.dumps(wanted), at=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    said = [s for s in done.stderr.splitlines() if s.startswith(("error: ", "== "))]
    assert len(said) == 2 * len(wanted), done.stderr
    for sentence, status in zip(said[::2], said[1::2]):
        assert status == "== 1" and "Read-only file system" in sentence
    assert "Traceback" not in done.stderr
    assert "predicted" not in done.stdout


def test_plans_made_at_once_into_one_file_leave_a_whole_plan(tmp_path, plan_path):
    """Three processes share the caches and the file; all make the plan that one alone makes."""
    command = [sys.executable, "-m", "placement.experiments.cli"]
    running = [
        subprocess.Popen(
            [*command, *PLAN, f"out={tmp_path / 'plan.json'}"],
            env=os.environ
            | {"MESHWRIGHT_CACHE_DIR": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for one in running:
        _, stderr = one.communicate(timeout=280)
        assert one.returncode == 0, stderr
    made, alone = (Plan.load(p) for p in (tmp_path / "plan.json", plan_path))
    assert (made.inputs, made.results, made.mesh_shape) == (
        alone.inputs,
        alone.results,
        alone.mesh_shape,
    )
    assert [p.name for p in tmp_path.glob("*.part")] == []


def _write_and_read(folder: str, writer: int) -> int:
    """Rounds in which an entry or a text was damaged, while others write the same ones."""
    place, damaged = pathlib.Path(folder), 0
    text = "HloModule m\n" * 2000
    for n in range(40):
        entry = {"status": "ok", "seconds": n % 5, "message": "m" * 5000}
        compile_cache.store_entry(place, f"k{n % 5}", entry)
        compile_cache.store_text(place / "m.txt.gz", text)
        damaged += compile_cache.load_entry(place, f"k{n % 5}") != entry
        damaged += compile_cache.load_text(place / "m.txt.gz") != text
    return damaged


def test_caches_that_processes_share_are_never_read_half_written(tmp_path):
    with concurrent.futures.ProcessPoolExecutor(max_workers=4) as pool:
        found = list(pool.map(_write_and_read, [str(tmp_path)] * 4, range(4)))
    assert found == [0, 0, 0, 0]
    assert [p.name for p in tmp_path.glob(".*")] == []
