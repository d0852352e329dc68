"""The instance format of the ASPLOS 2025 contest on intra-operator parallelism, read and written.

``problem.nodes`` holds, for each node, one half-open ``interval``, its strategy ``costs`` and its
strategy ``usages``; ``problem.edges`` holds node tuples with cost arrays row-major over their
strategies; ``problem.usage_limit`` bounds the usages summed at every time point (Moffitt and
Fegade, "The ASPLOS 2025 / EuroSys 2025 Contest on Intra-Operator Parallelism for Distributed Deep
Learning", sections 2 and 3).

Reading folds edges of one node into node costs and adds parallel edges. An edge of three or more
nodes becomes an auxiliary node, appended after the others, whose strategies are the tuples.
What ``write`` had to add for lack of expression, ``read`` takes away again.
"""

from __future__ import annotations

import dataclasses
import gc
import gzip
import itertools
import json
import math
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from cost_model.iopddl_write import document, write
from cost_model.problem import FORBIDDEN, Problem
from graphs.errors import MeshwrightError

__all__ = ["document", "n_listed_nodes", "parse", "read", "write"]

_LARGEST = float(2**63)


def read(path: str | os.PathLike[str]) -> Problem:
    """Load an instance, gzip or plain. Raises MeshwrightError with one sentence if it is malformed.

    Hyperedges and exports may append auxiliary nodes; ``n_listed_nodes`` says how many leading
    nodes the file itself lists.
    """
    was_enabled = gc.isenabled()
    gc.disable()  # Millions of numbers and no cycles: collections would cost a third of the time.
    try:
        return parse(_load_json(Path(path)), name=_stem(Path(path)))
    finally:
        if was_enabled:
            gc.enable()


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
    node_costs = _rows(costs, "costs of node")
    node_usages = _rows(usages, "usages of node")
    k = np.diff(node_costs.offsets)
    if (k == 0).any():
        i = int(np.flatnonzero(k == 0)[0])
        raise MeshwrightError(f"node {i} has no strategies; every node needs at least one")
    uneven = np.flatnonzero(k != np.diff(node_usages.offsets))
    if len(uneven):
        i = int(uneven[0])
        raise MeshwrightError(
            f"node {i} has {k[i]} costs and {np.diff(node_usages.offsets)[i]} usages; give one "
            "usage per strategy"
        )
    extra = _field(document, "meshwright", dict, where="the file", default={})
    limit = body.get("usage_limit")
    problem = Problem(
        name=str(body.get("name", name)),
        strategy_offsets=node_costs.offsets,
        node_costs=node_costs.values,
        **_edges(edge_nodes, _rows(edge_costs, "costs of edge"), k),
        usage_nodes=np.arange(len(costs), dtype=np.int32),
        usage_intervals=_intervals(intervals),
        usage_offsets=node_usages.offsets,
        usages=node_usages.values,
        usage_limit=math.inf if limit is None else float(_row([limit], "usage_limit")[0]),
    )
    for e, ends in enumerate(edge_nodes):
        if len(ends) != 2:
            table = edge_costs[e]
            problem = _with_arity(problem, e, ends, np.array(table, dtype=np.float64))
    return _without_idle_usage(_undo_export(problem, extra) if extra else problem)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rows:
    """Ragged rows of numbers, flat."""

    values: np.ndarray
    offsets: np.ndarray


def _edges(ends: list, tables: _Rows, k: np.ndarray) -> dict[str, Any]:
    """Pairwise edges with parallel ones added; other arities are checked and left out."""
    _check_ends(ends, len(k))
    sizes = np.diff(tables.offsets)
    arity = np.fromiter(map(len, ends), dtype=np.int64, count=len(ends))
    pairs = np.array([x for x in ends if len(x) == 2], dtype=np.int64).reshape(-1, 2)
    expected = np.empty(len(ends), dtype=np.int64)
    expected[arity == 2] = k[pairs[:, 0]] * k[pairs[:, 1]]
    for e in np.flatnonzero(arity != 2):
        expected[e] = math.prod(int(k[i]) for i in ends[e])
    wrong = np.flatnonzero(sizes != expected)
    if len(wrong):
        e = int(wrong[0])
        shape = " x ".join(str(k[i]) for i in ends[e])
        raise MeshwrightError(
            f"edge {e} has {sizes[e]} costs, but its nodes have {shape} strategies; "
            f"give {expected[e]} costs"
        )
    values, offsets = tables.values, tables.offsets
    key = pairs.min(axis=1) * len(k) + pairs.max(axis=1) if len(pairs) else np.zeros(0, np.int64)
    edges = np.flatnonzero(arity == 2)
    _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    for x in np.flatnonzero(first[inverse] != np.arange(len(key))):
        y = first[inverse[x]]
        table = values[offsets[edges[x]] : offsets[edges[x] + 1]].reshape(k[pairs[x]])
        target = values[offsets[edges[y]] : offsets[edges[y] + 1]]
        target += (table if pairs[x, 0] == pairs[y, 0] else table.T).ravel()
    np.minimum(values, FORBIDDEN, out=values)
    first.sort()
    kept = edges[first]
    if len(kept) < len(ends):
        taken = [values[offsets[e] : offsets[e + 1]] for e in kept]
        values = np.concatenate([*taken, np.zeros(0)])
        offsets = _starts(sizes[kept])
    return {
        "edge_nodes": pairs[first].astype(np.int32),
        "edge_offsets": offsets,
        "edge_costs": values,
    }


def _check_ends(ends: list, n_nodes: int) -> None:
    for e, nodes in enumerate(ends):
        if not isinstance(nodes, list) or not nodes:
            raise MeshwrightError(f"edge {e} has no node list; give the indices of its nodes")
        for i in nodes:
            if type(i) is not int or not 0 <= i < n_nodes:
                raise MeshwrightError(
                    f"edge {e} names node {i!r}, but nodes are numbered 0 to {n_nodes - 1}"
                )
        if len(set(nodes)) != len(nodes):
            raise MeshwrightError(
                f"edge {e} is a cycle on one node ({nodes}); put such a cost in the node's costs"
            )


def _with_arity(p: Problem, e: int, ends: list[int], values: np.ndarray) -> Problem:
    """Add an edge of one node to its costs, or one of three or more by an auxiliary node."""
    if len(ends) == 1:
        costs = p.node_costs.copy()
        costs[p.strategy_offsets[ends[0]] : p.strategy_offsets[ends[0] + 1]] += values
        return dataclasses.replace(p, node_costs=costs)
    k = p.n_strategies()
    allowed = np.flatnonzero(values < FORBIDDEN)
    if len(allowed) == 0:
        raise MeshwrightError(f"edge {e} forbids every choice of its nodes; allow at least one")
    ties = []
    for i, states in zip(ends, np.unravel_index(allowed, [int(k[i]) for i in ends])):
        tie = np.full((int(k[i]), len(allowed)), FORBIDDEN)
        tie[states, np.arange(len(allowed))] = 0.0
        ties.append(tie.ravel())
    links = np.array([[i, p.n_nodes] for i in ends], dtype=np.int32)
    return dataclasses.replace(
        p,
        strategy_offsets=np.append(p.strategy_offsets, p.strategy_offsets[-1] + len(allowed)),
        node_costs=np.append(p.node_costs, values[allowed]),
        edge_nodes=np.concatenate([p.edge_nodes, links]),
        edge_offsets=np.append(
            p.edge_offsets, p.edge_offsets[-1] + np.cumsum([len(t) for t in ties])
        ),
        edge_costs=np.concatenate([p.edge_costs, *ties]),
        n_auxiliary=p.n_auxiliary + 1,
    )


def _undo_export(p: Problem, extra: dict[str, Any]) -> Problem:
    """Restore units, further usage entries of a node, and the auxiliary nodes of an export."""
    unit = _positive(extra.get("cost_unit", 1.0), "meshwright.cost_unit")
    usage_unit = _positive(extra.get("usage_unit", 1.0), "meshwright.usage_unit")
    copies = extra.get("usage_copies", [])
    n = p.n_nodes - len(copies)
    if not isinstance(copies, list) or n < 1 or any(type(i) is not int for i in copies):
        raise MeshwrightError("meshwright.usage_copies does not fit the nodes of the file")
    if any(not 0 <= i < n for i in copies):
        raise MeshwrightError("meshwright.usage_copies names nodes that the file lacks")

    def scaled(x: np.ndarray) -> np.ndarray:
        return np.where(x >= FORBIDDEN, FORBIDDEN, x * unit)

    cells = p.strategy_offsets[n]
    kept = np.flatnonzero(p.edge_nodes.max(axis=1, initial=0) < n)
    tables = [p.edge_costs[p.edge_offsets[e] : p.edge_offsets[e + 1]] for e in kept]
    nodes = p.usage_nodes.copy()
    nodes[n:] = copies
    return dataclasses.replace(
        p,
        strategy_offsets=p.strategy_offsets[: n + 1],
        node_costs=scaled(p.node_costs[:cells]),
        edge_nodes=p.edge_nodes[kept],
        edge_offsets=_starts(np.array([len(t) for t in tables], dtype=np.int64)),
        edge_costs=scaled(np.concatenate([*tables, np.zeros(0)])),
        usage_nodes=nodes,
        usages=p.usages * usage_unit,
        usage_limit=p.usage_limit * usage_unit,
        n_auxiliary=p.n_auxiliary + int(extra.get("n_auxiliary", 0)),
    )


def _without_idle_usage(p: Problem) -> Problem:
    """Leave out usage entries that are never live or use nothing."""
    sizes = np.diff(p.usage_offsets)
    most = np.maximum.reduceat(p.usages, p.usage_offsets[:-1])
    used = (p.usage_intervals[:, 0] < p.usage_intervals[:, 1]) & (most > 0.0)
    return dataclasses.replace(
        p,
        usage_nodes=p.usage_nodes[used],
        usage_intervals=p.usage_intervals[used],
        usage_offsets=_starts(sizes[used]),
        usages=p.usages[np.repeat(used, sizes)],
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


def _rows(rows: list, what: str) -> _Rows:
    """Check and flatten rows of numbers, each at least 0 and below 2**63."""
    try:
        offsets = _starts(np.fromiter(map(len, rows), dtype=np.int64, count=len(rows)))
        flat = list(itertools.chain.from_iterable(rows))
        if set(map(type, flat)) <= {int, float}:
            values = np.array(flat, dtype=np.float64)
            if not len(values) or (values.min() >= 0.0 and values.max() < _LARGEST):
                return _Rows(values=values, offsets=offsets)
    except (TypeError, OverflowError):
        pass
    for i, row in enumerate(rows):
        _row(row, f"{what} {i}")
    raise MeshwrightError(f"the {what}s are not rows of numbers that fit 64 bits")


def _row(row: Any, what: str) -> np.ndarray:
    """[n] float64 from one row, with the error that names it."""
    if not isinstance(row, list):
        raise MeshwrightError(f"the {what} are not a list of numbers")
    odd = [x for x in row if type(x) not in (int, float)]
    if odd:
        raise MeshwrightError(f"the {what} hold {odd[0]!r}, which is not a number")
    bad = next((x for x in row if not x >= 0), None)
    if bad is not None:
        raise MeshwrightError(f"the {what} hold {bad}; costs and usages start at 0")
    big = next((x for x in row if not x < _LARGEST), None)
    if big is not None:
        raise MeshwrightError(f"the {what} hold {float(big):g}, which overflows 64 bits")
    return np.array(row, dtype=np.float64)


def _intervals(rows: list) -> np.ndarray:
    """[n, 2] int64."""
    for i, value in enumerate(rows):
        if (
            not isinstance(value, list)
            or len(value) != 2
            or type(value[0]) is not int
            or type(value[1]) is not int
        ):
            raise MeshwrightError(
                f"the interval of node {i} is {value!r}; give [start, end] integers"
            )
        start, end = value
        if start < 0 or end < start or end >= 2**62:
            raise MeshwrightError(
                f"the interval of node {i} is {value}; it must run from a start >= 0 to an end "
                "not before it"
            )
    return np.array(rows, dtype=np.int64).reshape(-1, 2)


def _starts(sizes: np.ndarray) -> np.ndarray:
    """[n+1] int64 offsets of consecutive runs of these sizes."""
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def _positive(value: Any, what: str) -> float:
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        raise MeshwrightError(f"{what} is {value!r}; it must be a positive number")
    return float(value)
