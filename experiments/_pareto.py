"""Plans of one step for every objective, and those of them that no other beats in everything."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from graphs.errors import MeshwrightError

MEASURES = ("step_time_s", "peak_memory_bytes", "energy_j", "carbon_g", "cost_usd")
UNITS = {"peak_memory_bytes": "bytes", "energy_j": "J", "carbon_g": "g CO2e", "cost_usd": "USD"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One plan and what it costs by every measure; None where the device publishes no power or
    price."""

    objective: str
    plan: Any
    measures: dict[str, float | None]


def front(plan_for: Callable[[str], Any], cluster: Any, region: Any) -> list[Point]:
    """The plans of all objectives that are not dominated, the fastest first."""
    from placement.api import OBJECTIVES

    points = []
    for objective in OBJECTIVES:
        plan = plan_for(objective)
        points.append(
            Point(objective=objective, plan=plan, measures=measures_of(plan, cluster, region))
        )
    kept = undominated([tuple(p.measures[m] for m in MEASURES) for p in points])
    return sorted((points[i] for i in kept), key=lambda p: p.measures["step_time_s"] or 0.0)


def measures_of(plan: Any, cluster: Any, region: Any) -> dict[str, float | None]:
    """Step time, memory, and one step's energy, carbon and money."""
    estimate = plan.estimate
    measured: dict[str, float | None] = dict.fromkeys(MEASURES)
    measured["step_time_s"] = estimate.step_time_s
    measured["peak_memory_bytes"] = estimate.peak_memory_bytes
    used = energy_of(plan, cluster, region)
    if used is not None:
        measured |= {
            "energy_j": used.energy_j,
            "carbon_g": used.carbon_g,
            "cost_usd": used.cost_usd,
        }
    return measured


def energy_of(plan: Any, cluster: Any, region: Any) -> Any:
    """One step's cost_model.energy.Energy, or None where the device's power is not published."""
    from cost_model.energy import step_energy

    estimate = plan.estimate
    if not estimate.step_time_s:
        return None
    try:
        return step_energy(
            cluster.device,
            n_devices=cluster.n_devices,
            step_time_s=estimate.step_time_s,
            compute_time_s=estimate.compute_time_s,
            network_time_s=estimate.exposed_comm_time_s,
            region=region,
        )
    except MeshwrightError:
        # The one error here is a power that nobody has published: the measure does not exist.
        return None


def undominated(rows: Sequence[tuple[float | None, ...]]) -> list[int]:
    """Indices of rows that no other row equals or beats everywhere and beats somewhere; of equal
    rows the first."""
    kept = []
    for i, row in enumerate(rows):
        beaten = False
        for j, other in enumerate(rows):
            pairs = [(a, b) for a, b in zip(row, other) if a is not None and b is not None]
            no_worse = all(b <= a for a, b in pairs)
            better = any(b < a for a, b in pairs)
            beaten = beaten or (i != j and no_worse and (better or j < i))
        if not beaten:
            kept.append(i)
    return kept
