"""Why a whole-job plan is as it is: where its seconds go, what the nearest changes would cost."""

from __future__ import annotations

import dataclasses

import numpy as np

from cost_model.jobs import constants as constants_module
from cost_model.jobs.columns import CONTEXT_FORMS
from cost_model.jobs.constants import Constants
from cost_model.jobs.memory import memory
from cost_model.jobs.step import StepTime, step_time
from placement.jobs.search import JobPlan
from placement.jobs.space import REMAT, Groups, groups, members

_WORDS = {
    "compute_s": "computation",
    "remat_s": "recomputation",
    "tensor_s": "tensor-parallel collectives",
    "context_s": "keys and values of other devices",
    "expert_s": "expert all-to-all",
    "sharded_s": "gathers and reductions of sharded weights",
    "gradient_s": "gradient reduction",
    "bubble_s": "pipeline bubble, imbalance and sends",
    "optimizer_s": "optimizer",
    "host_s": "waiting for the host",
    "offload_s": "host offload",
    "spread_s": "waiting for the slowest node",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Neighbour:
    """The best plan that differs in one degree."""

    change: str
    step_time_s: float | None
    """None where no plan with that degree fits."""


def breakdown(plan: JobPlan, constants: Constants | None = None) -> dict[str, float]:
    """Seconds of the step by what they are spent on, largest first; they sum to the step."""
    time = step_time(plan.job, constants or constants_module.load())
    names = [f.name for f in dataclasses.fields(StepTime) if f.name != "step_time_s"]
    parts = {_WORDS[name]: float(getattr(time, name)[0]) for name in names}
    return dict(sorted(parts.items(), key=lambda item: -item[1]))


def neighbours(plan: JobPlan, constants: Constants | None = None) -> list[Neighbour]:
    """For each degree, the fastest plan of the space with the next smaller and the next larger
    value of it, all else free."""
    chosen = constants or constants_module.load()
    space = groups(plan.job)
    found = []
    for name in ("tp", "pp", "cp", "context_form", "ep", "vpp", "micro_batch", "zero_stage"):
        if name == "context_form" and not plan.context:
            continue
        values = np.unique(getattr(space, name))
        here = plan.degrees[name]
        near = [*values[values < here][-1:], *values[values > here][:1]]
        for value in near:
            part = space.take(np.flatnonzero(getattr(space, name) == value))
            change = f"{name} {value:g}"
            if name == "context_form":
                change = f"keys and values {CONTEXT_FORMS[int(value)]}"
            found.append(Neighbour(change=change, step_time_s=_fastest(plan, part, chosen)))
    return found


def explain(plan: JobPlan, constants: Constants | None = None) -> str:
    """The plan in words: degrees, where the time goes, what the next best choices would cost."""
    hidden = ("schedule", "first_layers", "last_layers", "context_form")
    degrees = ", ".join(f"{k} {v:g}" for k, v in plan.degrees.items() if k not in hidden)
    if plan.schedule:
        degrees += f", {plan.schedule}"
    if plan.context in ("ring", "gathered"):
        degrees += f", keys and values {'in a ring' if plan.context == 'ring' else 'gathered'}"
    if plan.degrees["first_layers"] >= 0:
        degrees += (
            f" with {plan.degrees['first_layers']:g} layers on the first stage and "
            f"{plan.degrees['last_layers']:g} on the last"
        )
    lines = [
        f"{plan.step_time_s:.4g} s a step, at most {plan.gap:.1%} above the bound of the space; "
        f"{plan.memory_bytes / 2**30:.1f} of {plan.capacity_bytes / 2**30:.1f} GiB",
        f"{degrees}; recomputed: {plan.remat}",
    ]
    lines += [
        f"  {seconds:9.4g} s  {100 * seconds / plan.step_time_s:5.1f} %  {name}"
        for name, seconds in breakdown(plan, constants).items()
        if seconds > 0.001 * plan.step_time_s
    ]
    for item in neighbours(plan, constants):
        if item.step_time_s is None:
            lines.append(f"  with {item.change} nothing fits")
        else:
            lines.append(
                f"  with {item.change} the best is {item.step_time_s:.4g} s, "
                f"{item.step_time_s / plan.step_time_s - 1:+.1%}"
            )
    return "\n".join(lines)


def _fastest(plan: JobPlan, part: Groups, constants: Constants) -> float | None:
    best = np.inf
    for remat in REMAT:
        jobs = members(plan.job, part, remat)
        fits = memory(jobs, constants).fits
        if fits.any():
            seconds = step_time(jobs.take(np.flatnonzero(fits)), constants).step_time_s
            best = min(best, float(seconds.min()))
    return best if np.isfinite(best) else None
