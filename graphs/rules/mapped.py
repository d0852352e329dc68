"""What the body of a `jax.shard_map` does on one device: counts, read from its jaxpr.

The body sees its share along the axes that the map names; the other axes of the mesh still share its
arrays. Loops count their trips; branches are weighed equally, as everywhere in a graph.

The sharding rule of a map keeps what its specs do not name whole. A rule for one map, registered as
``shard_map:NAME`` by its body's function, says more where its author knows that the other axes may
share a dimension (attention's batch and heads on a ring).
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from graphs.rules.rule import WHOLE, OpRule, register_rule

_COLLECTIVES = {
    "ppermute": "collective_permute",
    "psum": "all_reduce",
    "psum2": "all_reduce",
    "psum_invariant": "all_reduce",
    "pmax": "all_reduce",
    "pmin": "all_reduce",
    "all_gather": "all_gather",
    "all_gather_invariant": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "all_to_all": "all_to_all",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MapWork:
    """Of one device along the axes that the map names."""

    products: Mapping[tuple[int, int, int, int, str], float]
    """(batch, m, k, n, type) of a contraction -> how often."""
    elements: Mapping[str, float]
    """Other primitive -> elements of its results."""
    collectives: Mapping[tuple[str, tuple[str, ...]], float]
    """(kind, mesh axes) -> payload bytes."""
    starts: Mapping[tuple[str, tuple[str, ...]], float]
    """(kind, mesh axes) -> how often."""

    @property
    def flops(self) -> float:
        """Multiply-adds counted two."""
        return sum(2.0 * b * m * k * n * t for (b, m, k, n, _), t in self.products.items())


def map_name(params: Mapping[str, Any]) -> str:
    """The name of the function that is mapped."""
    return getattr(params["jaxpr"].debug_info, "func_name", "") or ""


def map_work(params: Mapping[str, Any]) -> MapWork:
    """Counts of a shard_map's body."""
    products: dict[tuple[int, int, int, int, str], float] = collections.defaultdict(float)
    elements: dict[str, float] = collections.defaultdict(float)
    moved: dict[tuple[str, tuple[str, ...]], float] = collections.defaultdict(float)
    starts: dict[tuple[str, tuple[str, ...]], float] = collections.defaultdict(float)
    for eqn, times in _equations(params["jaxpr"]):
        name = eqn.primitive.name
        if name == "dot_general":
            products[_product(eqn)] += times
        elif name in _COLLECTIVES:
            key = (_COLLECTIVES[name], _axes(eqn.params))
            arrays = eqn.outvars if name.startswith("all_gather") else eqn.invars
            moved[key] += times * sum(_n_bytes(v) for v in arrays if not hasattr(v, "val"))
            starts[key] += times * len(eqn.outvars)
        else:
            elements[name] += times * sum(math.prod(v.aval.shape) for v in eqn.outvars)
    return MapWork(products=products, elements=elements, collectives=moved, starts=starts)


def _equations(jaxpr: Any, times: float = 1.0) -> Iterator[tuple[Any, float]]:
    """(equation, how often it runs) of all that hold no others."""
    for eqn in jaxpr.eqns:
        inner = [
            found
            for value in eqn.params.values()
            for item in (value if isinstance(value, (tuple, list)) else (value,))
            if hasattr(found := getattr(item, "jaxpr", item), "eqns")
        ]
        if not inner:
            yield eqn, times
            continue
        each = times
        if eqn.primitive.name == "scan":
            each = times * float(eqn.params["length"])
        elif eqn.primitive.name == "cond":
            each = times / len(inner)
        for body in inner:
            yield from _equations(body, each)


def _product(eqn: Any) -> tuple[int, int, int, int, str]:
    (left_k, _), (left_b, _) = eqn.params["dimension_numbers"]
    left, right = (v.aval.shape for v in eqn.invars)

    def size(shape, dims) -> int:
        return math.prod(shape[d] for d in dims)

    batch, depth = size(left, left_b), size(left, left_k)
    m, n = math.prod(left) // (batch * depth), math.prod(right) // (batch * depth)
    return batch, m, depth, n, str(eqn.invars[0].aval.dtype)


def _axes(params: Mapping[str, Any]) -> tuple[str, ...]:
    named = params.get("axes", params.get("axis_name", ()))
    named = (named,) if isinstance(named, str) else named
    return tuple(a for a in named if isinstance(a, str))


def _n_bytes(var: Any) -> float:
    return math.prod(var.aval.shape) * var.aval.dtype.itemsize


def _ring_rule(params, ins, outs, operands, results) -> OpRule:
    """Letters for dimensions: c the ring, b batch, k key heads, g queries per key head, . whole."""
    letters = "cbkg"
    sizes = dict.fromkeys(letters, 0)
    for text, shape in zip((*operands, *results), (*ins, *outs)):
        for letter, n in zip(text, shape):
            sizes[letter] = math.gcd(sizes.get(letter, 0), n)

    def factors(text: str, shape) -> tuple[int, ...]:
        return tuple(
            WHOLE if x == "." or (n <= 1 and x != "c") else letters.index(x)
            for x, n in zip(text, shape)
        )

    return OpRule(
        operands=tuple(factors(t, s) for t, s in zip(operands, ins)),
        results=tuple(factors(t, s) for t, s in zip(results, outs)),
        sizes=tuple(sizes[x] for x in letters),
        light=False,
        flops=map_work(params).flops,
        pins={0: tuple(params["newly_manual_axes"])},
    )


_QUERY, _KEY, _ROW = "bckg.", "bck.", "bkgc"


@register_rule("shard_map:ring_forward")
def ring_forward(params, ins, outs) -> OpRule:
    """(positions of queries and keys, q, k, v) -> (out, logsumexp) of `graphs.zoo.ring`."""
    return _ring_rule(params, ins, outs, ("c", "c", _QUERY, _KEY, _KEY), (_QUERY, _ROW))


@register_rule("shard_map:ring_backward")
def ring_backward(params, ins, outs) -> OpRule:
    """(positions of queries and keys, q, k, v, out, logsumexp, cotangents of both) -> cotangents of
    q, k, v."""
    given = ("c", "c", _QUERY, _KEY, _KEY, _QUERY, _ROW, _QUERY, _ROW)
    return _ring_rule(params, ins, outs, given, (_QUERY, _KEY, _KEY))
