"""Errors, ranking and coverage of predictions against what was measured."""

from __future__ import annotations

import collections
import dataclasses
import typing

import numpy as np

from cost_model.jobs.bands import coverage
from cost_model.jobs.predict import Prediction


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """One model, device, number of devices and batch, measured in several configurations."""

    name: str
    source: str
    fitted: bool
    ids: tuple[str, ...]
    measured_s: np.ndarray
    predicted_s: np.ndarray

    @property
    def spearman(self) -> float:
        from scipy.stats import spearmanr

        if len(self.ids) < 3 or np.ptp(self.measured_s) == 0 or np.ptp(self.predicted_s) == 0:
            return float("nan")
        return float(np.asarray(spearmanr(self.measured_s, self.predicted_s))[0])

    @property
    def regret(self) -> float:
        """Time lost by the configuration ranked first, over the fastest measured."""
        return float(self.measured_s[int(np.argmin(self.predicted_s))] / self.measured_s.min() - 1)

    @property
    def random_regret(self) -> float:
        return float(self.measured_s.mean() / self.measured_s.min() - 1)


def timed(predictions: typing.Sequence[Prediction]) -> list[Prediction]:
    """Rows with a prediction and a measured time that count in an error."""
    return [
        p for p in predictions if p.step_time_s and p.run.measured_step_time_s and not p.run.exclude
    ]


def is_target(prediction: Prediction) -> bool:
    """16-bit rows whose source states shape, batch, degrees and recomputation."""
    return prediction.run.dtype in ("bf16", "fp16") and prediction.run.full_layout


def errors(rows: typing.Sequence[Prediction]) -> dict[str, float | int]:
    """Mean, median and bias of the step-time error of some rows."""
    if not rows:
        return {"rows": 0}
    ratio = np.array([p.step_time_s / p.run.measured_step_time_s for p in rows])  # type: ignore
    error = np.abs(ratio - 1)
    return {
        "rows": len(rows),
        "mean_abs_error": round(float(error.mean()), 4),
        "median_abs_error": round(float(np.median(error)), 4),
        "p95_abs_error": round(float(np.quantile(error, 0.95)), 4),
        "bias": round(float(np.exp(np.log(ratio).mean()) - 1), 4),
    }


def memory_errors(predictions: typing.Sequence[Prediction]) -> dict[str, float | int]:
    """Mean error of the peak memory of rows that state it."""
    rows = [
        p for p in predictions if p.memory_gb and p.run.measured_memory_gb and not p.run.exclude
    ]
    if not rows:
        return {"rows": 0}
    error = np.array([abs(p.memory_gb / p.run.measured_memory_gb - 1) for p in rows])  # type: ignore
    return {
        "rows": len(rows),
        "mean_abs_error": round(float(error.mean()), 4),
        "median_abs_error": round(float(np.median(error)), 4),
    }


def out_of_memory(predictions: typing.Sequence[Prediction]) -> dict[str, typing.Any]:
    """Rows that ran out of memory and are predicted to, and rows that ran and are not to fit."""
    died = [p for p in predictions if p.run.out_of_memory and p.memory_gb]
    ran = [
        p
        for p in predictions
        if p.memory_gb and p.run.measured_step_time_s and not p.run.out_of_memory
    ]
    found = [p.run.id for p in died if p.memory_gb > p.capacity_gb]  # type: ignore
    wrong = [p.run.id for p in ran if p.memory_gb > p.capacity_gb]  # type: ignore
    return {
        "rows_out_of_memory": len(died),
        "found": found,
        "rows_that_ran": len(ran),
        "ran_but_predicted_not_to_fit": wrong,
    }


def sweeps(predictions: typing.Sequence[Prediction]) -> list[Sweep]:
    """The published sweeps among the rows; repeats of one configuration are averaged."""
    groups: dict[tuple, dict[tuple, list[Prediction]]] = collections.defaultdict(
        lambda: collections.defaultdict(list)
    )
    for p in timed(predictions):
        job = p.run.record
        assert job is not None
        sizes = "n_layers d_model n_heads n_devices global_batch seq_len vocab".split()
        group = (p.run.source, p.run.hardware, p.run.dtype, *(job[name] for name in sizes))
        layout = tuple(
            job[name]
            for name in (
                "dp tp pp vpp cp ep micro_batch zero_stage fsdp compiled tp_overlap remat_core "
                "remat_up"
            ).split()
        )
        groups[group][layout].append(p)
    found = []
    for key, layouts in groups.items():
        if len(layouts) < 2:
            continue
        rows = list(layouts.values())
        found.append(
            Sweep(
                name=f"{key[1]} {key[3]:g}x{key[4]:g} heads {key[5]:g} on {key[6]:g}, "
                f"batch {key[7]:g}x{key[8]:g} {key[2]}",
                source=key[0],
                fitted=rows[0][0].run.fitted,
                ids=tuple(r[0].run.id for r in rows),
                measured_s=np.array(
                    [np.mean([p.run.measured_step_time_s or 0.0 for p in r]) for r in rows]
                ),
                predicted_s=np.array([np.mean([p.step_time_s or 0.0 for p in r]) for r in rows]),
            )
        )
    return found


def ranking(found: typing.Sequence[Sweep]) -> dict[str, float | int]:
    """Mean regret over sweeps and mean Spearman over those of at least three configurations."""
    if not found:
        return {"sweeps": 0}
    rho = np.array([sweep.spearman for sweep in found])
    counted = rho[~np.isnan(rho)]
    return {
        "sweeps": len(found),
        "mean_regret": round(float(np.mean([s.regret for s in found])), 4),
        "mean_regret_of_random_pick": round(float(np.mean([s.random_regret for s in found])), 4),
        "sweeps_of_three_or_more": len(counted),
        "mean_spearman": round(float(counted.mean()), 4) if len(counted) else float("nan"),
    }


def band_coverage(rows: typing.Sequence[Prediction], tail: float) -> dict[str, float | int]:
    """Share of rows inside p10 to p90, as shipped and with their own source left out."""
    if not rows:
        return {"rows": 0}
    inside = [p.p10_s <= p.run.measured_step_time_s <= p.p90_s for p in rows]  # type: ignore
    residual = np.array([np.log(p.run.measured_step_time_s / p.step_time_s) for p in rows])  # type: ignore
    apart = coverage(residual, [p.kind for p in rows], [p.run.source for p in rows], tail)
    return {
        "rows": len(rows),
        "inside_shipped_band": round(float(np.mean(inside)), 4),
        "inside_band_of_other_sources": round(float(np.mean(apart)), 4),
    }


def summary(
    predictions: typing.Sequence[Prediction], n_fitted: int, tail: float
) -> dict[str, typing.Any]:
    """All of it, as plain data."""
    rows = timed(predictions)
    target = [p for p in rows if is_target(p)]
    held = [p for p in rows if not p.run.fitted]
    found = sweeps(predictions)

    def grouped(key: typing.Callable[[Prediction], str]) -> dict[str, typing.Any]:
        names = sorted({key(p) for p in rows})
        return {name: errors([p for p in rows if key(p) == name]) for name in names}

    return {
        "rows": len(predictions),
        "rows_predicted": sum(p.step_time_s is not None for p in predictions),
        "rows_timed": len(rows),
        "fitted_constants": n_fitted,
        "step_time": {
            "target_fitted": errors([p for p in target if p.run.fitted]),
            "target_held_out": errors([p for p in target if not p.run.fitted]),
            "all_fitted": errors([p for p in rows if p.run.fitted]),
            "all_held_out": errors(held),
            "megatron_papers": errors([p for p in rows if _megatron(p)]),
            "by_source": grouped(lambda p: p.run.source),
            "by_hardware": grouped(lambda p: p.run.hardware),
            "by_dtype": grouped(lambda p: p.run.dtype),
            "by_kind": grouped(lambda p: p.kind),
        },
        "memory": {
            "fitted": memory_errors([p for p in predictions if p.run.fitted]),
            "held_out": memory_errors([p for p in predictions if not p.run.fitted]),
            "out_of_memory": out_of_memory(predictions),
        },
        "ranking": {
            "fitted": ranking([s for s in found if s.fitted]),
            "held_out": ranking([s for s in found if not s.fitted]),
            "all": ranking(found),
            "by_sweep": [
                {
                    "sweep": s.name,
                    "configurations": len(s.ids),
                    "spearman": None if np.isnan(s.spearman) else round(s.spearman, 3),
                    "regret": round(s.regret, 4),
                    "random_regret": round(s.random_regret, 4),
                }
                for s in found
            ],
        },
        "bands": {
            "held_out": band_coverage(held, tail),
            "all": band_coverage(rows, tail),
        },
        "not_predicted": {p.run.id: p.run.reason for p in predictions if p.step_time_s is None},
    }


def _megatron(p: Prediction) -> bool:
    return any(name in p.run.source for name in ("2104.04473", "2205.05198"))
