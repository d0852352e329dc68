"""Training under plans here: python benchmarks/launch.py {plans|ranks|kills|processes} [--out DIR]

plans      the tiny model for 200 steps unsharded and under twelve plans of cpu:8: final losses and
           step times beside the predicted ones
ranks      the rank correlation of measured and predicted step times over the twelve plans: all
           steps compiled in one process and taken in turn, a round in another order each, so that
           what else the machine does falls on all alike; a plan's time is its median share of a
           round, and the correlation has an interval from resampled rounds
kills      one run of 200 steps killed (SIGKILL) ten times at random steps and resumed each time,
           beside an uninterrupted one
processes  one job of two processes of four devices each beside one process of eight
"""

from __future__ import annotations

import argparse
import csv
import os
import pathlib
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from placement.training.metrics import read_metrics

COMMON = ("text=documentation", "train.learning_rate=0.003", "eval_every=100")
PLANS: dict[str, tuple[str, ...]] = {
    "unsharded": ("cluster=cpu:1", "optimizer=data_parallel"),
    "data_parallel": ("optimizer=data_parallel",),
    "zero1": ("optimizer=zero1",),
    "zero2": ("optimizer=zero2",),
    "fsdp": ("optimizer=fsdp",),
    "search": ("optimizer=search",),
    "megatron_2x4": ("optimizer=megatron", "mesh_shape={data:2,model:4}"),
    "megatron_4x2": ("optimizer=megatron", "mesh_shape={data:4,model:2}"),
    "megatron_sp_2x4": ("optimizer=megatron_sp", "mesh_shape={data:2,model:4}"),
    "megatron_sp_4x2": ("optimizer=megatron_sp", "mesh_shape={data:4,model:2}"),
    "fsdp_tp_2x4": ("optimizer=fsdp_tp", "mesh_shape={data:2,model:4}"),
    "fsdp_tp_4x2": ("optimizer=fsdp_tp", "mesh_shape={data:4,model:2}"),
    "fsdp_tp_sp_2x4": ("optimizer=fsdp_tp_sp", "mesh_shape={data:2,model:4}"),
}


def start(out: pathlib.Path, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "placement.experiments.cli", "launch", *COMMON, *overrides]
    # Equal programs are compiled once.
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(out.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "log.txt", "a", encoding="utf-8") as log:
        return subprocess.Popen(
            [*command, f"out={out}"], env=os.environ | cache, stdout=log, stderr=log
        )


def run(out: pathlib.Path, *overrides: str) -> list[dict]:
    shutil.rmtree(out, ignore_errors=True)
    if start(out, *overrides).wait():
        raise SystemExit(f"the launch into {out} failed: see {out / 'log.txt'}")
    return read_metrics(out / "metrics.jsonl")


def plans(out: pathlib.Path, steps: int) -> int:
    rows = []
    for name, overrides in PLANS.items():
        found = run(out / name, f"steps={steps}", f"checkpoint_every={steps}", *overrides)
        rows.append(
            {
                "plan": name,
                "first_loss": found[0]["loss"],
                "final_loss": found[-1]["loss"],
                "held_out_loss": found[-1]["eval_loss"],
                # The first step compiles.
                "step_time_s": statistics.median(r["step_time_s"] for r in found[1:]),
                "predicted_step_time_s": found[-1]["predicted_step_time_s"],
            }
        )
        write_csv(out / "plans.csv", rows)
        print({k: round(v, 5) if isinstance(v, float) else v for k, v in rows[-1].items()})
    reference = rows[0]["final_loss"]
    worst = max(abs(row["final_loss"] / reference - 1) for row in rows)
    print(f"final losses within {100 * worst:.2f} % of the unsharded one")
    return 0 if worst <= 0.01 else 1


def ranks(out: pathlib.Path, rounds: int) -> int:
    names, predicted, steps = zip(*compiled_steps(out))
    clocks = (time.perf_counter, time.process_time)
    seconds, order = np.zeros((2, rounds, len(names))), random.Random(0)
    for n in range(rounds):
        for i in order.sample(range(len(names)), len(names)):
            began = [clock() for clock in clocks]
            steps[i]()
            seconds[:, n, i] = [clock() - b for clock, b in zip(clocks, began)]
    shares = seconds / np.median(seconds, axis=2, keepdims=True)
    middle, share = np.median(seconds, axis=1), np.median(shares, axis=1)
    rows = [
        {
            "plan": name,
            "predicted_s": predicted[i],
            "median_s": middle[0, i],
            "median_processor_s": middle[1, i],
            "share_of_round": share[0, i],
            "processor_share_of_round": share[1, i],
        }
        for i, name in enumerate(names)
    ]
    write_csv(out / "ranks.csv", rows)
    for row in rows:
        print({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()})
    draws = np.random.default_rng(0).integers(0, rounds, (500, rounds))
    for c, clock in enumerate(("wall-clock", "processor")):
        drawn = [spearman(predicted, np.median(shares[c][d], axis=0)) for d in draws]
        low, high = np.quantile(drawn, (0.025, 0.975))
        print(
            f"{len(names)} plans, {rounds} rounds, {clock} seconds: rank correlation "
            f"{spearman(predicted, share[c]):.2f} ({low:.2f} to {high:.2f} over resampled rounds)"
        )
    return 0 if spearman(predicted, share[0]) >= 0.8 else 1


def compiled_steps(out: pathlib.Path) -> Iterator[tuple[str, float, Callable[[], float]]]:
    """(name, predicted seconds, one training step) of every sharded plan, in this process."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(out.parent / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

    import placement
    from placement.experiments import _hydra
    from placement.training.batches import Batches, on_devices
    from placement.training.corpus import load_corpus
    from placement.training.program import build_program

    text = load_corpus("documentation").train
    for name, overrides in PLANS.items():
        if name == "unsharded":
            continue
        config = _hydra.compose("launch", ["train.learning_rate=0.003", *overrides])
        model = _hydra.instantiate(config.model)
        function, arguments, donated = _hydra.instantiate(config.train)(model)
        plan = placement.optimize(
            function,
            *arguments,
            cluster="cpu:8",
            optimizer=config.optimizer.name,
            mesh_shape=_hydra.plain(config.mesh_shape),
            donate_argnums=donated,
        )
        program = build_program(
            plan, function, arguments, model=model, train=_hydra.plain(config.train)
        )
        global_batch, seq_len = arguments[2]["inputs"].shape
        batches = Batches(
            text=text,
            names=tuple(arguments[2]),
            global_batch=global_batch,
            seq_len=seq_len,
            seed=0,
        )
        batch = on_devices(batches.at(0), program.batch_shardings)
        step = stepper(program, batch)
        step()
        print(f"{name}: compiled", flush=True)
        yield name, plan.estimate.step_time_s, step


def stepper(program: Any, batch: Any) -> Callable[[], float]:
    """Takes one step more each time it is called, and returns its loss."""
    state = program.init(0)

    def step() -> float:
        nonlocal state
        *state, said = program.step(*state, batch)
        return float(said["loss"])

    return step


def write_csv(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def spearman(a: Any, b: Any) -> float:
    """The correlation of the ranks, equal values sharing theirs."""
    from scipy.stats import rankdata

    return float(np.corrcoef([rankdata(a), rankdata(b)])[0, 1])


def kills(out: pathlib.Path, steps: int) -> int:
    settings = (f"steps={steps}", "checkpoint_every=10", "optimizer=fsdp")
    whole = run(out / "whole", *settings)
    folder = out / "killed"
    shutil.rmtree(folder, ignore_errors=True)
    draw, interval = random.Random(0), 10
    times = 10
    for kill in range(times):
        until = kill * (steps - interval) // times + draw.randrange(interval, 2 * interval)
        running = start(folder, *settings)
        while len(read_metrics(folder / "metrics.jsonl")) < until and running.poll() is None:
            time.sleep(0.005)
        time.sleep(draw.random() * 0.2)
        running.send_signal(signal.SIGKILL)
        status = running.wait()
        reached = len(read_metrics(folder / "metrics.jsonl"))
        print(f"kill {kill + 1}: at step {reached}, status {status}", flush=True)
    if start(folder, *settings).wait():
        raise SystemExit(f"the last launch failed: see {folder / 'log.txt'}")
    return compare(read_metrics(folder / "metrics.jsonl"), whole, 1e-4)


def processes(out: pathlib.Path, steps: int) -> int:
    settings = (f"steps={steps}", "optimizer=fsdp")
    whole = run(out / "one", *settings)
    folder = out / "two"
    shutil.rmtree(folder, ignore_errors=True)
    job = ("distributed=true", "coordinator=localhost:9931", "processes=2")
    members = [start(folder, *settings, *job, f"process={i}") for i in range(2)]
    if any([member.wait() for member in members]):
        raise SystemExit(f"the job of two processes failed: see {folder / 'log.txt'}")
    return compare(read_metrics(folder / "metrics.jsonl"), whole, 0.01)


def compare(rows: list[dict], whole: list[dict], tolerance: float) -> int:
    if [row["step"] for row in rows] != [row["step"] for row in whole]:
        print("the curves have different steps")
        return 1
    worst = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(rows, whole))
    print(
        f"{len(rows)} steps, loss {rows[0]['loss']:.4f} to {rows[-1]['loss']:.4f}, "
        f"largest difference {100 * worst:.5f} %"
    )
    return 0 if worst <= tolerance else 1


STUDIES = {"plans": plans, "ranks": ranks, "kills": kills, "processes": processes}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=tuple(STUDIES))
    parser.add_argument("--out", default="out/launch_study", type=pathlib.Path)
    parser.add_argument("--steps", default=200, type=int, help="or rounds, of ranks")
    given = parser.parse_args()
    folder = given.out.absolute() / given.what
    folder.mkdir(parents=True, exist_ok=True)
    return STUDIES[given.what](folder, given.steps)


if __name__ == "__main__":
    sys.exit(main())
