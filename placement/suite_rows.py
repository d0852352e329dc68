"""Rows of the compiled suite: kept, summarised and shown."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

PLAN, PEER = "plan", "autosharding"
BASELINES = (
    "fsdp",
    "data_parallel",
    "megatron",
    "fsdp_tp",
    "megatron_sp",
    "zero1",
    "zero2",
    "fsdp_tp_sp",
    "t5x_2d",
)


PINNED = "@pinned"
"""Follows a rule's name where every operand is pinned as the cost model completes the rule."""


def is_plan(optimizer: str) -> bool:
    """Whether a row is the product's plan, or its plan on another mesh."""
    return optimizer.partition("@")[0] == PLAN


def is_pinned(optimizer: str) -> bool:
    """Whether a row's program is what was scored, in every operand."""
    return is_plan(optimizer) or optimizer.endswith(PINNED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One plan of one case, compiled."""

    case: str
    cluster: str
    optimizer: str
    status: str
    """``ok``, ``out_of_memory``, ``failed`` (the compiler's) or ``error`` (no plan)."""
    message: str
    mesh_shape: str
    step_time_s: float | None
    compute_time_s: float | None
    exposed_comm_time_s: float | None
    peak_memory_bytes: float | None
    predicted_step_time_s: float | None
    predicted_peak_memory_bytes: float | None
    planning_time_s: float | None
    """Tracing included; for the peer its whole compile, which is when it plans."""
    compile_time_s: float | None
    compile_cpu_time_s: float | None
    """Processor time of the compile: what it takes on a machine that does nothing else."""
    kernels: int
    unknown_kernels: int
    full_rematerializations: int
    versions: str


def load_rows(folder: pathlib.Path, cases: Mapping[str, Any]) -> list[Row]:
    """All rows in a folder, in the order of the cases."""
    order = list(cases)
    found = []
    for path in sorted((folder / "rows").glob("*.json")):
        row = Row(**json.loads(path.read_text(encoding="utf-8")))
        if row.case in cases:
            found.append(row)
    ranks = {name: i for i, name in enumerate((PLAN, PEER, *BASELINES))}
    return sorted(found, key=lambda r: (order.index(r.case), ranks.get(r.optimizer, 99)))


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
    """Per case the plan against the best rule and against the peer; geometric means."""
    cases: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(r.case for r in rows):
        own = {r.optimizer: r for r in rows if r.case == name}
        rules = [r for n, r in own.items() if n in BASELINES and r.status == "ok"]
        plan, peer = own.get(PLAN), own.get(PEER)
        best = min(rules, key=lambda r: r.step_time_s or math.inf, default=None)
        cases[name] = {
            "cluster": next(iter(own.values())).cluster,
            "plan_s": plan.step_time_s if plan else None,
            "plan_status": plan.status if plan else "missing",
            "best_rule": best.optimizer if best else None,
            "best_rule_s": best.step_time_s if best else None,
            "rules_compiled": len(rules),
            "peer_s": peer.step_time_s if peer else None,
            "peer_status": peer.status if peer else "missing",
            "against_rules": _ratio(plan, best),
            "against_peer": _ratio(plan, peer),
            "planning_time_s": plan.planning_time_s if plan else None,
            "peer_planning_time_s": peer.planning_time_s if peer else None,
            "peer_planning_cpu_time_s": peer.compile_cpu_time_s if peer else None,
        }
    return {
        "cases": cases,
        "geometric_mean_against_rules": _geometric_mean(c["against_rules"] for c in cases.values()),
        "geometric_mean_against_peer": _geometric_mean(c["against_peer"] for c in cases.values()),
        "worst_against_rules": _worst(c["against_rules"] for c in cases.values()),
        "worst_against_peer": _worst(c["against_peer"] for c in cases.values()),
        "versions": sorted({r.versions for r in rows}),
    }


def _ratio(a: Row | None, b: Row | None) -> float | None:
    if a is None or b is None or a.status != "ok" or b.status != "ok":
        return None
    return (a.step_time_s or math.nan) / (b.step_time_s or math.nan)


def _geometric_mean(values) -> float | None:
    known = [v for v in values if v is not None]
    return math.exp(sum(map(math.log, known)) / len(known)) if known else None


def _worst(values) -> float | None:
    return max((v for v in values if v is not None), default=None)


def as_line(row: Row) -> str:
    if row.step_time_s is None:
        return f"{row.case:22} {row.optimizer:14} {row.status}: {row.message[:120]}"
    planning = 0.0 if row.planning_time_s is None else row.planning_time_s
    return (
        f"{row.case:22} {row.optimizer:14} {row.status:13} {1e3 * row.step_time_s:9.2f} ms  "
        f"compute {1e3 * (row.compute_time_s or 0):8.2f}  "
        f"waits {1e3 * (row.exposed_comm_time_s or 0):7.2f}  "
        f"{(row.peak_memory_bytes or 0) / 2**30:6.2f} GiB  planned in {planning:5.1f} s  "
        f"{row.mesh_shape}"
    )


def as_csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    fields = [f.name for f in dataclasses.fields(Row)]
    writer = csv.DictWriter(text, fieldnames=fields, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(dataclasses.asdict(row))
    return text.getvalue()


def print_table(summary: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="step time by the compiler's schedule", title_justify="left")
    table.add_column("case")
    table.add_column("cluster")
    heads = (
        "plan ms",
        "best rule ms",
        "ratio",
        "auto-sharding ms",
        "ratio",
        "planned s",
        "its s",
        "its cpu s",
    )
    for head in heads:
        table.add_column(head, justify="right")

    def number(value: float | None, scale: float = 1.0, digits: int = 2) -> str:
        return "–" if value is None else f"{scale * value:.{digits}f}"

    for name, case in summary["cases"].items():
        rule = f"{number(case['best_rule_s'], 1e3)} {case['best_rule'] or ''}"
        table.add_row(
            name,
            case["cluster"],
            number(case["plan_s"], 1e3),
            rule,
            number(case["against_rules"], digits=3),
            number(case["peer_s"], 1e3) if case["peer_s"] else case["peer_status"],
            number(case["against_peer"], digits=3),
            number(case["planning_time_s"], digits=1),
            number(case["peer_planning_time_s"], digits=0),
            number(case["peer_planning_cpu_time_s"], digits=0),
        )
    console = Console(width=140)
    console.print(table)
    for against in ("rules", "peer"):
        mean, worst = (
            summary[f"geometric_mean_against_{against}"],
            summary[f"worst_against_{against}"],
        )
        console.print(
            f"against {against}: geometric mean {number(mean, digits=3)}, "
            f"worst {number(worst, digits=3)}"
        )
