"""Tables and pictures of the held-out suite."""

from __future__ import annotations

import csv
import io
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from placement.compile_cache import write_atomically
from placement.learned.baselines import BASELINES
from placement.learned.contenders import is_hurried
from placement.learned.heldout_summary import TEN, Mean, Runs, mean_ratio
from placement.learned.heldout_targets import targets

EVALUATIONS = (1, 16, 64, 256, 1024, 4096)
SECONDS = (0.1, 1.0, 10.0)
_SPLIT_WORDS = {
    "validation": "validation",
    "heldout_family": "unseen families",
    "heldout_device": "unseen devices",
    "heldout_scale": "unseen scale",
}
_COLOURS = {
    "learned": "#c0392b", "untrained": "#e59866", "uniform": "#f0c674", "engine": "#1f4e79",
    "engine_random": "#5dade2", "evolution": "#1e8449", "annealing": "#52be80",
    "tree_search": "#8e44ad", "random": "#7f8c8d", "random_nodes": "#bdc3c7",
    "heuristic": "#34495e", "learned_1s": "#922b21",
}  # fmt: skip


def write(folder: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """``runs.csv``, ``summary.csv``, ``targets.csv``, ``evaluations.png``, ``seconds.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    runs = Runs(rows)
    _csv(folder / "runs.csv", _run_rows(runs))
    _csv(folder / "summary.csv", summary_rows(runs))
    if found := [
        dict(policy=name, target=t.text, measured=t.measured, met="" if t.met is None else t.met)
        for name in policies(runs)
        for t in targets(runs, name)
    ]:
        _csv(folder / "targets.csv", found)
    draw(folder / "evaluations.png", runs, by_seconds=False)
    draw(folder / "seconds.png", runs, by_seconds=True)


def policies(runs: Runs) -> list[str]:
    """Trained policies among the optimizers, the shipped one first."""
    known = {*BASELINES, "untrained", "uniform"}
    trained = {n for n in runs.optimizers if n not in known and not is_hurried(n)}
    return sorted(trained, key=lambda n: (n != "learned", n))


def summary_rows(runs: Runs) -> list[dict[str, Any]]:
    """One row for each split, optimizer and budget."""
    rows = []
    for split in (*runs.splits, None):
        for optimizer in runs.optimizers:
            for kind, limit, mean in _means(runs, optimizer, split):
                rows.append(
                    dict(
                        split=split or "all",
                        optimizer=optimizer,
                        budget=kind,
                        limit=limit,
                        ratio=round(mean.value, 4),
                        low=round(mean.low, 4),
                        high=round(mean.high, 4),
                        found=round(mean.found, 4),
                        problems=mean.problems,
                    )
                )
    return rows


def _means(runs: Runs, optimizer: str, split: str | None):
    problems = [p for p in runs.of_split(split) if runs.curves(p, optimizer)]
    for n in EVALUATIONS:
        deep = [p for p in problems if runs.deep_enough(p, optimizer, n)]
        if n <= 64:
            deep = problems
        mean = mean_ratio(runs, optimizer, lambda c, n=n: c.at_evaluations(n), deep)
        if mean is not None:
            yield "evaluations", n, mean
    for s in SECONDS:
        mean = mean_ratio(runs, optimizer, lambda c, s=s: c.at_seconds(s), problems)
        if mean is not None:
            yield "seconds", s, mean


def table(
    runs: Runs, kind: str, limits: Sequence[float], optimizers: Sequence[str], split: str | None
) -> list[list[str]]:
    """Ratios with intervals, a row for each optimizer."""
    lines = []
    for optimizer in optimizers:
        cells: dict[float, Mean] = {
            limit: mean for k, limit, mean in _means(runs, optimizer, split) if k == kind
        }
        if cells:
            lines.append([optimizer, *(cell(cells.get(limit)) for limit in limits)])
    return lines


def cell(mean: Mean | None) -> str:
    """A ratio with its interval, and the share of runs that had a plan."""
    if mean is None:
        return ""
    if mean.found == 0.0:
        return "nothing yet"
    share = "" if mean.found == 1.0 else f", found {mean.found:.0%}"
    return f"{mean.value:.2f} ({mean.low:.2f} to {mean.high:.2f}{share})"


def draw(path: pathlib.Path, runs: Runs, *, by_seconds: bool) -> None:
    """Geometric mean ratio against the budget, a panel for each split."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(
        1, max(1, len(runs.splits)), figsize=(4.4 * max(1, len(runs.splits)), 4.6),
        sharey=True, squeeze=False,
    )  # fmt: skip
    grid = np.geomspace(0.1, 100, 40) if by_seconds else np.unique(np.geomspace(1, 64, 30).round())
    for ax, split in zip(axes[0], runs.splits):
        problems = runs.of_split(split)
        for name in runs.optimizers:
            if name == "rules" or any(not runs.curves(p, name) for p in problems):
                continue
            if name == "learned_1s" and not by_seconds:
                continue
            ratio = []
            for x in grid:
                logs = [
                    runs.logs(
                        p,
                        name,
                        lambda c, x=x: c.at_seconds(x) if by_seconds else c.at_evaluations(int(x)),
                    ).mean()
                    for p in problems
                ]
                ratio.append(math.exp(float(np.mean(logs))))
            ax.plot(
                grid, ratio, label=name, color=_COLOURS.get(name),
                linewidth=2.4 if name == "learned" else 1.2,
            )  # fmt: skip
        rules = [runs.logs(p, "rules", lambda c: c.at_seconds(math.inf)).mean()
                 for p in problems if runs.curves(p, "rules")]  # fmt: skip
        if rules:
            ax.axhline(math.exp(float(np.mean(rules))), color="black", linestyle=":", label="rules")
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_ylim(0.97, TEN * 1.1)
        ax.set_yticks([1, 1.2, 1.5, 2, 3, 5, 10], ["1", "1.2", "1.5", "2", "3", "5", "10"])
        ax.minorticks_off()
        ax.grid(alpha=0.25)
        ax.set_title(f"{_SPLIT_WORDS[split]} ({len(problems)} problems)")
        ax.set_xlabel("processor seconds" if by_seconds else "evaluations")
    axes[0, 0].set_ylabel("step time over the best known plan's")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="lower center", ncol=7, frameon=False)
    fig.tight_layout(rect=(0, 0.2, 1, 1))
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    plt.close(fig)
    write_atomically(path, buffer.getvalue())


def _run_rows(runs: Runs) -> list[dict[str, Any]]:
    rows = []
    for r in runs.rows:
        c = r["curve"]
        row = {k: r[k] for k in ("problem", "split", "family", "model", "cluster", "n_devices",
                                 "candidates", "optimizer", "seed", "max_evaluations")}  # fmt: skip
        row["best_known_s"] = _number(runs.best.get(r["problem"], math.inf))
        for n in EVALUATIONS:
            given = n <= r["max_evaluations"] or c.total_evaluations < r["max_evaluations"]
            row[f"at_{n}_evaluations_s"] = _number(c.at_evaluations(n)) if given else ""
        for s in SECONDS:
            row[f"at_{s:g}_seconds_s"] = _number(c.at_seconds(s))
        row["final_s"] = _number(c.step_time_s[-1] if c.step_time_s else math.inf)
        row["evaluations"], row["seconds"] = c.total_evaluations, round(c.total_seconds, 2)
        rows.append(row)
    return rows


def _number(value: float) -> str:
    return f"{value:.6g}" if math.isfinite(value) else ""


def _csv(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())
