"""Draw one planning problem: an architecture, a cluster that can hold it, a batch.

Rough counts decide what is worth tracing. P parameters, N devices, M bytes of memory a device:
16 P / N bytes of float32 weights, moments and gradients have to lie between 0.3 % and 55 % of M, and
a sixteenth of the activations (16 microbatches) has to fit beside them. With T tokens a device,
L layers of width D, feed-forward F and vocabulary V, activations under full rematerialisation are
about T (2 L D + 12 V + 40 D + 12 F) bytes: layer inputs, float32 logits and their gradient, and one
layer's intermediates.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from cost_model.cluster import Cluster, parse_cluster
from cost_model.device import load_device
from graphs.errors import MeshwrightError
from graphs.zoo import ModelConfig, load_model_config, model_names
from placement.learned.problems import (
    COMPILED,
    HELD_OUT_DEVICES,
    HELD_OUT_FAMILIES,
    LARGEST_TRAINED,
    PlanningProblem,
    family_of,
)

_TPU_2D = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_TPU_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16",
           "8x16x16", "16x16x16", "16x16x24")  # fmt: skip
_SLICES_2D = (2, 4, 8, 16, 32, 64)
_SLICES_3D = (2, 4)
_GPU_NODES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
_TRAINED_DEVICES = ("v4", "v4_megacore", "v5e", "v5p", "v6e", "a100", "a100_40g", "h100", "h200")
_COMPILED_DEVICES = ("a100", "h100", "h200")
_SMALLEST, _LARGEST, _LARGEST_COMPILED = 4, 16384, 32
_HEADS = (8, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128)
_VOCABULARIES = (32000, 50304, 65024, 100352, 128256, 151936, 202048, 256000, 262144)
_SEQUENCES = (1024, 2048, 4096, 8192, 16384, 32768)
_MOST_TOKENS = 1 << 26
_UNROLLED_LAYERS = 4


def draw(rng: np.random.Generator, split: str, number: int) -> PlanningProblem:
    """The next problem of a split."""
    while True:
        config = _architecture(rng, split)
        optimizer = str(rng.choice(["adamw", "adamw", "adamw", "adamw", "lion", "adafactor"]))
        clusters = [c for c in _clusters(split) if 0.003 < _state_share(config, c) < 0.55]
        if not clusters:
            continue
        # sizes first, so that the many small shapes do not crowd out the large
        size = rng.choice(sorted({c.n_devices for c in clusters}))
        cluster = clusters[rng.choice([i for i, c in enumerate(clusters) if c.n_devices == size])]
        seq_len = int(rng.choice([s for s in _SEQUENCES if s <= max(2048, 2 * config.seq_len)]))
        batch = _batch(rng, config, cluster, seq_len)
        if batch is None:
            continue
        if config.position == "learned":
            config = dataclasses.replace(config, seq_len=max(seq_len, config.seq_len))
        scan = bool(config.n_layers > _UNROLLED_LAYERS)
        return PlanningProblem(
            name=f"{split}_{number:03d}",
            split=split,
            family=family_of(config),
            model=_changed_fields(config),
            cluster=cluster.notation,
            global_batch=batch,
            seq_len=seq_len,
            scan=scan,
            optimizer=optimizer,
        )


def _architecture(rng: np.random.Generator, split: str) -> ModelConfig:
    held_out = split == "heldout_family"
    bases = [b for b in _zoo() if (family_of(b) in HELD_OUT_FAMILIES) == held_out]
    families = sorted({family_of(b) for b in bases})
    family = families[rng.choice(len(families), p=[0.4, 0.6])]
    base = bases[rng.choice([i for i, b in enumerate(bases) if family_of(b) == family])]
    config = base
    while rng.random() < 0.75:
        try:
            config = _varied(rng, base)
            break
        except MeshwrightError:
            continue
    layers = config.n_layers
    if rng.random() < 0.06 and not config.n_experts:
        layers = int(rng.integers(2, _UNROLLED_LAYERS + 1))
    return _whole_periods(rng, config, layers)


@functools.cache
def _zoo() -> tuple[ModelConfig, ...]:
    return tuple(load_model_config(n) for n in model_names() if n != "tiny")


def _varied(rng: np.random.Generator, base: ModelConfig) -> ModelConfig:
    """A random architecture of the base's kind."""
    heads = int(rng.choice(_HEADS))
    kv = base.n_kv_heads
    if base.attention in ("mha", "mla"):
        kv = heads
    elif base.attention == "gqa":
        kv = int(rng.choice([k for k in (1, 2, 4, 8, 16) if heads % k == 0]))
    dim = base.head_dim
    if base.attention != "mla" and rng.random() < 0.5:
        dim = int(rng.choice([64, 80, 96, 128, 256]))
    width = _round(heads * min(dim, 128) * rng.choice([0.75, 1.0, 1.0, 1.5]), 128)
    changes: dict[str, Any] = dict(
        name=f"{base.name} varied",
        n_heads=heads,
        n_kv_heads=kv,
        head_dim=dim,
        d_model=width,
        d_ff=_round(width * rng.choice([2.0, 8 / 3, 3.5, 4.0, 5.0]), 256),
        vocab_size=int(rng.choice(_VOCABULARIES)),
        n_layers=int(rng.integers(8, 97)),
        tied_embeddings=bool(rng.random() < 0.35),
    )
    if base.encoder_layers:
        changes["encoder_layers"] = changes["n_layers"] = int(rng.integers(6, 33))
    if base.n_experts:
        experts = int(rng.choice([8, 16, 32, 64, 128, 256]))
        changes |= dict(
            n_experts=experts,
            experts_per_token=int(rng.choice([k for k in (1, 2, 4, 8) if 2 * k <= experts])),
            moe_d_ff=_round(width * rng.choice([0.25, 0.5, 1.0, 2.0]), 128),
        )
    return dataclasses.replace(base, **changes)


def _whole_periods(rng: np.random.Generator, config: ModelConfig, layers: int) -> ModelConfig:
    """Layers as whole periods of at most two kinds, so that a scan holds all of them."""
    changes: dict[str, Any] = {}
    if config.local_per_global > 1:
        changes["local_per_global"] = 1
    period = 2 if config.local_per_global or (config.n_experts and config.moe_every > 1) else 1
    head = config.first_dense_layers if config.n_experts else 0
    body = max(period, (layers - head) // period * period)
    return dataclasses.replace(config, n_layers=head + body, **changes)


@functools.cache
def _clusters(split: str) -> tuple[Cluster, ...]:
    """Every cluster that a split may use."""
    devices = HELD_OUT_DEVICES if split == "heldout_device" else _TRAINED_DEVICES
    if split in COMPILED:
        devices = _COMPILED_DEVICES
    notations: list[str] = []
    for name in devices:
        device = load_device(name)
        if device.family == "gpu":
            per_node = [device.domain_size] if device.domain_size <= 8 else [64, 72]
            notations += [f"{name}:{p}x{n}" for p in per_node for n in _GPU_NODES]
            notations.append(f"{name}:4x1")
        elif device.torus_dims == 2:
            notations += [f"{name}:{s}" for s in _TPU_2D]
            notations += [f"{n}*{name}:16x16" for n in _SLICES_2D]
        else:
            notations += [f"{name}:{s}" for s in _TPU_3D]
            notations += [f"{n}*{name}:{s}" for n in _SLICES_3D for s in _TPU_3D[-5:-1]]
    found: dict[str, Cluster] = {}
    for text in notations:
        try:
            cluster = parse_cluster(text)
        except MeshwrightError:  # larger than the device's slices
            continue
        if split in COMPILED and cluster.n_devices > _LARGEST_COMPILED:
            continue
        large = cluster.n_devices > LARGEST_TRAINED
        if _SMALLEST <= cluster.n_devices <= _LARGEST and large == (split == "heldout_scale"):
            found[cluster.notation] = cluster
    return tuple(found.values())


def _batch(rng, config: ModelConfig, cluster: Cluster, seq_len: int) -> int | None:
    """Sequences of a step in a random regime, None where they cannot fit."""
    n = cluster.n_devices
    memory = cluster.device.hbm_available_bytes
    per_token = _token_bytes(config)
    regime = rng.choice(["limited", "tight", "roomy"], p=[0.35, 0.4, 0.25])
    if regime == "limited":
        batch = n / 2.0 ** rng.integers(1, 6)
    else:
        low, high = (0.4, 4.0) if regime == "tight" else (0.02, 0.3)
        fill = np.exp(rng.uniform(np.log(low), np.log(high)))
        batch = fill * memory / per_token * n / seq_len
    if batch < 1:
        return None
    rounded = 2 ** round(np.log2(batch))
    if rng.random() < 0.15 and rounded >= 8:
        rounded = rounded * 3 // 4
    tokens = rounded * seq_len
    share = _state_share(config, cluster) + tokens / n * per_token / 16 / memory
    return int(rounded) if tokens <= _MOST_TOKENS and share < 0.6 else None


def _state_share(config: ModelConfig, cluster: Cluster) -> float:
    return 16.0 * _parameters(config) / cluster.n_devices / cluster.device.hbm_available_bytes


def _token_bytes(c: ModelConfig) -> float:
    wide = c.moe_d_ff * c.experts_per_token * c.capacity_factor if c.n_experts else c.d_ff
    layers = c.n_layers + c.encoder_layers
    return 2.0 * layers * c.d_model + 12.0 * c.vocab_size + 40.0 * c.d_model + 12.0 * wide


def _parameters(c: ModelConfig) -> float:
    """Roughly; norms and biases left out."""
    matrices = 3 if c.gated else 2
    attention = c.d_model * c.head_dim * 2 * (c.n_heads + c.n_kv_heads)
    if c.attention == "mla":
        up = c.n_heads * (c.head_dim * c.q_lora_rank + 2 * c.v_head_dim * c.kv_lora_rank)
        attention = up + c.d_model * (c.q_lora_rank + c.kv_lora_rank + c.n_heads * c.v_head_dim)
    total = c.vocab_size * c.d_model * (1 if c.tied_embeddings else 2)
    for kind in c.layer_kinds():
        width = c.d_ff
        if kind.moe:
            width = c.moe_d_ff * (c.n_experts + c.shared_experts)
        total += attention + matrices * c.d_model * width
    return total + c.encoder_layers * (2 * attention + matrices * c.d_model * c.d_ff)


def _changed_fields(config: ModelConfig) -> dict[str, Any]:
    fields = dataclasses.fields(ModelConfig)
    return {
        f.name: getattr(config, f.name)
        for f in fields
        if f.name != "source" and getattr(config, f.name) != f.default
    }


def _round(value: float, multiple: int) -> int:
    return max(multiple, round(value / multiple) * multiple)
