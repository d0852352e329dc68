r"""The policy network as one function of arrays, for ``jax.numpy`` and for ``numpy`` alike.

Node, class and region states are updated together for a few rounds,

    n <- n + relu([n, A_1 n, ..., A_5 n, M c, G r] W),   c <- c + relu([c, M' n] W),
    r <- r + relu([r, G' n] W),

where the matrices take means over neighbours (:mod:`placement.learned.features`). Each pair of a
class and a mesh axis gets a state from both and from what the axis would do to the class; an axis is
the attention-weighted mean and the maximum over its pairs, a candidate the sum and the maximum over
its axes with its own features. Nothing depends on the order of nodes, classes, regions or axes.

Heads: preference (what the outer policy samples from), fit (probability of keeping the memory
limit), value (log of the step time over the ideal one). Preference and value start from the closed
form and add a correction. The inner head scores the choices of a node: a choice is the sum of its
(class, axis) placements and its own prices.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from placement.learned.candidates import N_AXIS, N_CANDIDATE, N_PAIR
from placement.learned.features import N_CLASS, N_GLOBAL, N_NODE, N_REGION, N_RELATIONS

ROUNDS = 3
Params = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heads:
    """What the network says of K candidates."""

    preference: Any
    """[K] logits."""
    fit: Any
    """[K] logit of keeping the memory limit."""
    value: Any
    """[K] log of step time over the ideal one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoded:
    """States after the rounds."""

    nodes: Any
    """[N, G]."""
    pairs: Any
    """[C, U, G]."""
    axes: Any
    """[U, H]."""
    whole: Any
    """[H]."""


def shapes(hidden: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter; a name ending in ``_b`` is a bias.

    States of nodes, classes, regions and pairs are half as wide as those of candidates.
    """
    h, g = hidden, hidden // 2
    found: dict[str, tuple[int, ...]] = {}

    def layer(name: str, n_in: int, n_out: int) -> None:
        found[f"{name}_w"], found[f"{name}_b"] = (n_in, n_out), (n_out,)

    layer("node", N_NODE, g)
    layer("class", N_CLASS, g)
    layer("region", N_REGION, g)
    for t in range(ROUNDS):
        layer(f"node_{t}", (N_RELATIONS + 3) * g, g)
        layer(f"class_{t}", 2 * g, g)
        layer(f"region_{t}", 2 * g, g)
    layer("whole", 4 * g + N_GLOBAL, h)
    layer("axis", N_AXIS, g)
    layer("pair_class", g, g)
    layer("pair_own", N_PAIR, g)
    layer("pair", g, g)
    layer("attend", g, 1)
    layer("axis_pool", 3 * g, h)
    layer("candidate", 2 * h + N_CANDIDATE, h)
    layer("candidate_whole", h, h)
    layer("candidate_0", h, h)
    layer("candidate_1", h, h)
    layer("heads", h, 3)
    found["scale"] = (3,)
    return found


def initial(hidden: int, seed: int) -> dict[str, np.ndarray]:
    """He-initialised weights, zero biases, small heads; the closed form enters at full weight."""
    rng = np.random.default_rng(seed)
    params: dict[str, np.ndarray] = {}
    small = ("heads_w", "attend_w")
    for name, shape in shapes(hidden).items():
        if name.endswith("_w"):
            spread = np.sqrt(2.0 / shape[0]) * (0.1 if name in small else 1.0)
            params[name] = (rng.standard_normal(shape) * spread).astype(np.float32)
        else:
            params[name] = np.zeros(shape, np.float32)
    params["scale"] = np.array([3.0, 3.0, 1.0], np.float32)
    return params


def hidden_of(params: Params) -> int:
    """Width of the states of candidates."""
    return int(params["candidate_0_w"].shape[1])


def encode(params: Params, seen: Any, found: Any, xp: Any, masks: Any = None) -> Encoded:
    """States of nodes, pairs and axes.

    Args:
      seen: arrays of an Observation (padded with zeros where ``masks`` are given).
      found: arrays of Candidates.
      masks: None, or an object with ``nodes`` [N] and ``classes`` [C] of ones and zeros.
    """

    def dense(name: str, x):
        return x @ params[f"{name}_w"] + params[f"{name}_b"]

    def relu(x):
        return xp.maximum(x, 0.0)

    n, c, r = (
        relu(dense("node", seen.nodes)),
        relu(dense("class", seen.classes)),
        relu(dense("region", seen.regions)),
    )
    for t in range(ROUNDS):
        around = [a @ n for a in seen.relations]
        heard = [n, *around, seen.classes_of_nodes @ c, seen.region_of_nodes @ r]
        new = relu(dense(f"node_{t}", xp.concatenate(heard, axis=-1)))
        c = _norm(c + relu(dense(f"class_{t}", _two(xp, c, seen.nodes_of_classes @ n))), xp)
        r = _norm(r + relu(dense(f"region_{t}", _two(xp, r, seen.nodes_of_regions @ n))), xp)
        n = _norm(n + new, xp)
    node_mask = xp.ones(n.shape[0], n.dtype) if masks is None else masks.nodes
    class_mask = xp.ones(c.shape[0], c.dtype) if masks is None else masks.classes
    pooled = [*_pool(n, node_mask, xp), *_pool(c, class_mask, xp), seen.overall]
    whole = relu(dense("whole", xp.concatenate(pooled)))
    axis = relu(dense("axis", found.axes))
    pairs = relu(dense("pair_class", c)[:, None, :] + axis[None] + dense("pair_own", found.pairs))
    pairs = relu(dense("pair", pairs))
    score = dense("attend", pairs)[..., 0] + (class_mask[:, None] - 1.0) * 1e9
    weight = xp.exp(score - score.max(0))
    weight = weight / weight.sum(0)
    mean = (weight[..., None] * pairs).sum(0)
    most = (pairs * class_mask[:, None, None]).max(0)
    axes = relu(dense("axis_pool", xp.concatenate([mean, most, axis], axis=-1)))
    return Encoded(nodes=n, pairs=pairs, axes=axes, whole=whole)


def outer(params: Params, states: Encoded, found: Any, xp: Any) -> Heads:
    """Heads of all candidates."""

    def dense(name: str, x):
        return x @ params[f"{name}_w"] + params[f"{name}_b"]

    def relu(x):
        return xp.maximum(x, 0.0)

    on = (found.of >= 0)[..., None]
    own = states.axes[found.of] * on
    x = xp.concatenate([own.sum(1), own.max(1), found.rows], axis=-1)
    x = relu(dense("candidate", x) + dense("candidate_whole", states.whole))
    x = x + relu(dense("candidate_0", x))
    x = _norm(x + relu(dense("candidate_1", x)), xp)
    out = dense("heads", x)
    scale = params["scale"]
    return Heads(
        preference=out[:, 0] - scale[0] * found.estimate,
        fit=out[:, 1] - scale[1] * found.pressure,
        value=out[:, 2] + scale[2] * found.estimate,
    )


def _norm(x, xp):
    return x / xp.sqrt((x * x).mean(-1, keepdims=True) + 1e-3)


def _two(xp, a, b):
    return xp.concatenate([a, b], axis=-1)


def _pool(x, mask, xp):
    total = (x * mask[:, None]).sum(0) / xp.maximum(mask.sum(), 1.0)
    return total, (x * mask[:, None]).max(0)
