"""The engine against the exact solver on exported train steps, and against references on instances.

    python benchmarks/solver.py exports [--seconds 5] [--exact-seconds 60] [--out FILE.json]
    python benchmarks/solver.py instances DIR [--fractions 0.1,1] [--seeds 10] [--out FOLDER]

``exports`` prices models of the zoo on meshes, sets the memory limit between the least and the
unlimited peak, writes each problem in the contest's format, reads it back, and solves it twice.
``instances`` runs ``meshwright evaluate suite=iopddl`` at fractions of the time limits, and prints
the spread over seeds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import tempfile
from collections.abc import Iterator

import numpy as np

from cost_model import iopddl
from cost_model.problem import Problem
from placement import solver
from placement.solver import suite

CASES = (
    ("llama3_8b", "v5e:16x16", {"data": 16, "model": 16}),
    ("llama3_8b", "v5e:16x16", {"data": 64, "model": 4}),
    ("llama3_70b", "v5p:8x8x16", {"data": 128, "model": 8}),
    ("gemma2_9b", "v5e:16x16", {"data": 32, "model": 8}),
    ("gpt2_xl", "v5e:8x8", {"data": 16, "model": 4}),
    ("mixtral_8x7b", "v5p:8x8x16", {"data": 128, "model": 8}),
    ("t5_xxl", "v5e:16x16", {"data": 64, "model": 4}),
    ("deepseek_v2_236b", "v5p:8x8x16", {"data": 128, "model": 8}),
)
TIGHTNESS = (0.05, 0.3, 1.0)
"""Share of the way from the least possible peak to the peak of the unlimited optimum."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    exports = verbs.add_parser("exports")
    exports.add_argument("--seconds", type=float, default=5.0)
    exports.add_argument("--exact-seconds", type=float, default=60.0)
    exports.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("out/solver_exports.json")
    )
    instances = verbs.add_parser("instances")
    instances.add_argument("dir")
    instances.add_argument("--fractions", default="0.1,1")
    instances.add_argument("--seeds", type=int, default=10)
    instances.add_argument("--out", type=pathlib.Path, default="out/solver_instances")
    arguments = parser.parse_args()
    solver.prepare()
    if arguments.verb == "exports":
        return compare_exports(arguments.seconds, arguments.exact_seconds, arguments.out)
    status = 0
    for fraction in map(float, arguments.fractions.split(",")):
        folder = arguments.out / f"fraction_{fraction:g}"
        status |= suite.evaluate(
            arguments.dir, str(folder), seeds=arguments.seeds, time_fraction=fraction
        )
        print_spread(folder / "iopddl.json")
    return status


def compare_exports(seconds: float, exact_seconds: float, out: pathlib.Path) -> int:
    """Status 1 if any problem that the exact solver finished is more than 0.5 % off."""
    rows = []
    print(f"{'problem':52} nodes {'gap %':>8} {'ms':>6} {'/exact':>9} {'exact s':>8} exact status")
    for problem in exported():
        found = solver.solve(problem, time_limit_s=seconds)
        exact = solver.exact(problem, time_limit_s=exact_seconds)
        ratio = found.cost / exact.cost
        rows.append(
            {
                "problem": problem.name,
                "nodes": problem.n_nodes,
                "gap": found.gap,
                "elapsed_s": found.elapsed_s,
                "over_exact": ratio,
                "exact_status": exact.status,
                "exact_s": exact.elapsed_s,
            }
        )
        print(
            f"{problem.name:52} {problem.n_nodes:5} {100 * found.gap:8.4f} "
            f"{1e3 * found.elapsed_s:6.0f} {ratio:9.5f} {exact.elapsed_s:8.2f} {exact.status}",
            flush=True,
        )
    finished = [r for r in rows if r["exact_status"] == "optimal"]
    worst = max((r["over_exact"] for r in finished), default=1.0)
    median = float(np.median([r["gap"] for r in rows]))
    print(
        f"{len(rows)} problems, {len(finished)} finished by the exact solver; worst cost over the "
        f"optimum {worst:.5f}; median gap {100 * median:.4f} %"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(rows, indent=1))
    return int(worst > 1.005)


def exported() -> Iterator[Problem]:
    """Problems of CASES at each tightness, after a round trip through the contest's format."""
    with tempfile.TemporaryDirectory() as folder:
        for model, cluster, mesh in CASES:
            free = dataclasses.replace(table_problem(model, cluster, mesh), usage_limit=1e30)
            peak = free.peak_usage(solver.solve(free, time_limit_s=5.0).assignment)
            least = least_peak(free, peak)
            for share in TIGHTNESS:
                name = f"{model} {cluster} {'x'.join(map(str, mesh.values()))} {share:g}"
                limit = np.ceil(least + share * (peak - least))
                path = pathlib.Path(folder) / "problem.json.gz"
                iopddl.write(dataclasses.replace(free, usage_limit=limit, name=name), path)
                yield iopddl.read(path)


def table_problem(model: str, cluster: str, mesh: dict[str, int]) -> Problem:
    """Tables of one train step on one mesh; batch of one sequence of 1024 per device."""
    from cost_model.analysis import Analysis
    from cost_model.cluster import parse_cluster
    from cost_model.layout import layout_for
    from cost_model.tables import build_tables
    from graphs.groups import group
    from graphs.trace import trace
    from graphs.zoo import build_train_step, load_model_config

    parsed = parse_cluster(cluster)
    step, arguments, donated = build_train_step(
        load_model_config(model), global_batch=parsed.n_devices, seq_len=1024
    )
    grouping = group(trace(step, *arguments, donate_argnums=donated))
    analysis = Analysis.of(grouping, parsed.device)
    return build_tables(analysis, layout_for(parsed, mesh), usage_limit_bytes=float("inf")).problem


def least_peak(problem: Problem, peak: float) -> float:
    """Smallest limit, to 1 part in 10^4, under which the engine finds something feasible."""
    low, high = 0.0, peak
    while high - low > 1e-4 * peak:
        middle = (low + high) / 2
        tight = dataclasses.replace(problem, usage_limit=middle)
        if solver.solve(tight, time_limit_s=0.3).feasible:
            high = middle
        else:
            low = middle
    return high


def print_spread(path: pathlib.Path) -> None:
    runs = json.loads(path.read_text())["runs"]
    for name in sorted({r["instance"] for r in runs}):
        costs = np.array([r["cost"] for r in runs if r["instance"] == name])
        spread = costs.max() / costs.min() - 1.0
        print(f"{name}: {len(costs)} runs, {np.isfinite(costs).sum()} valid, spread {spread:.3%}")


if __name__ == "__main__":
    raise SystemExit(main())
