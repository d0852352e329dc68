"""Jobs that do not fit: which limit binds, and the cheapest change that makes them fit.

Every change is checked by a search of the changed job: a narrower optimizer state, recomputation or
offload where the search was not allowed them, a smaller batch, more devices. Those that fit are ordered
by what they cost, device-seconds of a token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from cost_model.jobs.columns import Jobs
from cost_model.jobs.constants import Constants
from placement.jobs.describe import OPTIMIZER_STATES
from placement.jobs.search import Infeasible, JobPlan, plan_job
from placement.jobs.space import REMAT, Groups

_TIME_S = 2.0
_FACTORS = (2, 4, 8, 16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """A change after which a plan fits."""

    what: str
    """In words that follow "with"."""
    plan: JobPlan
    device_seconds_per_token: float


def changes(
    job: Jobs,
    *,
    constants: Constants | None = None,
    allowed: Callable[[Groups], np.ndarray] | None = None,
    remats: Sequence[str] = tuple(REMAT),
) -> list[Change]:
    """The least change of each kind that makes a job fit, cheapest first.

    Args:
      allowed, remats: what the search that failed was limited to (`placement.jobs.search.plan_job`).
    """
    found = []
    for kind in _changes(job, tuple(remats)):
        for what, changed, policies in kind:
            plan = plan_job(
                changed,
                time_limit_s=_TIME_S,
                constants=constants,
                allowed=allowed,
                remats=policies,
            )
            if isinstance(plan, JobPlan):
                tokens = float(changed.global_batch[0] * changed.seq_len[0])
                cost = plan.step_time_s * float(changed.n_devices[0]) / tokens
                found.append(Change(what=what, plan=plan, device_seconds_per_token=cost))
                break
    return sorted(found, key=lambda change: change.device_seconds_per_token)


def cheapest_change(job: Jobs, failed: Infeasible, constants: Constants | None = None) -> str:
    """A sentence: which limit binds, and what would make the job fit, cheapest first."""
    return sentence(failed, changes(job, constants=constants))


def sentence(failed: Infeasible, found: Sequence[Change]) -> str:
    """The limit that binds and the changes in words."""
    if np.isfinite(failed.least_bytes):
        need = f"{failed.least_bytes / 2**30:.1f} GiB of {failed.capacity_bytes / 2**30:.1f} GiB"
        start = f"no plan fits: the least takes {need}, most of it {failed.binding}"
    else:
        start = f"no plan fits: {failed.binding}"
    if not found:
        return (
            f"{start}; neither {_FACTORS[-1]} times the devices nor a smaller batch would make it "
            "fit, use a smaller model or a device with more memory"
        )
    words = [
        f"{c.what} ({c.plan.step_time_s:.4g} s a step, "
        f"{c.device_seconds_per_token:.3g} device-seconds a token)"
        for c in found
    ]
    also = f"; or with {', or with '.join(words[1:])}" if words[1:] else ""
    return f"{start}; it fits with {words[0]}{also}"


_Candidate = tuple[str, Jobs, tuple[str, ...]]


def _changes(job: Jobs, remats: tuple[str, ...]) -> Iterator[list[_Candidate]]:
    """Changes of each kind, least first."""
    batch, devices = float(job.global_batch[0]), float(job.n_devices[0])
    more = [name for name in REMAT if name not in remats]
    plain = [name for name in more if "offload" not in name]
    yield [("more rematerialisation", job, (*remats, *plain))] if plain else []
    if len(plain) < len(more) and job.device.host_bytes_per_s[0] > 0:
        yield [("activations offloaded to host memory", job, tuple(REMAT))]
    master = float(job.master_bytes[0])
    yield [
        (f"{name} optimizer state", job.replace(master_bytes=master - saved), remats)
        for name, saved in OPTIMIZER_STATES.items()
        if 0 < saved < master and master - saved >= float(4 - job.weight_bytes[0])
    ]
    yield [
        (
            f"a global batch of {batch / factor:g} sequences",
            job.replace(global_batch=batch / factor),
            remats,
        )
        for factor in _FACTORS
        if batch % factor == 0
    ]
    yield [(f"{devices * f:g} devices", _grown(job, devices * f), remats) for f in _FACTORS]


def _grown(job: Jobs, devices: float) -> Jobs:
    """The job on more devices, and on as many slices as the largest slice forces."""
    forced = np.ceil(devices / job.device.domain)
    slices = np.where(job.device.links > 0, np.maximum(job.n_slices, forced), job.n_slices)
    return job.replace(n_devices=devices, n_slices=slices)
