"""The instance format of the ASPLOS 2025 contest on intra-operator parallelism, read and written.

``problem.nodes`` holds, for each node, one half-open ``interval``, its strategy ``costs`` and its
strategy ``usages``; ``problem.edges`` holds node tuples with cost arrays row-major over their
strategies; ``problem.usage_limit`` bounds the usages summed at every time point (Moffitt and
Fegade, "The ASPLOS 2025 / EuroSys 2025 Contest on Intra-Operator Parallelism for Distributed Deep
Learning", sections 2 and 3).

Reading folds edges of one node into node costs and adds parallel edges. An edge of three or more
nodes becomes an auxiliary node, appended after the others, whose strategies are the tuples.
Writing is the inverse where the format is poorer: a node's second usage entry becomes an auxiliary
node tied to it, and costs become whole multiples of a unit recorded under the extra key
``meshwright``, which other programs ignore and which ``read`` undoes.
"""

from __future__ import annotations

import gzip
import itertools
import json
import math
import os
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from cost_model.problem import FORBIDDEN, Problem
from graphs.errors import MeshwrightError

_LARGEST = float(2**63)
_TARGET_TOTAL = float(2**52)


def read(path: str | os.PathLike[str]) -> Problem:
    """Load an instance, gzip or plain. Raises MeshwrightError with one sentence if it is malformed.

    Hyperedges and exports may append auxiliary nodes; ``n_listed_nodes`` says how many leading
    nodes the file itself lists.
    """
    return parse(_load_json(Path(path)), name=_stem(Path(path)))


def n_listed_nodes(problem: Problem) -> int:
    """Nodes that a contest answer for this problem must list (auxiliary nodes come after)."""
    return problem.n_nodes - problem.n_auxiliary


def parse(document: Any, *, name: str) -> Problem:
    """A Problem from the parsed JSON of an instance."""
    body = _field(document, "problem", dict, where="the file")
    nodes = _field(body, "nodes", dict, where="problem")
    costs = _field(nodes, "costs", list, where="problem.nodes")
    intervals = _field(nodes, "intervals", list, where="problem.nodes")
    usages = _field(nodes, "usages", list, where="problem.nodes")
    edges = body.get("edges", {"nodes": [], "costs": []})
    edge_nodes = _field(edges, "nodes", list, where="problem.edges")
    edge_costs = _field(edges, "costs", list, where="problem.edges")
    if not costs:
        raise MeshwrightError("the instance has no nodes; give at least one node with a strategy")
    if not len(costs) == len(intervals) == len(usages):
        raise MeshwrightError(
            f"the instance lists {len(costs)} node costs, {len(intervals)} intervals and "
            f"{len(usages)} usages; give one of each per node"
        )
    if len(edge_nodes) != len(edge_costs):
        raise MeshwrightError(
            f"the instance lists {len(edge_nodes)} edges and {len(edge_costs)} edge cost arrays; "
            "give one array per edge"
        )
    node_costs = [_numbers(row, f"costs of node {i}") for i, row in enumerate(costs)]
    node_usages = [_numbers(row, f"usages of node {i}") for i, row in enumerate(usages)]
    for i, (cost, usage) in enumerate(zip(node_costs, node_usages)):
        if len(cost) == 0:
            raise MeshwrightError(f"node {i} has no strategies; every node needs at least one")
        if len(usage) != len(cost):
            raise MeshwrightError(
                f"node {i} has {len(cost)} costs and {len(usage)} usages; give one usage per "
                "strategy"
            )
    extra = _field(document, "meshwright", dict, where="the file", default={})
    unit = _positive(extra.get("cost_unit", 1.0), "meshwright.cost_unit")
    usage_unit = _positive(extra.get("usage_unit", 1.0), "meshwright.usage_unit")
    times = np.array([_interval(x, i) for i, x in enumerate(intervals)], dtype=np.int64)
    builder = _Builder(node_costs)
    for e, (ends, table) in enumerate(zip(edge_nodes, edge_costs)):
        builder.add_edge(e, ends, table)
    limit = body.get("usage_limit")
    if limit is None:
        limit_value = math.inf
    else:
        limit_value = float(_numbers([limit], "usage_limit")[0])
    return _finish(
        name=str(body.get("name", name)),
        builder=builder,
        usage_nodes=np.arange(len(costs), dtype=np.int32),
        intervals=times,
        usages=node_usages,
        limit=limit_value,
        unit=unit,
        usage_unit=usage_unit,
        extra=extra,
    )


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


class _Builder:
    """Collects node costs and pairwise edges while edges of any arity are folded."""

    def __init__(self, node_costs: list[np.ndarray]) -> None:
        self.costs = node_costs
        self.n_listed = len(node_costs)
        self.pairs: dict[tuple[int, int], np.ndarray] = {}

    def add_edge(self, e: int, ends: Any, table: Any) -> None:
        if not isinstance(ends, list) or not ends:
            raise MeshwrightError(f"edge {e} has no node list; give the indices of its nodes")
        for i in ends:
            if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < self.n_listed:
                raise MeshwrightError(
                    f"edge {e} names node {i!r}, but nodes are numbered 0 to {self.n_listed - 1}"
                )
        if len(set(ends)) != len(ends):
            raise MeshwrightError(
                f"edge {e} is a cycle on one node ({ends}); put such a cost in the node's costs"
            )
        values = _numbers(table, f"costs of edge {e}")
        shape = tuple(len(self.costs[i]) for i in ends)
        if len(values) != math.prod(shape):
            raise MeshwrightError(
                f"edge {e} has {len(values)} costs, but its nodes have "
                f"{' x '.join(map(str, shape))} strategies; give {math.prod(shape)} costs"
            )
        if len(ends) == 1:
            self.costs[ends[0]] = self.costs[ends[0]] + values
        elif len(ends) == 2:
            self._add_pair(ends[0], ends[1], values.reshape(shape))
        else:
            self._add_hyperedge(ends, values, shape)

    def _add_pair(self, i: int, j: int, table: np.ndarray) -> None:
        if (j, i) in self.pairs:
            i, j, table = j, i, np.ascontiguousarray(table.T)
        known = self.pairs.get((i, j))
        self.pairs[i, j] = table if known is None else known + table

    def _add_hyperedge(self, ends: list[int], values: np.ndarray, shape: tuple[int, ...]) -> None:
        allowed = np.flatnonzero(values < FORBIDDEN)
        if len(allowed) == 0:
            allowed = np.arange(len(values))
        auxiliary = len(self.costs)
        self.costs.append(values[allowed])
        for i, states in zip(ends, np.unravel_index(allowed, shape)):
            tie = np.full((len(self.costs[i]), len(allowed)), FORBIDDEN)
            tie[states, np.arange(len(allowed))] = 0.0
            self.pairs[i, auxiliary] = tie


def _finish(
    *,
    name: str,
    builder: _Builder,
    usage_nodes: np.ndarray,
    intervals: np.ndarray,
    usages: list[np.ndarray],
    limit: float,
    unit: float,
    usage_unit: float,
    extra: dict[str, Any],
) -> Problem:
    """Flatten, undoing the unit and the copied usages of an exported problem."""
    copies = extra.get("usage_copies", [])
    first_copy = builder.n_listed - len(copies)
    n_nodes = len(builder.costs)
    if copies:
        usage_nodes = np.concatenate([usage_nodes[:first_copy], np.array(copies, np.int32)])
        builder.pairs = {ij: t for ij, t in builder.pairs.items() if max(ij) < first_copy}
        builder.costs = builder.costs[:first_copy]
        n_nodes = first_copy
    k = np.array([len(c) for c in builder.costs], dtype=np.int64)
    pairs = builder.pairs
    used = [
        u for u in range(len(usages)) if intervals[u, 0] < intervals[u, 1] and np.any(usages[u] > 0)
    ]

    def forbid(x: np.ndarray) -> np.ndarray:
        return np.where(x >= FORBIDDEN, FORBIDDEN, x * unit)

    none = np.zeros(0)
    return Problem(
        name=name,
        strategy_offsets=np.concatenate([[0], np.cumsum(k)]).astype(np.int64),
        node_costs=forbid(np.concatenate(builder.costs)),
        edge_nodes=np.array(list(pairs), dtype=np.int32).reshape(-1, 2),
        edge_offsets=np.concatenate([[0], np.cumsum([t.size for t in pairs.values()])]).astype(
            np.int64
        ),
        edge_costs=forbid(np.concatenate([t.ravel() for t in pairs.values()] or [none])),
        usage_nodes=usage_nodes[used],
        usage_intervals=intervals[used].reshape(-1, 2),
        usage_offsets=np.concatenate([[0], np.cumsum([len(usages[u]) for u in used])]).astype(
            np.int64
        ),
        usages=np.concatenate([usages[u] for u in used] or [none]) * usage_unit,
        usage_limit=limit * usage_unit,
        n_auxiliary=int(extra.get("n_auxiliary", 0)) + n_nodes - min(first_copy, builder.n_listed),
    )


def _load_json(path: Path) -> Any:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise MeshwrightError(f"cannot read {path}: {error.strerror}") from error
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise MeshwrightError(f"{path} is a truncated or damaged gzip file: {error}") from error
    if not data.strip():
        raise MeshwrightError(f"{path} is empty; give an instance in the contest's JSON format")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise MeshwrightError(f"{path} is not valid JSON ({error}); it may be truncated") from error


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".json")


def _field(parent: Any, key: str, kind: type, *, where: str, default: Any = None) -> Any:
    if not isinstance(parent, dict):
        raise MeshwrightError(f"{where} is not a JSON object; see the contest's format")
    value = parent.get(key, default)
    if not isinstance(value, kind):
        what = "is missing" if value is None else f"is not a {kind.__name__}"
        raise MeshwrightError(f"{key!r} in {where} {what}; see the contest's format")
    return value


def _numbers(row: Any, what: str) -> np.ndarray:
    """[n] float64, each at least 0 and below 2**63."""
    if not isinstance(row, list):
        raise MeshwrightError(f"the {what} are not a list of numbers")
    try:
        values = np.array(row, dtype=np.float64)
    except (ValueError, TypeError, OverflowError) as error:
        raise MeshwrightError(f"the {what} are not all numbers that fit 64 bits") from error
    if values.ndim != 1:
        raise MeshwrightError(f"the {what} are nested; give a flat list of numbers")
    if values.size and not values.min() >= 0:
        raise MeshwrightError(f"the {what} hold {values.min():g}; costs and usages start at 0")
    if values.size and not values.max() < _LARGEST:
        raise MeshwrightError(f"the {what} hold {values.max():g}, which overflows 64 bits")
    return values


def _interval(value: Any, i: int) -> tuple[int, int]:
    if (
        not isinstance(value, list)
        or len(value) != 2
        or not all(isinstance(t, int) and not isinstance(t, bool) for t in value)
    ):
        raise MeshwrightError(f"the interval of node {i} is {value!r}; give [start, end] integers")
    start, end = value
    if start < 0 or end < start or end >= 2**62:
        raise MeshwrightError(
            f"the interval of node {i} is {value}; it must run from a start >= 0 to an end >= it"
        )
    return start, end


def _positive(value: Any, what: str) -> float:
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        raise MeshwrightError(f"{what} is {value!r}; it must be a positive number")
    return float(value)


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
