"""Rules of hand-written kernels: which axes of a Pallas grid devices can share.

A kernel is opaque, but its grid and its index maps say which block of each operand every grid point
reads and writes. Where a grid axis only walks along one dimension of each operand that depends on
it, and of every result, and the kernel does not ask where on that axis it is, the axis can be cut:
each device runs the same kernel on a shorter grid over its part of these dimensions.

A rule for one kernel, registered as ``pallas_call:NAME``, says more where its author knows more (for
instance that a kernel asks for its place but only to set its scratch space).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from graphs.errors import MeshwrightError
from graphs.rules.rule import WHOLE, OpRule, register_local, register_rule, rule_named, whole

_PLACE = ("program_id", "num_programs")
_BLOCKED, _SQUEEZED = "Blocked", "Squeezed"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Walk:
    """How the blocks of one operand follow the grid."""

    axes: tuple[frozenset[int], ...]
    """[dims] arguments of the index map on which the index of the block depends: grid axes first,
    then what the kernel prefetches."""
    blocks: tuple[int, ...]
    """[dims] number of blocks, 0 where blocks are not of one size that divides the dimension."""


def kernel_name(params: Mapping[str, Any]) -> str:
    """The name given to pallas_call, or that of the kernel's function."""
    return params.get("name") or getattr(params["jaxpr"].debug_info, "func_name", "") or "kernel"


@register_rule("pallas_call")
def pallas_call(params, ins, outs) -> OpRule:
    """One factor for each grid axis that devices can share; a rule of the kernel's own first."""
    name = kernel_name(params)
    own = rule_named(f"pallas_call:{name}")
    rule = _by_grid(params, ins, outs) if own is None else own(params, ins, outs)
    return dataclasses.replace(rule, light=False, flops=kernel_flops(params))


def _by_grid(params, ins, outs) -> OpRule:
    grid, first = _static_grid(params), params["grid_mapping"].num_index_operands
    operands = [[WHOLE] * len(s) for s in ins]
    results = [[WHOLE] * len(s) for s in outs]
    sizes: list[int] = []
    if grid is None or params.get("mesh") is not None:
        return whole(ins, outs)
    walks = _walks(params)
    asked = _asked_axes(params)
    maps = params["grid_mapping"].block_mappings
    arrays = [*operands[first:], *results]
    for axis, steps in enumerate(grid):
        along = None if axis in asked or steps <= 1 else _dimensions(walks, axis)
        if along is None or WHOLE in along[len(ins) - first :]:
            continue
        cut = [i for i, d in enumerate(along) if d != WHOLE]
        size = math.gcd(*(walks[i].blocks[along[i]] for i in cut))
        if size <= 1 or not all(
            _advances(maps[i], axis, along[i], steps // walks[i].blocks[along[i]]) for i in cut
        ):
            continue
        for i in cut:
            arrays[i][along[i]] = len(sizes)
        sizes.append(size)
    return OpRule(
        operands=tuple(map(tuple, operands)),
        results=tuple(map(tuple, results)),
        sizes=tuple(sizes),
        known=bool(sizes),
    )


def _dimensions(walks: Sequence[_Walk], axis: int) -> list[int] | None:
    """The dimension of each operand that walks along a grid axis and no other, WHOLE if none does.

    None where the axis cannot be cut.
    """
    found = []
    for walk in walks:
        on = [d for d, axes in enumerate(walk.axes) if axis in axes]
        if len(on) > 1 or any(walk.axes[d] != {axis} or walk.blocks[d] <= 1 for d in on):
            return None
        found.append(on[0] if on else WHOLE)
    return found


def _advances(mapping, axis: int, dim: int, every: int) -> bool:
    """Whether the block index of ``dim`` is the grid index divided by ``every``."""
    import jax
    from jax.core import eval_jaxpr

    jaxpr = mapping.index_map_jaxpr.jaxpr
    out = jaxpr.outvars[dim]
    if every < 1:
        return False
    if out is jaxpr.invars[axis]:
        return every == 1
    steps = every * _whole_blocks(mapping.block_shape[dim], mapping.array_aval.shape[dim])
    needed, eqns = {out}, []
    for eqn in reversed(jaxpr.eqns):
        if needed & set(eqn.outvars):
            needed |= {v for v in eqn.invars if not hasattr(v, "val")}
            eqns.insert(0, eqn)
    info = jaxpr.debug_info._replace(result_paths=("index",))
    only = jaxpr.replace(eqns=eqns, outvars=[out], debug_info=info)

    def index(step):
        args = [step if i == axis else 0 for i in range(len(jaxpr.invars))]
        return eval_jaxpr(only, mapping.index_map_jaxpr.consts, *args)[0]

    found = jax.vmap(index)(np.arange(steps, dtype=np.int32))
    return bool(np.array_equal(found, np.arange(steps) // every))


def _static_grid(params) -> tuple[int, ...] | None:
    grid = params["grid_mapping"].grid
    return tuple(grid) if all(isinstance(n, int) for n in grid) else None


def _walks(params) -> list[_Walk]:
    """For each operand after the prefetched ones, and each result."""
    gm = params["grid_mapping"]
    found = []
    for mapping in gm.block_mappings:
        jaxpr = mapping.index_map_jaxpr.jaxpr
        shape = mapping.array_aval.shape
        plain = len(jaxpr.outvars) == len(shape)
        everything = frozenset(range(len(jaxpr.invars)))
        found.append(
            _Walk(
                axes=_dependence(jaxpr) if plain else (everything,) * len(shape),
                blocks=tuple(_whole_blocks(b, n) for b, n in zip(mapping.block_shape, shape)),
            )
        )
    return found


def _whole_blocks(block, size: int) -> int:
    kind = type(block).__name__
    width = 1 if kind == _SQUEEZED else getattr(block, "block_size", 0) if kind == _BLOCKED else 0
    return size // width if width and size % width == 0 else 0


def _dependence(jaxpr) -> tuple[frozenset[int], ...]:
    """The arguments of an index map on which each of its results depends."""
    of: dict[Any, frozenset[int]] = {v: frozenset([i]) for i, v in enumerate(jaxpr.invars)}

    def read(atom) -> frozenset[int]:
        return frozenset() if hasattr(atom, "val") else of.get(atom, frozenset())

    for eqn in jaxpr.eqns:
        joined = frozenset().union(*map(read, eqn.invars))
        of.update((v, joined) for v in eqn.outvars)
    return tuple(read(v) for v in jaxpr.outvars)


def _asked_axes(params) -> set[int]:
    """Grid axes whose index or length the kernel reads; axes added by vmap have no number in it."""
    gm = params["grid_mapping"]
    own = [g for g in range(len(gm.grid)) if g not in gm.vmapped_dims]
    asked = (e.params["axis"] for e, _ in _equations(params["jaxpr"]) if e.primitive.name in _PLACE)
    return {own[a] for a in asked if a < len(own)}


def _equations(jaxpr, times: float = 1.0) -> Iterator[tuple[Any, float]]:
    """(equation, how often it runs), those of loops and branches included."""
    for eqn in jaxpr.eqns:
        yield eqn, times
        inside = (
            times * float(eqn.params.get("length", 1)) if eqn.primitive.name == "scan" else times
        )
        for value in eqn.params.values():
            for item in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(item, "jaxpr", item)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner, inside)


def kernel_flops(params: Mapping[str, Any]) -> float:
    """Multiply-adds (counted two) on the whole grid: the author's estimate, or what its body holds."""
    estimate = params.get("cost_estimate")
    if estimate is not None and estimate.flops > 0:
        return float(estimate.flops)
    total = 0.0
    for eqn, times in _equations(params["jaxpr"]):
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            depth = math.prod(left[d] for d in contract)
            total += 2.0 * times * depth * math.prod(eqn.outvars[0].aval.shape)
    return total * grid_steps(params)


def grid_steps(params: Mapping[str, Any]) -> float:
    """Points of the grid; an axis of a length that only the run knows counts once."""
    return float(math.prod(n for n in params["grid_mapping"].grid if isinstance(n, int)))


def kernel_bytes(params: Mapping[str, Any]) -> float:
    """Bytes between device memory and the core on the whole grid.

    A block is moved when its index changes from one grid point to the next: as often as the axes do
    down to the innermost on which the index depends. The author's estimate first.
    """
    estimate = params.get("cost_estimate")
    if estimate is not None and estimate.bytes_accessed > 0:
        return float(estimate.bytes_accessed)
    grid = [n if isinstance(n, int) else 1 for n in params["grid_mapping"].grid]
    total = 0.0
    for mapping, walk in zip(params["grid_mapping"].block_mappings, _walks(params)):
        inner = max((g for axes in walk.axes for g in axes), default=-1)
        block = math.prod(getattr(b, "block_size", 1) for b in mapping.block_shape)
        total += block * mapping.array_aval.dtype.itemsize * math.prod(grid[: inner + 1])
    return total


@register_local("pallas_call")
def local_kernel(
    params: Mapping[str, Any],
    operand_parts: Sequence[tuple[int, ...]],
    result_parts: Sequence[tuple[int, ...]],
) -> dict[str, Any]:
    """The same kernel on one device's part of its operands and results.

    Raises MeshwrightError where a dimension that is cut is not walked along by a grid axis of its
    own: the kernel's blocks would have to change.
    """
    gm = params["grid_mapping"]
    name = kernel_name(params)
    parts = [*operand_parts[gm.num_index_operands :], *result_parts]
    grid = list(gm.grid)
    cut: dict[int, int] = {}
    mappings = []
    for mapping, walk, by_dim in zip(gm.block_mappings, _walks(params), parts):
        shape = list(mapping.array_aval.shape)
        for d, n in enumerate(by_dim):
            if n == 1:
                continue
            axes = walk.axes[d]
            if len(axes) != 1 or walk.blocks[d] % n or cut.get(min(axes), n) != n:
                raise MeshwrightError(
                    f"kernel {name!r} cannot run on 1/{n} of dimension {d} of an operand of shape "
                    f"{tuple(shape)}: no grid axis walks along it in blocks that {n} divides; "
                    f"change its rule ('pallas_call:{name}') or wrap the call in jax.shard_map"
                )
            cut[min(axes)] = n
            shape[d] //= n
        mappings.append(mapping.replace(array_aval=mapping.array_aval.update(shape=tuple(shape))))
    for axis, n in cut.items():
        grid[axis] //= n
    share = math.prod(cut.values())
    first = gm.num_inputs
    changed: dict[str, Any] = dict(
        grid_mapping=gm.replace(grid=tuple(grid), block_mappings=tuple(mappings)),
        out_avals=tuple(
            aval.update(shape=m.array_aval.shape)
            for aval, m in zip(params["out_avals"], mappings[first:])
        ),
    )
    estimate = params.get("cost_estimate")
    if estimate is not None:
        amounts = {k: int(v) // share for k, v in dataclasses.asdict(estimate).items()}
        changed["cost_estimate"] = dataclasses.replace(estimate, **amounts)
    return {**params, **changed}
