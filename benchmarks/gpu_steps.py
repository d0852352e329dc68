"""Train steps on one GPU: seconds and bytes as measured, beside what the cost model predicts.

    python benchmarks/gpu_steps.py measure [case ...] [--device h200] [--out FOLDER]
    python benchmarks/gpu_steps.py [--device h200] [--out FOLDER]

The first needs that GPU; each case is written as soon as it is measured. The second, anywhere,
predicts every measured case and writes ``DEVICE.csv``. Models too large for one GPU are cut to a
few layers; parameters are random, the data too.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import csv
import dataclasses
import io
import json
import math
import os
import pathlib
import sys
import tempfile
import time
from typing import Any

import numpy as np

Case = dict[str, Any]
CASES: dict[str, Case] = {
    "gpt2_small_16": dict(model="gpt2_small", batch=16, seq=1024, remat="none"),
    "gpt2_small_64": dict(model="gpt2_small", batch=64, seq=1024, remat="full"),
    "gpt2_xl_8": dict(model="gpt2_xl", batch=8, seq=1024, remat="full"),
    "qwen3_0_6b_8": dict(model="qwen3_0_6b", batch=8, seq=2048, remat="full"),
    "gemma3_1b_4": dict(model="gemma3_1b", batch=4, seq=2048, remat="dots"),
    "gemma2_2b_4": dict(model="gemma2_2b", batch=4, seq=4096, remat="full"),
    "phi3_mini_4": dict(model="phi3_mini", batch=4, seq=2048, remat="full", layers=16),
    "llama2_7b_4": dict(model="llama2_7b", batch=4, seq=2048, remat="full", layers=8),
    "llama3_8b_2": dict(model="llama3_8b", batch=2, seq=4096, remat="dots", layers=8),
    "llama3_8b_8": dict(model="llama3_8b", batch=8, seq=4096, remat="full", layers=8),
    "llama3_70b_2": dict(model="llama3_70b", batch=2, seq=4096, remat="full", layers=2),
    "mixtral_8x7b_4": dict(model="mixtral_8x7b", batch=4, seq=2048, remat="full", layers=2),
    "qwen3_30b_a3b_4": dict(model="qwen3_30b_a3b", batch=4, seq=2048, remat="full", layers=3),
    "t5_xxl_4": dict(model="t5_xxl", batch=4, seq=1024, remat="full", layers=6),
}
STEPS = 8


def train_step(case: Case) -> tuple[Any, Any, tuple[int, ...]]:
    """The step of a case, its abstract arguments, and which of them are donated."""
    from graphs.zoo import build_train_step, load_model_config

    changes = {}
    if "layers" in case:
        changes["n_layers"] = case["layers"]
        if load_model_config(case["model"]).encoder_layers:
            changes["encoder_layers"] = case["layers"]
    config = dataclasses.replace(load_model_config(case["model"]), **changes)
    return build_train_step(
        config, global_batch=case["batch"], seq_len=case["seq"], remat=case["remat"]
    )


def compile_step(case: Case) -> tuple[Any, Any, float]:
    """(compiled step, abstract arguments, seconds of compilation)."""
    import jax

    step, arguments, donated = train_step(case)
    began = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=donated).lower(*arguments).compile()
    return compiled, arguments, time.perf_counter() - began


def measure(case: Case, compiled: Any, arguments: Any) -> dict[str, Any]:
    """Seconds of a step by the clock, seconds in which the GPU worked on it, bytes it needs."""
    import jax

    from cost_model.calibration.kernels import kernel_seconds, read_trace

    memory = compiled.memory_analysis()
    params, state, batch = _values(arguments)
    for _ in range(2):
        params, state, out = compiled(params, state, batch)
    jax.block_until_ready(out)
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        params, state, out = compiled(params, state, batch)
        jax.block_until_ready(out)
        times.append(time.perf_counter() - start)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder), jax.profiler.TraceAnnotation("case step"):
            params, state, out = compiled(params, state, batch)
            jax.block_until_ready(out)
        data = read_trace(folder)
        busy = kernel_seconds(data)["step"]
        kernels = _kernels(data)
    return {
        **case,
        "device_kind": jax.devices()[0].device_kind,
        "step_time_s": float(np.median(times)),
        "step_times_s": times,
        "busy_s": busy,
        "peak_bytes": memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes,
        "loss": float(out["loss"]),
        "versions": {"jax": jax.__version__, "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")},
        "kernels": kernels,
    }


def _values(arguments: Any) -> Any:
    """Parameters of standard deviation 0.02, zeros for the optimizer's state, random tokens."""
    import jax
    import jax.numpy as jnp

    params, state, batch = arguments

    def value(a: Any) -> Any:
        waves = jnp.sin(jax.lax.iota(jnp.float32, math.prod(a.shape)))
        return (0.028 * waves).reshape(a.shape).astype(a.dtype)

    def start() -> Any:
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), state)
        return jax.tree.map(value, params), zeros

    rng = np.random.default_rng(0)
    tokens = jax.tree.map(lambda a: jax.device_put(rng.integers(0, 1000, a.shape, a.dtype)), batch)
    return (*jax.jit(start)(), tokens)


def _kernels(data: Any, most: int = 80) -> list[list[Any]]:
    """[kernel, HLO instruction, runs, seconds] of the kernels that take most time."""
    sums: dict[tuple[str, str], list[float]] = {}
    for plane in data.planes:
        for line in plane.lines:
            if plane.name.startswith("/device:GPU") and line.name.startswith("Stream"):
                for event in line.events:
                    stats = {k: v for k, v in event.stats if k}
                    key = (event.name[:120], str(stats.get("hlo_op", ""))[:80])
                    known = sums.setdefault(key, [0, 0.0])
                    known[0] += 1
                    known[1] += event.duration_ns * 1e-9
    rows = [[*key, *found] for key, found in sums.items()]
    return sorted(rows, key=lambda r: -r[3])[:most]


def predict(case: Case, device: str) -> dict[str, float]:
    """Seconds and bytes of the case on one device of this kind."""
    import placement

    step, arguments, donated = train_step(case)
    plan = placement.optimize(
        step, *arguments, cluster=f"{device}:1x1", donate_argnums=donated, throw=False
    )
    return {
        "predicted_step_time_s": plan.estimate.step_time_s,
        "predicted_peak_bytes": plan.estimate.peak_memory_bytes,
    }


def report(folder: pathlib.Path, device: str) -> int:
    """Predicts every measured case, prints and writes the table."""
    from placement.compile_cache import write_atomically

    rows = []
    for name in CASES:
        place = folder / f"{device}-{name}.json"
        if not place.exists():
            continue
        row = json.loads(place.read_text())
        kept = {k: v for k, v in row.items() if k not in ("kernels", "step_times_s", "versions")}
        found = predict(CASES[name], device)
        row = {"case": name, **kept, **found}
        row["step_error"] = row["predicted_step_time_s"] / row["step_time_s"] - 1
        row["memory_error"] = row["predicted_peak_bytes"] / row["peak_bytes"] - 1
        rows.append(row)
        print(
            f"{name:18} {1e3 * row['step_time_s']:8.1f} ms (kernels {1e3 * row['busy_s']:8.1f}, "
            f"predicted {1e3 * row['predicted_step_time_s']:8.1f}: {row['step_error']:+6.1%})  "
            f"{row['peak_bytes'] / 2**30:6.1f} GiB (predicted "
            f"{row['predicted_peak_bytes'] / 2**30:6.1f}: {row['memory_error']:+6.1%})",
            flush=True,
        )
    if not rows:
        print(f"no case of {device} is measured in {folder}; run measure on a machine with one")
        return 1
    text = io.StringIO()
    fields = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, fieldnames=fields, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(folder / f"{device}.csv", text.getvalue().encode())
    steps = [abs(r["step_error"]) for r in rows]
    memory = [abs(r["memory_error"]) for r in rows]
    print(
        f"{len(rows)} cases: step time {np.mean(steps):.1%} mean error, {np.median(steps):.1%} "
        f"median; memory {np.mean(memory):.1%} and {np.median(memory):.1%}"
    )
    return 0


def main(argv: list[str]) -> int:
    from placement.compile_cache import write_atomically

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", help=f"measure, then cases of {', '.join(CASES)}")
    parser.add_argument("--device", default="h200")
    parser.add_argument("--out", default="benchmarks/results/gpu_steps")
    parser.add_argument("--hlo", action="store_true", help="keep the compiled programs as text")
    options = parser.parse_args(argv)
    folder = pathlib.Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    if options.what[:1] != ["measure"]:
        return report(folder, options.device)
    names = options.what[1:] or list(CASES)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        steps = {name: pool.submit(compile_step, CASES[name]) for name in names}
        concurrent.futures.wait(steps.values())  # nothing else may use the GPU while one is timed
    for name in names:
        try:
            compiled, arguments, compile_time_s = steps[name].result()
            row = measure(CASES[name], compiled, arguments)
        except Exception as error:
            # a case that does not run must not lose those after it
            print(f"{name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            continue
        row["compile_time_s"] = compile_time_s
        place = folder / f"{options.device}-{name}.json"
        write_atomically(place, json.dumps(row, indent=1).encode())
        if options.hlo:
            (folder / f"{name}.hlo").write_text(compiled.as_text())
        print(
            f"{name:18} {1e3 * row['step_time_s']:.1f} ms, kernels {1e3 * row['busy_s']:.1f}, "
            f"{row['peak_bytes'] / 2**30:.1f} GiB, compiled in {compile_time_s:.1f} s",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
