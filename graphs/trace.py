"""Trace any JAX function into a :class:`~graphs.graph.Graph`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from graphs._jaxpr import called_jaxpr, live_eqns, open_jaxpr
from graphs.collecting import without_collection
from graphs.errors import MeshwrightError
from graphs.graph import Graph, Op, Region, Tensor
from graphs.rules import local_of

_BODIES = frozenset(
    ["jaxpr", "call_jaxpr", "fun_jaxpr", "cond_jaxpr", "body_jaxpr", "branches", "jvp_jaxpr_fun"]
)


def trace(fn: Callable, *args: Any, donate_argnums: Sequence[int] = ()) -> Graph:
    """Trace ``fn(*args)``; ``args`` are pytrees of arrays or ``ShapeDtypeStruct``.

    Inputs of donated arguments are paired with outputs of the same shape and type, in the order of
    the same tree path first: they are the training state and keep one sharding.

    Raises MeshwrightError if the function cannot be traced.
    """
    bare = jax.tree.map(abstract, args)
    for n in donate_argnums:
        if not 0 <= n < len(args):
            raise MeshwrightError(
                f"donate_argnums names argument {n} but the function has {len(args)} arguments; "
                "give positions that exist"
            )
    try:
        with without_collection():
            closed, out_shape = jax.make_jaxpr(fn, return_shape=True)(*bare)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise MeshwrightError(
            f"the function cannot be traced by JAX with these arguments "
            f"({type(error).__name__}: {first}); call it under jax.make_jaxpr to see the full error"
        ) from error
    flat_in = jax.tree_util.tree_flatten_with_path(bare)[0]
    flat_out = jax.tree_util.tree_flatten_with_path(out_shape)[0]
    input_names = tuple(jax.tree_util.keystr(path) for path, _ in flat_in)
    output_names = tuple(jax.tree_util.keystr(path) for path, _ in flat_out)
    donated = [path[0].idx in set(donate_argnums) for path, _ in flat_in]
    with without_collection():
        return graph_of_jaxpr(closed, input_names, output_names, donated)


def graph_of_jaxpr(closed, input_names=None, output_names=None, donated=None) -> Graph:
    """The graph of a closed jaxpr; names and donation flags are per flat input and output."""
    jaxpr = closed.jaxpr
    names_in = tuple(input_names or (f"[{i}]" for i in range(len(jaxpr.invars))))
    names_out = tuple(output_names or (f"[{i}]" for i in range(len(jaxpr.outvars))))
    builder = _Builder()
    builder.regions.append(["top", -1, 1.0, 0, 0])
    inputs = [builder.tensor(v.aval, -1, 0) for v in jaxpr.invars]
    consts = [builder.tensor(v.aval, -1, 0) for v in jaxpr.constvars]
    outputs = builder.walk(jaxpr, consts, inputs, 0)
    builder.regions[0][4] = len(builder.ops)
    tensors = tuple(builder.tensors)
    aliases = _pair_state(
        tensors, inputs, outputs, names_in, names_out, donated or [False] * len(inputs)
    )
    digest = hashlib.sha256()
    for t in tensors:
        digest.update(f"{t.shape}{t.dtype};".encode())
    for op in builder.ops:
        digest.update(f"{op.primitive}{op.inputs}{op.outputs}{op.region};".encode())
    for r in builder.regions:
        digest.update(f"{r[0]}{r[2]};".encode())
    return Graph(
        tensors=tensors,
        ops=tuple(builder.ops),
        regions=tuple(
            Region(kind=k, parent=p, trips=t, start=a, stop=b) for k, p, t, a, b in builder.regions
        ),
        inputs=tuple(inputs),
        input_names=names_in,
        outputs=tuple(outputs),
        output_names=names_out,
        aliases=aliases,
        fingerprint=digest.hexdigest()[:32],
        warnings=tuple(dict.fromkeys(builder.warnings)),
    )


def abstract(leaf):
    """Shape and type of an argument leaf, without its sharding.

    Raises MeshwrightError if it has none.
    """
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    array = np.asarray(leaf)
    if array.dtype == object:
        raise MeshwrightError(
            f"an argument leaf is a {type(leaf).__name__}, not an array; "
            "close over it or mark it static"
        )
    return jax.ShapeDtypeStruct(array.shape, jax.dtypes.canonicalize_dtype(array.dtype))


class _Builder:
    """Collects tensors, ops and regions while walking a jaxpr in program order."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.ops: list[Op] = []
        self.regions: list[list] = []
        self.warnings: list[str] = []

    def tensor(self, aval, producer: int, region: int) -> int:
        shape = tuple(int(n) for n in getattr(aval, "shape", ()))
        dtype = getattr(aval, "dtype", None)
        itemsize = getattr(dtype, "itemsize", 4) if dtype is not None else 4
        self.tensors.append(
            Tensor(
                shape=shape,
                dtype=str(dtype),
                itemsize=int(itemsize),
                producer=producer,
                region=region,
            )
        )
        return len(self.tensors) - 1

    def emit(self, primitive, inputs, out_avals, region, params, source="", out_region=None):
        index = len(self.ops)
        outputs = tuple(
            self.tensor(a, index, region if out_region is None else out_region) for a in out_avals
        )
        # its rule may read the body, which stays a call
        whole = local_of(primitive) is not None or primitive == "shard_map"
        kept = params if whole else {k: v for k, v in params.items() if k not in _BODIES}
        self.ops.append(
            Op(
                primitive=primitive,
                inputs=tuple(inputs),
                outputs=outputs,
                region=region,
                params=kept,
                source=source,
            )
        )
        return outputs

    def walk(self, jaxpr, consts, inputs, region) -> list[int]:
        env: dict[Any, int] = {}
        for var, t in zip(jaxpr.constvars, consts):
            env[var] = t
        for var, t in zip(jaxpr.invars, inputs):
            env[var] = t

        def read(atom) -> int:
            return -1 if hasattr(atom, "val") else env[atom]

        for eqn in live_eqns(jaxpr):
            args = [read(v) for v in eqn.invars]
            called = called_jaxpr(eqn)
            name = eqn.primitive.name
            if name == "select_n":  # as where it is called with literals, by jnp.where
                args = self._materialise(eqn, args, eqn, region)
            if called is not None:
                inner, inner_consts = called
                if name in ("custom_vjp_call", "custom_vjp_call_jaxpr", "custom_jvp_call"):
                    args = args[: len(inner.invars)]
                args = self._materialise(eqn, args, inner, region)
                outs = self.walk(inner, self._consts(inner_consts, region), args, region)
            elif name == "scan":
                outs = self._scan(eqn, args, region)
            elif name == "while":
                outs = self._while(eqn, args, region)
            elif name == "cond":
                outs = self._cond(eqn, args, region)
            else:
                outs = self.emit(
                    name,
                    args,
                    [v.aval for v in eqn.outvars],
                    region,
                    dict(eqn.params),
                    _source(eqn),
                )
            for var, t in zip(eqn.outvars, outs):
                env[var] = t
        return [read(v) for v in jaxpr.outvars]

    def _materialise(self, eqn, args, inner, region) -> list[int]:
        """Literal arguments of a call become constants that the body can name."""
        return [
            t if t >= 0 else self.emit("literal", (), [var.aval], region, {})[0]
            for t, var in zip(args, inner.invars)
        ]

    def _consts(self, consts, region) -> list[int]:
        return [self.tensor(jax.typeof(c), -1, region) for c in consts]

    def _region(self, kind, parent, trips) -> int:
        self.regions.append([kind, parent, trips, len(self.ops), len(self.ops)])
        return len(self.regions) - 1

    def _scan(self, eqn, args, region) -> list[int]:
        params = eqn.params
        n_consts, n_carry = params["num_consts"], params["num_carry"]
        body, body_consts = open_jaxpr(params["jaxpr"])
        consts = self._materialise(eqn, args[:n_consts], _Head(body, 0, n_consts), region)
        carry_vars = body.invars[n_consts : n_consts + n_carry]
        carries = [
            self.emit("carry_in", (t,), [v.aval], region, {})[0]
            for t, v in zip(args[n_consts : n_consts + n_carry], carry_vars)
        ]
        inner = self._region("scan", region, float(params["length"]))
        slices = [
            self.emit("scan_slice", (t,), [v.aval], inner, {})[0]
            for t, v in zip(args[n_consts + n_carry :], body.invars[n_consts + n_carry :])
        ]
        for t in carries:  # a carry lives in the body
            old = self.tensors[t]
            self.tensors[t] = Tensor(
                shape=old.shape,
                dtype=old.dtype,
                itemsize=old.itemsize,
                producer=old.producer,
                region=inner,
            )
        outs = self.walk(
            body, self._consts(body_consts, region), [*consts, *carries, *slices], inner
        )
        results = []
        for i, (t, var) in enumerate(zip(outs, eqn.outvars)):
            if i < n_carry:
                results += self.emit(
                    "carry_out", (t, carries[i]), [var.aval], inner, {}, out_region=region
                )
            else:
                results += self.emit("scan_stack", (t,), [var.aval], inner, {}, out_region=region)
        self.regions[inner][4] = len(self.ops)
        return results

    def _while(self, eqn, args, region) -> list[int]:
        params = eqn.params
        nc, nb = params["cond_nconsts"], params["body_nconsts"]
        body, body_consts = open_jaxpr(params["body_jaxpr"])
        cond, _ = open_jaxpr(params["cond_jaxpr"])
        trips = _while_trips(eqn, cond)
        if trips is None:
            trips = 1.0
            self.warnings.append(
                "a while loop has no trip count that can be read from the program; it is counted "
                "once (use lax.scan or fori_loop with static bounds)"
            )
        consts = self._materialise(eqn, args[nc : nc + nb], _Head(body, 0, nb), region)
        inner = self._region("while", region, trips)
        carries = [
            self.emit("carry_in", (t,), [v.aval], region, {}, out_region=inner)[0]
            for t, v in zip(args[nc + nb :], body.invars[nb:])
        ]
        self.regions[inner][3] = len(self.ops)
        outs = self.walk(body, self._consts(body_consts, region), [*consts, *carries], inner)
        results = []
        for t, c, var in zip(outs, carries, eqn.outvars):
            results += self.emit("carry_out", (t, c), [var.aval], inner, {}, out_region=region)
        self.regions[inner][4] = len(self.ops)
        return results

    def _cond(self, eqn, args, region) -> list[int]:
        branches = eqn.params["branches"]
        by_branch = []
        for branch in branches:
            body, consts = open_jaxpr(branch)
            inner = self._region("branch", region, 1.0 / len(branches))
            operands = self._materialise(eqn, args[1:], body, inner)
            by_branch.append(self.walk(body, self._consts(consts, inner), operands, inner))
            self.regions[inner][4] = len(self.ops)
        return [
            self.emit("merge", [outs[i] for outs in by_branch], [var.aval], region, {})[0]
            for i, var in enumerate(eqn.outvars)
        ]


class _Head:
    """The first input variables of a jaxpr, for :meth:`_Builder._materialise`."""

    def __init__(self, jaxpr, start: int, stop: int) -> None:
        self.invars = jaxpr.invars[start:stop]


def _while_trips(eqn, cond) -> float | None:
    """Trip count of a counted loop ``i < n`` with literal bounds (what fori_loop makes)."""
    if len(cond.eqns) != 1 or cond.eqns[0].primitive.name != "lt":
        return None
    left, right = cond.eqns[0].invars
    nc, nb = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    operands = eqn.invars[:nc] + eqn.invars[nc + nb :]

    def value(atom):
        if hasattr(atom, "val"):
            return atom.val
        outer = operands[cond.invars.index(atom)]
        return outer.val if hasattr(outer, "val") else None

    low, high = value(left), value(right)
    if low is None or high is None:
        return None
    return max(float(high) - float(low), 0.0)


def _source(eqn) -> str:
    frame = getattr(eqn.source_info, "traceback", None)
    return "" if frame is None else str(eqn.source_info.name_stack)


def _pair_state(tensors, inputs, outputs, names_in, names_out, donated):
    """Pair donated inputs with outputs of the same shape and type, same path first."""
    free = {j for j, t in enumerate(outputs) if t >= 0}
    pairs: list[tuple[int, int]] = []

    def signature(t):
        return tensors[t].shape, tensors[t].dtype

    def tail(name):
        return name[name.find("]") + 1 :]

    waiting = [i for i, d in enumerate(donated) if d]
    by_tail: dict[Any, list[int]] = {}
    for j in sorted(free):
        by_tail.setdefault((tail(names_out[j]), signature(outputs[j])), []).append(j)
    for match_path in (True, False):
        by_shape: dict[Any, list[int]] = {}
        if not match_path:
            for j in sorted(free):
                by_shape.setdefault(signature(outputs[j]), []).append(j)
        rest = []
        for i in waiting:
            sign = signature(inputs[i])
            found = by_tail.get((tail(names_in[i]), sign)) if match_path else by_shape.get(sign)
            found = [j for j in found or [] if j in free]
            if found and math.prod(sign[0]) > 0:
                pairs.append((i, found[0]))
                free.discard(found[0])
            else:
                rest.append(i)
        waiting = rest
    return tuple(sorted(pairs))
