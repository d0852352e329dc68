"""Insert a plan's constraints into the user's function, inside loops and branches too.

The function is traced to a jaxpr and evaluated equation by equation. Tensors and ops are numbered
exactly as :mod:`graphs.trace` numbers them, so the plan's constraints, which name those numbers,
find their values. A result constraint pins the value; an operand constraint pins a copy that one op
reads, and copies with one spec are made once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.core import eval_jaxpr
from jax.sharding import NamedSharding, PartitionSpec

from graphs._jaxpr import called_jaxpr, live_eqns, open_jaxpr
from graphs.rules import local_of
from graphs.rules.manual import entry_axes
from graphs.trace import abstract
from placement.local_calls import call_on_parts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constraints:
    """Where a plan pins shardings."""

    results: Mapping[int, tuple]
    """Tensor -> PartitionSpec entries."""
    operands: Mapping[tuple[int, int], tuple]
    """(op, tensor) -> PartitionSpec entries of the copy the op reads."""
    copies: Mapping[tuple[int, int], tuple] = dataclasses.field(default_factory=dict)
    """(op, tensor) -> PartitionSpec entries of a copy that other ops read too and this one's is made
    from."""


def constrained(closed, constraints: Constraints, mesh, flat_args: list) -> list:
    """Evaluate a closed jaxpr on flat arguments with the constraints inserted."""
    walker = _Walker(constraints, mesh)
    inputs = [walker.value(x, pin=False) for x in flat_args]
    consts = [walker.value(c, pin=False) for c in closed.consts]
    return [v for v, _ in walker.walk(closed.jaxpr, consts, inputs)]


def steps(have: tuple, want: tuple) -> list[tuple]:
    """PartitionSpec entries on the way from one sharding to another, the last one ``want``.

    Each step is one that XLA's partitioner has a collective for: cut along axes that are free;
    gather those that are in the way; move axes from one dimension to another; gather the others;
    cut along the rest. Of several at once it gathers the whole tensor. The same order is priced by
    :func:`cost_model.pricing.reshard`.
    """
    have, want = (tuple(entry_axes(dim) for dim in spec) for spec in (have, want))
    held = {a for dim in have for a in dim}
    needed = {a for dim in want for a in dim}
    found: list[tuple] = []

    def emit(dims) -> None:
        spec = tuple(tuple(dim) or None for dim in dims)
        if spec != (found[-1] if found else tuple(dim or None for dim in have)):
            found.append(spec)

    now = [list(dim) for dim in have]
    for dim, goal in zip(now, want):
        for i, axis in enumerate(goal):
            if axis not in held and dim == list(goal[:i]):
                dim.append(axis)
    emit(now)
    first: set[str] = set()
    for d, goal in enumerate(want):
        now[d], early = _ordered(now[d], goal, needed, bool(set(goal) & (held - set(now[d]))))
        first |= early
    emit(now)
    now = [[a for a in dim if a not in first] for dim in now]
    emit(now)
    here = {a for dim in now for a in dim}
    goals = [
        [a for a in goal if a in here] + [a for a in dim if a not in needed]
        for dim, goal in zip(now, want)
    ]
    for dims in _moves(now, goals):
        emit(dims)
    emit([[a for a in dim if a in needed] for dim in goals])
    emit(want)
    return found or [tuple(dim or None for dim in want)]


def _ordered(
    dim: list[str], goal: tuple[str, ...], needed: set[str], target: bool
) -> tuple[list[str], set[str]]:
    """(axes of a dimension, those that stay first; those that are gathered before others move).

    An axis that goes is in the way of one that moves off where it is the minor one, and of all that
    move onto the dimension (``target``).
    """
    stay = [a for a in goal if a in dim]
    rest = [a for a in dim if a not in stay]
    moving = [a in needed for a in rest]
    cut = 0 if target else moving.index(True) if any(moving) else len(rest)
    tail = rest[cut:]
    gone = [a for a in tail if a not in needed]
    return stay + rest[:cut] + [a for a in tail if a in needed] + gone, set(gone)


def _moves(now: list[list[str]], goals: list[list[str]]) -> Iterator[list[list[str]]]:
    """The way from ``now`` to ``goals``, the same axes, one pair of dimensions after the other.

    What moves is the minor end of one dimension and becomes that of another; where no such move
    leads on, the rest goes at once.
    """
    while now != goals:
        step = next(_minor_moves(now, goals), None)
        if step is None:
            yield goals
            return
        source, target, n = step
        moved = now[source][-n:]
        now = [list(dim) for dim in now]
        del now[source][-n:]
        now[target] += moved
        yield now


def _minor_moves(now: list[list[str]], goals: list[list[str]]) -> Iterator[tuple[int, int, int]]:
    """(source, target, number of axes) of the moves that bring ``target`` nearer to its goal."""
    for target, goal in enumerate(goals):
        held = len(now[target])
        if now[target] != goal[:held]:
            continue
        for source, dim in enumerate(now):
            for n in range(len(dim), 0, -1):
                if source != target and dim[-n:] == goal[held : held + n]:
                    yield source, target, n


class _Walker:
    """Mirrors graphs.trace._Builder: a value travels with its tensor number."""

    def __init__(self, constraints: Constraints, mesh) -> None:
        self.constraints, self.mesh = constraints, mesh
        self.n_tensors = 0
        self.n_ops = 0
        self.copies: list[dict[tuple[int, tuple], Any]] = [{}]

    def value(self, x, pin: bool = True) -> tuple[Any, int]:
        number = self.n_tensors
        self.n_tensors += 1
        spec = self.constraints.results.get(number) if pin else None
        return (x if spec is None else self._pin(x, spec)), number

    def _pin(self, x, spec: tuple):
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(*spec)))

    def operand(self, pair: tuple[Any, int], op: int):
        x, t = pair
        spec = self.constraints.operands.get((op, t))
        if spec is None:
            return x
        have = self.constraints.results.get(t)
        shared = self.constraints.copies.get((op, t))
        if shared is not None:
            x, have = self._copy(x, t, have, shared), shared
        return self._copy(x, t, have, spec)

    def _copy(self, x, t: int, have: tuple | None, spec: tuple):
        """The copy of tensor t with this spec, made of x unless it is there already."""
        for scope in self.copies:
            if (t, spec) in scope:
                return scope[(t, spec)]
        for step in [spec] if have is None else steps(have, spec):
            x = self._pin(x, step)
        self.copies[-1][(t, spec)] = x
        return x

    def op(self) -> int:
        self.n_ops += 1
        return self.n_ops - 1

    def walk(self, jaxpr, consts, inputs) -> list[tuple[Any, int]]:
        env: dict[Any, tuple[Any, int]] = {}
        for var, pair in zip(jaxpr.constvars, consts):
            env[var] = pair
        for var, pair in zip(jaxpr.invars, inputs):
            env[var] = pair

        def read(atom) -> tuple[Any, int]:
            return (atom.val, -1) if hasattr(atom, "val") else env[atom]

        for eqn in live_eqns(jaxpr):
            args = [read(v) for v in eqn.invars]
            called = called_jaxpr(eqn)
            name = eqn.primitive.name
            if called is not None:
                outs = self._call(eqn, args, *called)
            elif name == "scan":
                outs = self._scan(eqn, args)
            elif name == "while":
                outs = self._while(eqn, args)
            elif name == "cond":
                outs = self._cond(eqn, args)
            else:
                if name == "select_n":
                    args = self._materialise(args)
                op = self.op()
                operands = [self.operand(a, op) for a in args]
                if name == "sharding_constraint":  # the plan holds the user's pin
                    env[eqn.outvars[0]] = self.value(operands[0])
                    continue
                outs = [self.value(x) for x in self._results(eqn, operands)]
            for var, pair in zip(eqn.outvars, outs):
                env[var] = pair
        return [read(v) for v in jaxpr.outvars]

    def _results(self, eqn, operands) -> list[Any]:
        local = local_of(eqn.primitive.name)
        if local is not None:
            numbers = range(self.n_tensors, self.n_tensors + len(eqn.outvars))
            specs = [self.constraints.results.get(t, ()) for t in numbers]
            return call_on_parts(eqn, local, operands, specs, self.mesh)
        params = eqn.primitive.get_bind_params(eqn.params)
        result = eqn.primitive.bind(*operands, **params)
        return list(result) if eqn.primitive.multiple_results else [result]

    def _materialise(self, args):
        out = []
        for x, t in args:
            if t < 0:
                self.op()
                out.append(self.value(x))
            else:
                out.append((x, t))
        return out

    def _call(self, eqn, args, inner, inner_consts):
        name = eqn.primitive.name
        if name in ("custom_vjp_call", "custom_vjp_call_jaxpr", "custom_jvp_call"):
            args = args[: len(inner.invars)]
        args = self._materialise(args)
        consts = [self.value(c, pin=False) for c in inner_consts]
        if name not in ("remat", "remat2", "checkpoint"):
            return self.walk(inner, consts, args)
        # rematerialisation keeps its barrier: rewrite the body and bind the same primitive again
        numbers: list[int] = []
        first = (self.n_tensors, self.n_ops)

        def body(*values):
            self._rewind(first, numbers)
            pairs = [(v, t) for v, (_, t) in zip(values, args)]
            self.copies.append({})
            outs = self.walk(inner, consts, pairs)
            self.copies.pop()
            numbers.extend(t for _, t in outs)
            return [v for v, _ in outs]

        closed = jax.make_jaxpr(body)(*[x for x, _ in args])
        new = closed.jaxpr
        if closed.consts:
            new = new.replace(constvars=[], invars=[*new.constvars, *new.invars], debug_info=None)
        params = dict(eqn.params, jaxpr=new)
        outs = eqn.primitive.bind(*closed.consts, *[x for x, _ in args], **params)
        return list(zip(outs, numbers))

    def _scan(self, eqn, args):
        p = eqn.params
        n_consts, n_carry = p["num_consts"], p["num_carry"]
        body, body_consts = open_jaxpr(p["jaxpr"])
        consts = self._materialise(args[:n_consts])
        carry_numbers, carry = [], []
        for pair in args[n_consts : n_consts + n_carry]:
            op = self.op()
            x, t = self.value(self.operand(pair, op))
            carry.append(x)
            carry_numbers.append(t)
        slices = args[n_consts + n_carry :]
        slice_numbers, slice_ops = [], []
        for _ in slices:
            slice_ops.append(self.op())
            slice_numbers.append(self.n_tensors)
            self.n_tensors += 1
        inner_consts = [self.value(c, pin=False) for c in body_consts]
        results: list[int] = []
        first = (self.n_tensors, self.n_ops)

        def step(state, xs):
            self._rewind(first, results)
            pairs = [
                *consts,
                *((self._repin(x, t), t) for x, t in zip(state, carry_numbers)),
                *((self._repin(x, t), t) for x, t in zip(xs, slice_numbers)),
            ]
            self.copies.append({})
            outs = self.walk(body, inner_consts, pairs)
            new, ys = [], []
            for i, pair in enumerate(outs):
                op = self.op()
                x = self.operand(pair, op)
                if i < n_carry:
                    new.append(self._repin(x, carry_numbers[i]))
                else:
                    ys.append(x)
                results.append(self.n_tensors)
                self.n_tensors += 1
            self.copies.pop()
            return new, ys

        xs = [self.operand(pair, op) for pair, op in zip(slices, slice_ops)]
        carry, ys = jax.lax.scan(
            step, carry, xs, length=p["length"], reverse=p["reverse"], unroll=p["unroll"]
        )
        return [(self._repin(x, t), t) for x, t in zip([*carry, *ys], results)]

    def _rewind(self, first: tuple[int, int], results: list[int]) -> None:
        """A body may be traced more than once; it is numbered the same each time."""
        self.n_tensors, self.n_ops = first
        results.clear()

    def _repin(self, x, number: int):
        spec = self.constraints.results.get(number)
        return x if spec is None else self._pin(x, spec)

    def _while(self, eqn, args):
        p = eqn.params
        nc, nb = p["cond_nconsts"], p["body_nconsts"]
        body, body_consts = open_jaxpr(p["body_jaxpr"])
        cond, cond_consts = open_jaxpr(p["cond_jaxpr"])
        cond_args = [x for x, _ in args[:nc]]
        consts = self._materialise(args[nc : nc + nb])
        carry, numbers = [], []
        for pair in args[nc + nb :]:
            op = self.op()
            x, t = self.value(self.operand(pair, op))
            carry.append(x)
            numbers.append(t)
        inner_consts = [self.value(c, pin=False) for c in body_consts]
        results: list[int] = []
        first = (self.n_tensors, self.n_ops)

        def test(state):
            return eval_jaxpr(cond, cond_consts, *cond_args, *state)[0]

        def step(state):
            self._rewind(first, results)
            pairs = [*consts, *((self._repin(x, t), t) for x, t in zip(state, numbers))]
            self.copies.append({})
            outs = self.walk(body, inner_consts, pairs)
            new = []
            for pair, t in zip(outs, numbers):
                new.append(self._repin(self.operand(pair, self.op()), t))
                results.append(self.n_tensors)
                self.n_tensors += 1
            self.copies.pop()
            return new

        out = jax.lax.while_loop(test, step, carry)
        return [(self._repin(x, t), t) for x, t in zip(out, results)]

    def _cond(self, eqn, args):
        flat = [x for x, _ in args[1:]]
        jaxprs = []
        for branch in eqn.params["branches"]:
            body, body_consts = open_jaxpr(branch)

            def run(*values, body=body, body_consts=body_consts):
                pairs = [(v, t) for v, (_, t) in zip(values, args[1:])]
                self.copies.append({})
                pairs = self._materialise(pairs)
                consts = [self.value(c, pin=False) for c in body_consts]
                outs = self.walk(body, consts, pairs)
                self.copies.pop()
                return [v for v, _ in outs]

            jaxprs.append(jax.make_jaxpr(run)(*flat))
        index, _ = args[0]
        calls = [lambda *v, j=j: eval_jaxpr(j.jaxpr, j.consts, *v) for j in jaxprs]
        outs = jax.lax.switch(index, calls, *flat)
        pairs = []
        for x in outs:
            self.op()
            pairs.append(self.value(x))
        return pairs


def apply(fn: Callable, constraints: Constraints, mesh, check: Callable[[Any], None]) -> Callable:
    """``fn`` with the constraints; ``check`` receives each traced jaxpr and may refuse it."""

    def wrapped(*args):
        bare = jax.tree.map(abstract, args)  # as planned: without shardings of the caller's
        closed, shape = jax.make_jaxpr(fn, return_shape=True)(*bare)
        check(closed)
        flat = jax.tree.leaves(args)
        outs = constrained(closed, constraints, mesh, flat)
        return jax.tree.unflatten(jax.tree.structure(shape), outs)

    wrapped.__name__ = getattr(fn, "__name__", "planned")
    wrapped.__doc__ = fn.__doc__
    return wrapped
