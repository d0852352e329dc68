"""axlearn: a mesh rule, as in axlearn/experiments/text/gpt/fuji.py.

Mesh axes (pipeline, data, expert, fsdp, seq, model); several slices make a HybridMeshShape whose
dcn part multiplies the ici part. The batch is split over data, expert and fsdp.
"""

from __future__ import annotations

import re

from graphs.errors import MeshwrightError
from placement.export.layout import JobLayout
from placement.export.target import Target, named_degrees

_AXES = {
    "pipeline": "pipeline",
    "data": "data",
    "expert": "expert",
    "fsdp": "fsdp",
    "seq": "context",
    "model": "tensor",
}
_POLICY = {
    "dots": "jax_remat_policies.dots_saveable",
    "full": "jax_remat_policies.nothing_saveable",
}

_REASONS = {
    "fsdp_transpose": "fsdp shards the model dimension only; it is merged into fsdp",
    "fsdp": "fsdp_transpose is merged into it",
    "expert_carved": "experts have a mesh axis of their own, which also splits the batch",
    "data": "the expert axis takes its ranks from data",
    "zero_stage": "weights and optimizer state are sharded together, over fsdp",
    "sequence_parallel": "norms are split by a modifier of their own",
    "virtual_pipeline": "the pipeline schedule is set in the model's code",
    "expert_tensor": "experts are split over the model axis as everything else",
    "remat": "single policies are set tensor by tensor in RematSpecModifier",
    "remat_detail": "tensors have other names there",
    "precision": "it is set in the model's code",
}


class AxLearn(Target):
    name = "axlearn"
    suffix = ".py"
    reasons = _REASONS

    def write(self, layout: JobLayout) -> str:
        sizes = {axis: getattr(layout, field) for axis, field in _AXES.items()}
        sizes["fsdp"] *= layout.fsdp_transpose
        if layout.expert_carved:
            axis = next((a for a in ("fsdp", "data") if sizes[a] % layout.expert == 0), None)
            if axis is None:
                sizes["expert"] = 1
            else:
                sizes[axis] //= layout.expert
        mesh = _shape(sizes)
        if layout.n_slices > 1:
            axis = next((a for a in ("data", "fsdp") if sizes[a] % layout.n_slices == 0), None)
            if axis is not None:
                inner = sizes | {axis: sizes[axis] // layout.n_slices}
                mesh = (
                    f"HybridMeshShape(ici_mesh_shape={_shape(inner)}, "
                    f"dcn_mesh_shape={_shape({axis: layout.n_slices})})"
                )
        modifiers = [f"MeshShapeModifier.default_config().set(mesh_shape={mesh})"]
        if layout.grad_accum > 1:
            modifiers.append(
                "GradientAccumulationModifier.default_config()"
                f".set(grad_acc_steps={layout.grad_accum})"
            )
        if layout.remat in _POLICY:
            modifiers.append(
                "RematSpecModifier.default_config().set(remat_policies={"
                '"model.decoder.transformer.layer": '
                f"RematSpec(prevent_cse=False, policy={_POLICY[layout.remat]})}})"
            )
        listed = ",\n            ".join(modifiers)
        settings = []
        if layout.global_batch is not None:
            settings.append(f"train_batch_size = {layout.global_batch}")
        if layout.seq_len is not None:
            settings.append(f"max_sequence_length = {layout.seq_len}")
        return (
            "\n".join([*settings, ""]) + "mesh_rules = (\n    (\n        INSTANCE_TYPE,\n"
            "        ChainConfigModifier.default_config().set(config_modifiers=[\n            "
            f"{listed},\n        ]),\n    ),\n)\n"
        )

    def parse(self, text: str) -> JobLayout:
        shapes = re.findall(r"mesh_shape_from_axes\(([^)]*)\)", text)
        if not shapes:
            raise MeshwrightError("the text has no mesh_shape_from_axes(...); export it again")
        sizes = dict.fromkeys(_AXES, 1)
        for axis, size in re.findall(r"(\w+)=(-?\d+)", ",".join(shapes)):
            if axis not in sizes or int(size) < 1:
                raise MeshwrightError(
                    f"the mesh has {axis}={size}; name axlearn's axes and write their numbers"
                )
            sizes[axis] *= int(size)
        n_slices = 1
        outer = re.search(r"dcn_mesh_shape=mesh_shape_from_axes\(([^)]*)\)", text)
        for _, size in re.findall(r"(\w+)=(\d+)", outer[1] if outer else ""):
            n_slices *= int(size)
        accumulation = _number(r"grad_acc_steps=(\d+)", text) or 1
        total = _number(r"train_batch_size = (\d+)", text)
        n_devices = 1
        for size in sizes.values():
            n_devices *= size
        ranks = sizes["data"] * sizes["expert"] * sizes["fsdp"]
        remat = next((k for k, v in _POLICY.items() if v in text), "none")
        return JobLayout(
            n_devices=n_devices,
            n_slices=n_slices,
            **named_degrees({field: sizes[axis] for axis, field in _AXES.items()}),
            zero_stage=3 if sizes["fsdp"] * sizes["expert"] * sizes["seq"] > 1 else 0,
            seq_len=_number(r"max_sequence_length = (\d+)", text),
            global_batch=total,
            micro_batch=None if total is None else total / ranks / accumulation,
            grad_accum=accumulation,
            remat=remat,
        )


def _shape(sizes: dict[str, int]) -> str:
    said = ", ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1)
    return f"mesh_shape_from_axes({said or 'data=1'})"


def _number(pattern: str, text: str) -> int | None:
    found = re.search(pattern, text)
    return int(found[1]) if found else None
