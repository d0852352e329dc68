"""Sweeps of launches: what is finished stays, what is missing runs, here and on SLURM."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import types

import pytest

from graphs.errors import MeshwrightError
from placement.experiments import _hydra, _sweep, cli, launch

SWEEP = ["optimizer=fsdp,zero1", "seed=0,1", "steps=3"]
NAMES = {f"optimizer={o},seed={s}" for o in ("fsdp", "zero1") for s in (0, 1)}
RESULT = {
    "steps": 3,
    "loss": 2.0,
    "eval_loss": 2.5,
    "step_time_s": 0.1,
    "predicted_step_time_s": 0.1,
    "tokens_per_s": 10.0,
}


def leave_result(folder: pathlib.Path, overrides: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = RESULT | {"overrides": overrides}
    (folder / _sweep.RESULT).write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def started(monkeypatch):
    """Stands for the processes of the jobs: (folders started, folders that are cut short)."""
    ran: list[str] = []
    killed: set[str] = set()

    def run(command, **_):
        folder = pathlib.Path(command[-1].removeprefix('out="').removesuffix('"'))
        ran.append(folder.name)
        if folder.name in killed:
            return types.SimpleNamespace(returncode=-9)
        at = command.index("launch") + 1
        leave_result(folder, command[at:-1])
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(_sweep, "subprocess", types.SimpleNamespace(run=run, STDOUT=0))
    return ran, killed


def sweep(out: pathlib.Path, *overrides: str) -> int:
    return cli.main(["launch", "--multirun", "--traceback", *overrides, f"out={out}"])


def test_an_interrupted_sweep_runs_only_what_is_missing(started, tmp_path, capsys):
    ran, killed = started
    killed.add("optimizer=zero1,seed=0")
    assert sweep(tmp_path, *SWEEP) == 1
    assert set(ran) == NAMES and len(ran) == 4
    assert "cut short" in capsys.readouterr().out
    killed.clear()
    ran.clear()
    assert sweep(tmp_path, *SWEEP) == 0
    assert ran == ["optimizer=zero1,seed=0"]
    ran.clear()
    assert sweep(tmp_path, *SWEEP) == 0
    assert ran == []


def test_more_steps_go_on_in_the_same_folders(started, tmp_path):
    ran, _ = started
    assert sweep(tmp_path, *SWEEP) == 0
    ran.clear()
    assert sweep(tmp_path, *SWEEP[:2], "steps=5") == 0
    assert set(ran) == NAMES


def test_clusters_are_swept_in_their_notation(started, tmp_path):
    ran, _ = started
    assert sweep(tmp_path, "cluster=cpu:8,cpu:4", "optimizer=fsdp") == 0
    assert set(ran) == {"cluster=cpu:8", "cluster=cpu:4"}


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optimizer=fsdp,zeroo1", "no optimizer named 'zeroo1': did you mean 'zero1'?"),
        ("train.globl_batch=8,16", "globl_batch"),
        ("seed=0,", "cannot be read"),
        ("hydra/launcher=slrm", "slrm"),
    ],
)
def test_mistakes_in_a_sweep_get_one_sentence(override, says, started, tmp_path, capsys):
    ran, _ = started
    assert cli.main(["launch", "--multirun", override, f"out={tmp_path}"]) == 1
    said = capsys.readouterr().err
    assert says in said and said.startswith("error: ") and said.count("\n") == 1
    assert ran == []


def test_several_values_without_the_flag_name_it():
    with pytest.raises(MeshwrightError, match="--multirun"):
        _hydra.compose("launch", ["optimizer=fsdp,zero1"])


def test_one_launch_at_a_time_writes_to_a_folder(tmp_path):
    with launch._alone(tmp_path, 0):
        with pytest.raises(MeshwrightError, match="another launch"), launch._alone(tmp_path, 0):
            pass
        with launch._alone(tmp_path, 1):
            pass
    with launch._alone(tmp_path, 0):
        pass


SLURM = {
    "sbatch": """
for last; do :; done
tasks=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$last")
cp "$last" "$SLURM_COPY"
(for i in $(seq 0 "$tasks"); do
  SLURM_JOB_ID=70$i SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=$i SLURM_NTASKS=1 \\
  SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0 \\
  SLURM_NODELIST=here SLURM_JOB_NODELIST=here bash "$last"
done) > /dev/null 2>&1 < /dev/null &
echo "Submitted batch job 7"
""",
    "srun": """
while [ "${1#-}" != "$1" ]; do
  case $1 in --output|--error) shift 2;; *) shift;; esac
done
exec "$@"
""",
    "sacct": """
echo "JobID|State|NodeList"
for i in 0 1 2 3; do echo "7_$i|COMPLETED|here"; done
""",
    "scontrol": "echo here",
}
"""Programs that stand for SLURM's: tasks run here, in turn."""


def test_a_sweep_goes_through_slurm(tmp_path):
    """All jobs are finished before, so that each task only says so; submitit does the rest."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    programs, out = tmp_path / "bin", tmp_path / "sweep"
    programs.mkdir()
    for name, text in SLURM.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}", encoding="utf-8")
        (programs / name).chmod(0o755)
    for name in NAMES:
        leave_result(out / name, [*name.split(","), "steps=3"])
    done = subprocess.run(
        [
            *(sys.executable, "-m", "placement.experiments.cli", "launch", "--multirun"),
            *("hydra/launcher=slurm", "hydra.launcher.partition=long", *SWEEP, f"out={out}"),
        ],
        env=os.environ
        | {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_COPY": str(tmp_path / "script")},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    script = (tmp_path / "script").read_text(encoding="utf-8")
    assert "--array=0-3" in script and "--partition=long" in script
    said = "".join(p.read_text() for p in (out / ".submitit").rglob("*.out"))
    logs = sorted((out / ".submitit").glob("7_*/*_result.pkl"))
    assert len(logs) == 4, said
