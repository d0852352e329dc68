"""Peak memory of planned steps of real models, predicted beside XLA:TPU's buffer assignment.

    python benchmarks/memory.py [case ...] [--out benchmarks/results/memory] [--redo]

The compiler is stopped once its buffers are assigned (``meshwright verify PLAN memory=true``), after
seconds. No constant of the memory model was set and no rule of it read on these cases. Each row is
written as soon as it is known, so a stopped run goes on where it was. Needs
``pip install 'meshwright[tpu]'``.
"""

from __future__ import annotations

import math
import os
import sys
import time
from typing import Any

import numpy as np
from case_rows import Case, planned, rows_of

CASES: dict[str, Case] = {
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


def run(name: str, case: Case) -> dict[str, Any]:
    """Plan, compile up to the buffers and compare one case."""
    import placement

    plan, step, args, _ = planned(case)
    began = time.monotonic()
    seen = placement.verify(plan, step, *args, memory_only=True)
    return {
        "case": name,
        **{"remat": "full", **case},
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


def error_of(row: dict[str, Any]) -> float:
    """Predicted over compiled peak, less one; NaN where it did not compile."""
    return row["predicted_peak_bytes"] / row["peak_bytes"] - 1 if row["peak_bytes"] else math.nan


def line(row: dict[str, Any]) -> str:
    """What is printed of a row."""
    if row["status"] != "ok":
        return f"{row['case']:18} {row['status']}: {row['message']}"
    return (
        f"{row['case']:18} {row['cluster']:11} {row['mesh_shape']:20} "
        f"{row['predicted_peak_bytes'] / 2**30:7.2f} GiB predicted, "
        f"{row['peak_bytes'] / 2**30:7.2f} GiB compiled {100 * error_of(row):+6.1f} %, "
        f"in {row['verify_time_s']:.0f} s"
    )


def main(argv: list[str]) -> int:
    rows = rows_of(
        argv, doc=__doc__ or "", cases=CASES, out="benchmarks/results/memory", run=run, line=line
    )
    rows = [row for row in rows if row["status"] == "ok"]
    if not rows:
        return 1
    errors = np.array([error_of(row) for row in rows])
    wrong = [
        row["case"]
        for row in rows
        if (row["peak_bytes"] <= row["capacity_bytes"])
        != (row["predicted_peak_bytes"] <= row["capacity_bytes"])
    ]
    print(
        f"{len(rows)} of {len(CASES)} cases: mean error {100 * abs(errors).mean():.1f} %, bias "
        f"{100 * errors.mean():+.1f} %; wrong about fitting: {', '.join(wrong) or 'none'}"
    )
    return 0 if len(rows) == len(CASES) and not wrong else 1


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(main(sys.argv[1:]))
