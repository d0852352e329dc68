"""Pictures of a validation: predicted against measured, errors by source, sweeps."""

from __future__ import annotations

import os
import pathlib
import typing

import numpy as np

from cost_model.jobs.predict import Prediction
from cost_model.jobs.score import sweeps, timed


def draw(predictions: typing.Sequence[Prediction], folder: pathlib.Path) -> list[pathlib.Path]:
    """Write the pictures that the rows allow; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    written = []
    rows = timed(predictions)
    if rows:
        written.append(_save(_times(rows), folder / "step_time.png"))
        written.append(_save(_errors(rows), folder / "errors_by_source.png"))
    found = [sweep for sweep in sweeps(predictions) if len(sweep.ids) >= 3]
    if found:
        written.append(_save(_sweeps(found), folder / "sweeps.png"))
    peaks = [p for p in predictions if p.memory_gb and p.run.measured_memory_gb]
    if peaks:
        written.append(_save(_memory(peaks), folder / "memory.png"))
    return written


def _axes(width: float, height: float):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _times(rows: typing.Sequence[Prediction]):
    figure, axes = _axes(6.5, 6.0)
    measured = np.array([p.run.measured_step_time_s for p in rows], float)
    predicted = np.array([p.step_time_s for p in rows], float)
    names = sorted({_short(p.run.source) for p in rows})
    for name in names:
        here = np.array([_short(p.run.source) == name for p in rows])
        axes.scatter(measured[here], predicted[here], s=12, alpha=0.7, label=name)
    ends = np.array([measured.min() * 0.7, measured.max() * 1.4])
    axes.plot(ends, ends, color="black", linewidth=0.8)
    axes.fill_between(ends, ends * 0.9, ends * 1.1, color="black", alpha=0.08, label="10 %")
    axes.set(xscale="log", yscale="log", xlabel="measured step, s", ylabel="predicted step, s")
    axes.legend(fontsize=7, loc="upper left")
    return figure


def _errors(rows: typing.Sequence[Prediction]):
    names = sorted({_short(p.run.source) for p in rows})
    figure, axes = _axes(7.5, 1.2 + 0.35 * len(names))
    data = [
        [
            100 * (p.step_time_s / p.run.measured_step_time_s - 1)  # type: ignore[operator]
            for p in rows
            if _short(p.run.source) == name
        ]
        for name in names
    ]
    axes.boxplot(data, orientation="horizontal", showfliers=True, flierprops={"markersize": 3})
    axes.set_yticks(range(1, len(names) + 1), [f"{n} ({len(d)})" for n, d in zip(names, data)])
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("predicted over measured step time, %")
    return figure


def _sweeps(found):
    figure, axes = _axes(6.5, 5.5)
    for sweep in found:
        best = sweep.measured_s.min()
        scale = best / sweep.predicted_s[int(np.argmin(sweep.measured_s))]
        axes.plot(
            sweep.measured_s / best, sweep.predicted_s * scale / best, "o", markersize=4, alpha=0.7
        )
    ends = [1.0, max(float((s.measured_s / s.measured_s.min()).max()) for s in found)]
    axes.plot(ends, ends, color="black", linewidth=0.8)
    axes.set(
        xlabel="measured, over the fastest of its sweep",
        ylabel="predicted, over the same configuration",
        title=f"{len(found)} sweeps of three or more configurations",
    )
    return figure


def _memory(rows: typing.Sequence[Prediction]):
    figure, axes = _axes(5.5, 5.0)
    measured = np.array([p.run.measured_memory_gb for p in rows], float)
    predicted = np.array([p.memory_gb for p in rows], float)
    for name in sorted({_short(p.run.source) for p in rows}):
        here = np.array([_short(p.run.source) == name for p in rows])
        axes.scatter(measured[here], predicted[here], s=14, alpha=0.7, label=name)
    ends = [0.0, float(max(measured.max(), predicted.max())) * 1.05]
    axes.plot(ends, ends, color="black", linewidth=0.8)
    axes.set(xlabel="measured peak, GiB", ylabel="predicted peak, GiB")
    axes.legend(fontsize=7)
    return figure


def _short(source: str) -> str:
    head = source.split("@")[0].removeprefix("github:")
    return head.split("/")[-1].split(" ")[0][:24] or "unnamed"


def _save(figure, path: pathlib.Path) -> pathlib.Path:
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=130, format="png")
    os.replace(temporary, path)
    return path
