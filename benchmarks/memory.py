"""Peak memory of planned steps of real models, predicted beside XLA:TPU's buffer assignment.

    python benchmarks/memory.py [case ...] [--out benchmarks/results/memory] [--redo]

The compiler is stopped once its buffers are assigned (``meshwright verify PLAN memory=true``), after
seconds. None of these cases was used to set a constant or to read a rule. Each row is written as soon
as it is known, so a stopped run goes on where it was. Needs ``pip install 'meshwright[tpu]'``.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import pathlib
import statistics
import sys
import time
from typing import Any

CASES: dict[str, dict[str, Any]] = {
    "llama3_8b_v5e_16": dict(model="llama3_8b", cluster="v5e:4x4", batch=16, seq=4096),
    "llama3_8b_v5e_32": dict(model="llama3_8b", cluster="v5e:4x8", batch=32, seq=8192),
    "llama3_8b_v6e_8": dict(model="llama3_8b", cluster="v6e:2x4", batch=8, seq=8192),
    "llama3_8b_dots": dict(model="llama3_8b", cluster="v5e:4x4", batch=16, seq=4096, remat="dots"),
    "llama3_8b_none": dict(model="llama3_8b", cluster="v6e:2x4", batch=8, seq=8192, remat="none"),
    "gemma2_9b": dict(model="gemma2_9b", cluster="v5e:4x4", batch=16, seq=4096),
    "gemma3_27b": dict(model="gemma3_27b", cluster="v6e:8x8", batch=128, seq=4096),
    "mistral_7b": dict(model="mistral_7b", cluster="v5e:8x8", batch=64, seq=8192),
    "qwen3_14b": dict(model="qwen3_14b", cluster="v5e:8x8", batch=64, seq=4096),
    "olmo2_13b": dict(model="olmo2_13b", cluster="v4:4x4x8", batch=128, seq=4096),
    "gpt2_xl": dict(model="gpt2_xl", cluster="v5e:4x4", batch=64, seq=1024),
    "gpt3_175b": dict(model="gpt3_175b", cluster="v5p:8x8x8", batch=512, seq=2048),
    "llama2_70b": dict(model="llama2_70b", cluster="v6e:16x16", batch=256, seq=4096),
    "llama3_70b": dict(model="llama3_70b", cluster="v5p:4x4x4", batch=64, seq=4096),
    "llama3_405b": dict(model="llama3_405b", cluster="v5p:8x8x16", batch=1024, seq=4096),
    "mixtral_8x7b": dict(model="mixtral_8x7b", cluster="v5p:4x4x4", batch=64, seq=4096),
    "qwen3_30b_a3b": dict(model="qwen3_30b_a3b", cluster="v5p:4x4x4", batch=128, seq=4096),
    "gpt_oss_20b": dict(model="gpt_oss_20b", cluster="v6e:8x8", batch=64, seq=4096),
    "deepseek_v2": dict(model="deepseek_v2_236b", cluster="v5p:8x8x8", batch=512, seq=4096),
    "t5_xxl": dict(model="t5_xxl", cluster="v5e:8x8", batch=64, seq=512),
}


def run(name: str, case: dict[str, Any]) -> dict[str, Any]:
    """Plan, compile up to the buffers and compare one case."""
    import placement
    from graphs.zoo import build_train_step, load_model_config

    options = {k: v for k, v in case.items() if k not in ("model", "cluster", "batch", "seq")}
    step, args, donated = build_train_step(
        load_model_config(case["model"]),
        global_batch=case["batch"],
        seq_len=case["seq"],
        **options,
    )
    plan = placement.optimize(
        step, *args, cluster=case["cluster"], donate_argnums=donated, throw=False
    )
    began = time.monotonic()
    seen = placement.verify(plan, step, *args, memory_only=True)
    return {
        "case": name,
        **{"remat": "full"} | case,
        "mesh_shape": " ".join(f"{k}={v}" for k, v in plan.mesh_shape.items()),
        "status": seen.status,
        "message": seen.message,
        "peak_bytes": seen.peak_bytes,
        "predicted_peak_bytes": seen.predicted_peak_bytes,
        "capacity_bytes": seen.capacity_bytes,
        "full_rematerializations": len(seen.full_rematerializations),
        "verify_time_s": time.monotonic() - began,
        "versions": " ".join(f"{k}=={v}" for k, v in seen.versions.items()),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """All rows as CSV."""
    fields = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=fields, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def main(argv: list[str]) -> int:
    from graphs.errors import MeshwrightError
    from placement.compile_cache import write_atomically

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; all by default")
    parser.add_argument("--out", default="benchmarks/results/memory")
    parser.add_argument("--redo", action="store_true", help="make rows again")
    options = parser.parse_args(argv)
    folder = pathlib.Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    for name in options.cases or CASES:
        place = folder / f"{name}.json"
        if place.exists() and not options.redo:
            continue
        try:
            row = run(name, CASES[name])
        except MeshwrightError as error:
            print(f"{name}: {error}", flush=True)
            continue
        write_atomically(place, json.dumps(row, indent=1).encode())
    paths = [folder / f"{n}.json" for n in CASES]
    rows = [json.loads(p.read_text()) for p in paths if p.exists()]
    if not rows:
        return 1
    write_atomically(folder / "results.csv", table(rows).encode())
    errors, wrong = [], []
    for row in rows:
        if row["status"] != "ok":
            print(f"{row['case']:18} {row['status']}: {row['message']}")
            continue
        error = row["predicted_peak_bytes"] / row["peak_bytes"] - 1
        errors.append(error)
        fits, said = (
            row[k] <= row["capacity_bytes"] for k in ("peak_bytes", "predicted_peak_bytes")
        )
        wrong += [row["case"]] if fits != said else []
        print(
            f"{row['case']:18} {row['cluster']:11} {row['mesh_shape']:20} "
            f"{row['predicted_peak_bytes'] / 2**30:7.2f} GiB predicted, "
            f"{row['peak_bytes'] / 2**30:7.2f} GiB compiled {100 * error:+6.1f} %, "
            f"in {row['verify_time_s']:.0f} s"
        )
    mean = statistics.mean(map(abs, errors))
    print(
        f"{len(errors)} of {len(CASES)} cases: mean error {100 * mean:.1f} %, bias "
        f"{100 * statistics.mean(errors):+.1f} %; wrong about fitting: {', '.join(wrong) or 'none'}"
    )
    return 0 if len(errors) == len(CASES) and not wrong else 1


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(main(sys.argv[1:]))
