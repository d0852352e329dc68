"""A plan in words and tables for the terminal, and the same as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from placement.experiments._arguments import write_text
from placement.report import words


def mesh_words(shape: dict[str, int]) -> str:
    used = {name: size for name, size in shape.items() if size > 1}
    return " × ".join(f"{name} {size}" for name, size in used.items()) or "one device"


def console() -> Any:
    """A console that does not fold tables where no terminal limits their width."""
    from rich.console import Console

    terminal = Console(soft_wrap=True, highlight=False)
    return terminal if terminal.is_terminal else Console(highlight=False, width=140)


def row_of(name: str, plan: Any, cluster: Any) -> dict[str, Any]:
    """One plan as plain numbers: what the table and the JSON file both show."""
    estimate = plan.estimate
    return {
        "name": name,
        "status": "feasible" if plan.status in ("feasible", "time_limit") else plan.status,
        "mesh": dict(plan.mesh_shape),
        "step_time_s": None if estimate is None else estimate.step_time_s,
        "p10_s": getattr(estimate, "p10_s", None),
        "p90_s": getattr(estimate, "p90_s", None),
        "peak_memory_bytes": None if estimate is None else estimate.peak_memory_bytes,
        "capacity_bytes": cluster.device.hbm_capacity_bytes,
        "planning_time_s": plan.planning_time_s,
    }


def comparison_table(rows: list[dict[str, Any]]) -> Any:
    """The first row is the plan; the rest are measured against it."""
    from rich.table import Table

    mine = rows[0]["step_time_s"]
    table = Table(title="the plan beside every hand-tuned baseline", title_justify="left")
    table.add_column("plan", no_wrap=True)
    for head in ("step time", "× the plan", "memory", "of capacity"):
        table.add_column(head, justify="right")
    table.add_column("mesh")
    table.add_column("status")
    for i, row in enumerate(rows):
        time_s, peak = row["step_time_s"], row["peak_memory_bytes"]
        table.add_row(
            row["name"],
            words.seconds(time_s),
            f"{time_s / mine:.2f}" if time_s and mine else "–",
            words.memory(peak),
            words.share(peak, row["capacity_bytes"]) if peak else "–",
            mesh_words(row["mesh"]),
            row["status"] if row["status"] == "feasible" else "does not fit",
            style="bold" if i == 0 else None,
        )
    return table


def plan_lines(plan: Any, title: str, cluster: Any, tokens: int | None) -> Iterator[str]:
    """What a newcomer wants to read first, a line each."""
    estimate, capacity_bytes = plan.estimate, cluster.device.hbm_capacity_bytes
    mesh = mesh_words(dict(plan.mesh_shape))
    yield f"{title} on {cluster.notation}: {mesh} ({plan.status})"
    yield (
        f"  step time   {words.seconds(estimate.step_time_s)} predicted: "
        f"{words.seconds(estimate.compute_time_s)} computing, "
        f"{words.seconds(estimate.exposed_comm_time_s)} waiting for the network"
    )
    if tokens and estimate.step_time_s:
        yield f"  throughput  {tokens / estimate.step_time_s:,.0f} tokens per second"
    yield (
        f"  memory      {words.memory(estimate.peak_memory_bytes)} of "
        f"{words.memory(capacity_bytes)} on each device "
        f"({words.share(estimate.peak_memory_bytes, capacity_bytes)})"
    )
    if plan.checkpoint_policy:
        yield f"  checkpoint  jax.checkpoint_policies.{plan.checkpoint_policy}"
    if 0.0 < plan.lower_bound_s < float("inf"):
        gap = estimate.step_time_s / plan.lower_bound_s - 1
        yield (
            f"  optimality  no plan is faster than {words.seconds(plan.lower_bound_s)} under the "
            f"cost model, so this one is within {100 * gap:.1f} % of the best"
        )
    yield (
        f"  planning    {words.seconds(plan.planning_time_s)}, {plan.evaluations:,} plans scored"
    )
    for warning in plan.warnings:
        yield f"  warning: {warning}"


def energy_line(used: Any, region: str) -> str:
    """One step's energy, carbon and list price."""
    said = f"  energy      {words.quantity(used.energy_j, 'J')} a step"
    said += f", {words.quantity(used.carbon_g, 'g')} CO2e in {region.replace('_', ' ')}"
    return said if used.cost_usd is None else f"{said}, {used.cost_usd:.4f} USD at list price"


def front_row(point: Any) -> dict[str, Any]:
    return {
        "objective": point.objective,
        "mesh": dict(point.plan.mesh_shape),
        **point.measures,
    }


def front_table(front: list[Any]) -> Any:
    """The plans that no other beats in everything."""
    from rich.table import Table

    table = Table(title="plans that no other beats in everything", title_justify="left")
    table.add_column("objective", no_wrap=True)
    for head in ("step time", "memory", "energy", "CO2e", "USD"):
        table.add_column(head, justify="right")
    table.add_column("mesh")
    for point in front:
        m = point.measures
        table.add_row(
            point.objective,
            words.seconds(m["step_time_s"]),
            words.memory(m["peak_memory_bytes"]),
            words.quantity(m["energy_j"], "J"),
            words.quantity(m["carbon_g"], "g"),
            words.quantity(m["cost_usd"], ""),
            mesh_words(dict(point.plan.mesh_shape)),
        )
    return table


def verification_table(verification: Any) -> Any:
    """What was predicted beside what the compiler says."""
    from rich.table import Table

    whole = verification.kernels > 0
    verdict = f"the plan {'compiles and ' if whole else ''}fits"
    if verification.status != "ok":
        verdict = f"{verification.status}: {verification.message}"
    elif not verification.fits:
        room = words.quantity(verification.capacity_bytes, "bytes")
        verdict = f"the plan does not fit into {room}"
    caption = "its memory alone; compiled as far in "
    if whole:
        caption = (
            f"{verification.kernels} kernels, {verification.unknown_kernels} of them without the "
            "compiler's estimate; compiled in "
        )
    caption += words.seconds(verification.compile_time_s)
    caption += " before (cached)" if verification.cached else ""
    table = Table(
        title=f"XLA's word: {verdict}",
        title_justify="left",
        caption=caption,
        caption_justify="left",
    )
    table.add_column("quantity")
    for head in ("predicted", "compiled", "difference"):
        table.add_column(head, justify="right")
    for row in verification.rows():
        gap = f"{100 * (row.predicted / row.compiled - 1):+.1f} %" if row.compiled else "–"
        table.add_row(
            row.quantity,
            words.quantity(row.predicted, row.unit),
            words.quantity(row.compiled, row.unit),
            gap,
        )
    return table


def write_json(path: str, content: Any) -> None:
    """Writes the file whole or not at all.

    Raises:
        MeshwrightError: the folder cannot be written.
    """
    write_text(path, json.dumps(content, indent=1) + "\n")
