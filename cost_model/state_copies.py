"""Copies of the training state that XLA:TPU makes to change its layout.

A step takes and returns its state in one layout; gradients often come out of their contractions in
another, and the update runs in theirs. XLA then copies weights and moments on the way in and out
(``copy`` instructions of compiled steps whose shape is that of an argument). How much is copied was
counted by hand over compiled steps of the cases that :mod:`placement.compiled_fidelity` lists as
fitted: of arrays that are sharded over all devices 0 to 0.68 of their bytes, 0.38 in the mean; of
others 0.66 to 1.97, 1.26 in the mean.
"""

from __future__ import annotations

import numpy as np

from cost_model.fusion import CONTRACTIONS
from cost_model.pricing import Pricing
from graphs.choices import Choices
from graphs.graph import Graph
from graphs.groups import HEAVY, Grouping

_SHARE_SHARDED, _SHARE_OTHER = 0.38, 1.26
"""Bytes copied over bytes of the array, where it is sharded over all devices and where not."""
GATHERED_SHARE = 0.73
"""Bytes over those of the array that lie beside it for the whole step, where its update is gathered:
0 to 1.0 in the fourteen compiled steps of rules that shard the moments only, this in the mean."""
RELAID_SHARE = 0.5
"""Bytes over those of the arrays of :func:`relaid_state` that lie beside them at the peak: 0 or 1 of
single arrays, about a half of all in the compiled steps."""
_OVER_BANDWIDTH = 1.45
"""Time of such a copy over that of its bytes at the bandwidth of the memory (the same steps)."""


def state_of(graph: Graph) -> frozenset[int]:
    """Tensors of the arguments whose memory results take."""
    return frozenset(graph.inputs[a] for a, _ in graph.aliases)


def contracted(grouping: Grouping) -> frozenset[int]:
    """Groups of weights that contractions read, themselves or a copy of them."""
    found = set()
    for g, item in enumerate(grouping.groups):
        if item.kind != HEAVY:
            continue
        for view in item.views:
            if any(grouping.graph.ops[o].primitive in CONTRACTIONS for o in view.ops):
                found.add(grouping.leaf_of(grouping.source_group(g, view)))
    return frozenset(found - {-1})


def relaid_state(
    grouping: Grouping, state: frozenset[int], weights: frozenset[int]
) -> frozenset[int]:
    """Tensors of the state that XLA:TPU may copy into the layout of the gradient ahead of the update:
    the weights of contractions that no loop slices, and moments of their shapes.

    ``state``: of :func:`state_of`; ``weights``: of :func:`contracted`.
    """
    graph = grouping.graph
    sliced = {t for op in graph.ops if op.primitive == "scan_slice" for t in op.inputs}
    shapes = {
        graph.tensors[t].shape
        for g in weights
        for t in grouping.groups[g].tensors
        if t in state and t not in sliced
    }
    return frozenset(t for t in state - sliced if graph.tensors[t].shape in shapes)


def state_copies_s(
    grouping: Grouping, g: int, choices: Choices, pricing: Pricing, state: frozenset[int]
) -> np.ndarray | None:
    """[S] seconds to copy the arrays of the state in group g; None where there are none.

    ``state``: of :func:`state_of`. No other compiler is known to copy.
    """
    item = grouping.groups[g]
    own = [t for t in item.tensors if t in state] if pricing.device.family == "tpu" else []
    seconds = np.zeros(len(choices))
    devices = float(np.prod(pricing.axis_sizes))
    for t in own:
        ways = choices.shards(item.tensors[t], pricing.axis_sizes)
        share = np.where(ways >= devices, _SHARE_SHARDED, _SHARE_OTHER)
        moved = 2.0 * share * grouping.graph.tensors[t].n_bytes / ways
        seconds = seconds + _OVER_BANDWIDTH * moved / pricing.device.hbm_bandwidth_bytes_per_s
    return seconds if own else None
