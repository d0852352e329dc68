"""A program, flattened: tensors, ops in program order, and the regions (loop bodies) they run in.

Calls (jit, remat, custom derivatives) are inlined. A loop keeps one copy of its body; the body is a
:class:`Region` with its trip count, and four bookkeeping primitives tie it to the outside:

``scan_slice``  outer [T, ...] -> body [...]            one slice of a scanned input
``carry_in``    initial value -> body value             runs once, outside
``carry_out``   (body result, body value) -> result     runs every trip; all three agree on sharding
``scan_stack``  body [...] -> outer [T, ...]            runs every trip

Scan and while constants are the outer tensor itself. Branches of ``cond`` are weighed equally and
meet in a ``merge``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """A value of the program."""

    shape: tuple[int, ...]
    dtype: str
    """Name of the element type, as in ``numpy.dtype.name`` (``bfloat16``, ``key<fry>`` …)."""
    itemsize: int
    """Bytes of one element."""
    producer: int
    """Op that makes it, or -1 for an input or a captured constant of the program."""
    region: int
    """Region it lives in."""

    @functools.cached_property
    def n_elements(self) -> int:
        return math.prod(self.shape)

    @functools.cached_property
    def n_bytes(self) -> int:
        return self.n_elements * self.itemsize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Op:
    """One primitive application."""

    primitive: str
    inputs: tuple[int, ...]
    """Tensor ids; -1 for a literal (a scalar constant)."""
    outputs: tuple[int, ...]
    """Tensor ids."""
    region: int
    params: dict[str, Any]
    """The jaxpr equation's parameters (bodies removed)."""
    source: str = ""
    """Where the user's code made it, for messages."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Region:
    """The top level, a loop body, or a branch."""

    parent: int
    """-1 for the top level."""
    kind: str
    """top | scan | while | branch."""
    trips: float
    """Times the body runs each time its parent runs; a branch has 1 / number of branches."""
    start: int
    stop: int
    """Ops [start, stop) in program order belong to it or to its children."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Graph:
    """A traced program."""

    tensors: tuple[Tensor, ...]
    ops: tuple[Op, ...]
    regions: tuple[Region, ...]
    inputs: tuple[int, ...]
    """Tensor id of each flat argument."""
    input_names: tuple[str, ...]
    """Path of each flat argument in the argument pytrees, e.g. ``[0]['layers']['wq']``."""
    outputs: tuple[int, ...]
    """Tensor id of each flat result; -1 for a literal."""
    output_names: tuple[str, ...]
    aliases: tuple[tuple[int, int], ...]
    """(input position, output position) pairs that must keep one sharding: the training state."""
    fingerprint: str
    """Hash of primitives, shapes and wiring; equal programs have equal fingerprints."""
    warnings: tuple[str, ...] = ()

    def multiplicity(self, region: int) -> float:
        """Times the region runs per call of the program."""
        trips = 1.0
        while region >= 0:
            trips *= self.regions[region].trips
            region = self.regions[region].parent
        return trips

    def multiplicities(self) -> np.ndarray:
        """[R] float64, :meth:`multiplicity` of every region."""
        return np.array([self.multiplicity(r) for r in range(len(self.regions))])

    def to_networkx(self):
        """The op graph as a ``networkx.DiGraph``: nodes are op indices, edges carry the tensor."""
        import networkx as nx

        graph = nx.DiGraph()
        for i, op in enumerate(self.ops):
            graph.add_node(i, primitive=op.primitive, region=op.region)
        for i, op in enumerate(self.ops):
            for t in op.inputs:
                if t >= 0 and self.tensors[t].producer >= 0:
                    graph.add_edge(self.tensors[t].producer, i, tensor=t)
        return graph
