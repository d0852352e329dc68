"""A plan, and what it was compared with, as the data of its report."""

from __future__ import annotations

import importlib.metadata
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cost_model.cluster import Cluster, parse_cluster
from placement.report import data as shown
from placement.report.page import write

if TYPE_CHECKING:
    from placement.plan import Plan

_NETWORKS = {
    "ici": "ICI",
    "core": "on-chip link",
    "nvlink": "NVLink",
    "network": "inter-node network",
    "dcn": "data-centre network",
    "host": "host memory",
}
_DRAWN_FIRST = ("x", "y", "z", "gpu", "host", "core", "node", "slice")
"""Physical axes in the order of drawing: columns, rows, then one plane each."""
_ITEM_BYTES = {"bool": 1, "bfloat16": 2, "float16": 2}


def write_report(
    plan: Plan,
    path: str | os.PathLike[str],
    *,
    title: str = "",
    baselines: Mapping[str, Plan] | None = None,
    verification: Any = None,
    tokens_per_step: float | None = None,
    pareto: Sequence[tuple[str, float, float, str]] = (),
) -> Path:
    """Writes the plan's page.

    ``baselines`` are plans of the same step by name; ``pareto`` holds (objective, step_time_s,
    value, unit) of each plan of a front.
    """
    write(
        report_data(
            plan,
            title=title,
            baselines=baselines,
            verification=verification,
            tokens_per_step=tokens_per_step,
            pareto=pareto,
        ),
        path,
    )
    return Path(path)


def report_data(
    plan: Plan,
    *,
    title: str = "",
    baselines: Mapping[str, Plan] | None = None,
    verification: Any = None,
    tokens_per_step: float | None = None,
    pareto: Sequence[tuple[str, float, float, str]] = (),
) -> shown.ReportData:
    """The plan as plain data."""
    cluster = parse_cluster(plan.cluster)
    estimate = plan.estimate
    return shown.ReportData(
        title=f"{title or 'Plan'} on {plan.cluster}",
        cluster=plan.cluster,
        device=cluster.device.name,
        n_devices=cluster.n_devices,
        objective=plan.objective,
        optimizer=plan.optimizer,
        status=plan.status,
        step_time_s=estimate.step_time_s,
        compute_time_s=estimate.compute_time_s,
        exposed_comm_time_s=estimate.exposed_comm_time_s,
        peak_memory_bytes=estimate.peak_memory_bytes,
        capacity_bytes=cluster.device.hbm_capacity_bytes,
        planning_time_s=plan.planning_time_s,
        evaluations=plan.evaluations,
        lower_bound_s=plan.lower_bound_s if 0 < plan.lower_bound_s < math.inf else None,
        p10_s=estimate.p10_s,
        p90_s=estimate.p90_s,
        energy_j=estimate.energy_j,
        tokens_per_step=tokens_per_step,
        physical_axes=physical_axes(cluster),
        mesh_axes=mesh_axes(plan, cluster),
        tensors=tuple(tensor_rows(plan)),
        timeline=tuple(
            shown.Event(lane=lane, name=name, kind=kind, start_s=start_s, end_s=end_s)
            for lane, name, kind, start_s, end_s in getattr(plan, "timeline", ()) or ()
        ),
        memory=tuple(
            shown.MemoryPoint(time_s=time_s, live_bytes=live)
            for time_s, live in getattr(plan, "memory_over_time", ()) or ()
        ),
        memory_parts=tuple(
            shown.MemoryPart(name=name, at_peak_bytes=amount)
            for name, amount in sorted(
                estimate.memory_by_class_bytes.items(), key=lambda item: -item[1]
            )
            if amount > 0
        ),
        costs=tuple(_costs(estimate)),
        baselines=tuple(candidate(name, other) for name, other in (baselines or {}).items()),
        searched=tuple(_searched(plan)),
        pareto=tuple(
            shown.ParetoRow(name=name, step_time_s=step_time_s, value=value, unit=unit)
            for name, step_time_s, value, unit in pareto
        ),
        checks=tuple(checks(verification)),
        explanation=plan.explain(),
        warnings=plan.warnings,
        versions={"meshwright": importlib.metadata.version("meshwright")},
    )


def drawing_order(cluster: Cluster) -> list[int]:
    """Indices of the cluster's physical axes, those of the fastest networks first."""
    names = [axis.name for axis in cluster.physical_axes]
    return sorted(range(len(names)), key=lambda i: _DRAWN_FIRST.index(names[i]))


def physical_axes(cluster: Cluster) -> tuple[shown.PhysicalAxis, ...]:
    axes = [cluster.physical_axes[i] for i in drawing_order(cluster)]
    return tuple(
        shown.PhysicalAxis(
            name=a.name, size=a.size, network=_NETWORKS.get(a.kind, a.kind), wraps=a.wraps
        )
        for a in axes
    )


def mesh_axes(plan: Plan, cluster: Cluster) -> tuple[shown.MeshAxis, ...]:
    """The plan's mesh axes with the sentences of its explanation that name them."""
    order = drawing_order(cluster)
    axes = []
    for (name, size), factors in zip(plan.mesh_shape.items(), plan.placement, strict=True):
        said = [r for r in plan.reasons if re.match(rf"axis {re.escape(name)}\b", r)]
        axes.append(
            shown.MeshAxis(
                name=name,
                size=size,
                spans=tuple(
                    shown.Span(physical_axis=order.index(f.axis), size=f.size, stride=f.stride)
                    for f in factors
                ),
                role=", ".join(roles(plan, name)),
                why=" ".join(said),
            )
        )
    return tuple(axes)


def roles(plan: Plan, axis: str) -> list[str]:
    """What the axis does, in the field's words, read off the argument specs."""
    by_kind: dict[str, bool] = {}
    for leaf in plan.inputs:
        kind = kind_of(leaf.name, plan.donate_argnums)
        where = [d for d, names in enumerate(leaf.spec) if axis in names]
        if not where:
            continue
        by_kind[kind] = True
        if kind == "input":
            by_kind["batch" if 0 in where else "sequence"] = True
    found = []
    weights, states = by_kind.get("parameter"), by_kind.get("optimizer state")
    if by_kind.get("batch"):
        found.append(
            "fully-sharded data" if weights else "data, sharded states" if states else "data"
        )
    elif weights:
        found.append("tensor")
    if by_kind.get("sequence"):
        found.append("context")
    return found


def kind_of(name: str, donate_argnums: tuple[int, ...]) -> str:
    """parameter | optimizer state | input, from the leaf's path and what is donated."""
    if re.search(r"opt_state|\.mu\b|\.nu\b|momentum|optimizer", name):
        return "optimizer state"
    match = re.match(r"\[(\d+)\]", name)
    index = int(match[1]) if match else 0
    if index not in donate_argnums:
        return "input"
    return "parameter" if index == min(donate_argnums) else "optimizer state"


def tensor_rows(plan: Plan):
    """One row of each argument leaf."""
    for leaf in plan.inputs:
        size = _item_bytes(leaf.dtype)
        local = [
            -(-n // math.prod(plan.mesh_shape[a] for a in names))
            for n, names in zip(leaf.shape, leaf.spec)
        ]
        local += list(leaf.shape[len(leaf.spec) :])
        yield shown.TensorRow(
            name=path_words(leaf.name),
            kind=kind_of(leaf.name, plan.donate_argnums),
            shape=leaf.shape,
            dtype=leaf.dtype,
            spec=spec_words(leaf.spec),
            bytes_total=round(math.prod(leaf.shape) * size),
            bytes_per_device=round(math.prod(local) * size),
        )


def spec_words(spec: tuple[tuple[str, ...], ...]) -> str:
    """A PartitionSpec as one writes it: P('data', None, ('x', 'y'))."""
    entries = [None if not d else repr(d[0]) if len(d) == 1 else repr(tuple(d)) for d in spec]
    while entries and entries[-1] is None:
        entries.pop()
    return f"P({', '.join('None' if e is None else e for e in entries)})"


def path_words(name: str) -> str:
    """``[0]['layers']['query']`` as ``0/layers/query``."""
    parts = re.findall(r"\['([^']*)'\]|\[(\d+)\]|\.(\w+)", name)
    return "/".join(next(p for p in part if p) for part in parts if any(part)) or name


def candidate(name: str, plan: Plan) -> shown.CandidateRow:
    estimate = plan.estimate
    fits = plan.status in ("feasible", "time_limit")
    return shown.CandidateRow(
        name=name,
        status="feasible" if fits else "does not fit",
        mesh=mesh_words(plan.mesh_shape),
        step_time_s=estimate.step_time_s if estimate is not None else None,
        peak_memory_bytes=estimate.peak_memory_bytes if estimate is not None else None,
        p10_s=estimate.p10_s if estimate is not None else None,
        p90_s=estimate.p90_s if estimate is not None else None,
    )


def mesh_words(shape: Mapping[str, int]) -> str:
    used = [f"{name} {size}" for name, size in shape.items() if size > 1]
    return " × ".join(used) or "one device"


def checks(verification: Any):
    """The verification's predicted and compiled quantities, where it has them."""
    if verification is None:
        return
    yield from (
        shown.CheckRow(
            quantity=row.quantity, predicted=row.predicted, compiled=row.compiled, unit=row.unit
        )
        for row in verification.rows()
    )


def _costs(estimate):
    for name, seconds in estimate.compute_by_class_s.items():
        yield shown.CostRow(name=name, kind="compute", time_s=seconds, exposed_time_s=seconds)
    total = sum(estimate.comm_by_purpose_s.values()) or 1.0
    for name, seconds in estimate.comm_by_purpose_s.items():
        # Which collective a wait belongs to is not recorded: exposed time is shared by busy time.
        yield shown.CostRow(
            name=name,
            kind="communication",
            time_s=seconds,
            exposed_time_s=estimate.exposed_comm_time_s * seconds / total,
        )


def _searched(plan: Plan):
    for row in plan.alternatives:
        shape = row.get("mesh_shape") or {}
        fits = row.get("fits")
        yield shown.CandidateRow(
            name=str(row.get("optimizer", "")),
            status="fits" if fits else "does not fit" if fits is not None else "",
            mesh=mesh_words(shape),
            step_time_s=row.get("step_time_s"),
            peak_memory_bytes=row.get("memory_bytes"),
        )


def _item_bytes(dtype: str) -> float:
    if dtype in _ITEM_BYTES:
        return _ITEM_BYTES[dtype]
    bits = re.search(r"(\d+)", dtype)
    if dtype.startswith("float8"):
        return 1
    if dtype.startswith("key<"):
        return 8
    return int(bits[1]) / 8 if bits else 4
