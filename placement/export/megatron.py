"""Megatron-LM: a torchrun line with the flags of megatron/training/arguments.py.

dp = n / (tp · pp · cp); experts are carved from the same ranks. --use-distributed-optimizer is
ZeRO-1; --use-megatron-fsdp with --data-parallel-sharding-strategy optim, optim_grads or
optim_grads_params is ZeRO 1, 2 or 3 over the whole data group.
"""

from __future__ import annotations

import shlex

from graphs.errors import MeshwrightError
from placement.export.layout import JobLayout
from placement.export.target import Target, maybe, number, words_of

GPUS_PER_NODE = 8
STRATEGY = {1: "optim", 2: "optim_grads", 3: "optim_grads_params"}
CARVED_REASONS = {
    "n_slices": "slices of TPUs have no counterpart",
    "data": "the sharded data group is the whole of data · fsdp",
    "fsdp": "the sharded data group is the whole of data · fsdp",
    "fsdp_transpose": "weights are sharded along one flattened dimension",
    "expert_carved": "experts reuse the data ranks",
    "expert": "the expert ranks must divide the data, context and tensor ranks",
    "remat": "no setting saves the matrix products alone",
    "remat_detail": "host offload is set by layers, and modules have other names",
    "sequence_parallel": "it needs tensor parallelism",
}


class Megatron(Target):
    name = "megatron"
    suffix = ".sh"
    reasons = CARVED_REASONS

    def write(self, layout: JobLayout) -> str:
        per_node = min(GPUS_PER_NODE, layout.n_devices)
        nodes = layout.n_devices // per_node
        flags = [
            f"--tensor-model-parallel-size {layout.tensor}",
            f"--pipeline-model-parallel-size {layout.pipeline}",
            f"--context-parallel-size {layout.context}",
        ]
        if layout.sequence_parallel:
            flags.append("--sequence-parallel")
        if layout.virtual_pipeline > 1:
            flags.append(f"--num-virtual-stages-per-pipeline-rank {layout.virtual_pipeline}")
        if layout.expert > 1:
            flags.append(f"--expert-model-parallel-size {layout.expert}")
        if layout.expert_tensor > 1:
            flags.append(f"--expert-tensor-parallel-size {layout.expert_tensor}")
        if layout.zero_stage == 1:
            flags.append("--use-distributed-optimizer")
        elif layout.zero_stage:
            flags += [
                "--use-megatron-fsdp",
                f"--data-parallel-sharding-strategy {STRATEGY[layout.zero_stage]}",
                "--use-distributed-optimizer",
                "--ckpt-format fsdp_dtensor",
                "--no-gradient-accumulation-fusion",
            ]
        if layout.micro_batch is not None:
            flags.append(f"--micro-batch-size {words_of(layout.micro_batch)}")
        if layout.global_batch is not None:
            flags.append(f"--global-batch-size {layout.global_batch}")
        if layout.seq_len is not None:
            flags += [
                f"--seq-length {layout.seq_len}",
                f"--max-position-embeddings {layout.seq_len}",
            ]
        flags += _recompute(layout)
        flags.append(_precision(layout.precision))
        joined = " \\\n  ".join(flags)
        run = f"torchrun --nnodes={nodes} --nproc_per_node={per_node} pretrain_gpt.py"
        return f"{run} \\\n  {joined}\n"

    def parse(self, text: str) -> JobLayout:
        settings = _flags(text)
        n_devices = number(settings, "nnodes") * number(settings, "nproc_per_node")
        strategy = settings.get("data-parallel-sharding-strategy")
        zero = {v: k for k, v in STRATEGY.items()}.get(strategy or "", 0)
        if strategy is None and "use-distributed-optimizer" in settings:
            zero = 1
        return carved_layout(
            n_devices=n_devices,
            tensor=number(settings, "tensor-model-parallel-size", 1),
            pipeline=number(settings, "pipeline-model-parallel-size", 1),
            context=number(settings, "context-parallel-size", 1),
            virtual_pipeline=number(settings, "num-virtual-stages-per-pipeline-rank", 1),
            expert=number(settings, "expert-model-parallel-size", 1),
            expert_tensor=number(settings, "expert-tensor-parallel-size", 1),
            sequence_parallel="sequence-parallel" in settings,
            zero_stage=zero,
            seq_len=maybe(settings, "seq-length"),
            global_batch=maybe(settings, "global-batch-size"),
            micro_batch=maybe(settings, "micro-batch-size"),
            remat=_remat_of(settings),
            precision=_precision_of(settings),
        )


def carved_layout(
    *,
    n_devices: int,
    tensor: int,
    pipeline: int,
    context: int,
    zero_stage: int,
    global_batch: int | None,
    micro_batch: int | None,
    remat: tuple[str, tuple[tuple[str, str], ...]],
    expert: int,
    **rest,
) -> JobLayout:
    """A layout of the Megatron family: the data degree is what the others leave."""
    inner = tensor * pipeline * context
    if n_devices % inner:
        raise MeshwrightError(
            f"tensor {tensor} x pipeline {pipeline} x context {context} does not divide "
            f"{n_devices} devices; change one of them"
        )
    ranks = n_devices // inner
    accumulation = 1
    if global_batch and micro_batch:
        accumulation = max(1, global_batch // (micro_batch * ranks))
    return JobLayout(
        n_devices=n_devices,
        data=1 if zero_stage > 1 else ranks,
        fsdp=ranks if zero_stage > 1 else 1,
        tensor=tensor,
        pipeline=pipeline,
        context=context,
        expert=expert,
        expert_carved=expert > 1,
        zero_stage=zero_stage,
        global_batch=global_batch,
        micro_batch=micro_batch,
        grad_accum=accumulation,
        remat=remat[0],
        remat_detail=remat[1],
        **rest,
    )


def modules_of(layout: JobLayout) -> list[str]:
    """Modules that selective recomputation names."""
    if layout.remat == "attention":
        return ["core_attn"]
    return [module for module, what in layout.remat_detail if what == "recompute"]


def remat_of_modules(modules: list[str]) -> tuple[str, tuple[tuple[str, str], ...]]:
    if modules == ["core_attn"]:
        return "attention", ()
    return "custom", tuple((m, "recompute") for m in modules)


def _recompute(layout: JobLayout) -> list[str]:
    if layout.remat == "full":
        return [
            "--recompute-granularity full",
            "--recompute-method uniform",
            "--recompute-num-layers 1",
        ]
    modules = modules_of(layout)
    if modules:
        return ["--recompute-granularity selective", f"--recompute-modules {' '.join(modules)}"]
    return []


def _remat_of(settings: dict[str, str]) -> tuple[str, tuple[tuple[str, str], ...]]:
    granularity = settings.get("recompute-granularity")
    if granularity == "full":
        return "full", ()
    if granularity == "selective":
        return remat_of_modules(settings.get("recompute-modules", "core_attn").split())
    return "none", ()


def _precision(precision: str) -> str:
    if precision.startswith(("fp8", "mxfp8")):
        recipe = "mxfp8" if "mx" in precision else "tensorwise"
        return f"--bf16 --fp8-format hybrid --fp8-recipe {recipe}"
    return "--fp16" if precision == "fp16" else "--bf16"


def _precision_of(settings: dict[str, str]) -> str:
    if "fp8-format" in settings:
        return "mxfp8" if settings.get("fp8-recipe") == "mxfp8" else "fp8"
    return "fp16" if "fp16" in settings else "bf16"


def _flags(text: str) -> dict[str, str]:
    """``--key value …``, ``--key=value`` and lone ``--key`` of a shell line."""
    words = shlex.split(text.replace("\\\n", " "), comments=True)
    found: dict[str, str] = {}
    key = ""
    for word in words:
        if word.startswith("--"):
            key, _, value = word[2:].partition("=")
            found[key] = value
        elif key:
            found[key] = f"{found[key]} {word}".strip()
    if "nnodes" not in found:
        raise MeshwrightError("the text has no torchrun line with --nnodes and --nproc_per_node")
    # The script's name follows torchrun's own options.
    found["nproc_per_node"] = found.get("nproc_per_node", "").split()[0]
    return found
