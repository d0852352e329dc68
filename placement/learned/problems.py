"""Planning problems to learn from and to be judged by.

A problem is a model, a cluster, a batch and an optimizer; its plan decides rematerialisation,
microbatches, the mesh and the sharding of every operator. The architectures are those of the zoo
(:mod:`graphs.zoo`) and random ones around them: depth, width, heads, key-value heads, experts,
vocabulary, sequence, batch, tying, layers scanned or unrolled. Clusters have 4 to 16,384 devices in
one or several slices.

The batch is drawn in one of three regimes, because the best plan differs most between them:

* limited: fewer sequences than devices, so that pure data parallelism is impossible;
* tight: with full rematerialisation and one microbatch the activations alone would take 0.4 to 4
  times the memory, so that rematerialisation, microbatches and sharding have to be traded;
* roomy: 2 to 30 % of the memory.

Splits are fixed files (``splits/*.jsonl``); :func:`generate` makes them again from their seed. What
is held out occurs in neither train nor validation: the families ``mla_moe`` (multi-head latent
attention with experts, DeepSeek-like) and ``encoder_decoder``; the devices tpu7x, b200 and gb200;
clusters of more than 4,096 devices.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from graphs.errors import MeshwrightError

if TYPE_CHECKING:
    from graphs.zoo import ModelConfig

VERSION = "v1"
"""Of the splits; recorded results and weights name it."""
SEED = 2025
COUNTS = {
    "train": 220,
    "validation": 30,
    "heldout_family": 20,
    "heldout_device": 20,
    "heldout_scale": 20,
}
SPLITS = tuple(COUNTS)
COMPILED = {"compiled_train": 64, "compiled_validation": 16, "compiled_test": 24}
"""Splits for :mod:`placement.learned.compiled_outcomes`: at most 32 GPUs, families and devices as in
train, programs of their own."""
HELD_OUT_FAMILIES = ("mla_moe", "encoder_decoder")
HELD_OUT_DEVICES = ("tpu7x", "b200", "gb200")
LARGEST_TRAINED = 4096
"""Devices of the largest cluster in train and validation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanningProblem:
    """A training job to plan."""

    name: str
    """Unique over all splits."""
    split: str
    """One of SPLITS or COMPILED."""
    family: str
    """dense | moe | mla_moe | encoder_decoder."""
    model: Mapping[str, Any]
    """Fields of ModelConfig that are not its defaults."""
    cluster: str
    """Notation."""
    global_batch: int
    """Sequences of one step, >= 1."""
    seq_len: int
    """Tokens of a sequence."""
    scan: bool
    """Layers as a scan over stacked weights, or unrolled."""
    optimizer: str
    """Update rule of the step."""
    objective: str = "time"

    def config(self) -> ModelConfig:
        """The architecture."""
        from graphs.zoo import ModelConfig

        return ModelConfig(**self.model)

    def to_json(self) -> str:
        """One line."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))


def load_split(name: str) -> list[PlanningProblem]:
    """The problems of a shipped split. MeshwrightError for an unknown one."""
    every = (*SPLITS, *COMPILED)
    if name not in every:
        raise MeshwrightError(f"unknown split {name!r}; use one of {', '.join(every)}")
    file = importlib.resources.files("placement.learned") / "splits" / f"{name}.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()
    return [PlanningProblem(**json.loads(line)) for line in lines if line]


def load_splits(argv: Sequence[str]) -> list[PlanningProblem]:
    """The problems of ``split=NAME …``; those to learn from where nothing is named."""
    names = [text.removeprefix("split=") for text in argv] or ["train", "validation"]
    return [problem for name in names for problem in load_split(name)]


def generate(seed: int = SEED, counts: Mapping[str, int] | None = None) -> list[PlanningProblem]:
    """Problems of the splits in `counts`, the same ones for the same seed."""
    from placement.learned.drawing import draw

    found: list[PlanningProblem] = []
    for split, count in (COUNTS if counts is None else counts).items():
        rng = np.random.default_rng([seed, (*SPLITS, *COMPILED).index(split)])
        found += [draw(rng, split, n) for n in range(count)]
    return found


def family_of(config: ModelConfig) -> str:
    """The family that an architecture is held out by."""
    if config.encoder_layers:
        return "encoder_decoder"
    if config.attention == "mla":
        return "mla_moe"
    return "moe" if config.n_experts else "dense"
