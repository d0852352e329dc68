"""Join ops that must agree on a sharding into decision groups.

A *heavy* op (contraction, gather, scatter, unknown) is a group of its own: it decides how it is
computed, hence the sharding of its operands and of its result. *Light* ops (elementwise, reductions,
views) follow each other: a connected set of them is one group with one class per named dimension,
and that class is sharded the same way everywhere in the group. Where joining would give two
dimensions of one tensor the same class, where a small operand is broadcast into a larger result,
where the batch is summed away, or where an operator needs a dimension complete, the operand is not
joined: the group reads a *view* of it, a copy that may be sharded differently, and the price of
resharding lies between the two groups.

Inputs used by heavy ops (weights, batches) are groups of their own, with what is cast or sliced from
them; inputs that only meet light ops (optimizer moments) join those.

A tensor read by several heavy ops is resharded once, through a *copy* group that they share.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from graphs.errors import MeshwrightError
from graphs.graph import Graph
from graphs.rules import OpRule, rule_of
from graphs.rules.kernel import kernel_name

LEAF, LIGHT, HEAVY, COPY = "leaf", "light", "heavy", "copy"


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """An operand that a group reads from another group."""

    tensor: int
    """The tensor read."""
    dims: tuple[int, ...]
    """Class of each dimension inside the reading group, or WHOLE."""
    region: int
    """Region of the readers."""
    ops: tuple[int, ...]
    """The ops that read it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reduction:
    """A reduced class inside a group: sharding it leaves partial results."""

    op: int
    cls: int
    how: str
    """sum | max."""
    result: int
    """Tensor that has to be combined."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """One decision: which mesh axis shards which class."""

    kind: str
    """leaf | light | heavy | copy."""
    sizes: tuple[int, ...]
    """[C] granularity of each class: the product of the mesh axes on it must divide this."""
    tensors: Mapping[int, tuple[int, ...]]
    """Owned tensor -> class of each dimension (or WHOLE)."""
    views: tuple[View, ...]
    ops: tuple[int, ...]
    reductions: tuple[Reduction, ...]
    source: int
    """For a copy, the tensor it copies; else -1."""
    factors: tuple[int, ...] = ()
    """For a heavy group, the class of each factor of its op's rule (or WHOLE)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grouping:
    """The groups of a graph."""

    graph: Graph
    rules: tuple[OpRule, ...]
    """[ops] the sharding rule of each op."""
    groups: tuple[Group, ...]
    group_of: tuple[int, ...]
    """[tensors] the group that owns each tensor."""
    redirect: Mapping[tuple[int, int], int]
    """(tensor, region) -> copy group that its heavy readers in that region share."""
    warnings: tuple[str, ...]

    def source_group(self, group: int, view: View) -> int:
        """The group that a view reads from: the shared copy where there is one."""
        if self.groups[group].kind == HEAVY:
            shared = self.redirect.get((view.tensor, view.region))
            if shared is not None:
                return shared
        return self.group_of[view.tensor]

    def leaf_of(self, group: int) -> int:
        """The group of inputs that a group is, or is a copy of; -1 where it is neither."""
        if self.groups[group].kind == COPY:
            group = self.group_of[self.groups[group].source]
        return int(group) if self.groups[group].kind == LEAF else -1


def group(graph: Graph, *, strict: bool = False) -> Grouping:
    """Join the ops of a graph into groups.

    With ``strict`` a primitive without a sharding rule raises MeshwrightError; otherwise it is kept
    whole and a warning names it.
    """
    rules, warnings = _rules(graph, strict)
    from graphs.joining import Joiner

    joiner = Joiner(graph, rules)
    joiner.run()
    groups, group_of, redirect = joiner.finish()
    return Grouping(
        graph=graph,
        rules=tuple(rules),
        groups=groups,
        group_of=group_of,
        redirect=redirect,
        warnings=(*graph.warnings, *warnings),
    )


def _rules(graph: Graph, strict: bool) -> tuple[list[OpRule], list[str]]:
    rules, unknown, cache = [], {}, {}
    for op in graph.ops:
        ins = tuple(graph.tensors[t].shape if t >= 0 else () for t in op.inputs)
        outs = tuple(graph.tensors[t].shape for t in op.outputs)
        key = None
        if all(isinstance(v, (int, str, bool, tuple, type(None))) for v in op.params.values()):
            key = (op.primitive, ins, outs, tuple(sorted(op.params.items(), key=lambda kv: kv[0])))
        try:
            rule = cache.get(key) if key is not None else None
        except TypeError:
            key, rule = None, None
        if rule is None:
            rule = rule_of(op.primitive, op.params, ins, outs)
            if key is not None:
                cache[key] = rule
        if not rule.known and any(math.prod(s) > 1 for s in (*ins, *outs)):
            name = op.primitive
            if name == "pallas_call":
                name = f"{name}:{kernel_name(op.params)}"
            unknown[name] = unknown.get(name, 0) + 1
        rules.append(rule)
    messages = [
        f"primitive {name!r} ({count} uses) has no sharding rule and is kept whole on every device; "
        f"add one with @graphs.rules.register_rule({name!r})"
        for name, count in unknown.items()
    ]
    if strict and messages:
        raise MeshwrightError(messages[0])
    return rules, messages
