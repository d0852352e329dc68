"""How fast and how well Meshwright plans: seconds from call to Plan, scores a second, gaps.

    python benchmarks/planning.py [--out benchmarks/results/planning.json]

Each case is planned in a process of its own, twice: the first call pays for loading compiled loops,
the second is what a running program sees. Processor seconds stand beside wall seconds, since other
work on the machine stretches the latter.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys

CASES = {
    "llama3_8b scanned, mesh pinned": dict(
        model="llama3_8b", cluster="v5e:16x16", global_batch=256, seq_len=8192,
        plan=dict(mesh_shape={"data": 16, "model": 16}), limit_s=3.0,
    ),
    "llama3_8b scanned, mesh free": dict(
        model="llama3_8b", cluster="v5e:16x16", global_batch=256, seq_len=8192, limit_s=10.0,
    ),
    "llama3_8b unrolled, mesh free": dict(
        model="llama3_8b", cluster="v5e:16x16", global_batch=256, seq_len=8192,
        step=dict(scan=False), plan=dict(time_limit_s=18.0), limit_s=20.0,
    ),
    "llama3_405b, 16M tokens": dict(
        model="llama3_405b", cluster="v5p:16x16x16", global_batch=2048, seq_len=8192, limit_s=10.0,
    ),
    "deepseek_v3_671b": dict(
        model="deepseek_v3_671b", cluster="v5p:8x8x16", global_batch=1024, seq_len=4096,
        limit_s=10.0,
    ),
}  # fmt: skip


def measure(name: str) -> dict:
    """Plan one case twice in this process; scores a second on its tables."""
    import resource
    import time

    import numpy as np

    import placement
    from cost_model.analysis import Analysis
    from cost_model.cluster import parse_cluster
    from cost_model.layout import layout_for
    from cost_model.simulate import Simulator
    from cost_model.tables import build_tables
    from graphs.groups import group
    from graphs.trace import trace
    from graphs.zoo import build_train_step, load_model_config
    from placement.solver.scoring import total_costs

    case = CASES[name]
    step, args, donated = build_train_step(
        load_model_config(case["model"]),
        global_batch=case["global_batch"],
        seq_len=case["seq_len"],
        **case.get("step", {}),
    )
    seconds = []
    for _ in range(2):
        wall, processor = time.monotonic(), time.process_time()
        plan = placement.optimize(
            step, *args, cluster=case["cluster"], donate_argnums=donated, **case.get("plan", {})
        )
        seconds.append((time.monotonic() - wall, time.process_time() - processor))
    grouping = group(trace(step, *args, donate_argnums=donated))
    layout = layout_for(parse_cluster(plan.cluster), plan.mesh_shape)
    analysis = Analysis.of(grouping, layout.cluster.device)
    tables = build_tables(analysis, layout, usage_limit_bytes=np.inf)
    simulator = Simulator.of(tables)
    rng = np.random.default_rng(0)
    picks = rng.integers(0, tables.problem.n_strategies(), size=(2000, tables.problem.n_nodes))
    rates = []
    for score in (lambda x: total_costs(tables.problem, x), simulator):
        score(picks[:1])
        begin = time.monotonic()
        score(picks)
        rates.append(len(picks) / (time.monotonic() - begin))
    gap = plan.estimate.table_cost_s / plan.table_bound_s - 1 if plan.table_bound_s > 0 else None
    return {
        "case": name,
        "cluster": case["cluster"],
        "limit_s": case["limit_s"],
        "first_wall_s": round(seconds[0][0], 2),
        "first_processor_s": round(seconds[0][1], 2),
        "second_wall_s": round(seconds[1][0], 2),
        "second_processor_s": round(seconds[1][1], 2),
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "mesh": plan.mesh_shape,
        "status": plan.status,
        "step_time_s": plan.estimate.step_time_s,
        "table_gap": gap,
        "simulation_gap": plan.estimate.step_time_s / plan.lower_bound_s - 1
        if plan.lower_bound_s > 0
        else None,
        "table_evaluations_per_s": round(rates[0]),
        "simulations_per_s": round(rates[1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="benchmarks/results/planning.json")
    parser.add_argument("--case", help="measure one case and print it (used by the program itself)")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(arguments.case)))
        return
    rows = []
    for name in CASES:
        done = subprocess.run(
            [sys.executable, __file__, "--case", name],
            capture_output=True,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        if done.returncode:
            raise SystemExit(f"case {name!r} failed: {done.stderr.strip().splitlines()[-1]}")
        rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
        row = rows[-1]
        print(
            f"{name}: {row['first_wall_s']} s wall, {row['first_processor_s']} s processor "
            f"(limit {row['limit_s']}), again {row['second_wall_s']} s, {row['peak_memory_gib']} GiB, "
            f"table gap {row['table_gap']}, {row['table_evaluations_per_s']:,} table evaluations/s, "
            f"{row['simulations_per_s']:,} simulations/s",
            flush=True,
        )
    out = pathlib.Path(arguments.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_suffix(".part")
    temporary.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, out)


if __name__ == "__main__":
    main()
