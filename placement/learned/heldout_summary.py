"""What the held-out runs say: ratios to the best plan known, with bootstrap intervals, and targets.

The best plan known of a problem is the fastest fitting one that any run found; ``engine`` opens
every candidate, so it is never worse than the best near-optimal completion of the whole space. A
run's *ratio* at a budget is its best step time over that; a run that has nothing fitting by then
counts as TEN, and the share of runs that have something is given beside. Means are geometric, over
the seeds of a problem first, then over problems; intervals are the 2.5 and 97.5 percentiles of
RESAMPLES resamplings of problems, and within each of seeds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from placement.learned.anytime import Curve

TEN = 10.0
"""Ratio of a run without a fitting plan."""
RESAMPLES = 2000
WITHIN = 1.02
"""A plan this close to the best known one counts as having reached it."""

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mean:
    """A geometric mean of ratios."""

    value: float
    low: float
    high: float
    found: float
    """Share of runs that have a fitting plan."""
    problems: int


class Runs:
    """All runs of a suite, by problem and optimizer."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = [r for r in rows if "curve" in r]
        self.bounds = {r["problem"]: r["bound_s"] for r in rows if r.get("bound_s") is not None}
        self.traced_s = {r["problem"]: float(r["traced_s"]) for r in self.rows if "traced_s" in r}
        self.split_of = {r["problem"]: r["split"] for r in self.rows}
        self.devices_of = {r["problem"]: int(r["n_devices"]) for r in self.rows}
        self.candidates_of = {r["problem"]: int(r["candidates"]) for r in self.rows}
        self.best: dict[str, float] = {}
        self._curves: dict[tuple[str, str], list[Curve]] = {}
        for r in self.rows:
            curve = r["curve"]
            self._curves.setdefault((r["problem"], r["optimizer"]), []).append(curve)
            if curve.step_time_s:
                known = self.best.get(r["problem"], math.inf)
                self.best[r["problem"]] = min(known, curve.step_time_s[-1])
        self.problems = [p for p in sorted(self.split_of) if p in self.best]
        self.optimizers = sorted({r["optimizer"] for r in self.rows})
        self.splits = [s for s in _SPLITS if s in set(self.split_of.values())]

    def curves(self, problem: str, optimizer: str) -> list[Curve]:
        return self._curves.get((problem, optimizer), [])

    def deep_enough(self, problem: str, optimizer: str, evaluations: int) -> list[Curve]:
        """Curves that were given so many evaluations, or ended because nothing was left to do."""
        rows = [r for r in self.rows if (r["problem"], r["optimizer"]) == (problem, optimizer)]
        limits = [(r["max_evaluations"], r.get("time_limit_s", math.inf)) for r in rows]
        return [
            c
            for c, (budget, limit_s) in zip(self.curves(problem, optimizer), limits)
            if c.total_evaluations >= evaluations
            or (c.total_evaluations < budget and c.total_seconds < limit_s)
        ]

    def of_split(self, split: str | None) -> list[str]:
        return [p for p in self.problems if split is None or self.split_of[p] == split]

    def logs(self, problem: str, optimizer: str, at: Callable[[Curve], float]) -> np.ndarray:
        """[seeds] logs of ratios to the best known plan."""
        best = self.best[problem]
        times = np.array([at(c) for c in self.curves(problem, optimizer)])
        return np.log(np.where(np.isfinite(times), times / best, TEN))


_SPLITS = ("validation", "heldout_family", "heldout_device", "heldout_scale")


def mean_ratio(
    runs: Runs, optimizer: str, at: Callable[[Curve], float], problems: Sequence[str]
) -> Mean | None:
    """Geometric mean of an optimizer's ratios; None where it has no runs on some problem."""
    logs = [runs.logs(p, optimizer, at) for p in problems]
    if not logs or any(len(x) == 0 for x in logs):
        return None
    found = [
        float(np.isfinite([at(c) for c in runs.curves(p, optimizer)]).mean()) for p in problems
    ]
    low, high = _interval(logs)
    value = float(np.exp(np.mean([x.mean() for x in logs])))
    return Mean(value=value, low=low, high=high, found=float(np.mean(found)), problems=len(logs))


def mean_against(
    runs: Runs,
    optimizer: str,
    at: Callable[[Curve], float],
    reference: Callable[[str], float],
    problems: Sequence[str],
) -> Mean | None:
    """Geometric mean of an optimizer's step times over a log reference of each problem."""
    logs = [runs.logs(p, optimizer, at) for p in problems]
    if not logs or any(len(x) == 0 for x in logs):
        return None
    logs = [x - reference(p) for x, p in zip(logs, problems)]
    low, high = _interval(logs)
    value = float(np.exp(np.mean([x.mean() for x in logs])))
    return Mean(value=value, low=low, high=high, found=1.0, problems=len(logs))


def best_of(
    runs: Runs, optimizers: Sequence[str], at: Callable[[Curve], float]
) -> Callable[[str], float]:
    """problem -> mean log ratio of the optimizer that is best on it."""

    def reference(problem: str) -> float:
        means = [runs.logs(problem, o, at) for o in optimizers]
        return min((float(x.mean()) for x in means if len(x)), default=math.nan)

    return reference


def evaluations_to_near(runs: Runs, optimizer: str, problem: str) -> float:
    """Median over seeds of evaluations until within WITHIN of the best known plan; inf if never."""
    limit = WITHIN * runs.best[problem]
    found = [c.evaluations_to(limit) for c in runs.curves(problem, optimizer)]
    return float(np.median(found)) if found else math.inf


def _interval(logs: Sequence[np.ndarray]) -> tuple[float, float]:
    """Percentiles of the geometric mean under resampled problems and seeds."""
    rng = np.random.default_rng(0)
    n = len(logs)
    means = np.zeros(RESAMPLES)
    # [resamples, problems] mean of resampled seeds of each problem
    drawn = np.stack(
        [x[rng.integers(0, len(x), (RESAMPLES, len(x)))].mean(axis=1) for x in logs], axis=1
    )
    pick = rng.integers(0, n, (RESAMPLES, n))
    means = np.take_along_axis(drawn, pick, axis=1).mean(axis=1)
    return float(np.exp(np.percentile(means, 2.5))), float(np.exp(np.percentile(means, 97.5)))
