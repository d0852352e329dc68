"""NeMo 2: overrides of a recipe's command line, ``nemo llm pretrain --factory RECIPE key=value``.

trainer.strategy is MegatronStrategy, so the degrees are Megatron's; the model's recomputation is
model.config.recompute_granularity, _method, _num_layers and _modules.
"""

from __future__ import annotations

import json
import re

from graphs.errors import MeshwrightError
from placement.export.layout import JobLayout
from placement.export.megatron import (
    CARVED_REASONS,
    GPUS_PER_NODE,
    STRATEGY,
    carved_layout,
    modules_of,
    remat_of_modules,
)
from placement.export.target import Target, maybe, number, words_of

_SETTING = re.compile(r"([\w.]+)=('[^']*'|\S+)")


class NeMo(Target):
    name = "nemo"
    suffix = ".sh"
    reasons = CARVED_REASONS | {"precision": "fp8 recipes are plugins of their own"}

    def write(self, layout: JobLayout) -> str:
        per_node = min(GPUS_PER_NODE, layout.n_devices)
        strategy = {
            "tensor_model_parallel_size": layout.tensor,
            "pipeline_model_parallel_size": layout.pipeline,
            "context_parallel_size": layout.context,
            "sequence_parallel": layout.sequence_parallel,
        }
        if layout.virtual_pipeline > 1:
            strategy["virtual_pipeline_model_parallel_size"] = layout.virtual_pipeline
        if layout.expert > 1:
            strategy["expert_model_parallel_size"] = layout.expert
        if layout.expert_tensor > 1:
            strategy["expert_tensor_parallel_size"] = layout.expert_tensor
        strategy["ddp.use_distributed_optimizer"] = layout.zero_stage >= 1
        lines = [
            f"trainer.num_nodes={layout.n_devices // per_node}",
            f"trainer.devices={per_node}",
            *(f"trainer.strategy.{k}={v}" for k, v in strategy.items()),
        ]
        if layout.zero_stage > 1:
            sharding = STRATEGY[layout.zero_stage]
            lines.append(f"trainer.strategy.ddp.data_parallel_sharding_strategy={sharding}")
        if layout.micro_batch is not None:
            lines.append(f"data.micro_batch_size={words_of(layout.micro_batch)}")
        if layout.global_batch is not None:
            lines.append(f"data.global_batch_size={layout.global_batch}")
        if layout.seq_len is not None:
            lines.append(f"data.seq_length={layout.seq_len}")
        lines += _recompute(layout)
        lines.append(f"trainer.plugins.precision={_precision(layout.precision)}")
        return "nemo llm pretrain --factory RECIPE \\\n  " + " \\\n  ".join(lines) + "\n"

    def parse(self, text: str) -> JobLayout:
        settings = {k: v.strip("'") for k, v in _SETTING.findall(text)}
        if "trainer.num_nodes" not in settings:
            raise MeshwrightError("the text has no trainer.num_nodes=; export it again")
        strategy = {k.removeprefix("trainer.strategy."): v for k, v in settings.items()}
        sharding = strategy.get("ddp.data_parallel_sharding_strategy", "")
        zero = {v: k for k, v in STRATEGY.items()}.get(sharding, 0)
        if not sharding and strategy.get("ddp.use_distributed_optimizer") == "True":
            zero = 1
        granularity = settings.get("model.config.recompute_granularity")
        modules = json.loads(settings.get("model.config.recompute_modules", '["core_attn"]'))
        remat = ("full", ()) if granularity == "full" else ("none", ())
        if granularity == "selective":
            remat = remat_of_modules(modules)
        plugin = settings.get("trainer.plugins.precision", "")
        return carved_layout(
            n_devices=number(settings, "trainer.num_nodes") * number(settings, "trainer.devices"),
            tensor=number(strategy, "tensor_model_parallel_size", 1),
            pipeline=number(strategy, "pipeline_model_parallel_size", 1),
            context=number(strategy, "context_parallel_size", 1),
            virtual_pipeline=number(strategy, "virtual_pipeline_model_parallel_size", 1),
            expert=number(strategy, "expert_model_parallel_size", 1),
            expert_tensor=number(strategy, "expert_tensor_parallel_size", 1),
            sequence_parallel=strategy.get("sequence_parallel") == "True",
            zero_stage=zero,
            seq_len=maybe(settings, "data.seq_length"),
            global_batch=maybe(settings, "data.global_batch_size"),
            micro_batch=maybe(settings, "data.micro_batch_size"),
            remat=remat,
            precision="fp8" if "fp8" in plugin else "fp16" if "16-mixed" == plugin else "bf16",
        )


def _recompute(layout: JobLayout) -> list[str]:
    if layout.remat == "full":
        return [
            "model.config.recompute_granularity=full",
            "model.config.recompute_method=uniform",
            "model.config.recompute_num_layers=1",
        ]
    modules = modules_of(layout)
    if modules:
        listed = json.dumps(modules).replace(" ", "")
        return [
            "model.config.recompute_granularity=selective",
            f"model.config.recompute_modules='{listed}'",
        ]
    return []


def _precision(precision: str) -> str:
    if precision.startswith("fp8"):
        return "bf16_with_fp8_mixed"
    return "16-mixed" if precision == "fp16" else "bf16_mixed"
