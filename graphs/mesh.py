"""Logical device meshes and sharding types.

A *spec* is, for each dimension of a tensor, the tuple of mesh axis indices that shard it, in
major-to-minor order: ``((0,), (), (1, 2))``. It is ``jax.sharding.PartitionSpec`` with axis
indices in place of names, so that specs hash fast and do not depend on axis naming.
"""

from __future__ import annotations

import dataclasses
import math

Spec = tuple[tuple[int, ...], ...]
"""For each tensor dimension, the mesh axis indices that shard it (major to minor)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogicalMesh:
    """A named, ordered factorisation of the devices."""

    axis_names: tuple[str, ...]
    """[A] distinct names, outermost (slowest network) first."""
    axis_sizes: tuple[int, ...]
    """[A] devices along each axis; the product is the number of devices."""

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        if len(self.axis_names) != len(self.axis_sizes):
            raise ValueError(
                f"mesh has {len(self.axis_names)} axis names and {len(self.axis_sizes)} sizes; "
                "give one size for each name"
            )
        if len(set(self.axis_names)) != len(self.axis_names):
            raise ValueError(f"mesh axis names {self.axis_names} repeat; make them distinct")
        for name, size in zip(self.axis_names, self.axis_sizes):
            if size < 1:
                raise ValueError(f"mesh axis {name!r} has size {size}; sizes start at 1")

    @property
    def n_devices(self) -> int:
        return math.prod(self.axis_sizes)

    @property
    def shape(self) -> dict[str, int]:
        return dict(zip(self.axis_names, self.axis_sizes))

    @classmethod
    def from_shape(cls, shape: dict[str, int]) -> LogicalMesh:
        return cls(axis_names=tuple(shape), axis_sizes=tuple(int(v) for v in shape.values()))


def shards(spec: Spec, axis_sizes: tuple[int, ...]) -> int:
    """Number of distinct shards of a tensor with this spec."""
    return math.prod(axis_sizes[a] for dim in spec for a in dim)


def local_shape(shape: tuple[int, ...], spec: Spec, axis_sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Per-device shape; a dimension that does not divide is padded up, as XLA does."""
    return tuple(
        -(-n // math.prod(axis_sizes[a] for a in dim)) if dim else n
        for n, dim in zip(shape, spec, strict=True)
    )


def replicated(rank: int) -> Spec:
    return ((),) * rank
