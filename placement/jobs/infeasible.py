"""The cheapest change that would make a job fit, each one checked by a search."""

from __future__ import annotations

from cost_model.jobs.columns import Jobs
from cost_model.jobs.constants import Constants
from placement.jobs.search import Infeasible, JobPlan, plan_job

_TIME_S = 4.0


def cheapest_change(job: Jobs, failed: Infeasible, constants: Constants | None = None) -> str:
    """A sentence: which limit binds and what would make the job fit.

    The changes are tried in the order of what they cost: 16-bit optimizer moments, a smaller batch,
    then two, four and eight times the devices. The first that a search confirms is named.
    """
    need = f"{failed.least_bytes / 2**30:.1f} GiB of {failed.capacity_bytes / 2**30:.1f} GiB"
    sentence = f"no plan fits: the least takes {need}, most of it {failed.binding}"
    for what, changed in _changes(job):
        found = plan_job(changed, time_limit_s=_TIME_S, constants=constants)
        if isinstance(found, JobPlan):
            return f"{sentence}; with {what} a plan of {found.step_time_s:.4g} s fits"
    return f"{sentence}; neither 8 times the devices nor a smaller batch would make it fit"


def _changes(job: Jobs) -> list[tuple[str, Jobs]]:
    master = float(job.master_bytes[0])
    batch, devices = float(job.global_batch[0]), float(job.n_devices[0])
    changes = []
    if master > 6:
        lean = job.replace(master_bytes=master - 4)
        changes.append(("16-bit optimizer moments", lean))
    changes.extend(
        (
            f"a global batch of {batch / factor:g} sequences",
            job.replace(global_batch=batch / factor),
        )
        for factor in (2, 4, 8)
        if batch % factor == 0 and batch / factor >= 1
    )
    changes.extend(
        (f"{devices * factor:g} devices", job.replace(n_devices=devices * factor))
        for factor in (2, 4, 8)
    )
    return changes
