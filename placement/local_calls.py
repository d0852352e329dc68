"""Calls that XLA cannot partition (Pallas kernels): each device makes them on its own part."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from graphs.rules import WHOLE, rule_of
from graphs.rules.manual import entry_axes
from graphs.rules.rule import LocalFn


def call_on_parts(
    eqn, local: LocalFn, operands: Sequence[Any], result_specs: Sequence[tuple], mesh
) -> list[Any]:
    """Results of an equation inside a ``jax.shard_map`` over all axes of the mesh.

    The specs of the results (PartitionSpec entries; empty: whole) say on which mesh axes each factor
    of the primitive's sharding rule lies; operands follow.
    """
    ins, outs = ([v.aval.shape for v in side] for side in (eqn.invars, eqn.outvars))
    rule = rule_of(eqn.primitive.name, eqn.params, tuple(ins), tuple(outs))
    axes: dict[int, tuple[str, ...]] = {}
    for factors, spec in zip(rule.results, result_specs):
        axes.update((f, entry_axes(e)) for f, e in zip(factors, spec) if f != WHOLE)
    sizes = dict(mesh.shape)

    def placed(dims) -> tuple[PartitionSpec, tuple[int, ...]]:
        on = [axes.get(f, ()) for f in dims]
        parts = tuple(math.prod(sizes[a] for a in names) for names in on)
        return PartitionSpec(*(names or None for names in on)), parts

    given, returned = ([placed(d) for d in dims] for dims in (rule.operands, rule.results))
    params = local(eqn.params, tuple(p for _, p in given), tuple(p for _, p in returned))
    call = _bound(eqn.primitive, params)
    return jax.shard_map(
        call,
        mesh=mesh,
        in_specs=tuple(s for s, _ in given),
        out_specs=[s for s, _ in returned],
        check_vma=False,
    )(*operands)


def _bound(primitive, params) -> Callable[..., list[Any]]:
    def call(*values):
        result = primitive.bind(*values, **params)
        return list(result) if primitive.multiple_results else [result]

    return call
