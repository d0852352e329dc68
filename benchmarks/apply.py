"""What plan.apply costs a compiled step: python benchmarks/apply.py [--calls 300] [--out FILE.json]

Pairs of compiled steps, called in turn with the same state and batch:

alone   one device, where a plan constrains nothing: the user's own step beside the applied one
mesh    eight devices: the applied step beside the function that jax.make_jaxpr reads out of it,
        which is the user's step with the constraints written into it by hand

Of each pair it says whether XLA compiled the same instructions, and the ratio of the times of a call:
the median over pairs of calls with the interval that 95 % of its bootstrap resamples lie in.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/apply.json"))
    given = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    with tempfile.TemporaryDirectory() as cache:  # equal programs are compiled once
        os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        rows = [measure("alone", 1, given.calls), measure("mesh", 8, given.calls)]
    for row in rows:
        low, high = row["interval_95"]
        same = "the same program" if row["same_program"] else "another program"
        print(
            f"{row['pair']}: {same}, applied/plain {row['ratio']:.4f} ({low:.4f} to {high:.4f}), "
            f"a call takes {1e3 * row['plain_s']:.2f} ms"
        )
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0 if all(row["same_program"] for row in rows) else 1


def measure(pair: str, n_devices: int, calls: int) -> dict[str, Any]:
    import jax

    import placement
    from graphs.zoo import build_train_step, init_state, load_model_config

    model = load_model_config("tiny")
    step, arguments, donated = build_train_step(model, global_batch=16, seq_len=32)
    plan = placement.optimize(
        step,
        *arguments,
        cluster=f"cpu:{n_devices}",
        optimizer="fsdp_tp" if n_devices > 1 else "data_parallel",
        mesh_shape={"data": 2, "model": 4} if n_devices > 1 else None,
        donate_argnums=donated,
    )
    mesh = plan.mesh(jax.devices()[:n_devices])
    places = {
        "in_shardings": plan.in_shardings(mesh),
        "out_shardings": plan.out_shardings(mesh),
    }
    applied = plan.apply(step)
    plain = step if n_devices == 1 else written_out(applied, arguments, mesh)
    steps = [jax.jit(f, **places).lower(*arguments).compile() for f in (plain, applied)]
    same = program(steps[0]) == program(steps[1])
    jitted = [jax.jit(f, **places) for f in (plain, applied)]
    rng = np.random.default_rng(0)
    batch = {
        name: rng.integers(0, 256, shape.shape).astype(shape.dtype)
        for name, shape in arguments[2].items()
    }
    values = jax.device_put((*init_state(model, jax.random.key(0)), batch), places["in_shardings"])
    seconds = paired_seconds(jitted, values, calls)
    ratios = seconds[:, 1] / seconds[:, 0]
    medians = np.median(rng.choice(ratios, (2000, len(ratios))), axis=1)
    return {
        "pair": pair,
        "same_program": same,
        "calls": calls,
        "plain_s": float(np.median(seconds[:, 0])),
        "ratio": float(np.median(ratios)),
        "interval_95": np.quantile(medians, (0.025, 0.975)).tolist(),
    }


def written_out(applied: Callable[..., Any], arguments: Any, mesh: Any) -> Callable[..., Any]:
    """The jaxpr of the applied function as a function: constraints and all, without Meshwright."""
    import jax
    from jax.extend.core import jaxpr_as_fun

    closed, shape = jax.make_jaxpr(applied, return_shape=True)(*arguments)
    outputs = jax.tree.structure(shape)
    run = jaxpr_as_fun(closed)

    def plain(*values: Any) -> Any:
        return jax.tree.unflatten(outputs, run(*jax.tree.leaves(values)))

    return plain


def program(compiled: Any) -> list[str]:
    """The optimised module's lines without names, sorted: XLA orders what is independent freely."""
    text = re.sub(r"(, )?metadata=\{[^}]*\}", "", compiled.as_text())
    sections = "FileNames|FunctionNames|FileLocations|StackFrames"
    text = re.sub(rf"^({sections})\n(.+\n)*", "", text, flags=re.MULTILINE)
    text = re.sub(r"^HloModule [^,]*,", "HloModule,", text)
    text = re.sub(r"[\w.]+(?=: \w+\[)", "argument", text)
    return sorted(re.sub(r"%[\w.-]+", "%", text).splitlines())


def paired_seconds(steps: list[Callable[..., Any]], values: Any, calls: int) -> np.ndarray:
    """[calls, 2]; the order within a pair alternates."""
    import jax

    seconds = np.empty((calls, 2))
    for step in steps:
        jax.block_until_ready(step(*values))
    for n in range(calls):
        for which in (0, 1) if n % 2 else (1, 0):
            began = time.perf_counter()
            jax.block_until_ready(steps[which](*values))
            seconds[n, which] = time.perf_counter() - began
    return seconds


if __name__ == "__main__":
    raise SystemExit(main())
