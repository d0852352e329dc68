"""Predictions of rows of a runs file, and of any columns of jobs."""

from __future__ import annotations

import dataclasses
import typing

import numpy as np

from cost_model.jobs import bands as bands_module
from cost_model.jobs import constants as constants_module
from cost_model.jobs.bands import Bands
from cost_model.jobs.columns import Jobs
from cost_model.jobs.constants import Constants
from cost_model.jobs.memory import Memory, memory
from cost_model.jobs.runs import Run, jobs_of
from cost_model.jobs.step import StepTime, step_time


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobEstimate:
    """Arrays [J]."""

    time: StepTime
    p10_s: np.ndarray
    p90_s: np.ndarray
    memory: Memory

    @property
    def step_time_s(self) -> np.ndarray:
        return self.time.step_time_s


def estimate(
    jobs: Jobs, constants: Constants | None = None, bands: Bands | None = None
) -> JobEstimate:
    """Step time with its band, and memory, of J jobs."""
    chosen = constants or constants_module.load()
    time = step_time(jobs, chosen)
    low, high = (bands or bands_module.load()).of(jobs)
    return JobEstimate(
        time=time,
        p10_s=time.step_time_s * low,
        p90_s=time.step_time_s * high,
        memory=memory(jobs, chosen),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """One row of a runs file beside its prediction; None where there is none."""

    run: Run
    step_time_s: float | None
    p10_s: float | None
    p90_s: float | None
    memory_gb: float | None
    """GiB of the fullest device; live states and activations only where the source computed that
    figure itself."""
    capacity_gb: float | None
    kind: str
    note: str = ""
    """what was assumed for the prediction beyond the run's own reason."""

    @property
    def reason(self) -> str:
        """Why there is no prediction, or what was assumed for it."""
        if not self.note:
            return self.run.reason
        return f"{self.run.reason}, {self.note}" if self.run.reason else f"assumed: {self.note}"


_HEAVIER = {
    "pointwise work": ("pointwise",),
    "MLPs": ("up", "pointwise"),
    "everything": ("core", "qkv", "out", "up", "down", "pointwise"),
}
"""What is recomputed where a silent row does not fit, least first."""


def settled(rows: typing.Sequence[Run], constants: Constants) -> tuple[Jobs, list[str]]:
    """The jobs of rows with a record, and what they were taken to recompute beyond their default.

    A published run fits. Where its source does not state the recomputation and the software's
    default is predicted not to fit, as little more is recomputed as makes it fit.
    """
    kept = [run for run in rows if run.record is not None]
    jobs = jobs_of(kept)
    silent = np.array([not run.remat_stated and not run.out_of_memory for run in kept], bool)
    assumed = [""] * len(kept)
    for name, parts in _HEAVIER.items():
        open_ = silent & ~memory(jobs, constants).fits
        shares = {f"remat_{p}": np.where(open_, 1.0, getattr(jobs, f"remat_{p}")) for p in parts}
        if "down" in parts:
            shares["remat_down"] = np.where(
                open_ & (jobs.skips_last > 0), 0.0, shares["remat_down"]
            )
        jobs = jobs.replace(**shares)
        assumed = [name if o else old for o, old in zip(open_, assumed)]
    return jobs, assumed


def predict_runs(
    rows: typing.Sequence[Run], constants: Constants | None = None, bands: Bands | None = None
) -> list[Prediction]:
    """A prediction for every row, in order."""
    kept = [run for run in rows if run.record is not None]
    if kept:
        chosen = constants or constants_module.load()
        jobs, heavy = settled(kept, chosen)
        result = estimate(jobs, chosen, bands)
        kind = bands_module.kinds(jobs)
    found: dict[int, Prediction] = {}
    for index, run in enumerate(kept):
        peak = result.memory.peak_bytes[index]
        if run.analytic:
            peak = result.memory.states_bytes[index] + result.memory.activations_bytes[index]
        found[id(run)] = Prediction(
            run=run,
            step_time_s=float(result.step_time_s[index]),
            p10_s=float(result.p10_s[index]),
            p90_s=float(result.p90_s[index]),
            memory_gb=float(peak) / 2**30,
            capacity_gb=float(result.memory.capacity_bytes[index]) / 2**30,
            kind=kind[index],
            note=f"recomputes {heavy[index]}, the default would not fit" if heavy[index] else "",
        )
    return [found.get(id(run)) or _unpredicted(run) for run in rows]


def _unpredicted(run: Run) -> Prediction:
    return Prediction(
        run=run,
        step_time_s=None,
        p10_s=None,
        p90_s=None,
        memory_gb=None,
        capacity_gb=None,
        kind="",
    )
