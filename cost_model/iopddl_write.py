"""Writing problems in the format of the ASPLOS 2025 contest; ``cost_model.iopddl`` reads it.

The format is poorer than Problem: a node's second usage entry becomes an auxiliary node tied to it
by forbidden pairs, and costs become whole multiples of a unit. Both are recorded under the extra
key ``meshwright``, which other programs ignore.
"""

from __future__ import annotations

import gzip
import itertools
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from cost_model.problem import FORBIDDEN, Problem

_TARGET_TOTAL = float(2**52)


def write(problem: Problem, path: str | os.PathLike[str]) -> None:
    """Save in the contest's format (gzip when the name ends in .gz), atomically."""
    text = json.dumps(document(problem), separators=(",", ":")).encode()
    target = Path(path)
    data = gzip.compress(text, mtime=0) if target.suffix == ".gz" else text
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def document(problem: Problem) -> dict[str, Any]:
    """The JSON document of a problem; costs become whole multiples of a recorded unit."""
    unit = _whole_unit(problem)
    k = problem.n_strategies()
    costs = [
        _whole(problem.node_costs[a:b], unit)
        for a, b in itertools.pairwise(problem.strategy_offsets)
    ]
    intervals: list[list[int]] = [[0, 0]] * problem.n_nodes
    usages: list[list[int]] = [[0] * int(n) for n in k]
    edge_nodes = problem.edge_nodes.tolist()
    edge_costs = [
        _whole(problem.edge_costs[a:b], unit) for a, b in itertools.pairwise(problem.edge_offsets)
    ]
    usage_unit = 1.0
    if np.isfinite(problem.usage_limit):
        values = np.append(problem.usages, problem.usage_limit)
        if np.any(values != np.round(values)):
            usage_unit = max(float(problem.usage_limit), 1e-300) / 2.0**40
    seen = np.zeros(problem.n_nodes, dtype=bool)
    auxiliary: list[int] = []
    for u, node in enumerate(problem.usage_nodes.tolist()):
        start, end = (int(t) for t in problem.usage_intervals[u])
        value = problem.usages[problem.usage_offsets[u] : problem.usage_offsets[u + 1]]
        amount = [int(x) for x in np.ceil(value / usage_unit)]
        if not seen[node]:
            seen[node] = True
            intervals[node], usages[node] = [start, end], amount
            continue
        size = int(k[node])
        edge_nodes.append([node, len(costs)])
        tie = np.full((size, size), int(FORBIDDEN), dtype=np.int64)
        np.fill_diagonal(tie, 0)
        edge_costs.append(tie.ravel().tolist())
        auxiliary.append(node)
        costs.append([0] * size)
        intervals.append([start, end])
        usages.append(amount)
    body: dict[str, Any] = {
        "name": problem.name,
        "nodes": {"intervals": intervals, "costs": costs, "usages": usages},
        "edges": {"nodes": edge_nodes, "costs": edge_costs},
    }
    if np.isfinite(problem.usage_limit):
        body["usage_limit"] = math.floor(problem.usage_limit / usage_unit)
    extra = {
        "cost_unit": unit,
        "usage_unit": usage_unit,
        "usage_copies": auxiliary,
        "n_auxiliary": problem.n_auxiliary,
    }
    return {"problem": body, "meshwright": extra}


def _whole_unit(problem: Problem) -> float:
    """1 where all costs are whole already, else so small that rounding is below 2**-52 of all."""
    both = np.concatenate([problem.node_costs, problem.edge_costs])
    finite = both[both < FORBIDDEN]
    if np.all(finite == np.round(finite)):
        return 1.0
    total = float(finite.max()) * (problem.n_nodes + problem.n_edges)
    return 2.0 ** math.ceil(math.log2(total / _TARGET_TOTAL))


def _whole(values: np.ndarray, unit: float) -> list[int]:
    return [int(FORBIDDEN) if x >= FORBIDDEN else round(x / unit) for x in values.tolist()]
