"""Lay batches over all devices of all processes; keep parameters on each.

With one process and one device this is a plain copy. With more, each process holds the same list of
batches and puts its own rows on its own devices; a jitted function of such arrays runs everywhere
and its gradients are averaged over the devices.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from graphs.errors import MeshwrightError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
    """A mesh of one axis over all devices."""

    mesh: Mesh
    rows_here: slice
    """Rows of each batch that this process holds."""

    @classmethod
    def over_all(cls, batch_size: int) -> Spread:
        """Raises MeshwrightError where the devices do not divide a batch."""
        devices = jax.devices()
        if batch_size % len(devices):
            raise MeshwrightError(
                f"batch_size={batch_size} does not divide over {len(devices)} devices; "
                "make it a multiple"
            )
        share = batch_size // jax.process_count()
        first = jax.process_index() * share
        return cls(mesh=Mesh(np.array(devices), ("data",)), rows_here=slice(first, first + share))

    @property
    def whole(self) -> NamedSharding:
        """Whole on each device."""
        return NamedSharding(self.mesh, PartitionSpec())

    def rows(self, batch: Any) -> Any:
        """A batch of host arrays over the devices, by its rows."""
        by_rows = NamedSharding(self.mesh, PartitionSpec("data"))
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(by_rows, x[self.rows_here], x.shape),
            batch,
        )

    def everywhere(self, tree: Any) -> Any:
        """A tree of equal host arrays, whole on each device."""
        whole = self.whole

        def place(x):
            if getattr(x, "sharding", None) == whole:
                return x
            return jax.make_array_from_process_local_data(whole, np.asarray(x))

        return jax.tree.map(place, tree)

    def here(self, tree: Any) -> Any:
        """The copy that this process has of a tree that is whole on each device."""
        return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), tree)
