"""Seconds of what a user's `jax.shard_map` does: its contractions, its vector work, its collectives.

The body is counted on one device (`graphs.rules.mapped`); mesh axes that the map leaves to the compiler
divide the counts where they lie on a dimension of the map's arrays. Permutes pass beside the
computation, which in a ring needs nothing of what arrives; other collectives are waited for.
"""

from __future__ import annotations

import numpy as np

from cost_model.fitted import load_calibration
from cost_model.fusion import vector_cost
from cost_model.matmul import matmul_time_s
from cost_model.pricing import KINDS, Pricing
from graphs.choices import Choices
from graphs.groups import HEAVY, Grouping
from graphs.rules import WHOLE
from graphs.rules.mapped import MapWork, map_work


def map_events(
    grouping: Grouping, g: int, choices: Choices, pricing: Pricing
) -> list[tuple[int, int, np.ndarray, np.ndarray, np.ndarray]]:
    """Of every map of group g: (op, region, compute seconds [S], exposed seconds [S] of its
    collectives, their payload bytes [kinds, S])."""
    item = grouping.groups[g]
    found = []
    for o in item.ops if item.kind == HEAVY else ():
        op, rule = grouping.graph.ops[o], grouping.rules[o]
        if op.primitive != "shard_map":
            continue
        free = [c for f, c in enumerate(item.factors) if f not in rule.pins and c != WHOLE]
        sizes = np.array(pricing.axis_sizes, np.float64)
        shards = np.where(choices.sharding(free), sizes, 1.0).prod(-1)
        work = map_work(op.params)
        compute = _compute_s(work, pricing) / shards
        exposed, n_bytes = _collectives(work, shards, compute, pricing)
        found.append((o, op.region, compute, exposed, n_bytes))
    return found


def _compute_s(work: MapWork, pricing: Pricing) -> float:
    device = pricing.device
    program = load_calibration(device.calibration).constants["program"]
    seconds = 0.0
    for (b, m, k, n, dtype), times in work.products.items():
        one = float(matmul_time_s(device, b, m, k, n, dtype))
        seconds += times * program["matmul"] * one
    vector = sum(n * vector_cost(name) for name, n in work.elements.items())
    return seconds + vector / device.vector_flops_per_s


def _collectives(
    work: MapWork, shards: np.ndarray, compute: np.ndarray, pricing: Pricing
) -> tuple[np.ndarray, np.ndarray]:
    names = pricing.layout.mesh.axis_names
    n_bytes = np.zeros((len(KINDS), len(shards)))
    passing, waiting = np.zeros(len(shards)), np.zeros(len(shards))
    for (kind, axes), payload in work.collectives.items():
        which, mask = KINDS.index(kind), sum(1 << names.index(a) for a in axes)
        local = payload / shards
        seconds = work.starts[kind, axes] * pricing.latency_s[which][mask]
        seconds = seconds + pricing.seconds_per_byte[which][mask] * local
        n_bytes[which] += local
        if kind == "collective_permute":
            passing = passing + seconds
        else:
            waiting = waiting + seconds
    return waiting + np.maximum(passing - compute, 0.0), n_bytes
