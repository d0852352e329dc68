"""Plans of one step in several variants: the best of them, with what they say together."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from placement.plan import Plan

_MESHES = 2
"""Meshes of one variant's plan on which others are tried."""


def fits(plan: Plan) -> bool:
    """Whether a plan is one that can run."""
    return plan.status in ("feasible", "time_limit")


@dataclasses.dataclass(kw_only=True)
class Trials:
    """Plans by the variant that they are of."""

    deadline: float
    """time.monotonic() by which all has to be planned."""
    objective: str = "time"
    """What the best one has least of."""
    plans: list[Plan] = dataclasses.field(default_factory=list)
    labels: list[str] = dataclasses.field(default_factory=list)
    """One of each plan, what its variant is called."""

    def add(self, label: str, plan: Plan) -> Plan:
        """Keep a plan; it is given back."""
        self.plans.append(plan)
        self.labels.append(label)
        return plan

    def slice(self, share: float) -> float:
        """Seconds that a share of what is left comes to."""
        return share * max(0.1, self.deadline - time.monotonic())

    def over(self) -> bool:
        """Whether the time is spent."""
        return time.monotonic() >= self.deadline

    def best(self) -> Plan:
        """The best by the objective that fits, or the one that takes the least memory."""
        return min(self.plans, key=lambda p: (not fits(p), self._score(p)))

    def _score(self, plan: Plan) -> float:
        found = plan.estimate
        if self.objective == "memory" or not fits(plan):
            return found.peak_memory_bytes
        if self.objective in ("energy", "carbon") and found.energy_j is not None:
            return found.energy_j
        return found.step_time_s

    def together(self, best: Plan, start: float) -> Plan:
        """``best`` with the bound, the evaluations and the alternatives of all of them.

        ``start``: time.monotonic() when planning began.
        """
        bound = min(p.lower_bound_s for p in self.plans)
        return dataclasses.replace(
            best,
            lower_bound_s=bound,
            reasons=(*best.reasons, *_gap(best, bound)),
            planning_time_s=time.monotonic() - start,
            evaluations=sum(p.evaluations for p in self.plans),
            alternatives=self._alternatives(),
        )

    def _alternatives(self) -> tuple[dict[str, Any], ...]:
        rows = [
            {
                "mesh_shape": p.mesh_shape,
                "optimizer": f"{p.optimizer}, {label}",
                "step_time_s": p.estimate.step_time_s,
                "memory_bytes": p.estimate.peak_memory_bytes,
                "fits": fits(p),
            }
            for label, p in zip(self.labels, self.plans, strict=True)
        ]
        return tuple(sorted(rows, key=lambda r: (not r["fits"], r["step_time_s"])))


def best_meshes(plan: Plan) -> list[dict[str, int]]:
    """The mesh of a plan and the best other one that it was chosen among."""
    found: list[dict[str, int]] = []
    for other in ({"mesh_shape": plan.mesh_shape}, *plan.alternatives):
        if other["mesh_shape"] not in found:
            found.append(other["mesh_shape"])
    return found[:_MESHES]


def _gap(plan: Plan, bound: float) -> tuple[str, ...]:
    if not fits(plan):
        return ()
    if bound <= 0:
        return ("the search was cut short, so that there is no bound of all programs and meshes.",)
    above = plan.estimate.step_time_s / bound - 1
    return (f"at most {above:.1%} above the bound of all programs and meshes searched.",)
