"""MaxText: a YAML file over its base.yml.

Names and meanings: AI-Hypercomputer/maxtext src/maxtext/configs/base.yml (mesh_axes, the
ici_*/dcn_* degrees, remat_policy and the per-tensor settings of the custom policy). Global batch =
per_device_batch_size x devices x gradient_accumulation_steps.
"""

from __future__ import annotations

import yaml

from graphs.errors import MeshwrightError
from placement.export.layout import JobLayout
from placement.export.target import Target, maybe, named_degrees, number, words_of

_AXES = {
    "data": "data",
    "pipeline": "pipeline",
    "fsdp": "fsdp",
    "fsdp_transpose": "fsdp_transpose",
    "context": "context",
    "tensor": "tensor",
    "expert": "expert",
}
_REMAT = {"none": "none", "dots": "minimal", "full": "full", "custom": "custom"}
_TENSORS = (
    "decoder_layer_input context mlpwi mlpwi_0 mlpwi_1 mlpwo moe_mlpwi_0 moe_mlpwi_1 moe_mlpwo "
    "query_proj key_proj value_proj kv_proj qkv_proj out_proj query_wa_proj kv_wa_proj "
    "mla_q mla_kv attention_out"
).split()
_PRECISION = {"fp8_full": "fp8_full", "int8": "int8", "fp8": "fp8"}

_REASONS = {
    "virtual_pipeline": "num_pipeline_repeats is derived from layers per stage, not set alone",
    "expert_carved": "experts have a mesh axis of their own, which also splits the batch",
    "data": "the expert axis takes its ranks from data",
    "fsdp": "the expert axis takes its ranks from fsdp",
    "zero_stage": "gradients are sharded with their weights; only 0, 1 and 3 can be asked for",
    "remat": "no policy recomputes the attention core alone; minimal is the nearest",
    "remat_detail": "only the tensors that base.yml lists can be placed, on device or host",
    "expert_tensor": "experts are split over the tensor axis as everything else",
    "micro_batch": "per_device_batch_size follows from the global batch",
    "precision": "only fp8, fp8_full and int8 have a quantization setting",
}


class MaxText(Target):
    name = "maxtext"
    suffix = ".yml"
    reasons = _REASONS

    def write(self, layout: JobLayout) -> str:
        sizes = _with_own_expert_axis(layout)
        if layout.sequence_parallel:
            sizes["tensor_sequence"] = sizes.pop("tensor")
        across = _split_slices(sizes, layout.n_slices)
        lines = ["base_config: base.yml"]
        for axis, size in sizes.items():
            outer = across.get(axis, 1)
            lines.append(f"dcn_{axis}_parallelism: {outer}")
            lines.append(f"ici_{axis}_parallelism: {size // outer}")
        if layout.zero_stage == 1:
            lines.append("shard_optimizer_over_data: true")
        if layout.global_batch is not None:
            each = layout.global_batch / layout.n_devices / layout.grad_accum
            lines.append(f"per_device_batch_size: {words_of(each)}")
        lines.append(f"gradient_accumulation_steps: {layout.grad_accum}")
        if layout.seq_len is not None:
            lines.append(f"max_target_length: {layout.seq_len}")
        lines.append(f"remat_policy: '{_REMAT.get(layout.remat, 'minimal')}'")
        if layout.remat == "custom":
            lines += [f"{t}: '{p}'" for t, p in layout.remat_detail if t in _TENSORS]
        if layout.precision in _PRECISION:
            lines.append(f"quantization: '{_PRECISION[layout.precision]}'")
        return "\n".join(lines) + "\n"

    def parse(self, text: str) -> JobLayout:
        try:
            raw = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise MeshwrightError(f"the MaxText file is not YAML ({error})") from error
        if not isinstance(raw, dict):
            raise MeshwrightError("the MaxText file holds no settings")
        settings = {k: str(v) for k, v in raw.items()}
        size, n_slices, n_devices = {}, 1, 1
        for axis in (*_AXES, "tensor_sequence"):
            outer = number(settings, f"dcn_{axis}_parallelism", 1)
            size[axis] = outer * number(settings, f"ici_{axis}_parallelism", 1)
            n_slices *= outer
            n_devices *= size[axis]
        if min(size.values()) < 1:
            raise MeshwrightError(
                "the MaxText file leaves a degree at -1; write the number of devices it takes"
            )
        accumulation = number(settings, "gradient_accumulation_steps", 1)
        each = settings.get("per_device_batch_size")
        total = None if each is None else round(float(each) * n_devices * accumulation)
        sequence = size.pop("tensor_sequence")
        remat = {v: k for k, v in _REMAT.items()}.get(
            settings.get("remat_policy", "full"), "custom"
        )
        weights = size["fsdp"] * size["fsdp_transpose"] * size["context"] * size["expert"]
        sharded = 3 if weights > 1 else 0
        if settings.get("shard_optimizer_over_data") == "True":
            sharded = max(sharded, 1)
        return JobLayout(
            n_devices=n_devices,
            n_slices=n_slices,
            **named_degrees({**size, "tensor": size["tensor"] * sequence}),
            sequence_parallel=sequence > 1,
            zero_stage=sharded,
            seq_len=maybe(settings, "max_target_length"),
            global_batch=total,
            micro_batch=_micro_batch(total, size, accumulation),
            grad_accum=accumulation,
            remat=remat,
            remat_detail=tuple(
                (t, settings[t]) for t in settings if t in _TENSORS and remat == "custom"
            ),
            precision=settings.get("quantization") or "bf16",
        )


def _micro_batch(total: int | None, size: dict[str, int], accumulation: int) -> float | None:
    if total is None:
        return None
    ranks = size["data"] * size["fsdp"] * size["fsdp_transpose"] * size["expert"]
    return total / ranks / accumulation


def _with_own_expert_axis(layout: JobLayout) -> dict[str, int]:
    sizes = {axis: getattr(layout, axis) for axis in _AXES}
    if layout.expert_carved:
        for axis in ("fsdp", "data"):
            if sizes[axis] % layout.expert == 0:
                sizes[axis] //= layout.expert
                return sizes
        sizes["expert"] = 1
    return sizes


def _split_slices(sizes: dict[str, int], n_slices: int) -> dict[str, int]:
    """The axis that crosses slices: the first of data, fsdp and pipeline that they divide."""
    for axis in ("data", "fsdp", "pipeline"):
        if n_slices > 1 and sizes[axis] % n_slices == 0:
            return {axis: n_slices}
    return {}
