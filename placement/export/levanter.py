"""Levanter: the trainer section of its YAML.

src/levanter/trainer.py: mesh (replica, data, model) over (dcn, ici); the data axis takes what
replica_ici_axis_size, replica_dcn_axis_size and model_axis_size leave. Parameters are sharded over
data by fsdp_axis, and over model by tensor_parallel_axes. The number of devices is not a setting,
so it stands in a comment.
"""

from __future__ import annotations

import re

import yaml

from graphs.errors import MeshwrightError
from placement.export.layout import JobLayout
from placement.export.target import Target, maybe, number, words_of

_REASONS = {
    "fsdp_transpose": "parameters are sharded along one axis; it is merged into the data axis",
    "fsdp": "the data axis takes every rank that is neither replica nor model",
    "context": "there is no sequence axis; its ranks join the data axis",
    "pipeline": "there are no pipeline stages; their ranks join the data axis",
    "virtual_pipeline": "there are no pipeline stages",
    "expert": "experts follow fsdp_axis and tensor_parallel_axes",
    "expert_carved": "experts follow fsdp_axis and tensor_parallel_axes",
    "expert_tensor": "experts follow fsdp_axis and tensor_parallel_axes",
    "sequence_parallel": "norms are not split over the model axis",
    "zero_stage": "the data axis shards weights and optimizer state together",
    "remat": "gradient_checkpointing is on or off, or a policy in the model's section",
    "remat_detail": "gradient_checkpointing is on or off, or a policy in the model's section",
    "micro_batch": "per_device_parallelism is whole, from 1 on",
    "precision": "mixed precision is bf16 compute with f32 parameters",
}


class Levanter(Target):
    name = "levanter"
    suffix = ".yaml"
    reasons = _REASONS

    def write(self, layout: JobLayout) -> str:
        slices = layout.n_slices if layout.data % layout.n_slices == 0 else 1
        lines = [
            f"# devices: {layout.n_devices}",
            "trainer:",
            f"  replica_dcn_axis_size: {slices}",
            f"  replica_ici_axis_size: {layout.data // slices}",
            f"  model_axis_size: {layout.tensor}",
            '  fsdp_axis: "embed"',
        ]
        if layout.tensor > 1:
            lines.append('  tensor_parallel_axes: ["mlp", "heads"]')
        if layout.global_batch is not None:
            lines.append(f"  train_batch_size: {layout.global_batch}")
        if layout.micro_batch is not None and layout.micro_batch >= 1:
            lines.append(f"  per_device_parallelism: {words_of(int(layout.micro_batch))}")
        lines.append('  mp: "p=f32,c=bfloat16"')
        if layout.seq_len is not None:
            lines.append(f"train_seq_len: {layout.seq_len}")
        checkpointing = "false" if layout.remat == "none" else "true"
        lines += ["model:", f"  gradient_checkpointing: {checkpointing}"]
        return "\n".join(lines) + "\n"

    def parse(self, text: str) -> JobLayout:
        devices = re.search(r"# devices: (\d+)", text)
        try:
            raw = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise MeshwrightError(f"the Levanter file is not YAML ({error})") from error
        if devices is None or not isinstance(raw, dict) or "trainer" not in raw:
            raise MeshwrightError(
                "the Levanter file needs a trainer section and a line '# devices: N'"
            )
        settings = {k: str(v) for k, v in raw["trainer"].items()}
        n_devices = int(devices[1])
        slices = number(settings, "replica_dcn_axis_size", 1)
        replicas = number(settings, "replica_ici_axis_size", 1) * slices
        model = number(settings, "model_axis_size", 1)
        if n_devices % (replicas * model):
            raise MeshwrightError(
                f"replicas {replicas} x model {model} does not divide {n_devices} devices"
            )
        sharded = n_devices // (replicas * model)
        total, each = maybe(settings, "train_batch_size"), maybe(settings, "per_device_parallelism")
        accumulation = 1
        if total and each:
            accumulation = max(1, total // (each * replicas * sharded))
        return JobLayout(
            n_devices=n_devices,
            n_slices=slices,
            data=replicas,
            fsdp=sharded,
            tensor=model,
            zero_stage=3 if sharded > 1 else 0,
            seq_len=raw.get("train_seq_len"),
            global_batch=total,
            micro_batch=each,
            grad_accum=accumulation,
            remat="full" if raw.get("model", {}).get("gradient_checkpointing") else "none",
        )
