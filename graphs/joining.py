"""Joining: union-find over tensor dimensions (classes) and over tensors (groups)."""

from __future__ import annotations

import math

from graphs.graph import Graph
from graphs.groups import COPY, HEAVY, LEAF, LIGHT, Group, Reduction, View
from graphs.rules import WHOLE, OpRule


class Joiner:
    """Union-find over tensor dimensions (classes) and over tensors (groups)."""

    def __init__(self, graph: Graph, rules: list[OpRule]) -> None:
        self.graph, self.rules = graph, rules
        n = len(graph.tensors)
        self.owner = list(range(n))  # union-find parent of each tensor or view: its group
        self.rank: list[tuple[int, ...]] = []  # dimension nodes of each tensor or view
        self.parent: list[int] = []  # union-find parent of each dimension node
        self.size: list[int] = []
        self.whole: list[bool] = []
        self.members: list[set[int]] = []  # tensors with a dimension in the class
        for t in range(n):
            self.rank.append(self._nodes(graph.tensors[t].shape, t))
        self.views: list[tuple[int, int, int, int]] = []  # (item, tensor, region, op)
        self.reductions: list[tuple[int, int, int, str, int]] = []
        self.op_item: list[int] = [-1] * len(graph.ops)
        self.heavy: set[int] = set()  # tensors made by heavy ops
        self.anchors: dict[int, dict[int, int]] = {}  # heavy op -> dimension node of each factor
        self.derived: dict[int, int] = {}  # tensor -> input it is cast or cut from
        self.weights = self._weights()

    def _nodes(self, shape, item) -> tuple[int, ...]:
        first = len(self.parent)
        for n in shape:
            self.parent.append(len(self.parent))
            self.size.append(n)
            self.whole.append(n <= 1)
            self.members.append({item})
        return tuple(range(first, first + len(shape)))

    def find(self, node: int) -> int:
        while self.parent[node] != node:
            self.parent[node] = self.parent[self.parent[node]]
            node = self.parent[node]
        return node

    def root(self, item: int) -> int:
        while self.owner[item] != item:
            self.owner[item] = self.owner[self.owner[item]]
            item = self.owner[item]
        return item

    def _weights(self) -> set[int]:
        """Inputs that, possibly cast or cut, feed a heavy op or are broadcast into a larger one."""
        graph, weights = self.graph, set()
        readers_elsewhere: dict[int, set[int]] = {}
        for t in graph.inputs:
            self.derived[t] = t
        for op, rule in zip(graph.ops, self.rules):
            big = [t for t in op.inputs if t >= 0 and graph.tensors[t].n_elements > 1]
            roots = {self.derived[t] for t in big if t in self.derived}
            if not roots:
                continue
            grows = any(
                graph.tensors[t].n_elements > graph.tensors[b].n_elements
                for t in op.outputs
                for b in big
                if b in self.derived
            )
            if not rule.light or grows:
                weights |= roots
            elif len(big) == 1 and not _cuts(rule, op, graph, 0):
                for t in op.outputs:
                    self.derived[t] = next(iter(roots))
            else:
                for r in roots:
                    readers_elsewhere.setdefault(r, set()).add(op.region)
        return weights

    def union_dims(self, pairs: list[tuple[int, int]]) -> bool:
        """Join classes pairwise; refuse (and change nothing) if a tensor would get one twice."""
        trial: list[tuple[int, int]] = []
        for a, b in pairs:
            ra, rb = self.find(a), self.find(b)
            if ra != rb and (ra, rb) not in trial and (rb, ra) not in trial:
                ma, mb = self.members[ra], self.members[rb]
                small, large = (ma, mb) if len(ma) < len(mb) else (mb, ma)
                if any(m in large for m in small):
                    return False
                trial.append((ra, rb))
        if not trial:
            return True
        if len(trial) > 1:  # three-way merges: check that no two pairs bring one tensor twice
            roots: dict[int, set[int]] = {}
            for ra, rb in trial:
                group_a = roots.get(ra, {ra})
                group_b = roots.get(rb, {rb})
                if group_a is group_b:
                    continue
                union = group_a | group_b
                seen = 0
                if len(union) > 2:
                    total: set[int] = set()
                    for r in union:
                        seen += len(self.members[r])
                        total |= self.members[r]
                    if len(total) != seen:
                        return False
                for r in union:
                    roots[r] = union
        for a, b in pairs:
            ra, rb = self.find(a), self.find(b)
            if ra == rb:
                continue
            if len(self.members[ra]) < len(self.members[rb]):
                ra, rb = rb, ra
            self.parent[rb] = ra
            self.members[ra] |= self.members[rb]
            self.members[rb] = set()
            self.size[ra] = math.gcd(self.size[ra], self.size[rb])
            self.whole[ra] = self.whole[ra] or self.whole[rb]
        return True

    def run(self) -> None:
        for index, (op, rule) in enumerate(zip(self.graph.ops, self.rules)):
            if rule.light:
                self._light(index, op, rule)
            else:
                self._heavy(index, op, rule)

    def _view(self, t: int, op_index: int) -> int:
        item = len(self.owner)
        self.owner.append(item)
        self.rank.append(self._nodes(self.graph.tensors[t].shape, item))
        self.views.append((item, t, self.graph.ops[op_index].region, op_index))
        return item

    def _tie(self, item: int, factors, anchor: dict[int, int], rule: OpRule) -> bool:
        pairs = []
        for node, f in zip(self.rank[item], factors):
            if f != WHOLE and f in anchor:
                pairs.append((node, anchor[f]))
        if not self.union_dims(pairs):
            return False
        for node, f in zip(self.rank[item], factors):
            root = self.find(node)
            if f == WHOLE:
                self.whole[root] = True
            else:
                self.size[root] = math.gcd(self.size[root], rule.sizes[f])
                anchor.setdefault(f, node)
        return True

    def _light(self, index, op, rule) -> None:
        graph = self.graph
        anchor: dict[int, int] = {}
        home = op.outputs[0]
        for t, factors in zip(op.outputs, rule.results):
            if not self._tie(t, factors, anchor, rule):  # repeated result: cannot happen in a rule
                raise AssertionError(f"rule of {op.primitive} gives one tensor a factor twice")
            self.owner[self.root(t)] = self.root(home)
        self.op_item[index] = home
        done: dict[int, int] = {}
        order = sorted(
            range(len(op.inputs)),
            key=lambda i: op.primitive == "carry_out" and i == 0,
        )
        n_big = len({t for t in op.inputs if t >= 0 and graph.tensors[t].n_elements > 1})
        for i in order:
            t = op.inputs[i]
            if t < 0 or graph.tensors[t].n_elements <= 1 or t in done:
                continue
            item = t
            if not self._joins(t, op, rule, i, n_big) or not self._join(t, home, i, rule, anchor):
                item = self._view(t, index)
                self._tie(item, rule.operands[i], anchor, rule)
                self.owner[self.root(item)] = self.root(home)
            done[t] = item
            for f, how in rule.reduced.items():
                for node, g in zip(self.rank[item], rule.operands[i]):
                    if g == f:
                        self.reductions.append((home, index, node, how, op.outputs[0]))

    def _joins(self, t, op, rule, i, n_big) -> bool:
        if t in self.heavy or _cuts(rule, op, self.graph, i):
            return False
        if op.primitive.startswith("reduce_") and 0 in op.params.get("axes", ()):
            return (
                False  # a sum over the batch (the gradient of a scale or bias) meets the optimizer
            )
        n = self.graph.tensors[t].n_elements
        if n < self.graph.tensors[op.outputs[0]].n_elements and op.primitive not in (
            "scan_stack",
            "pad",
        ):
            return False  # broadcast: a small operand must not tie the large ones that share it
        leaf = self.derived.get(t)
        if leaf is not None and leaf in self.weights:
            return n_big == 1 and op.outputs[0] in self.derived
        return True

    def _join(self, t, home, i, rule, anchor) -> bool:
        trial = dict(anchor)
        if not self._tie(t, rule.operands[i], trial, rule):
            return False
        anchor.update(trial)
        self.owner[self.root(t)] = self.root(home)
        return True

    def _heavy(self, index, op, rule) -> None:
        anchor: dict[int, int] = {}
        home = op.outputs[0]
        for t, factors in zip(op.outputs, rule.results):
            self._tie(t, factors, anchor, rule)
            self.owner[self.root(t)] = self.root(home)
            self.heavy.add(t)
        self.op_item[index] = home
        for i, t in enumerate(op.inputs):
            if t < 0 or self.graph.tensors[t].n_elements <= 1:
                continue
            item = self._view(t, index)
            self._tie(item, rule.operands[i], anchor, rule)
            self.owner[self.root(item)] = self.root(home)
        self.anchors[index] = anchor
        for f, how in rule.reduced.items():
            if f in anchor:
                self.reductions.append((home, index, anchor[f], how, home))

    def finish(self):
        graph = self.graph
        n = len(graph.tensors)
        index: dict[int, int] = {}
        parts: list[dict] = []

        def part(item) -> dict:
            root = self.root(item)
            if root not in index:
                index[root] = len(parts)
                parts.append(
                    dict(classes={}, sizes=[], tensors={}, views={}, ops=[], reductions=[])
                )
            return parts[index[root]]

        def cls(p, node) -> int:
            root = self.find(node)
            if self.whole[root]:
                return WHOLE
            if root not in p["classes"]:
                p["classes"][root] = len(p["sizes"])
                p["sizes"].append(self.size[root])
            return p["classes"][root]

        for t in range(n):
            p = part(t)
            p["tensors"][t] = tuple(cls(p, node) for node in self.rank[t])
        for item, t, region, op in self.views:
            p = part(item)
            dims = tuple(cls(p, node) for node in self.rank[item])
            p["views"].setdefault((t, dims, region), []).append(op)
        for op, item in enumerate(self.op_item):
            part(item)["ops"].append(op)
        for item, op, node, how, result in self.reductions:
            p = part(item)
            c = cls(p, node)
            if c != WHOLE:
                p["reductions"].append(Reduction(op=op, cls=c, how=how, result=result))
        inputs = set(graph.inputs)
        groups: list[Group] = []
        for p in parts:
            heavy = any(not self.rules[op].light for op in p["ops"])
            leaf = any(t in inputs for t in p["tensors"])
            factors: tuple[int, ...] = ()
            if heavy:
                op = next(op for op in p["ops"] if not self.rules[op].light)
                anchor = self.anchors[op]
                factors = tuple(
                    cls(p, anchor[f]) if f in anchor else WHOLE
                    for f in range(len(self.rules[op].sizes))
                )
            groups.append(
                Group(
                    kind=HEAVY if heavy else LEAF if leaf and not p["views"] else LIGHT,
                    sizes=tuple(p["sizes"]),
                    tensors=p["tensors"],
                    views=tuple(
                        View(tensor=t, dims=dims, region=region, ops=tuple(ops))
                        for (t, dims, region), ops in p["views"].items()
                    ),
                    ops=tuple(p["ops"]),
                    reductions=tuple(dict.fromkeys(p["reductions"])),
                    source=-1,
                    factors=factors,
                )
            )
        group_of = tuple(index[self.root(t)] for t in range(n))
        groups, redirect = _share_copies(graph, groups)
        return tuple(groups), group_of, redirect


def _share_copies(graph: Graph, groups: list[Group]):
    """A copy group for each tensor that several heavy groups read in one region."""
    readers: dict[tuple[int, int], set[int]] = {}
    for g, item in enumerate(groups):
        if item.kind == HEAVY:
            for view in item.views:
                readers.setdefault((view.tensor, view.region), set()).add(g)
    redirect: dict[tuple[int, int], int] = {}
    for (t, region), who in readers.items():
        if len(who) < 2 or len(graph.tensors[t].shape) < 2:
            continue
        shape = graph.tensors[t].shape
        dims, sizes = [], []
        for n in shape:
            dims.append(len(sizes) if n > 1 else WHOLE)
            if n > 1:
                sizes.append(n)
        redirect[(t, region)] = len(groups)
        groups.append(
            Group(
                kind=COPY,
                sizes=tuple(sizes),
                tensors={},
                views=(View(tensor=t, dims=tuple(dims), region=region, ops=()),),
                ops=(),
                reductions=(),
                source=t,
            )
        )
    return groups, redirect


def _cuts(rule: OpRule, op, graph: Graph, i: int) -> bool:
    """Whether the op needs a dimension of operand i complete that is not trivially so."""
    if i >= len(rule.operands) or op.primitive == "scan_slice":
        return False
    shape = graph.tensors[op.inputs[i]].shape if op.inputs[i] >= 0 else ()
    return any(f == WHOLE and n > 1 for f, n in zip(rule.operands[i], shape))
