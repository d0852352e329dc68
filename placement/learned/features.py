"""What the policy sees of a program and a cluster: a graph in normalised numbers.

Nodes are the decision groups of the folded program, classes its named dimensions, regions its loop
bodies. Edges say which node reads which (weights and activations apart) and which results take the
place of which inputs. Every feature is a share, a flag, or a logarithm of a ratio, so that programs
and devices of any size look alike; a device enters through its numbers alone.

Matrices are row-normalised: a product with node states is the mean over neighbours (GraphSAGE,
Hamilton et al. 2017), one matrix per kind of edge (R-GCN, Schlichtkrull et al. 2018).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from cost_model.cluster import Cluster
from graphs.groups import COPY, HEAVY, LEAF, LIGHT, Grouping
from graphs.names import BATCH, HIDDEN, OTHER, PARALLEL, SEQUENCE
from graphs.rules import WHOLE
from placement.learned.program import Program, bits, from_weights, program_of, region_of

KINDS = (LEAF, LIGHT, HEAVY, COPY)
NAMES = (BATCH, SEQUENCE, HIDDEN, PARALLEL, OTHER)
N_RELATIONS = 5
"""Weights read, by whom; activations read, by whom; results in place of inputs."""
N_NODE, N_CLASS, N_REGION, N_GLOBAL = 19, 14, 4, 18


@dataclasses.dataclass(frozen=True, kw_only=True)
class Observation:
    """N nodes, C classes, R regions. All float32 unless said otherwise."""

    nodes: np.ndarray
    """[N, N_NODE]."""
    relations: Any
    """N_RELATIONS matrices [N, N], rows sum to 1 or 0; dense or scipy.sparse."""
    classes: np.ndarray
    """[C, N_CLASS]."""
    classes_of_nodes: np.ndarray
    """[N, C] rows sum to 1 or 0."""
    nodes_of_classes: np.ndarray
    """[C, N] rows sum to 1."""
    regions: np.ndarray
    """[R, N_REGION]."""
    region_of_nodes: np.ndarray
    """[N, R] rows sum to 1."""
    nodes_of_regions: np.ndarray
    """[R, N] rows sum to 1."""
    overall: np.ndarray
    """[N_GLOBAL] the whole program on the cluster."""
    class_bytes: np.ndarray
    """[C, 4] float64: bytes of weights read, of activations, of results summed over the class, and
    flops that the class splits, in one step."""
    class_sizes: np.ndarray
    """[C] int64, greatest common divisor of the sizes that the class has."""
    class_of: dict[tuple[int, int], int]
    """(node, its class) -> class of the program."""
    ideal_s: float
    """Seconds of the step's flops at peak on all devices."""
    program: Program
    cluster: Cluster


def observe(grouping: Grouping, cluster: Cluster, *, program: Program | None = None) -> Observation:
    """The observation of a grouped program on a cluster."""
    program = program or program_of(grouping)
    graph = grouping.graph
    number = {g: n for n, g in enumerate(program.firsts)}
    ideal = max(program.flops, 1.0) / (cluster.device.peak("bfloat16") * cluster.n_devices)
    classes, class_of = _number_classes(program)
    regions = sorted({region_of(grouping, g) for g in program.firsts})
    trips = graph.multiplicities()
    state = {t for a, b in graph.aliases for t in (graph.inputs[a], graph.outputs[b])}
    facts = [_node_facts(program, n, trips, state) for n in range(len(program.firsts))]
    touched = np.array([f["touched"] for f in facts])
    member = np.zeros((len(program.firsts), len(classes)), np.float32)
    for (n, _), c in class_of.items():
        member[n, c] = 1.0
    inside = np.zeros((len(program.firsts), len(regions)), np.float32)
    for n, g in enumerate(program.firsts):
        inside[n, regions.index(region_of(grouping, g))] = 1.0
    totals, sizes = _class_totals(program, class_of, len(classes))
    last = max(len(graph.ops), 1)
    weight = touched * program.count
    region_rows = [
        (
            math.log10(trips[r] + 1.0),
            float(weight @ inside[:, k] / max(weight.sum(), 1.0)),
            graph.regions[r].start / last if r else 0.0,
            float(r == 0),
        )
        for k, r in enumerate(regions)
    ]
    return Observation(
        nodes=_node_rows(program, facts, ideal, cluster),
        relations=_relations(program, number),
        classes=_class_rows(classes, totals, sizes, member, ideal, cluster),
        classes_of_nodes=_mean(member),
        nodes_of_classes=_mean(member.T),
        regions=np.array(region_rows, np.float32),
        region_of_nodes=inside,
        nodes_of_regions=_mean(inside.T),
        overall=_overall(program, cluster),
        class_bytes=totals,
        class_sizes=sizes,
        class_of=class_of,
        ideal_s=ideal,
        program=program,
        cluster=cluster,
    )  # fmt: skip


def squash(ratio) -> np.ndarray:
    """log10 of a ratio, in [-1, 1] between 1e-6 and 1e6."""
    return np.clip(np.log10(np.maximum(ratio, 1e-9)) / 6.0, -1.5, 1.5)


def _mean(matrix: np.ndarray) -> np.ndarray:
    return (matrix / np.maximum(matrix.sum(1, keepdims=True), 1e-9)).astype(np.float32)


def _number_classes(program: Program) -> tuple[list[str], dict[tuple[int, int], int]]:
    """Names of the program's classes in order of appearance, and the class of each node's class."""
    found: dict[int, int] = {}
    names: list[str] = []
    class_of: dict[tuple[int, int], int] = {}
    for n, g in enumerate(program.firsts):
        for c, root in enumerate(program.names.root[g]):
            if root not in found:
                found[root] = len(names)
                names.append(program.names.of[g][c])
            class_of[n, c] = found[root]
    if not names:
        names.append(OTHER)
    return names, class_of


def _node_facts(program: Program, n: int, trips: np.ndarray, state: set[int]) -> dict[str, Any]:
    grouping, g = program.grouping, program.firsts[n]
    graph, item = grouping.graph, grouping.groups[g]
    owned = sum(graph.tensors[t].n_bytes * trips[graph.tensors[t].region] for t in item.tensors)
    largest = max((graph.tensors[t].n_bytes for t in item.tensors), default=0)
    read = sum(graph.tensors[v.tensor].n_bytes * trips[v.region] for v in item.views)
    index = next((o for o in item.ops if not grouping.rules[o].light), -1)
    flops = grouping.rules[index].flops * program.times[n] if index >= 0 else 0.0
    return dict(
        owned=float(owned),
        largest=float(largest),
        read=float(read),
        touched=float(owned + read),
        flops=float(flops),
        state=any(t in state for t in item.tensors),
        weights=any(from_weights(grouping, g, v) for v in item.views),
        position=float(np.mean(item.ops)) / max(len(graph.ops), 1) if item.ops else 0.0,
        summed=any(r.how == "sum" for r in item.reductions),
        primitive=graph.ops[index].primitive if index >= 0 else "",
    )


def _node_rows(
    program: Program, facts: list[dict[str, Any]], ideal: float, cluster: Cluster
) -> np.ndarray:
    device, devices = cluster.device, cluster.n_devices
    hbm = device.hbm_bandwidth_bytes_per_s * devices * ideal
    amounts = {k: np.array([f[k] for f in facts]) for k in ("flops", "owned", "read", "largest")}
    touched = np.array([f["touched"] for f in facts])
    rows = np.array([_node_row(program, n, f) for n, f in enumerate(facts)], np.float32)
    first = len(KINDS)
    ratios = (
        amounts["flops"] / max(program.flops, 1.0),
        amounts["owned"] * program.count / hbm,
        amounts["read"] * program.count / hbm,
        amounts["largest"] / (device.hbm_available_bytes * devices),
        amounts["flops"] / np.maximum(touched * program.count, 1.0),
    )
    for n, ratio in enumerate(ratios):
        rows[:, first + n] = squash(ratio)
    return rows


def _node_row(program: Program, n: int, f: dict[str, Any]) -> list:
    """One row; the ratios are filled in for all nodes at once."""
    item = program.grouping.groups[program.firsts[n]]
    return [
        *(float(item.kind == k) for k in KINDS),
        *(0.0,) * 5,
        math.log10(program.count[n]) / 2,
        math.log10(program.times[n]) / 3,
        len(item.sizes) / 6,
        float(f["state"]),
        float(f["weights"]),
        float(f["summed"]),
        f["position"],
        float(f["primitive"].startswith(("dot", "ragged"))),
        float(f["primitive"].startswith(("gather", "scatter", "dynamic"))),
        math.log10(1 + len(item.ops)) / 2,
    ]


def _relations(program: Program, number: dict[int, int]) -> list[np.ndarray]:
    grouping = program.grouping
    size = len(program.firsts)
    weights, others, alias = (np.zeros((size, size), np.float32) for _ in range(3))
    for n, g in enumerate(program.firsts):
        for view in grouping.groups[g].views:
            m = number[program.tied[grouping.source_group(g, view)]]
            (weights if from_weights(grouping, g, view) else others)[n, m] += 1.0
    graph = grouping.graph
    for a, b in graph.aliases:
        if graph.outputs[b] < 0:
            continue
        n = number[program.tied[grouping.group_of[graph.inputs[a]]]]
        m = number[program.tied[grouping.group_of[graph.outputs[b]]]]
        if n != m:
            alias[n, m] = alias[m, n] = 1.0
    weights, others = np.minimum(weights, 1.0), np.minimum(others, 1.0)
    return [_mean(x) for x in (weights, weights.T, others, others.T, alias)]


def _class_totals(
    program: Program, class_of: dict[tuple[int, int], int], n_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """class_bytes and class_sizes of the observation."""
    grouping = program.grouping
    graph = grouping.graph
    totals = np.zeros((n_classes, 4))
    sizes = np.zeros(n_classes, np.int64)
    for (n, c), k in class_of.items():
        sizes[k] = np.gcd(sizes[k], grouping.groups[program.firsts[n]].sizes[c])
    for n, g in enumerate(program.firsts):
        item = grouping.groups[g]
        if item.kind != HEAVY:
            continue
        index = next((o for o in item.ops if not grouping.rules[o].light), -1)
        if index < 0:
            continue
        times = program.times[n]
        for view in item.views:
            column = 0 if from_weights(grouping, g, view) else 1
            for c in set(view.dims) - {WHOLE}:
                totals[class_of[n, c], column] += graph.tensors[view.tensor].n_bytes * times
        result = next(iter(item.tensors), -1)
        out = set(item.tensors[result]) if result >= 0 else set()
        n_bytes = graph.tensors[result].n_bytes * times if result >= 0 else 0.0
        for c in set(item.factors) - {WHOLE}:
            totals[class_of[n, c], 3] += grouping.rules[index].flops * times
            totals[class_of[n, c], 1 if c in out else 2] += n_bytes
    return totals, np.maximum(sizes, 1)


def _class_rows(names, totals, sizes, member, ideal, cluster) -> np.ndarray:
    hbm = cluster.device.hbm_bandwidth_bytes_per_s * cluster.n_devices * ideal
    flops = max(totals[:, 3].max(initial=0.0), 1.0)
    rows = [
        [
            *(float(name == k) for k in NAMES),
            bits(sizes[c]) / 16,
            bits(sizes[c] & -sizes[c]) / 12,
            min(bits(sizes[c] / cluster.n_devices) / 8, 2.0),
            float(sizes[c] % cluster.n_devices == 0),
            *(float(squash(x / hbm)) for x in totals[c, :3]),
            float(totals[c, 3] / flops),
            float(member[:, c].mean()),
        ]
        for c, name in enumerate(names)
    ]
    return np.array(rows, np.float32)


def _overall(program: Program, cluster: Cluster) -> np.ndarray:
    device, n = cluster.device, cluster.n_devices
    hbm = device.hbm_available_bytes
    peak = device.peak("bfloat16")
    fast = max(a.bandwidth_bytes_per_s for a in cluster.physical_axes)
    slow = min(a.bandwidth_bytes_per_s for a in cluster.physical_axes)
    state = program.weights.amount.sum() + program.moments.amount.sum()
    row = [
        squash(peak / device.hbm_bandwidth_bytes_per_s / 1e2),
        squash(peak / max(fast, 1.0) / 1e4),
        squash(peak / max(slow, 1.0) / 1e4),
        squash(peak / max(device.vector_flops_per_s, 1.0) / 1e2),
        math.log10(hbm / 1e10),
        float(device.family == "gpu"),
        bits(n) / 14,
        bits(cluster.n_slices) / 6,
        len(cluster.physical_axes) / 4,
        squash(state / n / hbm),
        squash(program.weights.amount.sum() / hbm),
        squash(program.saved.amount.sum() / n / hbm),
        squash(program.inside.amount.sum() / n / hbm),
        squash(program.largest.amount.sum() / n / hbm),
        squash(program.flops / n / peak),
        bits(program.batch) / 14,
        min(bits(program.batch / n), 8.0) / 8
        if program.batch >= n
        else -bits(n / program.batch) / 8,
        squash(program.flops / max(program.weights_read.amount.sum(), 1.0) / 1e3),
    ]
    return np.array(row, np.float32)
