"""Which reductions XLA:GPU runs as kernels of their own, and what those read again.

XLA:GPU leaves contractions to libraries: what they read and write is stored, and element-wise chains
between them are kernels. A softmax or a norm is one kernel too, which keeps a row from its reductions
to its result: the operand of a reduction is read once more, or what it alone is computed from is,
and there is one result. Where more than one value on the way is stored, as values that the backward
pass needs are, or where a reduction's operand is computed from several arrays and read by nothing
else, as in the gradient of a softmax, the reduction is a kernel that reads all arrays again that its
operand is computed from (jax 0.11.2, kernels of profiled programs and of a profiled train step).
"""

from __future__ import annotations

from cost_model.fusion import REDUCTIONS
from graphs.groups import LEAF, LIGHT, Grouping

_FROM_OUTSIDE = ("scan_slice", "carry_in", "carry_out")
"""What hands a region a value: it is in memory."""


def own_passes(grouping: Grouping, stored: frozenset[int]) -> dict[int, frozenset[int]]:
    """Reduction with a kernel of its own -> the arrays in memory that it reads, of at least half the
    size of its operand. ``stored`` are the tensors that live in memory."""
    walk = _Walk(grouping, stored)
    return {
        o: walk.sources(op.inputs[0], op.region)
        for o, op in enumerate(grouping.graph.ops)
        if o in walk.light and op.primitive in REDUCTIONS and not walk.keeps_rows(op)
    }


class _Walk:
    """The program between what is in memory."""

    def __init__(self, grouping: Grouping, stored: frozenset[int]) -> None:
        self.ops, self.tensors = grouping.graph.ops, grouping.graph.tensors
        self.light = {o for g in grouping.groups if g.kind in (LIGHT, LEAF) for o in g.ops}
        self.readers: dict[tuple[int, int], list[int]] = {}
        """(tensor, region) -> ops that read it there, other than to stack it."""
        stacked = set()
        for o, op in enumerate(self.ops):
            if op.primitive == "scan_stack":
                stacked.add(op.inputs[0])
                continue
            for t in {t for t in op.inputs if t >= 0}:
                self.readers.setdefault((t, op.region), []).append(o)
        self.kept = stored | stacked

    def sources(self, operand: int, region: int) -> frozenset[int]:
        """Arrays in memory that a reduction's operand is computed from."""
        found, seen, todo = set(), set(), [operand]
        while todo:
            t = todo.pop()
            if t in seen:
                continue
            seen.add(t)
            if self._computed(t, region):
                todo += self._inputs(t, operand)
            else:
                found.add(t)
        return frozenset(found)

    def keeps_rows(self, reduction) -> bool:
        """Whether one kernel reduces and goes on."""
        operand, region = reduction.inputs[0], reduction.region
        t = operand
        while len(self.readers.get((t, region), ())) < 2:
            inputs = self._inputs(t, operand) if self._computed(t, region) else ()
            if len(inputs) != 1:
                return False
            (t,) = inputs
        found, seen, todo = set(), set(), [operand]
        while todo and len(found) < 2:
            t = todo.pop()
            if t in seen:
                continue
            seen.add(t)
            if t in self.kept and self._made(t, region):
                found.add(t)
            readers = (o for o in self.readers.get((t, region), ()) if o in self.light)
            made = (u for o in readers for u in self.ops[o].outputs)
            todo += [u for u in made if self._large(u, operand)]
        return len(found) < 2

    def _computed(self, t: int, region: int) -> bool:
        """Whether a kernel that needs t computes it, rather than to read it."""
        if t in self.kept or not self._made(t, region):
            return False
        return self.ops[self.tensors[t].producer].primitive not in REDUCTIONS

    def _made(self, t: int, region: int) -> bool:
        """Whether a loop of this region computes t."""
        o = self.tensors[t].producer
        if o not in self.light or self.ops[o].region != region:
            return False
        return self.ops[o].primitive not in _FROM_OUTSIDE

    def _inputs(self, t: int, operand: int) -> set[int]:
        inputs = self.ops[self.tensors[t].producer].inputs
        return {s for s in inputs if s >= 0 and self._large(s, operand)}

    def _large(self, t: int, operand: int) -> bool:
        return 2 * self.tensors[t].n_elements >= self.tensors[operand].n_elements
