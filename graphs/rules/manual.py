"""Rules of what the user has sharded by hand: sharding constraints and shard_map.

Dimensions that the user gives to mesh axes are factors, pinned to these axes; all others are whole.
The pins hold on a mesh that has the axes (:func:`user_mesh` finds the mesh they were written for).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from graphs.errors import MeshwrightError
from graphs.rules.mapped import map_name
from graphs.rules.rule import WHOLE, OpRule, register_rule, rule_named


def entry_axes(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one PartitionSpec entry."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _pinned(ins, outs, in_specs, out_specs) -> OpRule:
    sizes: list[int] = []
    pins: dict[int, tuple[str, ...]] = {}
    by_axes: dict[tuple[str, ...], int] = {}

    def factors(shape, spec):
        entries = [*spec, *([None] * (len(shape) - len(spec)))]
        found = []
        for n, entry in zip(shape, entries):
            axes = entry_axes(entry)
            if not axes:
                found.append(WHOLE)
                continue
            if axes not in by_axes:
                by_axes[axes] = len(sizes)
                pins[len(sizes)] = axes
                sizes.append(n)
            found.append(by_axes[axes])
        return tuple(found)

    return OpRule(
        operands=tuple(factors(s, p) for s, p in zip(ins, in_specs)),
        results=tuple(factors(s, p) for s, p in zip(outs, out_specs)),
        sizes=tuple(sizes),
        light=False,
        pins=pins,
    )


@register_rule("sharding_constraint")
def sharding_constraint(params, ins, outs) -> OpRule:
    """The value has the sharding that the user wrote."""
    spec = tuple(getattr(params["sharding"], "spec", ()) or ())
    return _pinned(ins, outs, [spec], [spec])


@register_rule("shard_map")
def shard_map(params, ins, outs) -> OpRule:
    """Operands and results have the map's specs; what happens inside is the user's."""
    own = rule_named(f"shard_map:{map_name(params)}")
    if own is not None:
        return own(params, ins, outs)
    return _pinned(ins, outs, _specs(params, "in"), _specs(params, "out"))


def _specs(params: Mapping[str, Any], side: str) -> list[tuple]:
    found = params.get(f"{side}_specs", params.get(f"{side}_names"))
    return [tuple(s) if not isinstance(s, dict) else _from_names(s) for s in found or ()]


def _from_names(names: Mapping[int, Iterable[str]]) -> tuple:
    """{dimension: axes} as a spec."""
    top = max(names, default=-1)
    return tuple(tuple(names.get(d, ())) or None for d in range(top + 1))


def user_mesh(ops) -> dict[str, int] | None:
    """The mesh (axis name -> size) that the user's constraints and maps name, if any.

    Raises MeshwrightError where they name several.
    """
    found: dict[tuple[tuple[str, int], ...], None] = {}
    for op in ops:
        mesh = None
        if op.primitive == "sharding_constraint":
            mesh = getattr(op.params.get("sharding"), "mesh", None)
        elif op.primitive == "shard_map":
            mesh = op.params.get("mesh")
        shape = getattr(mesh, "shape", None)
        if shape:
            found[tuple((str(k), int(v)) for k, v in dict(shape).items())] = None
    if len(found) > 1:
        raise MeshwrightError(
            f"the function's sharding constraints name {len(found)} different meshes "
            f"({'; '.join(map(str, map(dict, found)))}); use one mesh"
        )
    return dict(next(iter(found))) if found else None
