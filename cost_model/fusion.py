"""What XLA stores and what it computes again: tensors in memory, and chains inside contractions.

An element-wise chain that contractions read is not stored: the kernel of each contraction computes
it from what is stored, once for every block of its other operand. A chain starts at tensors that
other kernels leave in memory: results of contractions and reductions, what a loop carries, and
results of element-wise operations that run at the end of a contraction's own kernel, because they
alone read its result.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from graphs.groups import HEAVY, LIGHT, Grouping

TRANSCENDENTAL = frozenset(
    "cbrt cos cosh digamma erf erf_inv erfc exp exp2 expm1 lgamma log log1p logistic pow rsqrt sin "
    "sinh sqrt tan tanh div".split()
)
"""Vector primitives that take several instructions."""
_TRANSCENDENTAL_COST = 6.0
_VIEWS = frozenset(
    "reshape transpose squeeze expand_dims broadcast_in_dim slice split scan_slice scan_stack "
    "carry_in carry_out merge copy stop_gradient concatenate pad literal iota".split()
)
REDUCTIONS = frozenset(
    "reduce_sum reduce_max reduce_min reduce_prod argmax argmin cumsum cumlogsumexp cummax".split()
)
"""Vector primitives whose operand has to pass before their result is there."""
CONTRACTIONS = ("dot_general", "ragged_dot", "ragged_dot_general")
_THROUGH = frozenset("reshape transpose squeeze expand_dims broadcast_in_dim stop_gradient".split())
"""Views that a chain may contain."""
BY_ROW = 5.0
"""Vector instructions to spread one number a row along the lanes (profiled contractions of v6e)."""
_CASTS = frozenset("convert_element_type reduce_precision".split())
_ENDS = frozenset("concatenate pad slice split dynamic_slice dynamic_update_slice".split())


def vector_cost(primitive: str) -> float:
    """Vector instructions of an element of a primitive's result; 0 for views."""
    if primitive in _VIEWS:
        return 0.0
    return _TRANSCENDENTAL_COST if primitive in TRANSCENDENTAL else 1.0


def materialised(grouping: Grouping) -> set[int]:
    """Tensors that live in memory: read by another group or region, or results of the program."""
    graph = grouping.graph
    found = {t for t in graph.outputs if t >= 0} | set(graph.inputs)
    for item in grouping.groups:
        for view in item.views:
            found.add(view.tensor)
        if item.kind == HEAVY:
            found |= set(item.tensors)
    for op in graph.ops:
        if op.primitive in ("scan_stack", "carry_out", "carry_in"):
            found |= set(op.outputs)
            continue
        for t in op.inputs:
            if t >= 0 and graph.tensors[t].region != op.region:
                found.add(t)
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chain:
    """An operand of a contraction, computed inside its kernel or stored."""

    instructions: float = 0.0
    """Vector instructions of an element: :func:`vector_cost`, and ``BY_ROW`` for each operand that
    has one number a row; 0 where it is stored."""
    itemsize: float = 2.0
    """Bytes read for an element, over all arrays of the operand's size."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fusion:
    """How XLA cuts a program into kernels."""

    stored: frozenset[int]
    """Tensors that live in memory."""
    wide: frozenset[int]
    """Results of contractions that stay in float32: what ends their kernels is computed in it."""
    chains: Mapping[int, tuple[Chain, Chain]]
    """Contraction op -> its left and right operand."""
    inside: frozenset[int]
    """Ops that run nowhere but inside contractions that read them."""
    ended: frozenset[int]
    """Ops that only pass on the result of a contraction, at the end of its kernel."""
    at_end: frozenset[int]
    """Tensors that a contraction's kernel has in hand: its result, and what passes it on."""
    passes: Mapping[int, frozenset[int]] = dataclasses.field(default_factory=dict)
    """Reduction with a kernel of its own -> what it reads, on GPUs (:mod:`cost_model.gpu_fusion`)."""

    @classmethod
    def of(cls, grouping: Grouping) -> Fusion:
        graph = grouping.graph
        walk = _Walk(grouping)
        chains = {
            o: (walk.chain(o, op.inputs[0]), walk.chain(o, op.inputs[1]))
            for o, op in enumerate(graph.ops)
            if op.primitive in CONTRACTIONS
        }
        ended, at_end = walk.ends()
        return cls(
            stored=frozenset(materialised(grouping)),
            wide=frozenset(graph.ops[o].outputs[0] for o in chains if walk.widens(o)),
            chains=chains,
            inside=walk.inside(),
            ended=ended,
            at_end=at_end,
        )


class _Walk:
    """Chains of a program, from its contractions back to what is stored."""

    def __init__(self, grouping: Grouping) -> None:
        self.grouping, self.graph = grouping, grouping.graph
        self.readers: dict[int, list[int]] = {}
        for o, op in enumerate(self.graph.ops):
            for t in set(op.inputs):
                self.readers.setdefault(t, []).append(o)
        self.visited: set[int] = set()
        """Ops found inside a chain."""
        light = {o for g in grouping.groups if g.kind == LIGHT for o in g.ops}
        self.loops = {o for o in light if self.elementwise(o) and not grouping.rules[o].pins}
        self.last: dict[int, bool] = {}
        self.little: set[int] = set()
        """Tensors that are counters, views of small ones, or computed from such, as masks are."""
        for o, op in enumerate(self.graph.ops):  # in order, so that no search goes deep
            if o in self.loops:
                self.ends_contraction(o)
            if op.primitive == "iota" or (o in self.loops and self._of_little(o)):
                self.little.add(op.outputs[0])

    def _of_little(self, o: int) -> bool:
        op, tensors = self.graph.ops[o], self.graph.tensors
        size = tensors[op.outputs[0]].n_elements
        return all(
            t < 0 or t in self.little or 2 * tensors[t].n_elements <= size for t in op.inputs
        )

    def elementwise(self, o: int) -> bool:
        op = self.graph.ops[o]
        if len(op.outputs) != 1 or op.primitive in _ENDS:
            return False
        if op.primitive in _THROUGH:
            return True
        shape = self.graph.tensors[op.outputs[0]].shape
        spread = (self.graph.tensors[t].shape for t in op.inputs if t >= 0)
        same = all(all(a in (1, b) for a, b in zip(s, shape)) for s in spread)
        return same and vector_cost(op.primitive) > 0

    def ends_contraction(self, o: int) -> bool:
        """Whether the op runs at the end of the kernel of a contraction that only it reads.

        Changes of type and views go with what reads them: alone they are no reason to store.
        """
        op = self.graph.ops[o]
        if op.primitive in _CASTS or op.primitive in _THROUGH:
            return False
        if o not in self.last:
            self.last[o] = any(
                self._from_contraction(t) for t in op.inputs if t >= 0 and self._same_region(t, o)
            )
        return self.last[o]

    def _same_region(self, t: int, o: int) -> bool:
        return self.graph.tensors[t].region == self.graph.ops[o].region

    def _from_contraction(self, t: int) -> bool:
        """Whether one op alone reads t, which a contraction's kernel has in hand."""
        producer = self.graph.tensors[t].producer
        if producer < 0 or len(self.readers.get(t, ())) != 1:
            return False
        op = self.graph.ops[producer]
        if op.primitive in CONTRACTIONS:
            return True
        if producer not in self.loops:
            return False
        if op.primitive in _CASTS or op.primitive in _THROUGH:
            return op.inputs[0] >= 0 and self._from_contraction(op.inputs[0])
        return self.ends_contraction(producer)

    def widens(self, contraction: int) -> bool:
        """Whether the kernel of a contraction leaves float32, because it ends in such ops."""
        o, wide = contraction, False
        while True:
            readers = self.readers.get(self.graph.ops[o].outputs[0], ())
            if len(readers) != 1:
                return False
            o = readers[0]
            if self.graph.ops[o].primitive not in _CASTS | _THROUGH:
                return wide and self.ends_contraction(o)
            wide = self.graph.tensors[self.graph.ops[o].outputs[0]].dtype == "float32"

    def chain(self, reader: int, operand: int) -> Chain:
        """What the contraction ``reader`` computes of its operand."""
        graph = self.graph
        region, size = graph.ops[reader].region, graph.tensors[operand].n_elements
        instructions, itemsize = 0.0, 0
        seen, todo = set(), [operand]
        while todo:
            t = todo.pop()
            if t < 0 or t in seen:
                continue
            seen.add(t)
            tensor = graph.tensors[t]
            if 2 * tensor.n_elements < size:
                continue  # a number a row or a column
            o = tensor.producer
            inner = o >= 0 and graph.ops[o].region == region and o in self.loops
            if not inner or self.ends_contraction(o):
                itemsize += tensor.itemsize
                continue
            self.visited.add(o)
            instructions += vector_cost(graph.ops[o].primitive) + BY_ROW * self._by_row(o)
            todo += graph.ops[o].inputs
        return Chain(instructions=instructions, itemsize=itemsize)

    def ends(self) -> tuple[frozenset[int], frozenset[int]]:
        """The ops and tensors of ``Fusion.ended`` and ``Fusion.at_end``."""
        ended, at_end = set(), set()
        for o, op in enumerate(self.graph.ops):
            if op.primitive in CONTRACTIONS:
                at_end.add(op.outputs[0])
            elif o in self.loops and self._passes_on(o, at_end):
                ended.add(o)
                at_end.add(op.outputs[0])
        return frozenset(ended), frozenset(at_end)

    def _passes_on(self, o: int, at_end: set[int]) -> bool:
        """Whether an op reads nothing of its size but a contraction's result that only it reads."""
        op = self.graph.ops[o]
        size = self.graph.tensors[op.outputs[0]].n_elements
        large = [t for t in op.inputs if t >= 0 and 2 * self.graph.tensors[t].n_elements > size]
        return (
            bool(large)
            and all(
                (t in at_end and len(self.readers[t]) == 1 and self._same_region(t, o))
                or t in self.little
                for t in large
            )
            and any(t in at_end for t in large)
        )

    def _by_row(self, o: int) -> int:
        """Operands of an op with one number a row, which has to be spread along the row."""
        shapes = [self.graph.tensors[t].shape for t in self.graph.ops[o].inputs if t >= 0]
        return sum(len(s) > 1 and s[-1] == 1 and math.prod(s) > 1 for s in shapes)

    def inside(self) -> frozenset[int]:
        """Ops of the chains whose results nothing but these chains and contractions read."""
        graph, results = self.graph, set(self.graph.outputs)
        found: set[int] = set()
        for o in sorted(self.visited, reverse=True):
            t = graph.ops[o].outputs[0]
            if t not in results and all(
                r in found or graph.ops[r].primitive in CONTRACTIONS
                for r in self.readers.get(t, ())
            ):
                found.add(o)
        return frozenset(found)
