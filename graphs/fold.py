"""Find repeated groups: isomorphic blocks of an unrolled program share one decision.

Each group gets a colour from what it is made of (primitives, shapes, classes, trips) and, for a few
rounds, from the colours of the groups it reads and is read by (Weisfeiler and Leman's refinement).
Groups of one colour are tied. Inputs are coloured alike, so layers of one shape tie whatever their
names; a first or last layer keeps decisions of its own only where its surroundings differ.
"""

from __future__ import annotations

from graphs.groups import Grouping

ROUNDS = 2


def fold(grouping: Grouping, rounds: int = ROUNDS) -> tuple[int, ...]:
    """[groups] index of the representative (first group of the same colour)."""
    graph = grouping.graph
    times = graph.multiplicities()
    links: list[list[tuple[int, str]]] = [[] for _ in grouping.groups]
    colours: list[int] = []
    for g, item in enumerate(grouping.groups):
        views = []
        for view in item.views:
            source = grouping.source_group(g, view)
            mark = f"{graph.tensors[view.tensor].shape}{view.dims}{times[view.region]}"
            links[g].append((source, "r" + mark))
            links[source].append((g, "w" + mark))
            views.append((mark, len(view.ops)))
        body = (
            item.kind,
            item.sizes,
            tuple(sorted(views)),
            tuple(sorted((graph.tensors[t].shape, d) for t, d in item.tensors.items())),
            tuple((graph.ops[o].primitive, times[graph.ops[o].region]) for o in item.ops),
        )
        colours.append(hash(body))
    for pair in grouping.graph.aliases:
        a = grouping.group_of[graph.inputs[pair[0]]]
        b = grouping.group_of[graph.outputs[pair[1]]]
        links[a].append((b, "alias"))
        links[b].append((a, "alias"))
    for _ in range(rounds):
        colours = [
            hash((colours[g], tuple(sorted((mark, colours[o]) for o, mark in set(links[g])))))
            for g in range(len(colours))
        ]
    first: dict[int, int] = {}
    return tuple(first.setdefault(c, g) for g, c in enumerate(colours))
