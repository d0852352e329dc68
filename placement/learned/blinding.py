"""Hide parts of what the policy sees, to learn what they are worth.

Without edges, states of nodes, classes and regions hear nothing of each other and only their pools
remain. Without the mesh, an axis is its size and whether it divides a class: bandwidths, latencies,
the closed form and every time made from them are gone.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from placement.learned.dataset import Arrays

_EDGES = ("relations", "classes_of_nodes", "nodes_of_classes", "region_of_nodes",
          "nodes_of_regions")  # fmt: skip
_CANDIDATE = (0, *range(2, 19), *range(25, 32), *range(34, 38))
_OVERALL = (1, 2, 8)


def blinded(arrays: Arrays, *, edges: bool = True, mesh: bool = True) -> Arrays:
    """The arrays (unbatched) with what is False set to zero."""
    hidden: dict[str, Any] = {}
    if not edges:
        hidden |= {k: [0.0 * np.asarray(x) for x in getattr(arrays, k)]
                   if k == "relations" else 0.0 * getattr(arrays, k) for k in _EDGES}  # fmt: skip
    if not mesh:
        hidden |= dict(
            axes=_zeroed(arrays.axes, range(1, arrays.axes.shape[-1])),
            pairs=_zeroed(arrays.pairs, range(2, arrays.pairs.shape[-1])),
            rows=_zeroed(arrays.rows, _CANDIDATE),
            overall=_zeroed(arrays.overall, _OVERALL),
            estimate=0.0 * arrays.estimate,
            pressure=0.0 * arrays.pressure,
        )
    return dataclasses.replace(arrays, **hidden)


def _zeroed(x: np.ndarray, columns) -> np.ndarray:
    x = x.copy()
    x[..., list(columns)] = 0.0
    return x
