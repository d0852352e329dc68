"""Every contest instance of a folder solved at its reference time limit, and scored.

The folder's ``reference.csv`` has the columns instance, timeout_s, contest_winner, contest_best,
xla_production and lower_bound. Score of an instance = best known contest cost / found cost, and 0
without a valid answer; the mean is over instances, as in the contest's ranking by relative cost.
Every instance runs in its own process, whose answer is checked here from the file.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cost_model import iopddl
from graphs.errors import MeshwrightError

_COLUMNS = ("instance", "timeout_s", "contest_winner", "contest_best", "lower_bound")

_REQUIRED = ("timeout_s", "contest_winner", "contest_best")
"""Numbers that every row has; the others may be empty."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """One run on one instance."""

    instance: str
    seed: int
    timeout_s: float
    elapsed_s: float
    """Wall clock of the whole process."""
    memory_bytes: int
    """Largest resident set of the process."""
    cost: float
    """inf without a valid answer."""
    lower_bound: float
    """The bound this run proved; -inf if none."""
    winner: float
    """The contest winner's cost."""
    best_known: float
    reference_bound: float
    xla: float
    """nan where unknown."""

    @property
    def score(self) -> float:
        return self.best_known / self.cost if self.cost > 0 else 1.0

    @property
    def gap(self) -> float:
        """Against the better of the run's bound and the reference's."""
        return 1.0 - max(self.lower_bound, self.reference_bound) / self.cost


def evaluate(
    dir: str,
    out: str | None = None,
    *,
    seeds: int = 1,
    first_seed: int = 0,
    time_fraction: float = 1.0,
    instances: str | Sequence[str] | None = None,
) -> int:
    """Print a table and the mean contest score; write ``out``/iopddl.json if given.

    ``time_fraction`` scales the reference time limits; ``instances`` names some: a list, or
    names joined by + or commas.
    Exit status 1 if any run gave no valid answer.
    """
    folder = Path(dir)
    rows = _reference(folder / "reference.csv")
    if isinstance(instances, str):
        instances = instances.replace("+", ",").split(",")
    chosen = list(instances or (row["instance"] for row in rows))
    unknown = set(chosen) - {row["instance"] for row in rows}
    if unknown:
        raise MeshwrightError(f"no instance {sorted(unknown)[0]!r} in {folder / 'reference.csv'}")
    scores = []
    print(
        "instance seed limit_s  used_s  GiB        cost  /winner  best/found  xla/found   gap %",
        flush=True,
    )
    for row in rows:
        if row["instance"] not in chosen:
            continue
        for seed in range(first_seed, first_seed + seeds):
            scores.append(_run(folder, row, seed, time_fraction))
            print(_line(scores[-1]), flush=True)
    mean = float(np.mean([s.score for s in scores])) if scores else 0.0
    print(f"mean contest score {mean:.5f} over {len(scores)} runs")
    if out is not None:
        _write(Path(out) / "iopddl.json", scores, mean)
    return 0 if scores and all(math.isfinite(s.cost) for s in scores) else 1


def _reference(path: Path) -> list[dict[str, str]]:
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise MeshwrightError(
            f"cannot read {path} ({getattr(error, 'strerror', None) or 'no table'}); "
            "the folder needs a reference.csv"
        ) from error
    missing = [c for c in _COLUMNS if not rows or c not in rows[0]]
    if missing:
        raise MeshwrightError(f"{path} lacks the column {missing[0]!r} or has no rows")
    for line, row in enumerate(rows, 2):
        for column in (*_COLUMNS[1:], "xla_production"):
            text = row.get(column) or ("" if column in _REQUIRED else "0")
            if not _is_amount(text):
                raise MeshwrightError(
                    f"{path}, line {line}: {column}={text!r} is not a number of at least 0"
                )
    return rows


def _is_amount(text: str) -> bool:
    try:
        return 0 <= float(text) < math.inf
    except ValueError:
        return False


def _run(folder: Path, row: dict[str, str], seed: int, time_fraction: float) -> Score:
    name = row["instance"]
    files = [folder / f"{name}{suffix}" for suffix in (".json.gz", ".json")]
    file = next((f for f in files if f.exists()), None)
    if file is None:
        raise MeshwrightError(f"{folder} has no {name}.json.gz or {name}.json")
    timeout_s = float(row["timeout_s"]) * time_fraction
    began = time.monotonic()
    command = [sys.executable, "-m", "placement.solver.contest", str(file)]
    child = subprocess.Popen(
        [*command, str(timeout_s), str(seed)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    lines = child.stdout.read().splitlines()
    _, _, usage = os.wait4(child.pid, 0)
    child.returncode = 0
    elapsed_s = time.monotonic() - began
    answer, bound = _parse(lines)
    cost = math.inf
    if answer and elapsed_s <= timeout_s:
        cost = _checked_cost(file, answer)
    return Score(
        instance=name,
        seed=seed,
        timeout_s=timeout_s,
        elapsed_s=elapsed_s,
        memory_bytes=usage.ru_maxrss * 1024,
        cost=cost,
        lower_bound=bound,
        winner=float(row["contest_winner"]),
        best_known=float(row["contest_best"]),
        reference_bound=float(row["lower_bound"] or "-inf"),
        xla=float(row.get("xla_production") or "nan"),
    )


def _parse(lines: list[str]) -> tuple[list[int], float]:
    """The listed strategies and the last bound printed."""
    if not lines or not lines[-1].startswith("["):
        return [], -math.inf
    bounds = [line.split(" bound ")[1].split()[0] for line in lines if " bound " in line]
    return json.loads(lines[-1]), float(bounds[-1]) if bounds else -math.inf


def _checked_cost(file: Path, answer: list[int]) -> float:
    """Cost of an answer recomputed from the file; inf if it is not valid."""
    problem = iopddl.read(file)
    if problem.n_auxiliary or len(answer) != problem.n_nodes:
        return math.inf
    x = np.array(answer)
    if np.any(x < 0) or np.any(x >= problem.n_strategies()) or not problem.is_feasible(x):
        return math.inf
    return problem.cost(x)


def _line(s: Score) -> str:
    return (
        f"{s.instance:8} {s.seed:4} {s.timeout_s:7.1f} {s.elapsed_s:7.1f} "
        f"{s.memory_bytes / 2**30:4.1f} {s.cost:11.0f} {s.cost / s.winner:8.5f} "
        f"{s.score:11.5f} {s.xla / s.cost:10.2f} {100 * s.gap:7.3f}"
    )


def _write(path: Path, scores: list[Score], mean: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(
        {"mean_score": mean, "runs": [dataclasses.asdict(s) for s in scores]}, indent=1
    )
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(temporary, path)
