"""The choices of a group on a mesh: which class each mesh axis shards.

A choice gives, for each mesh axis, a class of the group or none. On a heavy group an axis may also
shard a *reduced* class; the partial results are then combined over the axis, and the choice says
how: ``scatter`` names the result class that the combined result is scattered along
(reduce-scatter), or none (all-reduce). Axes on one dimension are in mesh order, major first.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable

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
        found = self._specs.get((dims, result))
        if found is None:
            found = self._specs[dims, result] = self._make_specs(dims, result)
            found.flags.writeable = False  # it is shared
        return found

    def shards(
        self, dims: tuple[int, ...], axis_sizes: tuple[int, ...], *, result: bool = False
    ) -> np.ndarray:
        """[S] float64: number of shards of a tensor (``dims``, ``result``: as for specs)."""
        key = (dims, axis_sizes, result)
        found = self._shards.get(key)
        if found is None:
            on = self.specs(dims, result=result) >= 0
            found = np.where(on, np.array(axis_sizes, np.float64), 1.0).prod(axis=-1)
            found.flags.writeable = False  # it is shared
            self._shards[key] = found
        return found

    def sharding(self, classes: Iterable[int]) -> np.ndarray:
        """[S, A] bool: whether the axis shards one of the classes."""
        return _among(self.place, classes)

    def scattering(self, classes: Iterable[int]) -> np.ndarray:
        """[S, A] bool: whether partial results are scattered along one of the classes."""
        return _among(self.scatter, classes)

    @functools.cached_property
    def _specs(self) -> dict[tuple[tuple[int, ...], bool], np.ndarray]:
        """Specs that were asked for."""
        return {}

    @functools.cached_property
    def _shards(self) -> dict[tuple[tuple[int, ...], tuple[int, ...], bool], np.ndarray]:
        """Shards that were asked for."""
        return {}

    def _make_specs(self, dims: tuple[int, ...], result: bool) -> np.ndarray:
        lut = np.full(128, NONE, np.int8)
        for d, c in enumerate(dims):
            if c != WHOLE:
                lut[c] = d
        out = np.where(self.place == NONE, NONE, lut[np.maximum(self.place, 0)])
        if result:
            scattered = np.where(self.scatter == NONE, NONE, lut[np.maximum(self.scatter, 0)])
            out = np.where(scattered != NONE, scattered, out)
        return out.astype(np.int8)


def _among(placed: np.ndarray, classes: Iterable[int]) -> np.ndarray:
    """Whether each entry is one of the classes; NONE is none of them. As ``np.isin``, but cheap for
    the small arrays that there are thousands of."""
    found = np.zeros(129, bool)  # the last one is where NONE looks
    found[list(classes)] = True
    return found[placed]


def choices_of(
    group: Group,
    axis_sizes: tuple[int, ...],
    limit: int = 4096,
    known: dict[tuple, Choices] | None = None,
) -> Choices:
    """Every choice of a group whose sharded dimensions divide evenly.

    Groups with the same choices share one object where ``known`` keeps those made before.
    """
    reduced: set[int] = set()
    kept: set[int] = set()
    if group.kind == HEAVY:
        reduced = {r.cls for r in group.reductions if r.how == "sum"}
        for dims in group.tensors.values():
            kept |= {c for c in dims if c != WHOLE}
    known = {} if known is None else known
    key = (group.sizes, frozenset(reduced), frozenset(kept), axis_sizes, limit)
    if key not in known:
        known[key] = _enumerate(group.sizes, reduced, kept, axis_sizes, limit)
    return known[key]


def _enumerate(
    class_sizes: tuple[int, ...],
    reduced: set[int],
    kept: set[int],
    axis_sizes: tuple[int, ...],
    limit: int,
) -> Choices:
    options: list[list[tuple[int, int]]] = []
    for size in axis_sizes:
        axis: list[tuple[int, int]] = [(NONE, NONE)]
        if size > 1:
            for c, n in enumerate(class_sizes):
                if n % size == 0:
                    axis.append((c, NONE))
                    if c in reduced and c not in kept:
                        axis += [(c, k) for k in sorted(kept) if class_sizes[k] % size == 0]
        options.append(axis)
    # a partial choice that divides can always be completed with NONE, so that cutting the partial
    # ones at the limit keeps the first `limit` choices in the order of the product
    rows = np.zeros((1, 0, 2), np.int8)
    load = np.ones((1, max(len(class_sizes), 1)), np.int64)
    whole = np.array(class_sizes or (1,), np.int64)
    for axis, size in zip(options, axis_sizes):
        added = np.array(axis, np.int8)
        factor = np.ones((len(axis), load.shape[1]), np.int64)
        for n, (c, k) in enumerate(axis):
            if c != NONE:
                factor[n, c] *= size
            if k != NONE:
                factor[n, k] *= size
        loads = (load[:, None, :] * factor[None]).reshape(-1, load.shape[1])
        ok = np.flatnonzero((whole % loads == 0).all(axis=1))[:limit]
        old, new = np.divmod(ok, len(axis))
        rows = np.concatenate([rows[old], added[new][:, None, :]], axis=1)
        load = loads[ok]
    return Choices(place=rows[..., 0].copy(), scatter=rows[..., 1].copy())


def spec_of(row: np.ndarray, rank: int) -> Spec:
    """The spec of one row of :meth:`Choices.specs`."""
    return tuple(tuple(a for a in range(len(row)) if row[a] == d) for d in range(rank))
