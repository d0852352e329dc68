"""Predict published training runs from their configuration alone and report the errors.

usage: meshwright validate [RUNS.csv] [out=DIR] [refit=DIR]

RUNS.csv   runs with the columns of the shipped table (default: the shipped table)
out        folder for predictions.csv, summary.json and pictures (default out/validate)
refit      also fit the constants on the stated half of the rows and write them there
"""

from __future__ import annotations

import csv
import io
import json
import os
import pathlib
import re
import sys
import typing

from graphs.errors import MeshwrightError
from placement.experiments import _arguments

COLUMNS = (
    "id",
    "predicted_step_time_s",
    "p10_s",
    "p90_s",
    "predicted_memory_gb",
    "measured_step_time_s",
    "reason",
)


def main(argv: list[str]) -> int:
    if any(a in ("-h", "--help", "help") for a in argv):
        print(__doc__)
        return 0
    from cost_model.jobs import bands as bands_module
    from cost_model.jobs import constants, pictures, predict, runs, score

    path, out, refit = _settings(argv, str(runs.MEASURED_RUNS))
    table = runs.read(path)
    chosen, bands = constants.load(), None
    if refit is not None:
        from cost_model.jobs import refit as refit_module

        chosen, bands = refit_module.refit(table.rows, _arguments.writable_folder(refit))
    predictions = predict.predict_runs(table.rows, chosen, bands)
    folder = _arguments.writable_folder(out)
    _write(folder / "predictions.csv", _csv(predictions))
    report = score.summary(predictions, chosen.n_fitted, (bands or bands_module.load()).tail)
    report["faults"] = [str(fault) for fault in table.faults]
    _write(folder / "summary.json", json.dumps(_plain(report), indent=1) + "\n")
    pictures.draw(predictions, folder)
    _print(report, folder)
    for fault in table.faults:
        print(f"meshwright: {fault}", file=sys.stderr)
    return 1 if table.faults else 0


def _settings(argv: list[str], default: str) -> tuple[str, str, str | None]:
    path, out, refit = None, "out/validate", None
    for text in argv:
        key, equals, value = text.partition("=")
        if equals and key in ("out", "refit", "runs", "file"):
            if not value:
                raise MeshwrightError(f"{text!r} gives no value; write {key}=PATH")
            out = value if key == "out" else out
            refit = value if key == "refit" else refit
            path = value if key in ("runs", "file") else path
        elif equals and not pathlib.Path(text).exists():
            raise MeshwrightError(f"unknown setting {key!r}; use out=DIR or refit=DIR")
        elif path is not None:
            raise MeshwrightError(f"{text!r} is a second runs file after {path!r}; give one")
        else:
            path = text
    return path or default, out, refit


def _csv(predictions) -> str:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.6g}"

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for p in predictions:
        writer.writerow(
            [
                p.run.id,
                number(p.step_time_s),
                number(p.p10_s),
                number(p.p90_s),
                number(p.memory_gb),
                number(p.run.measured_step_time_s),
                p.reason,
            ]
        )
    return text.getvalue()


def _write(path: pathlib.Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _plain(value: typing.Any) -> typing.Any:
    """JSON has no NaN: None in its place."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and value != value else value


def _print(report: dict[str, typing.Any], folder: pathlib.Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="step time against published runs", title_justify="left")
    for heading in ("rows of", "rows", "mean error", "median", "95th pct.", "bias"):
        table.add_column(heading, justify="left" if heading == "rows of" else "right")
    times = report["step_time"]
    chosen = {
        "fitted half, 16-bit, full layout": times["target_fitted"],
        "held-out half, 16-bit, full layout": times["target_held_out"],
        "held-out half, all": times["all_held_out"],
        "Megatron papers": times["megatron_papers"],
        **{f"  {_tail(name)}": row for name, row in times["by_source"].items()},
    }
    for name, row in chosen.items():
        if row["rows"]:
            cells = ("mean_abs_error", "median_abs_error", "p95_abs_error", "bias")
            table.add_row(name, str(row["rows"]), *(f"{100 * row[c]:.1f} %" for c in cells))
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    memory, rank, bands = report["memory"], report["ranking"], report["bands"]
    for half in ("fitted", "held_out"):
        if memory[half]["rows"]:
            print(
                f"memory, {half.replace('_', '-')} rows: mean error "
                f"{100 * memory[half]['mean_abs_error']:.1f} % of {memory[half]['rows']}"
            )
    oom = memory["out_of_memory"]
    if oom["rows_out_of_memory"]:
        print(f"out of memory: {len(oom['found'])} of {oom['rows_out_of_memory']} found")
    for half in ("fitted", "held_out"):
        if rank[half]["sweeps"]:
            rho = rank[half]["mean_spearman"]
            print(
                f"ranking, {half.replace('_', '-')}: {rank[half]['sweeps']} sweeps, regret "
                f"{100 * rank[half]['mean_regret']:.1f} % (random pick "
                f"{100 * rank[half]['mean_regret_of_random_pick']:.1f} %), Spearman {rho:.2f} "
                f"over {rank[half]['sweeps_of_three_or_more']} of three or more configurations"
            )
    if bands["held_out"]["rows"]:
        print(
            f"p10 to p90 holds {100 * bands['held_out']['inside_band_of_other_sources']:.0f} % of "
            f"held-out rows when their own source does not calibrate it"
        )
    print(f"fitted constants: {report['fitted_constants']}")
    print(f"rows predicted: {report['rows_predicted']} of {report['rows']}; written to {folder}")


def _tail(source: str) -> str:
    """A source without its owner and commit."""
    bare = re.sub(r"@[0-9a-f]{7,}", "", source.removeprefix("github:"))
    return bare.split("/", 1)[-1][:70] if "/" in bare.split(":")[0] else bare[:70]
