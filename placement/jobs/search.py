"""The fastest plan of a whole job that fits, with a bound on the whole space.

Groups (`space`) are scored with nothing recomputed and nothing offloaded: recomputation, offload,
and a short allocator only add time, so that this is a lower bound of every member. With everything
recomputed and offloaded a group takes its least memory. Groups that do not fit at their least are
dropped; the rest are opened in the order of their bounds until the next bound is no better than the
best plan found: no plan of the space is then faster, and the bound equals the plan. Where time runs
out first, the bound is the least of the plan and the unopened groups.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import numpy as np

from cost_model.jobs import constants as constants_module
from cost_model.jobs.columns import CONTEXT_FORMS, SCHEDULES, Jobs
from cost_model.jobs.constants import Constants
from cost_model.jobs.memory import memory
from cost_model.jobs.step import step_time
from graphs.errors import MeshwrightError
from placement.jobs.space import REMAT, Groups, groups, members

DEGREES = (
    "dp fsdp zero_stage tp sp pp vpp cp context_form ep micro_batch schedule first_layers last_layers"
).split()
"""Columns of a job that a search decides, rematerialisation and offload apart."""
_CHUNK = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobPlan:
    """A whole job's plan."""

    degrees: dict[str, float]
    """dp, fsdp, zero_stage, tp, sp, pp, vpp, cp, context_form, ep, micro_batch, schedule, first_layers,
    last_layers: `cost_model.jobs.columns.Jobs`."""
    remat: str
    """a policy of `space.REMAT`, or "as given" for the configuration the search started from."""
    step_time_s: float
    memory_bytes: float
    capacity_bytes: float
    lower_bound_s: float
    """no plan of the space is faster under the cost model."""
    evaluations: int
    planning_time_s: float
    job: Jobs
    """the plan as a table of one job."""

    @property
    def schedule(self) -> str:
        """Name of the pipeline's schedule, empty without stages."""
        if self.degrees["pp"] <= 1:
            return ""
        name = SCHEDULES[int(self.degrees["schedule"])]
        return "interleaved" if self.degrees["vpp"] > 1 else name

    @property
    def context(self) -> str:
        """How keys and values of a split sequence meet the queries; empty where none is split."""
        if self.degrees.get("cp", 1) <= 1:
            return ""
        return CONTEXT_FORMS[int(self.degrees["context_form"])]

    @property
    def gap(self) -> float:
        """Relative distance of the plan to the bound."""
        return self.step_time_s / self.lower_bound_s - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Infeasible:
    """No plan of the space fits."""

    least_bytes: float
    capacity_bytes: float
    binding: str
    """what fills the device in the plan that takes least: states, activations or working set."""
    evaluations: int
    planning_time_s: float


def plan_job(
    job: Jobs,
    *,
    time_limit_s: float = 10.0,
    given: Jobs | None = None,
    given_ran: bool = False,
    constants: Constants | None = None,
    allowed: Callable[[Groups], np.ndarray] | None = None,
    remats: Sequence[str] = tuple(REMAT),
) -> JobPlan | Infeasible:
    """Search the space of one job.

    Args:
      job: a table of one row: model, batch, devices, number types and software.
      time_limit_s: when to stop opening groups.
      given: a configuration that is in the space whatever its degrees, such as an expert's.
      given_ran: it is known to fit because it was run.
      allowed: which groups may be chosen, a mask over them; all where None.
      remats: the policies of `space.REMAT` that may be chosen.
    """
    start = time.monotonic()
    chosen = constants or constants_module.load()
    if job.n_jobs != 1:
        raise MeshwrightError(f"a search takes one job, not {job.n_jobs}; give a table of one row")
    found = groups(job)
    if allowed is not None and found.n_groups:
        found = found.take(np.flatnonzero(allowed(found)))
    state = _Search(
        job=job, constants=chosen, start=start, time_limit_s=time_limit_s, remats=tuple(remats)
    )
    if given is not None:
        state.consider(given, "as given", known_to_fit=given_ran)
    if found.n_groups:
        state.run(found)
    return state.result()


class _Search:
    """Best plan so far and the bound of what is unopened."""

    def __init__(
        self,
        *,
        job: Jobs,
        constants: Constants,
        start: float,
        time_limit_s: float,
        remats: tuple[str, ...],
    ):
        self.job, self.constants, self.remats = job, constants, remats
        self.start, self.time_limit_s = start, time_limit_s
        self.evaluations = 0
        self.best_s, self.best = np.inf, None
        self.least: tuple[float, Jobs | None] = (np.inf, None)
        self.open_bound_s = np.inf

    def run(self, found: Groups) -> None:
        bound = np.full(found.n_groups, np.inf)
        hosted = self.job.device.host_bytes_per_s[0] > 0 and "full, offloaded" in self.remats
        full = "full, offloaded" if hosted else "full"
        for at in range(0, found.n_groups, _CHUNK):
            part = np.arange(at, min(at + _CHUNK, found.n_groups))
            lean = members(self.job, found.take(part), full)
            held = memory(lean, self.constants)
            self.evaluations += len(part)
            peak = held.peak_bytes
            low = int(np.argmin(peak))
            if peak[low] < self.least[0]:
                self.least = (float(peak[low]), lean.take(np.array([low])))
            fits = held.fits
            if fits.any():
                eager = members(self.job, found.take(part[fits]), "none")
                bound[part[fits]] = self._time(eager.replace(caching_allocator=0.0))
        order = np.argsort(bound)
        order = order[np.isfinite(bound[order])]
        size = 256
        for at in range(0, len(order), size):
            part = order[at : at + size]
            if bound[part[0]] >= self.best_s:
                return
            # the most promising groups are opened always: what fits at its least is in them
            if at and time.monotonic() - self.start > self.time_limit_s:
                self.open_bound_s = float(bound[part[0]])
                return
            part = part[bound[part] < self.best_s]
            for remat in self.remats:
                self.consider(members(self.job, found.take(part), remat), remat)

    def consider(self, jobs: Jobs, remat: str, known_to_fit: bool = False) -> None:
        held = memory(jobs, self.constants)
        fits = np.flatnonzero(held.fits | known_to_fit)
        self.evaluations += jobs.n_jobs
        if not len(fits):
            return
        kept = jobs.take(fits)
        seconds = self._time(kept)
        low = int(np.argmin(seconds))
        if seconds[low] < self.best_s:
            self.best_s = float(seconds[low])
            self.best = (kept.take(np.array([low])), remat, float(held.peak_bytes[fits[low]]))

    def _time(self, jobs: Jobs) -> np.ndarray:
        return step_time(jobs, self.constants).step_time_s

    def result(self) -> JobPlan | Infeasible:
        spent = time.monotonic() - self.start
        capacity = float(self.job.device.hbm_bytes[0])
        if self.best is None:
            return Infeasible(
                least_bytes=self.least[0],
                capacity_bytes=capacity,
                binding=_binding(self.least[1], self.constants),
                evaluations=self.evaluations,
                planning_time_s=spent,
            )
        job, remat, peak = self.best
        return JobPlan(
            degrees={name: float(getattr(job, name)[0]) for name in DEGREES},
            remat=remat,
            step_time_s=self.best_s,
            memory_bytes=peak,
            capacity_bytes=capacity,
            lower_bound_s=min(self.best_s, self.open_bound_s),
            evaluations=self.evaluations,
            planning_time_s=spent,
            job=job,
        )


def _binding(job: Jobs | None, constants: Constants) -> str:
    if job is None:
        return "no degrees divide the devices, the batch and the model"
    held = memory(job, constants)
    parts = {
        "weights, gradients and optimizer state": float(held.states_bytes[0]),
        "saved activations": float(held.activations_bytes[0]),
        "the working set of one layer and the logits": float(
            held.peak_bytes[0] - held.states_bytes[0] - held.activations_bytes[0]
        ),
    }
    return max(parts, key=lambda name: parts[name])
