"""Logical axis rules, as flax and t5x take them: [logical name, mesh axes], with the mesh.

The names are those of t5x's standard_logical_axis_rules and MaxText's base.yml; a rule without
axes means that the dimension stays whole.
"""

from __future__ import annotations

import json

from graphs.errors import MeshwrightError
from placement.export.layout import JobLayout
from placement.export.target import Target, named_degrees

AXES: tuple[str, ...] = (
    "data",
    "fsdp",
    "fsdp_transpose",
    "tensor",
    "context",
    "pipeline",
    "expert",
)

_REASONS = {
    "n_slices": "rules name mesh axes, not networks",
    "expert_carved": "experts need a mesh axis of their own",
    "data": "the expert axis takes its ranks from data",
    "fsdp": "the expert axis takes its ranks from fsdp",
    "virtual_pipeline": "rules shard dimensions; schedules are not theirs",
    "expert_tensor": "experts are split over the tensor axis as everything else",
    "zero_stage": "a parameter and its optimizer state share their rules",
    "global_batch": "rules shard dimensions; the batch is not theirs",
    "seq_len": "rules shard dimensions; the batch is not theirs",
    "micro_batch": "rules shard dimensions; the batch is not theirs",
    "grad_accum": "rules shard dimensions; the batch is not theirs",
    "remat": "rules shard dimensions; rematerialisation is not theirs",
    "remat_detail": "rules shard dimensions; rematerialisation is not theirs",
    "precision": "rules shard dimensions; types are not theirs",
}


class LogicalAxisRules(Target):
    name = "logical_axis_rules"
    suffix = ".json"
    reasons = _REASONS

    def write(self, layout: JobLayout) -> str:
        sizes = {axis: getattr(layout, axis) for axis in AXES}
        if layout.expert_carved:
            axis = next((a for a in ("fsdp", "data") if sizes[a] % layout.expert == 0), None)
            if axis is None:
                sizes["expert"] = 1
            else:
                sizes[axis] //= layout.expert
        return json.dumps(
            {"mesh": sizes, "rules": rules(sizes, sequence=layout.sequence_parallel)}, indent=1
        )

    def parse(self, text: str) -> JobLayout:
        try:
            raw = json.loads(text)
            sizes = {axis: int(raw["mesh"][axis]) for axis in AXES}
            named = {name: axes for name, axes in raw["rules"]}
        except (ValueError, KeyError, TypeError) as error:
            raise MeshwrightError(
                f"the rules are not a mesh and [name, axes] pairs ({error!r}); export them again"
            ) from error
        total = 1
        for size in sizes.values():
            total *= size
        weights = [a for a in named.get("embed", []) if sizes[a] > 1]
        return JobLayout(
            n_devices=total,
            **named_degrees(sizes),
            sequence_parallel="tensor" in named.get("activation_norm_length", []),
            zero_stage=3 if weights or sizes["fsdp_transpose"] > 1 else 0,
        )


def rules(sizes: dict[str, int], *, sequence: bool) -> list[list]:
    """[logical name, mesh axes] pairs; axes of size 1 are left out."""

    def used(*axes: str) -> list[str]:
        return [a for a in axes if sizes[a] > 1]

    weights = used("fsdp", "context", "expert")
    batch = used("data", "fsdp", "fsdp_transpose", "expert")
    return [
        ["activation_batch", batch],
        ["activation_length", used("context")],
        ["activation_norm_length", used("tensor", "context") if sequence else used("context")],
        ["activation_heads", used("tensor")],
        ["activation_mlp", used("tensor")],
        ["activation_vocab", used("tensor")],
        ["activation_embed", []],
        ["activation_exp", used("expert")],
        ["embed", weights],
        ["embed_vocab", weights],
        ["embed_moe", used("fsdp", "context")],
        ["q_lora", weights],
        ["kv_lora", weights],
        ["q_lora_up_proj", []],
        ["kv_lora_up_proj", []],
        ["vocab", used("tensor")],
        ["mlp", used("fsdp_transpose", "tensor")],
        ["mlp_moe", used("fsdp_transpose", "tensor")],
        ["heads", used("tensor")],
        ["q_heads", used("tensor")],
        ["kv_heads", used("tensor")],
        ["kv", []],
        ["kv_head_dim", []],
        ["exp", used("expert")],
        ["norm", []],
        ["layers", used("pipeline")],
        ["dense_layers", []],
        ["moe_layers", []],
    ]
