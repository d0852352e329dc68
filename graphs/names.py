"""Named dimension classes of the whole program: which dimensions are the batch, the sequence, the
hidden width, and which ones tensor parallelism splits.

Classes of neighbouring groups are joined along the data flow. Names follow from where a class
appears: in the batch arguments (batch, then sequence), in most weights (hidden), elsewhere in
weights (heads, feed-forward, vocabulary, experts: ``parallel``).
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

from graphs.groups import Grouping
from graphs.rules import WHOLE

BATCH, SEQUENCE, HIDDEN, PARALLEL, OTHER = "batch", "sequence", "hidden", "parallel", "other"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Names:
    """Name of every class of every group."""

    of: tuple[tuple[str, ...], ...]
    """[groups][classes]."""
    root: tuple[tuple[int, ...], ...]
    """[groups][classes] id of the program-wide class."""


def name_classes(grouping: Grouping) -> Names:
    """Join classes along the data flow and name them."""
    offsets, total = [], 0
    for item in grouping.groups:
        offsets.append(total)
        total += len(item.sizes)
    parent = list(range(total))

    def find(x: int) -> int:
        while parent[x] != x:
            parent[x] = parent[parent[x]]
            x = parent[x]
        return x

    for g, item in enumerate(grouping.groups):
        for view in item.views:
            source = grouping.source_group(g, view)
            other = grouping.groups[source]
            dims = other.views[0].dims if not other.tensors else other.tensors[view.tensor]
            for a, b in zip(view.dims, dims):
                if a != WHOLE and b != WHOLE:
                    parent[find(offsets[g] + a)] = find(offsets[source] + b)

    def root(g: int, c: int) -> int:
        return find(offsets[g] + c)

    graph = grouping.graph
    state = {graph.inputs[a] for a, _ in graph.aliases}
    batch_votes: Counter[int] = Counter()
    sequence_votes: Counter[int] = Counter()
    for t in graph.inputs:
        g = grouping.group_of[t]
        dims = grouping.groups[g].tensors[t]
        if t in state or not dims:
            continue
        known = [root(g, c) for c in dims if c != WHOLE]
        size = math.prod(graph.tensors[t].shape)
        if dims[0] != WHOLE:
            batch_votes[root(g, dims[0])] += size
        if len(known) > 1:
            sequence_votes[known[1]] += size
    weights: Counter[int] = Counter()
    inside: set[int] = set()
    for t in state:
        g = grouping.group_of[t]
        dims = [c for c in grouping.groups[g].tensors[t] if c != WHOLE]
        for r in {root(g, c) for c in dims}:
            inside.add(r)
            if len(dims) > 1:
                weights[r] += 1
    names: dict[int, str] = {}
    if batch_votes:
        names[batch_votes.most_common(1)[0][0]] = BATCH
    for r, _ in weights.most_common():
        if r not in names:
            names[r] = HIDDEN
            break
    for r, _ in sequence_votes.most_common():
        if r not in names:
            names[r] = SEQUENCE
            break
    for r in inside:
        names.setdefault(r, PARALLEL)
    return Names(
        of=tuple(
            tuple(names.get(root(g, c), OTHER) for c in range(len(item.sizes)))
            for g, item in enumerate(grouping.groups)
        ),
        root=tuple(
            tuple(root(g, c) for c in range(len(item.sizes)))
            for g, item in enumerate(grouping.groups)
        ),
    )
