"""The cases to profile: operators at log-uniform shapes."""

from __future__ import annotations

import math

import numpy as np

from cost_model.calibration.chains import READS
from cost_model.calibration.programs import Case, case

_SCORES = "nt_plain_plain_float32"
_OF_SCORES = (_SCORES, "nn_softmax_plain", "nn_softmaxgrad_plain")
"""Products of attention: scores, and what is computed from them."""
_IN_ROWS = [name for name in READS if name not in ("softmax", "softmaxgrad")]
"""Chains of activations; the others are of scores."""
_OFF_CHIP = 1 << 25
"""Scores that no device keeps on chip."""
_BYTES_LIMIT = 3 << 30
"""Largest operand or result of a case, so that every device can hold it."""


def cases(seed: int = 0, scale: float = 1.0, largest: float | None = None) -> list[Case]:
    """The shapes to profile: log-uniform, about half of them aligned, the rest ragged.

    ``scale`` multiplies the number of cases of each kind, ``largest`` bounds the multiply-adds or
    elements of one case (for devices that run them). The same arguments give the same list.
    """
    rng = np.random.default_rng(seed)
    out: dict[str, Case] = {}

    def size(low: int, high: int, aligned: float = 0.6) -> int:
        x = math.exp(rng.uniform(math.log(low), math.log(high)))
        if rng.random() < aligned:
            return max(low, 2 ** round(math.log2(x))) if x < 128 else round(x / 128) * 128
        return max(1, round(x))

    def width(low: int, high: int) -> int:
        """Of a model or its shard: four to seven times a power of two."""
        x = math.exp(rng.uniform(math.log(low), math.log(high)))
        unit = 2 ** (math.floor(math.log2(x)) - 2)
        return round(x / unit) * unit

    def add(item: Case, *elements: int) -> None:
        if max(elements) * 4 > _BYTES_LIMIT:
            return
        if largest is not None and math.prod(v for _, v in item.dims) > largest:
            return
        out.setdefault(item.name, item)

    def times(n: int) -> range:
        return range(max(1, round(n * scale)))

    for _ in times(300):
        dtype = str(rng.choice(["bfloat16", "bfloat16", "bfloat16", "float32"]))
        form = str(rng.choice(["nn", "nt", "tn"]))
        variant = form + ("_float32" if rng.random() < 0.15 else "")
        m, k, n = size(16, 32768), size(32, 32768), size(32, 65536)
        if 2 * m * k * n < 2e14:
            add(case("matmul", variant, dtype, b=1, m=m, k=k, n=n), m * k, k * n, m * n)
    for _ in times(90):
        b, m = size(2, 256, 0.9), size(64, 8192, 0.9)
        k, n = size(32, 4096, 0.9), size(32, 8192, 0.9)
        form = str(rng.choice(["nn", "nt", "tn"]))
        if 2 * b * m * k * n < 1e14:
            item = case("matmul", form, "bfloat16", b=b, m=m, k=k, n=n)
            add(item, b * m * k, b * k * n, b * m * n)
    for _ in times(60):
        b, h = 2 ** int(rng.integers(0, 5)), 2 ** int(rng.integers(0, 6))
        q, d = size(128, 8192, 0.9), int(rng.choice([64, 80, 128, 192, 256]))
        variant = str(rng.choice(["full", "causal", "grad", "grad_causal"]))
        add(case("attention", variant, "bfloat16", b=b, h=h, q=q, k=q, d=d), b * h * q * max(q, d))
    names = "scale add add3 silu_mul gelu exp tanh to_f32 where chain4".split()
    for _ in times(90):
        dtype = str(rng.choice(["bfloat16", "float32"]))
        r, c = size(8, 65536), size(64, 32768)
        add(case("elementwise", str(rng.choice(names)), dtype, r=r, c=c), r * c * 2)
    names = (
        "sum_row sum_column max_row square_sum rms_norm rms_norm_grad layer_norm softmax "
        "log_softmax cross_entropy cumsum argmax_row"
    ).split()
    for _ in times(100):
        dtype = str(rng.choice(["bfloat16", "bfloat16", "float32"]))
        r, c = size(8, 65536), size(64, 32768)
        add(case("reduce", str(rng.choice(names)), dtype, r=r, c=c), r * c * 2)
    names = (
        "transpose transpose_021 transpose_102 concatenate pad broadcast dynamic_slice "
        "dynamic_update_slice reshape"
    ).split()
    for _ in times(70):
        dtype = str(rng.choice(["bfloat16", "float32"]))
        r, c = size(16, 32768), 128 * max(1, size(128, 16384) // 128)
        add(case("move", str(rng.choice(names)), dtype, r=r, c=c), r * c * 2)
    for _ in times(50):
        v, c, r = size(1024, 131072), 128 * max(1, size(128, 8192) // 128), size(64, 32768)
        dtype = str(rng.choice(["bfloat16", "float32"]))
        variant = str(rng.choice(["gather", "scatter_add", "one_hot"], p=[0.4, 0.4, 0.2]))
        add(case("index", variant, dtype, v=v, c=c, r=r), v * c, r * c)
    for _ in times(40):
        variant = str(rng.choice(["sort", "argsort", "top_k"]))
        r, c = size(8, 16384), size(8, 4096)
        k = int(rng.choice([1, 2, 4, 8]))
        add(case("sort", variant, "float32", r=r, c=c, k=min(k, c)), r * c)
    for _ in times(20):
        g = 2 ** int(rng.integers(1, 7))
        m, k, n = size(256, 32768), size(128, 8192), size(128, 8192)
        add(case("ragged_dot", "plain", "bfloat16", g=g, m=m, k=k, n=n), m * k, g * k * n, m * n)
    for _ in times(30):
        r, c = size(8, 16384), size(64, 16384)
        variant = str(rng.choice(["adamw", "lion", "sgd"]))
        add(case("optimizer", variant, str(rng.choice(["bfloat16", "float32"])), r=r, c=c), r * c)
    for _ in times(100):
        form, left = str(rng.choice(["nn", "nt", "tn"])), str(rng.choice(_IN_ROWS))
        right = str(rng.choice(["plain", "plain", "gain", left]))
        if rng.random() < 0.25:
            left, right = right, left
        m, k, n = width(256, 16384), width(256, 16384), width(128, 16384)
        if 2 * m * k * n < 2e13:
            item = case("fused", f"{form}_{left}_{right}", "bfloat16", m=m, k=k, n=n)
            add(item, 2 * m * k, 2 * k * n, 2 * m * n)
    for _ in times(40):
        b, seq = 2 ** int(rng.integers(2, 8)), 2 ** int(rng.integers(9, 14))
        head = int(rng.choice([64, 128, 256]))
        variant = str(rng.choice(_OF_SCORES))
        sides = {"m": seq, "k": seq, "n": head}
        if variant == _SCORES:
            sides = {"m": seq, "k": head, "n": seq}
        if b * seq * seq >= _OFF_CHIP:
            add(case("fused", variant, "bfloat16", b=b, **sides), 2 * b * seq * seq)
    return list(out.values())
