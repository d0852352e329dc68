"""A training run in a folder: metrics, checkpoints, curves and weights.

Each member has a folder ``out/member_N`` with ``metrics.jsonl``, one row an epoch, and
``checkpoints``; beside them are ``curves.png`` and ``policy.safetensors``, the averaged weights of
all members with their provenance. A run that finds a checkpoint of the same configuration and the
same recorded outcomes goes on from it.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from graphs.errors import MeshwrightError
from placement.learned.dataset import Example
from placement.learned.distributed import Spread
from placement.learned.policy import save_weights
from placement.learned.train import (
    TrainConfig,
    fingerprint,
    first_state,
    make_train,
    provenance,
    started,
)
from placement.training.checkpoint import Checkpoints, Position
from placement.training.metrics import MetricsFile, read_metrics

WEIGHTS = "policy.safetensors"
_SHOWN = (
    ("regret", "regret of the first choice"),
    ("missed", "first choice does not fit"),
    ("infeasible_recall", "recall of what does not fit"),
    ("value_error", "value error"),
)


def run(
    config: TrainConfig,
    training: Sequence[Example],
    validation: Sequence[Example],
    out: str | pathlib.Path,
    *,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Trains every member, from its last checkpoint where there is one.

    Returns the rows of all epochs, each with its ``member``. Raises MeshwrightError where the
    folder holds the checkpoints of another run.
    """
    out = pathlib.Path(out)
    if config.start:
        started(config.member(config.members - 1))  # refused before any is trained
    members, rows = [], []
    for number in range(config.members):

        def say(row: dict[str, Any], number: int = number) -> None:
            on_row({"member": number, **row})

        folder = out / f"member_{number}"
        params, own = _one(config.member(number), training, validation, folder, say)
        members.append(params)
        rows += [{"member": number, **r} for r in own]
    if jax.process_index() == 0:
        save_weights(out / WEIGHTS, members, provenance(config, training, rows))
        draw(rows, out / "curves.png")
    return rows


def _one(config, training, validation, out: pathlib.Path, on_row):
    """(weights, rows of all epochs) of one member."""
    first = jax.process_index() == 0
    here = Position(
        step=0,
        windows=0,
        seed=config.seed,
        seq_len=0,
        text=fingerprint(config, training),
        model=f"policy of width {config.hidden}",
    )
    with Checkpoints(out / "checkpoints") as checkpoints:
        start = _start(checkpoints, config, here)
        done = 0 if start is None else start[0]
        with MetricsFile(out / "metrics.jsonl", resumed_step=done, writes=first) as metrics:

            def write(row: dict[str, Any]) -> None:
                metrics.write(row)
                on_row(row)

            def keep(epoch: int, state: Any) -> None:
                checkpoints.save(state, dataclasses.replace(here, step=epoch))

            trained = make_train(config)(training, validation, start=start, keep=keep, on_row=write)
    return trained.params, read_metrics(out / "metrics.jsonl")


def _start(checkpoints: Checkpoints, config: TrainConfig, here: Position):
    found = checkpoints.latest()
    if found is None:
        return None
    if dataclasses.replace(found, step=0) != here:
        raise MeshwrightError(
            f"the checkpoints in {str(checkpoints.folder)!r} are of another configuration or of "
            "other recorded outcomes; give another out= or remove them"
        )
    abstract = jax.eval_shape(lambda: first_state(config))
    whole = Spread.over_all(config.batch_size).whole
    shardings = jax.tree.map(lambda _: whole, abstract)
    return found.step, checkpoints.restore(found.step, abstract, shardings)


def draw(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """Validation curves over epochs; the second stage is shaded."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panes = pyplot.subplots(2, 2, figsize=(9, 6), sharex=True)
    members = sorted({r["member"] for r in rows})
    later = [r["step"] for r in rows if r["stage"] == "reinforcement"]
    for pane, (key, title) in zip(panes.flat, _SHOWN):
        for m in members:
            own = [r for r in rows if r["member"] == m]
            pane.plot([r["step"] for r in own], [r[key] for r in own], label=f"member {m}")
        if later:
            pane.axvspan(min(later) - 0.5, max(later) + 0.5, alpha=0.12)
        pane.set_title(title, fontsize=10)
        pane.set_ylim(bottom=0)
        pane.grid(alpha=0.3)
    for pane in panes[1]:
        pane.set_xlabel("epoch")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
