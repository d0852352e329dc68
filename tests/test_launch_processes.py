"""Two processes of four devices each train as one job, with the curve of one process of eight."""

from __future__ import annotations

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

from placement.training.metrics import read_metrics

SMALL = (
    "optimizer=fsdp",
    "train.global_batch=16",
    "train.seq_len=32",
    "train.warmup_steps=2",
    "steps=4",
    "checkpoint_every=2",
    "eval_every=4",
    "eval_batches=1",
)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def start(out: pathlib.Path, *overrides: str) -> subprocess.Popen:
    environment = os.environ | {
        "XLA_FLAGS": "",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
    }
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "placement.experiments.cli",
            "launch",
            *SMALL,
            *overrides,
            f"out={out}",
        ],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(job: list[subprocess.Popen]) -> list[str]:
    said = []
    try:
        for member in job:
            stdout, stderr = member.communicate(timeout=280)
            assert member.returncode == 0, stderr[-3000:]
            said.append(stdout)
    finally:
        for member in job:
            member.kill()
    return said


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[pathlib.Path, list[str]]:
    out = tmp_path_factory.mktemp("two")
    together = ("distributed=true", f"coordinator=localhost:{free_port()}", "processes=2")
    return out, finish([start(out, *together, f"process={i}") for i in range(2)])


def test_their_curve_is_that_of_one_process(two, tmp_path):
    folder, said = two
    spoke = ["tokens per second" in text for text in said]
    assert spoke == [True, False], "one of them speaks for both"
    finish([start(tmp_path)])
    ours, theirs = (read_metrics(out / "metrics.jsonl") for out in (folder, tmp_path))
    assert [row["step"] for row in ours] == [1, 2, 3, 4]
    for key in ("loss", "eval_loss"):
        np.testing.assert_allclose(
            [row[key] for row in ours if key in row],
            [row[key] for row in theirs if key in row],
            rtol=1e-3,
        )
    assert json.loads((folder / "result.json").read_text())["loss"] == ours[-1]["loss"]


def test_one_process_goes_on_from_the_checkpoint_of_two(two):
    folder, _ = two
    finish([start(folder, "steps=6")])
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[5]["loss"] < rows[0]["loss"]
