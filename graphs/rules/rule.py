"""Sharding rules in factors, in the manner of Shardy's operator sharding rules.

A rule names the *factors* of an operator. Dimensions of operands and results that carry the same
factor are sharded together. A factor that is missing from the results is reduced: sharding it leaves
partial results that must be combined across the mesh axis. ``WHOLE`` marks a dimension that has to be
complete on every device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

WHOLE = -1

Shape = tuple[int, ...]
Factors = tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpRule:
    """How one operator may be sharded."""

    operands: tuple[Factors, ...]
    """For each operand, the factor of each dimension, or WHOLE. A dimension made of several factors
    names its major one: only that one can be sharded."""
    results: tuple[Factors, ...]
    """The same for each result."""
    sizes: tuple[int, ...]
    """[F] size of each factor; a mesh axis shards it only where it divides this."""
    reduced: Mapping[int, str] = dataclasses.field(default_factory=dict)
    """Reduced factor -> how partial results combine: ``sum`` or ``max``."""
    light: bool = True
    """True where the operator costs memory traffic only and follows its neighbours' sharding;
    False where it decides (contractions, gathers, scatters)."""
    flops: float = 0.0
    """Multiply-adds count two. Only contractions and kernels count here."""
    pins: Mapping[int, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Factor -> names of the mesh axes that the user has put on it."""
    known: bool = True
    """False for the fallback of a primitive without a rule."""


RuleFn = Callable[[Mapping[str, Any], tuple[Shape, ...], tuple[Shape, ...]], OpRule]
"""(equation parameters, operand shapes, result shapes) -> rule."""

LocalFn = Callable[
    [Mapping[str, Any], tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]], dict[str, Any]
]
"""(equation parameters, parts into which each dimension of each operand is cut, the same of each
result) -> the parameters of the call on one device."""

_RULES: dict[str, RuleFn] = {}
_LOCAL: dict[str, LocalFn] = {}


def register_rule(*primitives: str) -> Callable[[RuleFn], RuleFn]:
    """Decorator: use the function as the sharding rule of these primitives."""

    def register(fn: RuleFn) -> RuleFn:
        for name in primitives:
            _RULES[name] = fn
        return fn

    return register


def register_local(*primitives: str) -> Callable[[LocalFn], LocalFn]:
    """Decorator: XLA cannot partition these primitives, so each device calls them on its part.

    The function gives the equation's parameters on that part; the sharding rule says which parts
    there are. A plan's ``apply`` puts such a call into a ``jax.shard_map``.
    """

    def register(fn: LocalFn) -> LocalFn:
        for name in primitives:
            _LOCAL[name] = fn
        return fn

    return register


def local_of(primitive: str) -> LocalFn | None:
    """How a primitive is called on one device's part; None where XLA partitions it."""
    return _LOCAL.get(primitive)


def rule_named(name: str) -> RuleFn | None:
    """The rule registered under a name, if any."""
    return _RULES.get(name)


def rule_of(
    primitive: str, params: Mapping[str, Any], ins: tuple[Shape, ...], outs: tuple[Shape, ...]
) -> OpRule:
    """The rule of an operator; a primitive without one is kept whole (``known=False``)."""
    fn = _RULES.get(primitive)
    if fn is None:
        return whole(ins, outs)
    return fn(params, ins, outs)


def registered() -> tuple[str, ...]:
    """Names of the primitives that have a rule."""
    return tuple(sorted(_RULES))


def whole(ins: tuple[Shape, ...], outs: tuple[Shape, ...]) -> OpRule:
    """Every dimension complete on every device."""
    return OpRule(
        operands=tuple((WHOLE,) * len(s) for s in ins),
        results=tuple((WHOLE,) * len(s) for s in outs),
        sizes=(),
        light=False,
        known=False,
    )


class FactorBuilder:
    """Hands out factors while a rule is written."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def new(self, size: int) -> int:
        """A new factor, or WHOLE for a dimension of size one."""
        if size <= 1:
            return WHOLE
        self.sizes.append(int(size))
        return len(self.sizes) - 1

    def dims(self, shape: Shape) -> list[int]:
        """A new factor for each dimension."""
        return [self.new(n) for n in shape]
