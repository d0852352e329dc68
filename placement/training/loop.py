"""The loop: a batch, a step, a row of metrics; now and then an evaluation and a checkpoint.

A run that finds a checkpoint goes on from it. The state, the position in the text and the file of
metrics agree at every checkpoint, so that the curve of a resumed run is that of an uninterrupted
one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

from graphs.errors import MeshwrightError
from placement.training.batches import Batches, Prefetch, on_devices
from placement.training.checkpoint import Checkpoints, Position
from placement.training.metrics import MetricsFile, Yardstick
from placement.training.program import Program
from placement.training.tensorboard import EventFile

_SHOWN = ("loss", "eval_loss", "step_time_s", "tokens_per_s", "mfu", "energy_j")
"""What TensorBoard shows of a row."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how often, in steps, each >= 1."""

    steps: int
    checkpoint_every: int
    eval_every: int
    eval_batches: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value < 1:
                raise MeshwrightError(f"{field.name}={value} is less than 1; make it at least 1")


def train(
    program: Program,
    *,
    batches: Batches,
    validation: Batches,
    schedule: Schedule,
    yardstick: Yardstick,
    start: Position,
    out: str | pathlib.Path,
    on_start: Callable[[int], None] = lambda step: None,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
) -> None:
    """Trains until ``schedule.steps`` and leaves metrics.jsonl, checkpoints/ and
    tensorboard/ in ``out``.

    start: where a run without checkpoints begins. on_start hears the step resumed from, on_row
    every row. Raises MeshwrightError where the checkpoints are of another run or the loss is no
    number.
    """
    import jax

    out = pathlib.Path(out)
    main = jax.process_index() == 0
    with Checkpoints(out / "checkpoints") as checkpoints:
        at = checkpoints.latest()
        if at is None:
            at = start
            state = program.init(start.seed)
        else:
            _check_same_run(at, start)
            state = checkpoints.restore(at.step, program.abstract_state, program.state_shardings)
        on_start(at.step)
        first = at
        held_out = [
            on_devices(validation.at(n * validation.global_batch), program.batch_shardings)
            for n in range(schedule.eval_batches)
        ]

        def make(step: int) -> dict[str, Any]:
            taken = first.windows + (step - first.step) * batches.global_batch
            return on_devices(batches.at(taken), program.batch_shardings)

        numbers = range(at.step, schedule.steps)
        with (
            MetricsFile(out / "metrics.jsonl", resumed_step=at.step, writes=main) as metrics,
            EventFile(out / "tensorboard", first_step=at.step + 1)
            if main and numbers
            else contextlib.nullcontext() as events,
            Prefetch(make, numbers) as ahead,
        ):
            for batch in ahead:
                began = time.perf_counter()
                *state, said = program.step(*state, batch)
                loss = float(said["loss"])
                if not math.isfinite(loss):
                    raise MeshwrightError(
                        f"the loss of step {at.step + 1} is {loss}; lower train.learning_rate or "
                        "raise train.warmup_steps and launch again from the last checkpoint"
                    )
                row = yardstick.row(at.step + 1, loss, time.perf_counter() - began)
                at = dataclasses.replace(
                    at, step=at.step + 1, windows=at.windows + batches.global_batch
                )
                last = at.step == schedule.steps
                if at.step % schedule.eval_every == 0 or last:
                    losses = [float(program.evaluate(state[0], b)) for b in held_out]
                    row["eval_loss"] = sum(losses) / len(losses)
                metrics.write(row)
                if events is not None:
                    shown = {k: row[k] for k in _SHOWN if row.get(k) is not None}
                    events.write(at.step, shown)
                on_row(row)
                if at.step % schedule.checkpoint_every == 0 or last:
                    checkpoints.save(tuple(state), at)


def _check_same_run(found: Position, wanted: Position) -> None:
    for field in ("seed", "seq_len", "text", "model"):
        theirs, ours = getattr(found, field), getattr(wanted, field)
        if theirs != ours:
            raise MeshwrightError(
                f"the checkpoints are of a run with {field}={theirs!r} and this one has "
                f"{field}={ours!r}; give another out= or the run's own settings"
            )
