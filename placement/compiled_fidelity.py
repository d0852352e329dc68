"""Predicted steps beside compiled ones: the rows of suite=compiled against the present cost model.

Beside each row lies a record of its assignment: mesh, placement on the physical axes, what every
node of the problem chose, and the collectives that the compiled program emits. From it the step is
predicted again without planning, so that a changed cost model is compared on the very plans that
were compiled. Hand-tuned rules leave operands to XLA's propagation, so their programs are not quite
the ones that are predicted; they are summed up apart, as are rules with every operand pinned.

Within a case: Spearman's rank correlation of predicted and compiled step times, and the regret, the
time that the plan predicted fastest takes over the fastest compiled one. ``FITTED`` names the cases
whose kernels the shares of ``cost_model/calibration/fused.csv`` were read from; all others are held
out.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from graphs.errors import MeshwrightError
from placement.suite_rows import PEER, is_pinned, is_plan, load_rows

FITTED = (
    "public_dense",
    "small_roomy",
    "gqa_scanned",
    "memory_tight",
    "v5p_dense",
    "v6e_dense",
)
"""Cases that were looked at when the shares were set."""
FITS_WITH_CARE = 0.95
"""A plan predicted to need less than this share of the memory should compile."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """What was planned and compiled for one row."""

    case: str
    optimizer: str
    mesh_shape: Mapping[str, int]
    placement: tuple[tuple[tuple[int, int, int], ...], ...]
    """[mesh axes] factors (physical axis, size, stride)."""
    choices: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    """[nodes] (class that each mesh axis shards, class that partial sums are scattered along)."""
    collectives: Mapping[str, float]
    """Payload bytes by kind as compiled, windowed loops counted as what they carry out; empty where
    the program was not at hand."""
    step_time_s: float | None
    """As compiled, by which the record is known to be of its row; None where that is not known."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """One row predicted by the present model."""

    case: str
    optimizer: str
    status: str
    """of the compile, as in the row."""
    compiled_s: float | None
    compiled_compute_s: float | None
    compiled_exposed_s: float | None
    compiled_bytes: float | None
    predicted_s: float
    predicted_compute_s: float
    predicted_exposed_s: float
    predicted_bytes: float
    available_bytes: float
    compiled_collectives: Mapping[str, float]
    predicted_collectives: Mapping[str, float]

    @property
    def planned(self) -> bool:
        """Whether it is one of this planner's plans, every operand pinned."""
        return is_plan(self.optimizer)

    @property
    def pinned(self) -> bool:
        """Whether every operand was pinned, so that the program is what is predicted."""
        return is_pinned(self.optimizer)

    @property
    def error(self) -> float:
        """predicted / compiled step time - 1."""
        return self.predicted_s / (self.compiled_s or float("nan")) - 1


def record_of(case: str, optimizer: str, plan: Any, scheduled: Any | None) -> Record:
    """What is kept of a plan that was just made and compiled."""
    return Record(
        case=case,
        optimizer=optimizer,
        mesh_shape=dict(plan.mesh_shape),
        placement=tuple(tuple((f.axis, f.size, f.stride) for f in axis) for axis in plan.placement),
        choices=plan.assignment,
        collectives=dict(scheduled.logical_collective_bytes) if scheduled else {},
        step_time_s=scheduled.step_time_s if scheduled else None,
    )


def load_records(folder: pathlib.Path) -> dict[tuple[str, str], Record]:
    """Records in ``folder/records`` by case and optimizer. MeshwrightError for a damaged one."""
    found = {}
    for path in sorted((folder / "records").glob("*.json")):
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            record = Record(
                **{k: raw[k] for k in ("case", "optimizer", "mesh_shape", "collectives")},
                step_time_s=raw.get("step_time_s"),
                placement=tuple(tuple(tuple(f) for f in axis) for axis in raw["placement"]),
                choices=tuple((tuple(p), tuple(s)) for p, s in raw["choices"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise MeshwrightError(
                f"the record {path} is damaged ({type(error).__name__}: {error}); delete it"
            ) from error
        found[record.case, record.optimizer] = record
    return found


def compare(
    folder: pathlib.Path, cases: Mapping[str, Mapping[str, Any]]
) -> tuple[list[Comparison], list[str]]:
    """Every row of these cases that has a record, predicted; and why others are not."""
    records = load_records(folder)
    compared, left_out = [], []
    programs: dict[str, Any] = {}
    for row in load_rows(folder, cases):
        if row.optimizer == PEER:
            continue
        record = records.get((row.case, row.optimizer))
        if record is None or row.status == "error":
            left_out.append(f"{row.case} {row.optimizer}: no record of its plan")
            continue
        if record.step_time_s not in (None, row.step_time_s):
            left_out.append(f"{row.case} {row.optimizer}: its record is of another plan")
            continue
        if row.case not in programs:
            programs[row.case] = _grouping(row.case, cases[row.case])
        try:
            estimate, available = _predict(record, row.cluster, programs[row.case])
        except MeshwrightError as error:
            left_out.append(f"{row.case} {row.optimizer}: {error}")
            continue
        compared.append(
            Comparison(
                case=row.case,
                optimizer=row.optimizer,
                status=row.status,
                compiled_s=row.step_time_s,
                compiled_compute_s=row.compute_time_s,
                compiled_exposed_s=row.exposed_comm_time_s,
                compiled_bytes=row.peak_memory_bytes,
                predicted_s=estimate.step_time_s,
                predicted_compute_s=estimate.compute_time_s,
                predicted_exposed_s=estimate.exposed_comm_time_s,
                predicted_bytes=estimate.peak_memory_bytes,
                available_bytes=available,
                compiled_collectives=record.collectives,
                predicted_collectives=estimate.collectives,
            )
        )
    return compared, left_out


def _grouping(name: str, case: Mapping[str, Any]) -> Any:
    from graphs.groups import group
    from graphs.trace import trace
    from graphs.zoo import ModelConfig, build_train_step

    program = build_train_step(ModelConfig(name=name, **case["model"]), **case["step"])
    step, args, donated = program
    return group(trace(step, *args, donate_argnums=donated))


def _predict(record: Record, cluster: str, grouping: Any) -> tuple[Any, float]:
    """The estimate of a record's assignment, and the bytes that one device has."""
    from cost_model.analysis import Analysis
    from cost_model.cluster import parse_cluster
    from cost_model.estimate import estimate
    from cost_model.layout import Factor, MeshLayout
    from cost_model.simulate import Simulator
    from cost_model.tables import build_tables
    from graphs.mesh import LogicalMesh

    layout = MeshLayout(
        cluster=parse_cluster(cluster),
        mesh=LogicalMesh(
            axis_names=tuple(record.mesh_shape), axis_sizes=tuple(record.mesh_shape.values())
        ),
        placement=tuple(
            tuple(Factor(axis=a, size=n, stride=s) for a, n, s in axis) for axis in record.placement
        ),
    )
    analysis = Analysis.of(grouping, layout.cluster.device)
    tables = build_tables(analysis, layout, usage_limit_bytes=np.inf, exposure=0.3, keep=1 << 20)
    if len(record.choices) != len(tables.choices):
        raise MeshwrightError(
            f"the record has {len(record.choices)} decisions and the program "
            f"{len(tables.choices)}; plan and compile it again"
        )
    picks = []
    for menu, (place, scatter) in zip(tables.choices, record.choices):
        same = (menu.place == np.array(place)).all(1) & (menu.scatter == np.array(scatter)).all(1)
        if not same.any():
            raise MeshwrightError(
                "the record makes a choice that the program no longer has; plan and compile again"
            )
        picks.append(int(np.flatnonzero(same)[0]))
    found = estimate(Simulator.of(tables), np.array(picks), pinned=is_pinned(record.optimizer))
    return found, float(layout.cluster.device.hbm_available_bytes)


def summarize(compared: Sequence[Comparison]) -> dict[str, Any]:
    """Errors over all rows, and ranking within each case of two plans or more."""
    timed = [c for c in compared if c.status == "ok" and c.compiled_s]
    groups = {
        "all": timed,
        "plans": [c for c in timed if c.planned],
        "pinned rules": [c for c in timed if c.pinned and not c.planned],
        "plans and pinned rules": [c for c in timed if c.pinned],
        "rules": [c for c in timed if not c.pinned],
        "fitted cases": [c for c in timed if c.case in FITTED],
        "held-out cases": [c for c in timed if c.case not in FITTED],
    }
    cases = {}
    for name in dict.fromkeys(c.case for c in timed):
        own = [c for c in timed if c.case == name]
        cases[name] = {"rows": len(own), **_errors(own), **_ranking(own)}
        pinned = [c for c in own if c.pinned]
        cases[name]["pinned"] = {"rows": len(pinned), **_ranking(pinned)}
    refused = [c for c in compared if c.status == "out_of_memory"]
    return {
        "rows": len(timed),
        "groups": {k: {"rows": len(v), **_errors(v)} for k, v in groups.items() if v},
        "cases": cases,
        **_means(list(cases.values())),
        "pinned": _means([c["pinned"] for c in cases.values()]),
        "out_of_memory": len(refused),
        "out_of_memory_predicted_to_fit": [
            f"{c.case} {c.optimizer}"
            for c in refused
            if c.predicted_bytes <= FITS_WITH_CARE * c.available_bytes
        ],
        "collectives": _collectives([c for c in timed if c.compiled_collectives]),
    }


def _errors(rows: Sequence[Comparison]) -> dict[str, float]:
    steps = np.array([c.error for c in rows])
    memory = np.array(
        [c.predicted_bytes / c.compiled_bytes - 1 for c in rows if c.compiled_bytes] or [np.nan]
    )
    return {
        "mean_abs_step_error": float(np.abs(steps).mean()),
        "step_bias": float(steps.mean()),
        "mean_abs_memory_error": float(np.abs(memory).mean()),
        "memory_bias": float(memory.mean()),
    }


def _ranking(rows: Sequence[Comparison]) -> dict[str, float | None]:
    from scipy.stats import spearmanr

    if len(rows) < 2:
        return {"spearman": None, "regret": None}
    compiled = np.array([c.compiled_s for c in rows], np.float64)
    predicted = np.array([c.predicted_s for c in rows])
    regret = float(compiled[int(predicted.argmin())] / compiled.min() - 1)
    spread = len(rows) >= 3 and np.ptp(compiled) > 0 and np.ptp(predicted) > 0
    rank: Any = spearmanr(predicted, compiled) if spread else None
    return {"spearman": None if rank is None else float(rank.statistic), "regret": regret}


def _means(cases: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Over cases of two plans or more; the correlation over those of three or more."""
    found = {}
    for name in ("spearman", "regret"):
        values = [c[name] for c in cases if c[name] is not None]
        found[f"mean_{name}"] = float(np.mean(values)) if values else None
    return found


def _collectives(rows: Iterable[Comparison]) -> dict[str, dict[str, float]]:
    """Totals by kind over the rows whose compiled program was at hand, in bytes."""
    totals: dict[str, dict[str, float]] = {}
    for row in rows:
        group = totals.setdefault(
            "plans" if row.planned else "pinned rules" if row.pinned else "rules", {}
        )
        for side, by_kind in (
            ("predicted", row.predicted_collectives),
            ("compiled", row.compiled_collectives),
        ):
            for kind, amount in by_kind.items():
                key = f"{kind.replace('-', '_')} {side}"
                group[key] = group.get(key, 0.0) + amount
    return totals


def calibrate_bands(compared: Sequence[Comparison]) -> tuple[Any, float]:
    """Bands of log(compiled / predicted) by kind of plan, and the share of rows that lie inside
    bands calibrated without their own case."""
    from cost_model.jobs.bands import calibrate, coverage
    from cost_model.step_bands import kind_of

    rows = [c for c in compared if c.status == "ok" and c.compiled_s]
    residuals = np.array([-np.log1p(c.error) for c in rows])
    kinds = [kind_of("tpu", c.pinned) for c in rows]
    sources = [c.case for c in rows]
    bands = calibrate(residuals, kinds, sources)
    return bands, float(np.mean(coverage(residuals, kinds, sources, bands.tail)))
