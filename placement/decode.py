"""From an assignment to shardings of arguments and results, and constraints on what lies between."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np

from cost_model.fusion import CONTRACTIONS, materialised
from cost_model.tables import Tables
from graphs.choices import spec_of
from graphs.groups import COPY, HEAVY, View
from graphs.mesh import Spec
from graphs.rules import local_of
from placement.plan import LeafSpec, SpecEntries

SMALL = 2048
"""Values with fewer elements are left to the compiler."""
ALWAYS = frozenset(["sharding_constraint", "conv_general_dilated"])
"""Primitives whose operands and results are pinned however small: what the user pinned, and
convolutions, whose weight gradient XLA's partitioner gets wrong where it may shard the window
(``tests/test_apply.py``: a depthwise convolution, four times its gradient)."""


def _always(primitive: str) -> bool:
    """Whether it is in ALWAYS, or each device calls it on its part, which the pins say."""
    return primitive in ALWAYS or local_of(primitive) is not None


def tensor_specs(tables: Tables, assignment: np.ndarray) -> dict[int, Spec]:
    """Spec of every tensor of the program."""
    grouping = tables.grouping
    specs: dict[int, Spec] = {}
    for g, item in enumerate(grouping.groups):
        node = int(tables.node_of[g])
        menu, pick = tables.choices[node], int(assignment[node])
        one = slice(pick, pick + 1)
        for t, dims in item.tensors.items():
            row = type(menu)(place=menu.place[one], scatter=menu.scatter[one]).specs(
                dims, result=item.kind == HEAVY
            )[0]
            specs[t] = spec_of(row, len(dims))
    return specs


def _as_read(tables: Tables, assignment: np.ndarray, g: int, view: View) -> Spec:
    """How group g holds what it reads."""
    node = int(tables.node_of[g])
    return spec_of(tables.choices[node].specs(view.dims)[int(assignment[node])], len(view.dims))


def axis_order(tables: Tables, assignment: np.ndarray, specs: dict[int, Spec]) -> tuple[int, ...]:
    """Mesh axes, major first, where one dimension lies on several.

    Where a reader needs a dimension on fewer axes, those that stay have to be the major ones: then
    each device gathers neighbours. Else its part of the result is no range of what its group holds,
    and XLA gathers the whole tensor on all axes and cuts it. The order is the one by which the fewest
    bytes are moved so; the mesh's where none matters.
    """
    grouping = tables.grouping
    times = grouping.graph.multiplicities()
    changes: dict[tuple[frozenset, frozenset], float] = {}
    for g, item in enumerate(grouping.groups):
        for view in item.views:
            tensor = item.source if item.kind == COPY else view.tensor
            needed = _as_read(tables, assignment, g, view)
            weight = grouping.graph.tensors[tensor].n_bytes * times[view.region]
            for have, want in zip(specs.get(tensor, ()), needed):
                few, many = sorted((frozenset(have), frozenset(want)), key=len)
                if few and few < many:
                    changes[few, many] = changes.get((few, many), 0.0) + weight
    return major_first(changes, len(tables.layout.mesh.axis_sizes))


def major_first(
    changes: Mapping[tuple[frozenset[int], frozenset[int]], float], n_axes: int
) -> tuple[int, ...]:
    """The order of axes under which the fewest bytes change between sharings that do not nest.

    ``changes`` gives the bytes of what lies on the second set of axes and is read on the first, a
    part of it. They nest where the axes that stay are the major ones of the second set.
    """

    def moved(order: tuple[int, ...]) -> float:
        return sum(
            weight
            for (few, many), weight in changes.items()
            if set([a for a in order if a in many][: len(few)]) != few
        )

    return min(itertools.permutations(range(n_axes)), key=moved)


def decode(
    tables: Tables, assignment: np.ndarray, *, pin_operands: bool = True
) -> tuple[
    tuple[LeafSpec, ...],
    tuple[LeafSpec, ...],
    dict[int, SpecEntries],
    dict[tuple[int, int], SpecEntries],
    dict[tuple[int, int], SpecEntries],
]:
    """(arguments, results, value constraints, operand constraints, copies that operands come from).

    Without ``pin_operands`` only values are constrained, as experts do by hand; where an operand has
    to change its sharding is then left to the compiler.
    """
    grouping = tables.grouping
    graph = grouping.graph
    names = tables.layout.mesh.axis_names
    sizes = tables.layout.mesh.axis_sizes
    specs = tensor_specs(tables, assignment)
    order = tuple(range(len(names)))
    if pin_operands:
        order = axis_order(tables, assignment, specs)

    def named(spec: Spec) -> SpecEntries:
        return tuple(tuple(names[a] for a in order if a in dim and sizes[a] > 1) for dim in spec)

    def leaf(t: int, name: str, spec: Spec) -> LeafSpec:
        tensor = graph.tensors[t]
        return LeafSpec(name=name, shape=tensor.shape, dtype=tensor.dtype, spec=named(spec))

    inputs = tuple(leaf(t, n, specs[t]) for t, n in zip(graph.inputs, graph.input_names))
    state = {b: a for a, b in graph.aliases}
    outputs = []
    for j, (t, name) in enumerate(zip(graph.outputs, graph.output_names)):
        if t < 0:
            outputs.append(LeafSpec(name=name, shape=(), dtype="float32", spec=()))
        elif j in state:
            outputs.append(leaf(t, name, specs[graph.inputs[state[j]]]))
        else:
            outputs.append(leaf(t, name, specs[t]))

    def summed(t: int) -> SpecEntries:
        """As XLA scatters sums: on the axes that shard the contraction's own rows before others."""
        g = grouping.group_of[t]
        node = int(tables.node_of[g])
        place = tables.choices[node].place[int(assignment[node])]

        def axes_of(dim: tuple[int, ...], cls: int) -> tuple[str, ...]:
            used = [a for a in order if a in dim and sizes[a] > 1]
            return tuple(names[a] for a in sorted(used, key=lambda a: place[a] != cls))

        classes = grouping.groups[g].tensors[t]
        return tuple(axes_of(dim, cls) for dim, cls in zip(specs[t], classes))

    stored = materialised(grouping)
    results = {}
    for t in stored:
        tensor = graph.tensors[t]
        if tensor.producer < 0:
            continue
        always = _always(graph.ops[tensor.producer].primitive)
        if always or math.prod(tensor.shape) >= SMALL:
            product = graph.ops[tensor.producer].primitive in CONTRACTIONS
            results[t] = summed(t) if product and pin_operands else named(specs[t])
    operands: dict[tuple[int, int], SpecEntries] = {}
    copies: dict[tuple[int, int], SpecEntries] = {}

    for g, item in enumerate(grouping.groups):
        if item.kind == COPY:
            continue
        for view in item.views:
            small = math.prod(graph.tensors[view.tensor].shape) < SMALL
            spec = _as_read(tables, assignment, g, view)
            if spec != specs[view.tensor]:
                for op in view.ops:
                    left_open = small or not pin_operands
                    if left_open and not _always(graph.ops[op].primitive):
                        continue
                    operands[(op, view.tensor)] = named(spec)
                    source = grouping.source_group(g, view)
                    copy = grouping.groups[source]
                    if copy.kind == COPY:
                        on_the_way = _as_read(tables, assignment, source, copy.views[0])
                        if on_the_way not in (spec, specs[view.tensor]):
                            copies[(op, view.tensor)] = named(on_the_way)
    return inputs, tuple(outputs), results, operands, copies
