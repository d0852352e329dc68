"""Plans for H100 clusters compiled by XLA:GPU: do they fit, and are their collectives as predicted?

Step times are those of the compiler's schedule, whose kernels :mod:`placement.schedule` times itself.

    python benchmarks/gpu.py [case ...] [--out benchmarks/results/gpu] [--redo]

Each row is written as soon as it is known, so a stopped run goes on where it was. XLA:GPU compiles
without a GPU; it does not refuse a program that is too large, so bytes are compared with the
device's memory. Needs ``pip install 'meshwright[gpu]'``.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from case_rows import Case, planned, rows_of

CASES: dict[str, Case] = {
    "llama3_8b_8": dict(model="llama3_8b", cluster="h100:8x1", batch=16, seq=4096),
    "gemma2_9b_32": dict(model="gemma2_9b", cluster="h100:8x4", batch=64, seq=4096),
    "mixtral_8x7b_64": dict(model="mixtral_8x7b", cluster="h100:8x8", batch=128, seq=4096),
    "llama3_8b_64": dict(model="llama3_8b", cluster="h100:8x8", batch=128, seq=8192),
    "qwen3_14b_128": dict(model="qwen3_14b", cluster="h100:8x16", batch=256, seq=4096),
    "llama3_70b_256": dict(model="llama3_70b", cluster="h100:8x32", batch=256, seq=8192),
    "gpt3_175b_512": dict(model="gpt3_175b", cluster="h100:8x64", batch=1024, seq=2048),
    "llama3_405b_1024": dict(model="llama3_405b", cluster="h100:8x128", batch=1024, seq=8192),
}
BYTES_THAT_MATTER = 0.02
"""Kinds below this share of all collective bytes are listed but not judged."""


def run(name: str, case: Case) -> dict[str, Any]:
    """Plan, compile and compare one case."""
    import placement

    plan, step, args, planning = planned(case)
    seen = placement.verify(plan, step, *args)
    total = sum(seen.collectives.values()) or 1.0
    kinds = sorted({*seen.collectives, *seen.predicted_collectives})
    ratios = {
        kind: seen.predicted_collectives.get(kind, 0.0) / seen.collectives[kind]
        for kind in kinds
        if seen.collectives.get(kind, 0.0) > BYTES_THAT_MATTER * total
    }
    return {
        "case": name,
        **case,
        "mesh_shape": " ".join(f"{k}={v}" for k, v in plan.mesh_shape.items()),
        "plan_status": plan.status,
        "status": seen.status,
        "fits": seen.fits,
        "step_time_s": seen.step_time_s,
        "predicted_step_time_s": seen.predicted_step_time_s,
        "peak_bytes": seen.peak_bytes,
        "predicted_peak_bytes": seen.predicted_peak_bytes,
        "full_rematerializations": len(seen.full_rematerializations),
        "collective_bytes": total,
        "predicted_collective_bytes": sum(seen.predicted_collectives.values()),
        "largest_error_of_a_kind": max((abs(r - 1) for r in ratios.values()), default=0.0),
        **{f"{kind}_bytes": seen.collectives.get(kind, 0.0) for kind in kinds},
        **{f"predicted_{kind}_bytes": seen.predicted_collectives.get(kind, 0.0) for kind in kinds},
        "planning_time_s": planning,
        "compile_time_s": seen.compile_time_s,
        "versions": " ".join(f"{k}=={v}" for k, v in seen.versions.items()),
    }


def line(row: dict[str, Any]) -> str:
    """What is printed of a row."""
    return (
        f"{row['case']:18} {row['mesh_shape']:24} {row['status']} fits={row['fits']} "
        f"{row['step_time_s']:.3g} s (predicted {row['predicted_step_time_s']:.3g}), "
        f"{row['peak_bytes'] / 2**30:.1f} GiB (predicted "
        f"{row['predicted_peak_bytes'] / 2**30:.1f}), rematerialised "
        f"{row['full_rematerializations']}, bytes by kind within "
        f"{100 * row['largest_error_of_a_kind']:.1f} %, planned in "
        f"{row['planning_time_s']:.1f} s, compiled in {row['compile_time_s']:.1f} s"
    )


def main(argv: list[str]) -> int:
    rows = rows_of(
        argv, doc=__doc__ or "", cases=CASES, out="benchmarks/results/gpu", run=run, line=line
    )
    good = [r for r in rows if r["fits"] and not r["full_rematerializations"]]
    close = [r for r in good if r["largest_error_of_a_kind"] <= 0.10]
    print(
        f"{len(rows)} cases: {len(good)} fit without full rematerialisation, "
        f"{len(close)} of them with every kind's bytes within 10 %"
    )
    return 0 if len(close) == len(rows) == len(CASES) else 1


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(main(sys.argv[1:]))
