"""The policy network as a flax nnx module that owns the parameters of :mod:`forward`."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from placement.learned import forward


class PolicyNetwork(nnx.Module):
    """Parameters by name; calling it runs the heads on one problem."""

    def __init__(self, hidden: int, *, seed: int) -> None:
        values = forward.initial(hidden, seed)
        self.weights = nnx.Dict({k: nnx.Param(jnp.asarray(v)) for k, v in values.items()})

    def params(self) -> dict[str, Any]:
        """The arrays."""
        return {k: v[...] for k, v in self.weights.items()}

    def __call__(self, seen: Any, found: Any, masks: Any = None) -> forward.Heads:
        """Heads of all candidates of one problem."""
        params = self.params()
        states = forward.encode(params, seen, found, jnp, masks)
        return forward.outer(params, states, found, jnp)


def count(params: dict[str, Any]) -> int:
    """Number of parameters."""
    return int(sum(np.prod(v.shape) for v in params.values()))
