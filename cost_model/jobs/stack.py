"""Facts about the software and the cluster of a published run: `stacks.yaml`, by source."""

from __future__ import annotations

import functools
import pathlib
import re
import typing

import yaml

_FILE = pathlib.Path(__file__).with_name("stacks.yaml")


@functools.lru_cache(maxsize=1)
def _table() -> dict[str, typing.Any]:
    return yaml.safe_load(_FILE.read_text())


def facts(source: str, notes: str) -> dict[str, float]:
    """The facts of a row by its source and notes; defaults where no stack matches."""
    table = _table()
    found = dict(table["defaults"])
    for entry in table["stacks"]:
        if re.search(entry["match"], source):
            found.update({k: v for k, v in entry.items() if k not in ("match", "notes")})
            for pattern, change in entry.get("notes", {}).items():
                if re.search(pattern, notes):
                    found.update(change)
            break
    return {key: float(value) for key, value in found.items()}


# Names that remat notes use for the outputs of a layer's parts.
_SAVED = {
    "core": r"context(?!_par)",
    "qkv": r"\bq/k/v|q/k/v_proj|qkv|query_proj|query\b",
    "out": r"out_proj|/out\b|\bout/|attention_out|\bo_proj|\+out\b",
    "up": r"mlpwi|linear1",
    "down": r"mlpwo|linear2",
}
_PARTS = ("core", "qkv", "out", "up", "down", "pointwise")


def remat_shares(
    recompute: str, notes: str, *, jax: bool, fused: bool, skips_last: bool
) -> dict[str, float]:
    """The share of each part of a layer that is computed again in the backward pass.

    `recompute` is none / selective / full or blank. What "selective" covers is read from the
    notes where they name it: MaxText policies name the tensors that are *kept*, Megatron's
    selective means the attention core (arXiv:2205.05198), torchtitan's per-op policy keeps every
    second matmul and its per-layer policy every second layer. XLA, and PyTorch's non-reentrant
    checkpoint, leave out the last matmul of a recomputed layer because no gradient needs it.
    """
    kept: dict[str, float] = {part: 0.0 for part in _PARTS}
    if recompute in ("", "none"):
        return kept
    if recompute == "full":
        redone = {part: 1.0 for part in _PARTS}
        if skips_last:
            redone["down"] = 0.0
        return redone
    text = notes
    if re.search(r"save_dot_with_context_except_mlp\b", text):
        return {**kept, "up": 1.0, "pointwise": 1.0}
    if re.search(r"save_dot_except_mlp\b", text):
        return {**kept, "core": 1.0, "up": 1.0, "pointwise": 1.0}
    if re.search(r"save_dot_except_mlpwi", text):
        return {**kept, "core": 1.0, "up": 1.0, "pointwise": 1.0}
    if re.search(r"minimal_(flash|with_context)|dots_saveable", text):
        return {**kept, "pointwise": 1.0}
    if re.search(r"remat_policy=minimal|minimal\b", text):
        return {**kept, "core": 1.0, "pointwise": 1.0}
    if re.search(r"per-op|torchtitan", text):
        half = 0.5
        return {**kept, "qkv": half, "out": half, "up": half, "down": half, "pointwise": 1.0}
    if re.search(r"per-layer", text):
        return {part: 0.5 for part in _PARTS}
    text = re.sub(r"[^;,]*\b(remat|recomputed)\b(?! with|:|_)", "", text)
    saved = {part for part, pattern in _SAVED.items() if re.search(pattern, text)}
    if jax and (saved or re.search(r"offload|custom|layer input", text)):
        redone = {part: 0.0 if part in saved else 1.0 for part in _PARTS}
        redone["down"] = 0.0
        return redone
    if fused:
        return {**kept, "pointwise": 1.0}
    return {**kept, "core": 1.0}


def offload_share(notes: str, n_layers: float) -> float:
    """The share of the kept activations that goes to host memory: all where the notes say that
    activations are offloaded, the named number of layers where they count them."""
    text = re.sub(r"(?i)no offload|without offload\w*|offload\w*[ =]*(false|off|none)", "", notes)
    found = re.search(r"offload", text)
    if not found:
        return 0.0
    counted = re.search(
        r"offload[^;.]*?(?:num_layers=|of )?(\d+)(?:-\d+)? layers|"
        r"offload[^;.]*?num_layers=(\d+)",
        text,
    )
    if "offload for a number of layers" in text:
        return 0.5
    if counted:
        return min(float(counted[1] or counted[2]) / n_layers, 1.0)
    return 1.0
