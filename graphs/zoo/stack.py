"""Equal layers one after the other: scanned over stacked weights or unrolled, under a remat policy.

A scan keeps the program (and its compilation) as small as one layer; unrolled layers let the
compiler overlap across them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from graphs.errors import MeshwrightError
from graphs.zoo.options import RunOptions, layers_of_share


def run_layer(layer: nnx.Module, options: RunOptions, x: jax.Array, *args) -> jax.Array:
    """layer(x, *args) under the remat policy of the options."""
    graphdef, state = nnx.split(layer)

    def body(x, params, *args):
        return nnx.merge(graphdef, params)(x, *args)

    return _checkpoint(body, options, prevent_cse=True)(x, state, *args)


class LayerStack(nnx.Module):
    """`repeats` modules made by `create`, each mapping (x, *args) -> x."""

    def __init__(
        self,
        create: Callable[[nnx.Rngs], nnx.Module],
        repeats: int,
        options: RunOptions,
        *,
        rematerialise: bool = True,
        rngs: nnx.Rngs,
    ) -> None:
        together = layers_of_share(options.remat_layers)
        if repeats % together:
            raise MeshwrightError(
                f"remat_layers={options.remat_layers} counts by {together} layers, and {repeats} are "
                "repeated; give a share that divides them"
            )
        self.options, self.repeats, self.rematerialise = options, repeats, rematerialise
        self.scan = options.scan and repeats > 1
        if self.scan:
            stacked = nnx.vmap(create, in_axes=0, out_axes=0, axis_size=repeats)
            self.layer = nnx.split_rngs(splits=repeats)(stacked)(rngs)
        else:
            for i in range(repeats):
                setattr(self, f"layer_{i:03d}", create(rngs))

    def __call__(self, x: jax.Array, *args) -> jax.Array:
        if not self.scan:
            for i in range(self.repeats):
                layer = getattr(self, f"layer_{i:03d}")
                x = self._run(layer, self.options.remat_of(i), x, *args)
            return x
        graphdef, state = nnx.split(self.layer)
        together = layers_of_share(self.options.remat_layers)
        if together > 1:
            state = jax.tree.map(
                lambda w: w.reshape(self.repeats // together, together, *w.shape[1:]), state
            )

        def body(x, params):
            if together == 1:
                return nnx.merge(graphdef, params)(x, *args), None
            for i in range(together):
                layer = nnx.merge(graphdef, jax.tree.map(lambda w, i=i: w[i], params))
                x = self._run(layer, self.options.remat_of(i), x, *args)
            return x, None

        if self.rematerialise and together == 1:
            body = _checkpoint(body, self.options, prevent_cse=False)
        return jax.lax.scan(body, x, state)[0]

    def _run(self, layer: Any, options: RunOptions, x: jax.Array, *args) -> jax.Array:
        """One of them, which may rematerialise its own layers."""
        if self.rematerialise:
            return run_layer(layer, options, x, *args)
        layer.options = options
        return layer(x, *args)


def _checkpoint(body: Callable, options: RunOptions, *, prevent_cse: bool) -> Callable:
    # remat=attention checkpoints the attention core, inside the layer
    if options.remat in ("none", "attention"):
        return body
    policy = None
    if options.remat == "dots":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(body, policy=policy, prevent_cse=prevent_cse)
