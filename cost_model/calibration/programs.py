"""Operator programs to profile: what a case is, and the JAX function that it stands for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from cost_model.calibration.chains import READS, by_row, chain
from graphs.errors import MeshwrightError

Shape = dict[str, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One operator at one shape."""

    kind: str
    """``matmul``, ``attention``, ``elementwise``, ...: a key of PROGRAMS."""
    variant: str
    """which program of the kind, for example ``nt`` or ``silu_mul``."""
    dtype: str
    """type of the operands."""
    dims: tuple[tuple[str, int], ...]
    """sizes by letter."""

    @property
    def name(self) -> str:
        sizes = ",".join(f"{k}={v}" for k, v in self.dims)
        return f"{self.kind}.{self.variant}.{self.dtype}:{sizes}"


def case(kind: str, variant: str, dtype: str, **dims: int) -> Case:
    return Case(kind=kind, variant=variant, dtype=dtype, dims=tuple(dims.items()))


def parse_case(name: str) -> Case:
    """The case of this name."""
    head, _, sizes = name.partition(":")
    kind, variant, dtype = head.split(".")
    dims = tuple((k, int(v)) for k, v in (part.split("=") for part in sizes.split(",")))
    return Case(kind=kind, variant=variant, dtype=dtype, dims=dims)


def build(item: Case) -> tuple[Callable[..., Any], list[Any]]:
    """The function and its abstract arguments."""
    if item.kind not in PROGRAMS:
        raise MeshwrightError(f"unknown operator {item.kind!r}; use one of {', '.join(PROGRAMS)}")
    return PROGRAMS[item.kind](item.variant, item.dtype, dict(item.dims))


def _array(dtype: str, *shape: int) -> Any:
    import jax

    return jax.ShapeDtypeStruct(shape, dtype)


_MATMUL = {
    "nn": ("mk", "kn"),
    "nt": ("mk", "nk"),
    "tn": ("km", "kn"),
}


def _matmul(variant: str, dtype: str, s: Shape) -> tuple[Callable[..., Any], list[Any]]:
    import jax.numpy as jnp

    form, _, out = variant.partition("_")
    left, right = _MATMUL[form]
    batch = "b" if s["b"] > 1 else ""
    spec = f"{batch}{left},{batch}{right}->{batch}mn"
    shapes = [[s[c] for c in batch + side] for side in (left, right)]

    def program(a: Any, b: Any) -> Any:
        return jnp.einsum(spec, a, b, preferred_element_type=out or dtype)

    return program, [_array(dtype, *shape) for shape in shapes]


def _attention(variant: str, dtype: str, s: Shape) -> tuple[Callable[..., Any], list[Any]]:
    import jax
    import jax.numpy as jnp

    def forward(q: Any, k: Any, v: Any) -> Any:
        scores = jnp.einsum("bhqd,bhkd->bhqk", q, k).astype(jnp.float32)
        scores = scores / math.sqrt(s["d"])
        if "causal" in variant:
            mask = jnp.arange(s["q"])[:, None] >= jnp.arange(s["k"])[None, :]
            scores = jnp.where(mask, scores, -1e30)
        weights = jax.nn.softmax(scores, axis=-1).astype(dtype)
        return jnp.einsum("bhqk,bhkd->bhqd", weights, v)

    q = _array(dtype, s["b"], s["h"], s["q"], s["d"])
    kv = _array(dtype, s["b"], s["h"], s["k"], s["d"])
    if not variant.startswith("grad"):
        return forward, [q, kv, kv]

    def backward(q: Any, k: Any, v: Any, g: Any) -> Any:
        _, pull = jax.vjp(forward, q, k, v)
        return pull(g)

    return backward, [q, kv, kv, q]


def _elementwise(variant: str, dtype: str, s: Shape) -> tuple[Callable[..., Any], list[Any]]:
    import jax
    import jax.numpy as jnp

    def f32(f: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *xs: f(*(x.astype(jnp.float32) for x in xs)).astype(dtype)

    programs: dict[str, tuple[int, Callable[..., Any]]] = {
        "scale": (1, lambda x: x * 2),
        "add": (2, lambda x, y: x + y),
        "add3": (3, lambda x, y, z: x + y * z),
        "silu_mul": (2, f32(lambda x, y: jax.nn.silu(x) * y)),
        "gelu": (1, f32(jax.nn.gelu)),
        "exp": (1, f32(jnp.exp)),
        "tanh": (1, f32(jnp.tanh)),
        "to_f32": (1, lambda x: x.astype(jnp.float32) * 2),
        "to_bf16": (1, lambda x: (x * 2).astype(jnp.bfloat16)),
        "where": (2, lambda x, y: jnp.where(x > y, x, y * 2)),
        "chain4": (2, f32(lambda x, y: jnp.tanh(x * y + x) * jnp.exp(-y))),
    }
    n, program = programs[variant]
    return program, [_array(dtype, s["r"], s["c"])] * n


def _reduce(variant: str, dtype: str, s: Shape) -> tuple[Callable[..., Any], list[Any]]:
    import jax
    import jax.numpy as jnp

    def f32(x: Any) -> Any:
        return x.astype(jnp.float32)

    def rms(x: Any, g: Any) -> Any:
        y = f32(x)
        return (y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-6) * f32(g)).astype(dtype)

    def layer(x: Any, g: Any) -> Any:
        y = f32(x)
        y = y - jnp.mean(y, -1, keepdims=True)
        return (y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-6) * f32(g)).astype(dtype)

    def entropy(x: Any, labels: Any) -> Any:
        y = f32(x)
        picked = jnp.take_along_axis(y, labels[:, None], axis=-1)[:, 0]
        return jax.nn.logsumexp(y, axis=-1) - picked

    x, g, labels = _array(dtype, s["r"], s["c"]), _array(dtype, s["c"]), _array("int32", s["r"])

    def pull(f: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, g, ct: jax.vjp(f, x, g)[1](ct)

    programs: dict[str, tuple[Callable[..., Any], list[Any]]] = {
        "sum_row": (lambda x: jnp.sum(f32(x), -1), [x]),
        "sum_column": (lambda x: jnp.sum(f32(x), 0), [x]),
        "max_row": (lambda x: jnp.max(x, -1), [x]),
        "square_sum": (lambda x: jnp.sum(f32(x) ** 2), [x]),
        "argmax_row": (lambda x: jnp.argmax(x, -1), [x]),
        "rms_norm": (rms, [x, g]),
        "rms_norm_grad": (pull(rms), [x, g, x]),
        "layer_norm": (layer, [x, g]),
        "softmax": (lambda x: jax.nn.softmax(f32(x), -1).astype(dtype), [x]),
        "log_softmax": (lambda x: jax.nn.log_softmax(f32(x), -1), [x]),
        "cross_entropy": (entropy, [x, labels]),
        "cumsum": (lambda x: jnp.cumsum(f32(x), -1), [x]),
    }
    return programs[variant]


def _move(variant: str, dtype: str, s: Shape) -> tuple[Callable[..., Any], list[Any]]:
    import jax
    import jax.numpy as jnp

    r, c = s["r"], s["c"]
    x = _array(dtype, r, c)
    cube = _array(dtype, r, max(1, c // 128), 128)
    index = _array("int32")
    programs: dict[str, tuple[Callable[..., Any], list[Any]]] = {
        "transpose": (lambda x: x.T.copy(), [x]),
        "transpose_021": (lambda x: jnp.swapaxes(x, 1, 2), [cube]),
        "transpose_102": (lambda x: jnp.swapaxes(x, 0, 1), [cube]),
        "concatenate": (lambda x, y: jnp.concatenate([x, y], 0), [x, x]),
        "pad": (lambda x: jnp.pad(x, ((0, 8), (0, 128))), [x]),
        "broadcast": (lambda v: jnp.broadcast_to(v[None, :], (r, c)) * 2, [_array(dtype, c)]),
        "dynamic_slice": (
            lambda x, i: jax.lax.dynamic_slice(x, (i, 0), (max(1, r // 4), c)),
            [x, index],
        ),
        "dynamic_update_slice": (
            lambda x, u, i: jax.lax.dynamic_update_slice(x, u, (i, 0)),
            [x, _array(dtype, max(1, r // 4), c), index],
        ),
        "reshape": (lambda x: x.reshape(r * 2, c // 2) * 2, [x]),
    }
    return programs[variant]


def _index(variant: str, dtype: str, s: Shape) -> tuple[Callable[..., Any], list[Any]]:
    import jax
    import jax.numpy as jnp

    table, rows = _array(dtype, s["v"], s["c"]), _array(dtype, s["r"], s["c"])
    ids = _array("int32", s["r"])
    programs: dict[str, tuple[Callable[..., Any], list[Any]]] = {
        "gather": (lambda t, i: jnp.take(t, i, axis=0), [table, ids]),
        "scatter_add": (lambda t, i, u: t.at[i].add(u), [table, ids, rows]),
        "one_hot": (
            lambda t, i: jax.nn.one_hot(i, s["v"], dtype=dtype) @ t,
            [table, ids],
        ),
    }
    return programs[variant]


def _sort(variant: str, dtype: str, s: Shape) -> tuple[Callable[..., Any], list[Any]]:
    import jax
    import jax.numpy as jnp

    x = _array(dtype, s["r"], s["c"])
    programs: dict[str, Callable[..., Any]] = {
        "sort": lambda x: jnp.sort(x, -1),
        "argsort": lambda x: jnp.argsort(x, -1),
        "top_k": lambda x: jax.lax.top_k(x, s["k"]),
    }
    return programs[variant], [x]


def _ragged(variant: str, dtype: str, s: Shape) -> tuple[Callable[..., Any], list[Any]]:
    import jax

    def program(x: Any, w: Any, sizes: Any) -> Any:
        return jax.lax.ragged_dot(x, w, sizes)

    return program, [
        _array(dtype, s["m"], s["k"]),
        _array(dtype, s["g"], s["k"], s["n"]),
        _array("int32", s["g"]),
    ]


def _optimizer(variant: str, dtype: str, s: Shape) -> tuple[Callable[..., Any], list[Any]]:
    import jax.numpy as jnp

    w, grad = _array("float32", s["r"], s["c"]), _array(dtype, s["r"], s["c"])

    def adamw(w: Any, m: Any, v: Any, grad: Any, lr: Any) -> Any:
        g = grad.astype(jnp.float32)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        return w - lr * (m / (jnp.sqrt(v) + 1e-8) + 0.1 * w), m, v

    def lion(w: Any, m: Any, grad: Any, lr: Any) -> Any:
        g = grad.astype(jnp.float32)
        return w - lr * (jnp.sign(0.9 * m + 0.1 * g) + 0.1 * w), 0.99 * m + 0.01 * g

    def sgd(w: Any, grad: Any, lr: Any) -> Any:
        return w - lr * grad.astype(jnp.float32)

    scalar = _array("float32")
    programs: dict[str, tuple[Callable[..., Any], list[Any]]] = {
        "adamw": (adamw, [w, w, w, grad, scalar]),
        "lion": (lion, [w, w, grad, scalar]),
        "sgd": (sgd, [w, grad, scalar]),
    }
    return programs[variant]


def _fused(variant: str, dtype: str, s: Shape) -> tuple[Callable[..., Any], list[Any]]:
    import jax
    import jax.numpy as jnp

    form, first, second, *out = variant.split("_")
    batch = "b" if s.get("b", 1) > 1 else ""
    left, right = (batch + side for side in _MATMUL[form])
    spec = f"{left},{right}->{batch}mn"
    arrays = [
        _chain_arrays(name, [s[c] for c in side]) for name, side in ((first, left), (second, right))
    ]

    def program(*stacks: Any) -> Any:
        def layer(done: Any, one: Any) -> Any:
            cut = len(arrays[0])
            a, b = chain(first, dtype)(*one[:cut]), chain(second, dtype)(*one[cut:])
            return done, jnp.einsum(spec, a, b, preferred_element_type=(*out, dtype)[0])

        return jax.lax.scan(layer, 0, stacks)[1]

    return program, [*arrays[0], *arrays[1]]


def _chain_arrays(name: str, shape: list[int]) -> list[Any]:
    """Stacked inputs of a chain over ``shape``."""
    whole = [_array(dtype, LOOP_STEPS, *shape) for dtype in READS[name]]
    return [*whole, *[_array("float32", LOOP_STEPS, *shape[:-1], 1)] * by_row(name)]


PROGRAMS: dict[str, Callable[[str, str, Shape], tuple[Callable[..., Any], list[Any]]]] = {
    "matmul": _matmul,
    "attention": _attention,
    "elementwise": _elementwise,
    "reduce": _reduce,
    "move": _move,
    "index": _index,
    "sort": _sort,
    "ragged_dot": _ragged,
    "optimizer": _optimizer,
    "fused": _fused,
}

LOOP_STEPS = 2
"""Steps of the loop of a fused contraction."""
