"""The experts suite: hand-tuned configurations against plans of the same job.

Every case is one published recipe. The expert's degrees, batch and rematerialisation are scored by
the job model; Meshwright then plans the same model on the same devices with the same global batch
and sequence length, number types and software. ``experts.csv`` has one line per case.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import pathlib
import statistics
import typing

import numpy as np

from placement.jobs.cases import Case, read_cases
from placement.jobs.infeasible import cheapest_change
from placement.jobs.search import Infeasible, JobPlan, plan_job

COLUMNS = (
    "case_id",
    "expert_step_time_s",
    "expert_fits",
    "plan_step_time_s",
    "lower_bound_s",
    "planning_time_s",
    "reason",
)


def evaluate(cases: str | None = None, out: str = "out/experts", time_limit_s: float = 10.0) -> int:
    """Score every case of a file (the shipped one by default) and write experts.csv,
    plans.json and summary.json to `out`."""
    from rich.console import Console
    from rich.progress import track

    rows: list[dict[str, typing.Any]] = []
    plans: dict[str, typing.Any] = {}
    console = Console(stderr=True)
    for case in track(read_cases(cases), "planning", console=console, transient=True):
        row, plan = _score(case, time_limit_s)
        rows.append(row)
        if plan is not None:
            plans[case.case_id] = plan
    folder = pathlib.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(
        text, [str(name) for name in COLUMNS], lineterminator="\n", extrasaction="ignore"
    )
    writer.writeheader()
    writer.writerows({k: _cell(v) for k, v in row.items()} for row in rows)
    _write(folder / "experts.csv", text.getvalue())
    _write(folder / "plans.json", json.dumps(plans, indent=1) + "\n")
    summary = _summary(rows)
    _write(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    for key, value in summary.items():
        print(f"{key.replace('_', ' ')}: {value}")
    print(f"written to {folder}")
    return 0


def _score(case: Case, time_limit_s: float) -> tuple[dict[str, typing.Any], typing.Any]:
    from cost_model.jobs import constants
    from cost_model.jobs.memory import memory
    from cost_model.jobs.predict import predict_runs, settled

    row: dict[str, typing.Any] = dict.fromkeys(COLUMNS)
    row.update(case_id=case.case_id, reason=case.reason)
    if case.reason or case.run.record is None:
        return row, None
    prediction = predict_runs([case.run])[0]
    loaded = constants.load()
    job, _ = settled([case.run], loaded)
    held = memory(job, loaded)
    row["expert_step_time_s"] = prediction.step_time_s
    row["expert_fits"] = bool(held.fits[0])
    notes = [prediction.reason] if prediction.reason else []
    if not held.fits[0]:
        notes.append(
            f"the expert's configuration is predicted to take {held.peak_bytes[0] / 2**30:.1f} GiB "
            f"of {held.capacity_bytes[0] / 2**30:.1f} GiB"
        )
    if case.run.measured_step_time_s:
        notes.append(f"measured {case.run.measured_step_time_s:.4g} s")
    ran = case.run.measured_step_time_s is not None
    found = plan_job(job, time_limit_s=time_limit_s, given=job, given_ran=ran)
    row["planning_time_s"] = found.planning_time_s
    plan = None
    if isinstance(found, Infeasible):
        notes.append(cheapest_change(job, found))
    else:
        row["plan_step_time_s"] = found.step_time_s
        row["lower_bound_s"] = found.lower_bound_s
        plan = _plain(found)
    row["reason"] = "; ".join(notes)
    return row, plan


def _plain(plan: JobPlan) -> dict[str, typing.Any]:
    return {
        "degrees": plan.degrees,
        "schedule": plan.schedule,
        "remat": plan.remat,
        "step_time_s": plan.step_time_s,
        "memory_gib": plan.memory_bytes / 2**30,
        "capacity_gib": plan.capacity_bytes / 2**30,
        "lower_bound_s": plan.lower_bound_s,
        "gap": plan.gap,
        "evaluations": plan.evaluations,
    }


def _summary(rows: list[dict[str, typing.Any]]) -> dict[str, typing.Any]:
    both = [r for r in rows if r["expert_step_time_s"] and r["plan_step_time_s"]]
    ratio = [r["plan_step_time_s"] / r["expert_step_time_s"] for r in both]
    gaps = [r["plan_step_time_s"] / r["lower_bound_s"] - 1 for r in both]
    spent = [r["planning_time_s"] for r in rows if r["planning_time_s"] is not None]
    return {
        "cases": len(rows),
        "scored": sum(r["expert_step_time_s"] is not None for r in rows),
        "planned": len(both),
        "experts_predicted_not_to_fit": sum(r["expert_fits"] is False for r in rows),
        "plan_over_expert_geometric_mean": _round(
            math.exp(float(np.mean(np.log(ratio)))) if ratio else None
        ),
        "plan_over_expert_largest": _round(max(ratio, default=None)),
        "cases_slower_than_the_expert": [
            r["case_id"] for r, x in zip(both, ratio) if x > 1.0 + 1e-9
        ],
        "gap_to_lower_bound_median": _round(statistics.median(gaps) if gaps else None),
        "planning_time_s_median": _round(statistics.median(spent) if spent else None),
        "planning_time_s_largest": _round(max(spent, default=None)),
    }


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _cell(value: typing.Any) -> typing.Any:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else value


def _write(path: pathlib.Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
