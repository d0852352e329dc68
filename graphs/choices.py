"""The choices of a group on a mesh: which class each mesh axis shards.

A choice gives, for each mesh axis, a class of the group or none. On a heavy group an axis may also
shard a *reduced* class; the partial results are then combined over the axis, and the choice says
how: ``scatter`` names the result class that the combined result is scattered along
(reduce-scatter), or none (all-reduce). Axes on one dimension are in mesh order, major first.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from graphs.groups import HEAVY, Group
from graphs.mesh import Spec
from graphs.rules import WHOLE

NONE = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choices:
    """S choices of one group on a mesh of A axes."""

    place: np.ndarray
    """[S, A] int8: class that the axis shards, or NONE."""
    scatter: np.ndarray
    """[S, A] int8: result class that partial results are scattered along, or NONE."""

    def __len__(self) -> int:
        return len(self.place)

    def specs(self, dims: tuple[int, ...], *, result: bool = False) -> np.ndarray:
        """[S, A] int8: dimension of a tensor that each axis shards, or NONE.

        ``dims`` is the class of each dimension; ``result`` says that the tensor is the combined
        result, whose scattered dimensions count.
        """
        lut = np.full(128, NONE, np.int8)
        for d, c in enumerate(dims):
            if c != WHOLE:
                lut[c] = d
        out = np.where(self.place == NONE, NONE, lut[np.maximum(self.place, 0)])
        if result:
            scattered = np.where(self.scatter == NONE, NONE, lut[np.maximum(self.scatter, 0)])
            out = np.where(scattered != NONE, scattered, out)
        return out.astype(np.int8)


def choices_of(group: Group, axis_sizes: tuple[int, ...], limit: int = 4096) -> Choices:
    """Every choice of a group whose sharded dimensions divide evenly."""
    reduced = {r.cls for r in group.reductions if r.how == "sum"} if group.kind == HEAVY else set()
    kept: set[int] = set()
    if group.kind == HEAVY:
        for dims in group.tensors.values():
            kept |= {c for c in dims if c != WHOLE}
    options: list[list[tuple[int, int]]] = []
    for size in axis_sizes:
        axis: list[tuple[int, int]] = [(NONE, NONE)]
        if size > 1:
            for c, n in enumerate(group.sizes):
                if n % size == 0:
                    axis.append((c, NONE))
                    if c in reduced and c not in kept:
                        axis += [(c, k) for k in sorted(kept) if group.sizes[k] % size == 0]
        options.append(axis)
    rows = []
    for combo in itertools.product(*options):
        load: dict[int, int] = {}
        for (c, k), size in zip(combo, axis_sizes):
            if c != NONE:
                load[c] = load.get(c, 1) * size
            if k != NONE:
                load[k] = load.get(k, 1) * size
        if all(group.sizes[c] % n == 0 for c, n in load.items()):
            rows.append(combo)
            if len(rows) >= limit:
                break
    array = np.array(rows, np.int8).reshape(len(rows), len(axis_sizes), 2)
    return Choices(place=array[..., 0].copy(), scatter=array[..., 1].copy())


def spec_of(row: np.ndarray, rank: int) -> Spec:
    """The spec of one row of :meth:`Choices.specs`."""
    return tuple(tuple(a for a in range(len(row)) if row[a] == d) for d in range(rank))
