"""torchtitan: a TOML file with the sections of torchtitan/config/job_config.py.

Degrees multiply as replicate · shard · context · tensor · pipeline; experts are carved from shard ·
context ("dp2ep"). Tensor parallelism always splits the sequence between blocks. local_batch_size
is per data rank; it is cut into microbatches of pipeline_parallel_microbatch_size.
"""

from __future__ import annotations

import tomllib

from graphs.errors import MeshwrightError
from placement.export.layout import JobLayout
from placement.export.target import Target, number, words_of

_REMAT = {"none": "none", "full": "full", "attention": "selective"}

_REASONS = {
    "n_slices": "slices of TPUs have no counterpart",
    "fsdp_transpose": "parameters are sharded along their first dimension only",
    "sequence_parallel": "it goes with tensor parallelism, always",
    "zero_stage": "sharded ranks shard weights, gradients and optimizer state together",
    "virtual_pipeline": "stages per rank follow from the model's layers and the schedule",
    "expert_carved": "experts reuse the shard and context ranks",
    "remat": "selective recomputation is by operator; matrix products are not chosen alone",
    "remat_detail": "single tensors cannot be placed, and nothing goes to the host",
    "precision": "float8 and mx are converters of their own section",
    "grad_accum": "it is the global batch over the local batch and the data ranks",
    "micro_batch": "it must be whole, from 1 on",
}


class TorchTitan(Target):
    name = "torchtitan"
    suffix = ".toml"
    reasons = _REASONS

    def write(self, layout: JobLayout) -> str:
        shard = layout.fsdp * layout.fsdp_transpose
        replicate = layout.data
        if not layout.expert_carved:
            shard *= layout.expert
        lines = [
            "[parallelism]",
            f"data_parallel_replicate_degree = {replicate}",
            f"data_parallel_shard_degree = {shard}",
            f"context_parallel_degree = {layout.context}",
            f"tensor_parallel_degree = {layout.tensor}",
            f"pipeline_parallel_degree = {layout.pipeline}",
        ]
        if layout.pipeline > 1:
            looped = layout.virtual_pipeline > 1
            schedule = "Interleaved1F1B" if looped else "1F1B"
            lines.append(f'pipeline_parallel_schedule = "{schedule}"')
            if layout.micro_batch is not None:
                each = words_of(layout.micro_batch)
                lines.append(f"pipeline_parallel_microbatch_size = {each}")
        if layout.expert > 1:
            lines.append(f"expert_parallel_degree = {layout.expert}")
        if layout.expert_tensor > 1:
            lines.append(f"expert_tensor_parallel_degree = {layout.expert_tensor}")
        lines += ["", "[training]"]
        if layout.micro_batch is not None:
            inside = layout.grad_accum if layout.pipeline > 1 else 1
            lines.append(f"local_batch_size = {words_of(layout.micro_batch * inside)}")
        if layout.global_batch is not None:
            lines.append(f"global_batch_size = {layout.global_batch}")
        if layout.seq_len is not None:
            lines.append(f"seq_len = {layout.seq_len}")
        lines += [
            "",
            "[activation_checkpoint]",
            f'mode = "{_REMAT.get(layout.remat, "selective")}"',
        ]
        if _REMAT.get(layout.remat, "selective") == "selective":
            lines.append('selective_ac_option = "op"')
        return "\n".join(lines) + "\n"

    def parse(self, text: str) -> JobLayout:
        try:
            raw = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise MeshwrightError(f"the torchtitan file is not TOML ({error})") from error
        if "parallelism" not in raw:
            raise MeshwrightError("the torchtitan file has no section [parallelism]")
        degrees = {k: str(v) for k, v in raw["parallelism"].items()}
        training = raw.get("training", {})
        replicate = number(degrees, "data_parallel_replicate_degree", 1)
        shard = number(degrees, "data_parallel_shard_degree")
        if shard < 1:
            raise MeshwrightError(
                "the torchtitan file leaves data_parallel_shard_degree at -1; write its number"
            )
        tensor = number(degrees, "tensor_parallel_degree", 1)
        pipeline = number(degrees, "pipeline_parallel_degree", 1)
        context = number(degrees, "context_parallel_degree", 1)
        expert = number(degrees, "expert_parallel_degree", 1)
        total, local = training.get("global_batch_size"), training.get("local_batch_size")
        if pipeline > 1:
            # The pipeline's microbatches accumulate gradients within one local batch.
            local = raw["parallelism"].get("pipeline_parallel_microbatch_size", local)
        accumulation = 1
        if total and local:
            accumulation = max(1, round(total / (local * replicate * shard)))
        looped = degrees.get("pipeline_parallel_schedule") == "Interleaved1F1B"
        mode = raw.get("activation_checkpoint", {}).get("mode", "selective")
        return JobLayout(
            n_devices=replicate * shard * context * tensor * pipeline,
            data=replicate,
            fsdp=shard,
            tensor=tensor,
            sequence_parallel=tensor > 1,
            context=context,
            pipeline=pipeline,
            # Looped schedules have at least two stages a rank.
            virtual_pipeline=2 if looped else 1,
            expert=expert,
            expert_tensor=number(degrees, "expert_tensor_parallel_degree", 1),
            expert_carved=expert > 1,
            zero_stage=3 if shard > 1 else 0,
            seq_len=training.get("seq_len"),
            global_batch=total,
            micro_batch=local,
            grad_accum=accumulation,
            remat={v: k for k, v in _REMAT.items()}[mode],
        )
