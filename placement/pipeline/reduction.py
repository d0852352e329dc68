"""Sums of gradients over the devices that share a weight, left where its optimizer state lies.

With ZeRO-1 (arXiv:1910.02054) a device updates the part of a weight whose state it holds, so that it
needs the sum of that part alone: a reduce-scatter, half the bytes of an all-reduce.

Matrices are reduced one after the other. XLA:TPU fuses a reduction with the slice that follows where
it can, and ends with "No feasible span count for ... all reduce scatter fusion" on some stacks of
matrices cut along an inner dimension (float32 [8, 14336, 4096] along the second, in four); a matrix
alone is reduced in another way where it has no such fusion. A matrix at a time also holds fewer bytes
of partial sums.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from placement.pipeline.shardings import Spec, names_of, state_spec, weight_spec


def wide(mesh_shape: Mapping[str, int], axes: Sequence[str]) -> tuple[str, ...]:
    """The axes of more than one device. XLA's partitioner refuses to reduce along one of a single
    device where the map has no other."""
    return tuple(axis for axis in axes if mesh_shape[axis] > 1)


def reduced_specs(
    params: Any,
    mesh_shape: Mapping[str, int],
    axes: Sequence[str],
    *,
    segment: str,
    zero_stage: int,
) -> Any:
    """PartitionSpecs, on the manual `axes` alone, of what :func:`reduce_gradients` returns.

    params: the whole program's, any pytree of arrays or shapes.
    """

    def one(path, leaf):
        spec = _kept(path, leaf.shape, mesh_shape, axes, segment=segment, zero_stage=zero_stage)
        return PartitionSpec(*[entry or None for entry in spec])

    return jax.tree_util.tree_map_with_path(one, params)


def reduce_gradients(
    gradients: Any, shapes: Any, mesh_shape: Mapping[str, int], axes: Sequence[str], *, segment: str,
    zero_stage: int, shared: Sequence[str] = (),
) -> Any:  # fmt: skip
    """Sum each device's gradients over the manual `axes`, inside their map.

    Args:
      gradients: a pytree of what each device has added up, whole along every axis but those in
        `shared`, along which it has its own part.
      shapes: the pytree of the whole program's parameters.
      shared: axes that a weight of `segment` lies on already; nothing is added up along them.
      zero_stage: 0 leaves every sum on all devices.
    """

    def one(path, gradient, whole):
        spec = _kept(path, whole.shape, mesh_shape, axes, segment=segment, zero_stage=zero_stage)
        at = {axis: dim for dim, entry in enumerate(spec) for axis in entry}
        names = names_of(path)
        for axis in wide(mesh_shape, axes):
            if axis in shared and segment in names:
                continue
            if axis not in at:
                gradient = jax.lax.psum(gradient, axis)
            else:
                gradient = _scattered(gradient, axis, at[axis], experts="experts" in names)
        return gradient

    return jax.tree_util.tree_map_with_path(one, gradients, shapes)


def _kept(
    path: tuple, shape: tuple[int, ...], mesh_shape: Mapping[str, int], axes: Sequence[str], *,
    segment: str, zero_stage: int,
) -> Spec:  # fmt: skip
    spec = weight_spec(path, shape, mesh_shape, segment)
    if zero_stage >= 1:
        spec = state_spec(spec, shape, mesh_shape)
    return tuple(tuple(axis for axis in entry if axis in axes) for entry in spec)


def _scattered(x: jax.Array, axis: str, dim: int, *, experts: bool) -> jax.Array:
    """Each device's part along `dim` of the sum over `axis`, a matrix at a time."""
    stacked = min(dim, 1 + experts) if x.ndim > 2 else 0
    lead, rest = x.shape[:stacked], x.shape[stacked:]

    def one(matrix):
        return jax.lax.psum_scatter(matrix, axis, scatter_dimension=dim - stacked, tiled=True)

    if math.prod(lead) == 1:
        found = one(x.reshape(rest))
    else:
        found = jax.lax.map(one, x.reshape(-1, *rest))
    return found.reshape(*lead, *found.shape[found.ndim - len(rest) :])
