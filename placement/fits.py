"""When nothing fits: the least memory there is, and the smallest cluster of the kind that would do."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from cost_model.analysis import Analysis
from cost_model.cluster import Cluster, parse_cluster
from cost_model.layout import MeshLayout, enumerate_layouts
from cost_model.problem import Problem
from cost_model.simulate import Simulator
from cost_model.tables import Tables, build_tables
from graphs.errors import MeshwrightError
from graphs.groups import Grouping

_DOUBLINGS = 10


def least_memory(tables: Tables, time_limit_s: float = 1.0) -> tuple[float, np.ndarray]:
    """(peak bytes, choices) of an assignment that minimises bytes held, whatever it costs."""
    from placement.solver import solve

    found = solve(_bytes_first(tables.problem), time_limit_s=time_limit_s, bound=False)
    choices = np.asarray(found.assignment, np.int64)
    return Simulator.of(tables).peak_memory_bytes(choices), choices


def _bytes_first(p: Problem) -> Problem:
    """Costs are gigabytes of all usage entries; seconds break ties."""
    held = np.zeros(len(p.node_costs))
    for u, node in enumerate(p.usage_nodes):
        a, b = p.usage_offsets[u], p.usage_offsets[u + 1]
        start = p.strategy_offsets[node]
        held[start : start + b - a] += p.usages[a:b] * 1e-9
    scale = 1e-6 / max(float(np.median(p.node_costs)), 1e-12)
    return dataclasses.replace(
        p,
        node_costs=held + scale * p.node_costs,
        edge_costs=scale * p.edge_costs,
        usage_limit=np.inf,
    )


def larger_clusters(cluster: Cluster) -> Iterator[Cluster]:
    """The same device in ever larger shapes: the smallest dimension doubles, then slices do."""
    device = cluster.device.name
    slices, shape = cluster.n_slices, list(cluster.slice_shape)
    for _ in range(_DOUBLINGS):
        grown = list(shape)
        if cluster.device.family == "gpu":
            grown[-1] *= 2
        else:
            grown[int(np.argmin(grown))] *= 2
        text = "x".join(map(str, grown))
        try:
            bigger = parse_cluster(
                f"{slices}*{device}:{text}" if slices > 1 else f"{device}:{text}"
            )
            shape = grown
        except MeshwrightError:
            slices *= 2
            try:
                bigger = parse_cluster(f"{slices}*{device}:{'x'.join(map(str, shape))}")
            except MeshwrightError:
                return
        yield bigger


def smallest_fit(grouping: Grouping, cluster: Cluster, share: float) -> str | None:
    """Notation of the first larger cluster on which an assignment was found that fits."""
    analysis = Analysis.of(grouping, cluster.device)
    for bigger in larger_clusters(cluster):
        limit = bigger.device.hbm_available_bytes * share
        for layout in _widest(bigger):
            tables = build_tables(analysis, layout, usage_limit_bytes=limit)
            if least_memory(tables)[0] <= limit:
                return bigger.notation
    return None


def _widest(cluster: Cluster) -> list[MeshLayout]:
    """One axis over everything, and the most even two."""
    layouts = enumerate_layouts(cluster, max_axes=2)
    one = [x for x in layouts if len(x.mesh.axis_sizes) == 1][:1]
    two = [x for x in layouts if len(x.mesh.axis_sizes) == 2]
    return one + sorted(two, key=lambda x: max(x.mesh.axis_sizes))[:1]
