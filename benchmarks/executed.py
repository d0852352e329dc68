"""Plans executed on eight host devices beside the unsharded step: losses and parameters compared.

    python benchmarks/executed.py [case ...]

writes benchmarks/results/executed.json: for every case the plan's mesh, schedule and sharding, and
the largest relative differences after three steps (`placement.pipeline.check`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import sys
import time

if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    flags = os.environ.get("XLA_FLAGS", "")
    flags += " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    # XLA:CPU's concurrent order lets devices wait for each other's collectives on a loaded machine
    flags += " --xla_cpu_enable_concurrency_optimized_scheduler=false"
    os.environ["XLA_FLAGS"] = flags.strip()  # compiles sooner; eight devices share this machine
os.environ["JAX_PLATFORMS"] = "cpu"

RESULTS = pathlib.Path(__file__).parent / "results" / "executed.json"
BATCH, SEQ_LEN = 16, 32
COMMON = {"global_batch": BATCH, "seq_len": SEQ_LEN}

PIPELINED = {
    # name: (model, mesh, options)
    "stages_2": ("dense", {"stage": 2, "data": 4}, {"microbatches": 4}),
    "stages_4": ("dense", {"stage": 4, "data": 2}, {"microbatches": 8}),
    "stages_4_gpipe": (
        "dense", {"stage": 4, "data": 2}, {"microbatches": 4, "schedule": "gpipe"}),
    "stages_2_interleaved": (
        "dense", {"stage": 2, "data": 4},
        {"microbatches": 4, "schedule": "interleaved", "chunks": 2}),
    "stages_2_uneven": (
        "dense", {"stage": 2, "data": 4}, {"microbatches": 2, "layers": (3, 1)}),
    "stages_2_tensor": ("dense", {"stage": 2, "data": 2, "model": 2}, {"microbatches": 4}),
    "stages_2_zero_bubble": (
        "dense", {"stage": 2, "data": 4}, {"microbatches": 4, "schedule": "zero_bubble_h1"}),
    "stages_4_zero_bubble": (
        "dense", {"stage": 4, "data": 2}, {"microbatches": 8, "schedule": "zero_bubble_h1"}),
    "stages_2_zero_bubble_tensor": (
        "dense", {"stage": 2, "data": 2, "model": 2},
        {"microbatches": 4, "schedule": "zero_bubble_h1"}),
    "stages_2_leading_dense": (
        "leading", {"stage": 2, "expert": 2, "model": 2}, {"microbatches": 4}),
    "stages_4_leading_dense": ("leading", {"stage": 4, "data": 2}, {"microbatches": 8}),
    "stages_2_encoder_decoder_tensor": (
        "encoder_decoder", {"stage": 2, "data": 2, "model": 2}, {"microbatches": 4}),
    "stages_4_encoder_decoder": (
        "encoder_decoder", {"stage": 4, "data": 2}, {"microbatches": 8}),
    "context": ("dense", {"stage": 1, "data": 2, "context": 4}, {"microbatches": 1}),
    "stages_2_context": ("dense", {"stage": 2, "data": 2, "context": 2}, {"microbatches": 4}),
    "context_ring": (
        "dense", {"stage": 1, "data": 2, "context": 4}, {"microbatches": 1, "attention": "ring"}),
    "stages_2_context_ring": (
        "dense", {"stage": 2, "context": 2, "model": 2}, {"microbatches": 4, "attention": "ring"}),
    "stages_2_expert": ("sparse", {"stage": 2, "expert": 2, "model": 2}, {"microbatches": 4}),
    "mixed_interleaved_tensor_bfloat16": (
        "dense", {"stage": 2, "data": 2, "model": 2},
        {"microbatches": 4, "schedule": "interleaved", "chunks": 2, "compute_dtype": "bfloat16",
         "optimizer_state_dtype": "bfloat16"}),
}  # fmt: skip
SPMD = {
    # name: (model, optimizer, mesh, build options)
    "zero1": ("dense", "zero1", {"data": 8}, {}),
    "zero2": ("dense", "zero2", {"data": 8}, {}),
    "zero3": ("dense", "fsdp", {"data": 8}, {}),
    "two_dimensional": ("dense", "t5x_2d", {"data": 2, "model": 4}, {}),
    "accumulation": ("dense", "fsdp", {"data": 4, "model": 2}, {"microbatches": 4}),
    "context_ring_one_program": (
        "dense",
        "search",
        {"data": 2, "context": 4},
        {"attention": "ring", "mesh_shape": {"data": 2, "context": 4}},
    ),
    "expert": ("sparse", "megatron", {"data": 2, "model": 4}, {}),
}


def model(kind: str):
    from graphs.zoo import load_model_config

    config = dataclasses.replace(load_model_config("tiny"), n_layers=4)
    if kind in ("sparse", "leading"):
        config = dataclasses.replace(config, n_experts=4, experts_per_token=2, moe_d_ff=64)
    if kind == "leading":
        config = dataclasses.replace(config, n_layers=5, first_dense_layers=1)
    if kind == "encoder_decoder":
        config = dataclasses.replace(config, encoder_layers=4, position="relative")
    return config


def plan_of(name: str):
    """(model, plan) of a case."""
    import placement
    from placement.pipeline.plan import pipelined_plan

    if name in PIPELINED:
        kind, mesh, options = PIPELINED[name]
        options = {"compute_dtype": "float32", **COMMON, **options}
        return model(kind), pipelined_plan(model(kind), cluster="cpu:8", mesh_shape=mesh, **options)
    kind, optimizer, mesh, options = SPMD[name]
    from graphs.zoo import build_train_step

    program = {"compute_dtype": "float32", "remat": "full", "microbatches": 1, **COMMON, **options}
    step, args, donated = build_train_step(model(kind), **program)
    plan = placement.optimize(
        step,
        *args,
        cluster="cpu:8",
        mesh_shape=mesh,
        optimizer=optimizer,
        donate_argnums=donated,
        time_limit_s=5.0,
    )
    return model(kind), dataclasses.replace(plan, program=program)


def run(name: str) -> dict:
    from placement.pipeline.check import compare

    start = time.monotonic()
    config, plan = plan_of(name)
    found = compare(plan, config)
    specs = {leaf.name: [list(dim) for dim in leaf.spec] for leaf in plan.inputs}

    def of(part: str) -> list:
        return next((spec for name, spec in specs.items() if part in name and any(spec)), [])

    return {
        "mesh": plan.mesh_shape,
        "optimizer": plan.optimizer,
        "schedule": plan.program.get("schedule", ""),
        "microbatches": plan.program["microbatches"],
        "tokens": specs["[2]['inputs']"],
        "query_weight": of("['query']"),
        "expert_weight": of("['experts']['up']"),
        "moment": next((s for n, s in specs.items() if ".mu" in n and any(s)), []),
        "collectives": found.collectives,
        "loss_difference": found.loss_difference,
        "parameter_difference": found.parameter_difference,
        "rounding_difference": found.rounding_difference,
        "seconds": round(time.monotonic() - start, 1),
    }


def main() -> int:
    every = [*PIPELINED, *SPMD]
    for name in sys.argv[1:] or every:
        row = run(name)
        print(name, json.dumps(row), flush=True)
        rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        rows = {key: rows[key] for key in every if key in rows} | {name: row}
        temporary = RESULTS.with_suffix(".part")
        temporary.write_text(json.dumps(rows, indent=1) + "\n")
        os.replace(temporary, RESULTS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
