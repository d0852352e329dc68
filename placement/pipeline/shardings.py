"""How one stage's arrays lie on the mesh: Megatron's tensor parallelism, expert, context and ZeRO-1.

Heads, feed-forward width and vocabulary lie on ``model`` (arXiv:1909.08053), whole experts on
``expert`` (arXiv:2006.16668), positions of the residual stream on ``context`` and ``model``
(arXiv:2205.05198), stacked layers on ``stage``; optimizer state on ``data`` too (arXiv:1910.02054).
A dimension that an axis does not divide stays whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax

STAGE, DATA = "stage", "data"
"""Names of the mesh axes that stages lie on, and that split every microbatch."""
MODEL, CONTEXT, EXPERT = "model", "context", "expert"

_MODEL_DIM = {
    # leaf -> its dimension, from the end, that lies on the model axis
    "query": -2, "key": -2, "value": -2, "output": -3,
    "query_bias": -2, "key_bias": -2, "value_bias": -2, "sink": -1,
    "query_up": -2, "key_up": -2, "value_up": -2,
    "gate": -1, "up": -1, "down": -2, "gate_bias": -1, "up_bias": -1,
    "embedding": -2, "head": -1,
}  # fmt: skip

Spec = tuple[tuple[str, ...], ...]


def activation_spec(
    mesh_shape: Mapping[str, int], seq_len: int, *, has_experts: bool
) -> tuple[Any, ...]:
    """PartitionSpec entries of a replica's activations [B, S, D] between layers.

    Experts gather tokens of whole sequences, which XLA's partitioner cannot do on a sharded sequence
    under a manual axis (it ends the process), so that models with experts keep sequences whole.
    """
    batch = EXPERT if mesh_shape.get(EXPERT, 1) > 1 else None
    split = () if has_experts else (CONTEXT, MODEL)
    axes = tuple(a for a in split if mesh_shape.get(a, 1) > 1)
    if seq_len % math.prod(mesh_shape[a] for a in axes):
        axes = axes[:-1]
    spec = (batch, axes or None)
    return spec if any(spec) else ()


def names_of(path: tuple) -> list[str]:
    """The names along a path of a pytree."""
    return [str(getattr(e, "key", getattr(e, "name", getattr(e, "idx", "")))) for e in path]


def weight_spec(
    path: tuple, shape: tuple[int, ...], mesh_shape: Mapping[str, int], segment: str
) -> Spec:
    """The spec of one parameter (or of a moment of its shape) by its path in the tree."""
    names = names_of(path)
    spec: list[tuple[str, ...]] = [() for _ in shape]

    def lay(dim: int, axis: str) -> None:
        if -dim <= len(shape) and not spec[dim] and mesh_shape.get(axis, 1) > 1:
            if shape[dim] % mesh_shape[axis] == 0:
                spec[dim] = (axis,)

    if segment in names and shape:
        lay(-len(shape), STAGE)
    leaf = next((n for n in reversed(names) if n in _MODEL_DIM or n == "down_bias"), "")
    if "experts" in names and "shared" not in names and leaf in (
        "gate", "up", "down", "gate_bias", "up_bias", "down_bias",
    ):  # fmt: skip
        lay(-2 if leaf.endswith("bias") else -3, EXPERT)
    if leaf in _MODEL_DIM:
        lay(_MODEL_DIM[leaf], MODEL)
    return tuple(spec)


def state_spec(spec: Spec, shape: tuple[int, ...], mesh_shape: Mapping[str, int]) -> Spec:
    """The spec of optimizer state: the weight's, and its largest whole dimensions split over the axes
    that the weight is replicated on."""
    out = list(spec)
    used = {a for dim in spec for a in dim}
    for axis in (DATA, CONTEXT, STAGE, EXPERT):
        size = mesh_shape.get(axis, 1)
        if size == 1 or axis in used:
            continue
        free = [d for d, n in enumerate(shape) if not out[d] and n % size == 0]
        if free:
            out[max(free, key=lambda d: shape[d])] = (axis,)
    return tuple(out)


def update_shardings(params: Any, mesh: Any, segment: str) -> Any:
    """The NamedSharding of every parameter while it is updated: that of its optimizer state.

    With gradients and parameters cut to it before the update, each device updates its own part, and
    only the new parameters are gathered.
    """
    from jax.sharding import NamedSharding, PartitionSpec

    sizes = dict(mesh.shape)

    def one(path, leaf):
        spec = state_spec(weight_spec(path, leaf.shape, sizes, segment), leaf.shape, sizes)
        return NamedSharding(mesh, PartitionSpec(*[axes or None for axes in spec]))

    return jax.tree_util.tree_map_with_path(one, params)


def pinned_weights(weights: Any, segment: str) -> Any:
    """Weights inside a map, held by the automatic axes as their specs say; gradients likewise.

    Without it optimizer state that is split over more axes reaches back into the embedding's gradient,
    a scatter that XLA's partitioner cannot split along two axes under a manual one (the process ends).
    """
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types))
    free = {a: n for a, n in mesh.shape.items() if kinds[a] == AxisType.Auto}

    def one(path, leaf):
        spec = weight_spec(path, leaf.shape, free, segment)
        spec = PartitionSpec(*[axes or None for axes in spec])
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(one, weights) if free else weights


def argument_specs(
    args: tuple, mesh_shape: Mapping[str, int], segment: str, zero_stage: int
) -> list[Spec]:
    """The specs of the flat arguments (params, opt_state, batch) of a pipelined step."""
    tokens = tuple(a for a in (DATA, EXPERT) if mesh_shape.get(a, 1) > 1)
    context = mesh_shape.get(CONTEXT, 1)
    specs: list[Spec] = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(args):
        which = path[0].idx
        if which == 2:
            along = (CONTEXT,) if context > 1 and leaf.shape[1] % context == 0 else ()
            specs.append((tokens, along))
            continue
        spec = weight_spec(path, leaf.shape, mesh_shape, segment)
        if which == 1 and zero_stage >= 1:
            spec = state_spec(spec, leaf.shape, mesh_shape)
        specs.append(spec)
    return specs
