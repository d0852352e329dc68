"""The Estimate: what the simulation says of an assignment, with its breakdown."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from cost_model.energy import devices_energy_j
from cost_model.events import COMPUTE, RESHARD
from cost_model.pricing import KINDS
from cost_model.simulate import Simulator
from cost_model.step_bands import step_band


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a step is predicted to take."""

    step_time_s: float
    compute_time_s: float
    """Busy time of the computation lane."""
    exposed_comm_time_s: float
    """Time the computation lane waits for the network."""
    comm_time_s: float
    """Busy time of the network lanes."""
    peak_memory_bytes: float
    """Per device."""
    energy_j: float | None
    """All devices, one step, without cooling and hosts (:mod:`cost_model.energy` adds them); None
    where the power is not published."""
    table_cost_s: float
    """The additive score of the same assignment."""
    compute_by_class_s: dict[str, float]
    """Seconds by operator class."""
    collectives: dict[str, float]
    """Payload bytes by collective kind, per device, loops multiplied."""
    comm_by_purpose_s: dict[str, float]
    """Seconds of collectives by what they are for."""
    memory_by_class_bytes: dict[str, float]
    """Live bytes by class at the peak."""
    p10_s: float | None = None
    """Step time that one plan in ten is expected to beat (calibrated on compiled steps)."""
    p90_s: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Estimate:
        return cls(**data)


def estimate(simulator: Simulator, assignment: np.ndarray, *, pinned: bool = True) -> Estimate:
    """Simulate one assignment and break it down.

    ``pinned`` says that every operand will be constrained, so that XLA compiles just this plan. A
    plan that leaves operands to XLA has a wider band, and on a TPU its gathered weights are passed
    around a ring (:func:`ring_s`).
    """
    tables = simulator.tables
    step, compute, comm = (float(x) for x in simulator(assignment)[0])
    times = tables.grouping.graph.multiplicities()
    by_class: dict[str, float] = {}
    by_kind: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    by_purpose: dict[str, float] = {}
    for e in tables.events:
        pick: Any = int(assignment[e.node])
        if e.kind == RESHARD:
            assert e.rows is not None and e.columns is not None
            pick = (int(e.rows[assignment[e.source]]), int(e.columns[assignment[e.node]]))
        seconds = float(e.seconds[pick]) * times[e.region]
        if e.kind == COMPUTE:
            by_class[e.label] = by_class.get(e.label, 0.0) + seconds
            continue
        if seconds > 0:
            by_purpose[e.label] = by_purpose.get(e.label, 0.0) + seconds
        assert e.n_bytes is not None
        values = e.n_bytes[(slice(None), *np.atleast_1d(pick))]
        for kind, amount in zip(KINDS, values):
            by_kind[kind] += float(amount) * times[e.region]
    if not pinned:
        step += ring_s(simulator, assignment)
    profile = simulator.memory_profile(assignment)
    low, high = step_band(tables.pricing.device.family, pinned)
    return Estimate(
        step_time_s=step,
        p10_s=step * low,
        p90_s=step * high,
        compute_time_s=compute,
        exposed_comm_time_s=max(0.0, step - compute),
        comm_time_s=comm,
        peak_memory_bytes=float(profile.max(initial=0.0)),
        energy_j=devices_energy_j(
            tables.pricing.device,
            n_devices=tables.layout.cluster.n_devices,
            step_time_s=step,
            compute_time_s=compute,
        ),
        table_cost_s=table_cost(simulator, assignment),
        compute_by_class_s=by_class,
        collectives=by_kind,
        comm_by_purpose_s=by_purpose,
        memory_by_class_bytes=_memory_classes(simulator, assignment, int(profile.argmax())),
    )


_LEAST_RING = 5
"""Devices from which XLA:TPU makes rings: on four it gathers (compiled steps of suite=compiled)."""


def ring_s(simulator: Simulator, assignment: np.ndarray) -> float:
    """Seconds of a step in which weights go around a ring that holds up the computation.

    XLA:TPU turns a contraction with a weight that is sharded over the whole mesh, and whose operand
    nothing constrains, into a windowed one: narrow contractions with a permute between each two, by
    which every shard goes once around all devices.
    """
    tables = simulator.tables
    pricing = tables.pricing
    axes = [a for a, n in enumerate(pricing.axis_sizes) if n > 1]
    if pricing.device.family != "tpu" or len(axes) != 1:
        return 0.0
    ways = pricing.axis_sizes[axes[0]]
    if ways < _LEAST_RING:
        return 0.0
    times = tables.grouping.graph.multiplicities()
    passed = 0.0
    for e in tables.events:
        if e.kind == RESHARD and e.label == "weights":
            assert e.rows is not None and e.columns is not None and e.n_bytes is not None
            row, column = e.rows[assignment[e.source]], e.columns[assignment[e.node]]
            passed += float(e.n_bytes[0, row, column]) * times[e.region]
    once = pricing.windowed_s(np.array([1 << axes[0]]), np.array([passed]))
    return float(2 * once[0] * (1 + 1 / ways))


def table_cost(simulator: Simulator, assignment: np.ndarray) -> float:
    """The additive score."""
    p = simulator.tables.problem
    a = np.asarray(assignment, np.int64)
    nodes = p.node_costs[p.strategy_offsets[:-1] + a].sum()
    sizes = p.n_strategies()
    i, j = p.edge_nodes[:, 0], p.edge_nodes[:, 1]
    edges = p.edge_costs[p.edge_offsets[:-1] + a[i] * sizes[j] + a[j]].sum() if len(i) else 0.0
    return float(nodes + edges)


def _memory_classes(simulator: Simulator, assignment, at: int) -> dict[str, float]:
    p = simulator.tables.problem
    labels = simulator.tables.usage_labels
    live = (p.usage_intervals[:, 0] <= at) & (at < p.usage_intervals[:, 1])
    out: dict[str, float] = {}
    for u in np.flatnonzero(live):
        amount = float(p.usages[p.usage_offsets[u] + assignment[p.usage_nodes[u]]])
        out[labels[u]] = out.get(labels[u], 0.0) + amount
    return out
