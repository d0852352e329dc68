"""Trade-offs of a whole job: plans that no other plan beats in time and in memory or energy.

The whole space is scored, a few hundred thousand plans a second. With devices and region given,
carbon is energy times the grid's intensity and money is time times the price, so that their fronts
are those of energy and of time alone.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from cost_model import energy
from cost_model.jobs import constants as constants_module
from cost_model.jobs.columns import Jobs
from cost_model.jobs.constants import Constants
from cost_model.jobs.memory import memory
from cost_model.jobs.step import StepTime, step_time
from graphs.errors import MeshwrightError
from placement.jobs.search import DEGREES
from placement.jobs.space import REMAT, groups, members

AGAINST = ("memory", "energy")
_CHUNK = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One plan of a front."""

    degrees: dict[str, float]
    remat: str
    step_time_s: float
    memory_bytes: float
    energy_j: float
    """of all devices and what surrounds them, without the data centre's overhead; NaN where the
    device's power is not published."""


def step_energy_j(jobs: Jobs, time: StepTime) -> np.ndarray:
    """[J] joules of a step: power by what each device does, over all devices."""
    total = time.step_time_s
    computing = np.clip((time.compute_s + time.remat_s + time.optimizer_s) / total, 0.0, 1.0)
    moving = time.tensor_s + time.context_s + time.expert_s + time.sharded_s + time.gradient_s
    moving = np.clip(moving / total, 0.0, 1.0 - computing)
    idle, busy = energy.activity("idle_share"), energy.activity("compute_share")
    network = energy.activity("network_share")
    power = jobs.device.max_power_w * (idle + (1 - idle) * (busy * computing + network * moving))
    return power * (1 + energy.activity("host_share")) * jobs.n_devices * total


def front(job: Jobs, against: str = "memory", constants: Constants | None = None) -> list[Point]:
    """The plans that are fastest at their memory, or energy, or below; fastest first.

    Raises:
      MeshwrightError: an unknown objective, a device without published power, or no plan that fits.
    """
    if against not in AGAINST:
        raise MeshwrightError(f"no front of time against {against!r}; use {' or '.join(AGAINST)}")
    if against == "energy" and np.isnan(job.device.max_power_w[0]):
        raise MeshwrightError(
            "the device's power is not published, so that energy is unknown; use against=memory"
        )
    chosen = constants or constants_module.load()
    found = groups(job)
    best: list[Point] = []
    for at in range(0, found.n_groups, _CHUNK):
        part = found.take(np.arange(at, min(at + _CHUNK, found.n_groups)))
        for remat in REMAT:
            jobs = members(job, part, remat)
            held = memory(jobs, chosen)
            fits = np.flatnonzero(held.fits)
            if not len(fits):
                continue
            kept = jobs.take(fits)
            time = step_time(kept, chosen)
            joules = step_energy_j(kept, time)
            other = held.peak_bytes[fits] if against == "memory" else joules
            for i in _lower_left(time.step_time_s, other):
                best.append(
                    Point(
                        degrees={name: float(getattr(kept, name)[i]) for name in DEGREES},
                        remat=remat,
                        step_time_s=float(time.step_time_s[i]),
                        memory_bytes=float(held.peak_bytes[fits[i]]),
                        energy_j=float(joules[i]),
                    )
                )
    if not best:
        raise MeshwrightError("no plan of the space fits; search the job to learn what would")
    value = np.array([p.memory_bytes if against == "memory" else p.energy_j for p in best])
    seconds = np.array([p.step_time_s for p in best])
    return [best[i] for i in _lower_left(seconds, value)]


def _lower_left(first: np.ndarray, second: np.ndarray) -> list[int]:
    """Indices of points that none beats in both, in the order of the first."""
    order = np.lexsort((second, first))
    kept, least = [], np.inf
    for i in order:
        if second[i] < least:
            kept.append(int(i))
            least = second[i]
    return kept
