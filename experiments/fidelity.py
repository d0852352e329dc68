"""meshwright fidelity [out=FILE.md] [compiled=DIR] [memory=FILE.csv] [refit=true]: how far the cost
models are from what was measured.

Everything in the file is computed when the command runs: published runs, their memory, ranking
and error bands, published energy figures, train steps that the TPU compiler compiled, and the
held-out operator profiles that ship. Pictures go to a folder beside the file (default
docs/fidelity.md). ``compiled`` is the folder of results of suite=compiled (default
benchmarks/results/compiled); ``refit=true`` calibrates the error bands of estimated steps on it.
``memory`` is the table that benchmarks/memory.py writes.
"""

from __future__ import annotations

import json
import pathlib
import typing

from graphs.errors import MeshwrightError
from placement.experiments import _arguments, _hydra
from placement.experiments._compiled import compiled_section, memory_section
from placement.experiments._markdown import percent, table


def main(argv: list[str]) -> int:
    if _hydra.wants_help(argv):
        print((__doc__ or "").strip())
        return 0
    chosen = {
        "out": "docs/fidelity.md",
        "compiled": "benchmarks/results/compiled",
        "memory": "benchmarks/results/memory/results.csv",
        "refit": "false",
    }
    for text in argv:
        key, _, value = text.partition("=")
        if key not in chosen or not value:
            raise MeshwrightError(
                f"unknown setting {text!r}; use out=FILE.md, compiled=DIR, memory=FILE.csv "
                "or refit=true"
            )
        chosen[key] = value
    if chosen["refit"] not in ("true", "false"):
        raise MeshwrightError(f"refit is {chosen['refit']!r}; use true or false")
    path = pathlib.Path(chosen["out"])
    pictures = path.with_suffix("")
    pictures.mkdir(parents=True, exist_ok=True)
    text = "\n".join(
        [
            "# How far the cost models are from what was measured",
            "",
            "Written by `meshwright fidelity`; do not edit.",
            "",
            *_runs(pictures),
            *_constants(),
            *_energy(),
            *compiled_section(pathlib.Path(chosen["compiled"]), chosen["refit"] == "true"),
            *memory_section(pathlib.Path(chosen["memory"])),
            *_operators(),
        ]
    )
    _arguments.write_text(str(path), text.rstrip() + "\n")
    print(f"written to {path}")
    return 0


def _runs(folder: pathlib.Path) -> list[str]:
    from cost_model.jobs import bands, constants, pictures, predict, runs, score

    predictions = predict.predict_runs(runs.read(runs.MEASURED_RUNS).rows)
    report = score.summary(predictions, constants.load().n_fitted, bands.load().tail)
    drawn = pictures.draw(predictions, folder)
    times = report["step_time"]
    rank, memory, band = report["ranking"], report["memory"], report["bands"]
    oom = memory["out_of_memory"]
    lines = [
        "## Published training runs (`meshwright validate`)",
        "",
        f"{report['rows']} rows of `cost_model/data/measured_runs.csv`, {report['rows_predicted']} "
        "predicted from their configuration alone; the constants are fitted on the sources of "
        "`cost_model/jobs/split.yaml`, all others are held out.",
        "",
        *table(
            ("step time", "rows", "mean error", "median", "95th percentile", "bias"),
            [
                (name, *_errors(row))
                for name, row in (
                    ("fitted half, 16-bit, full layout", times["target_fitted"]),
                    ("held-out half, 16-bit, full layout", times["target_held_out"]),
                    ("held-out half, all rows", times["all_held_out"]),
                    ("the Megatron papers' tables", times["megatron_papers"]),
                    *((f"{name} only", row) for name, row in times["by_hardware"].items()),
                    *((f"{name}", row) for name, row in times["by_kind"].items()),
                )
                if row["rows"]
            ],
        ),
        *table(
            ("step time by source", "rows", "mean error", "median", "95th percentile", "bias"),
            [(name.replace("|", "/"), *_errors(row)) for name, row in times["by_source"].items()],
        ),
        *table(
            ("ranking within sweeps", "sweeps", "regret", "of a random pick", "Spearman (of)"),
            [
                (
                    half.replace("_", "-"),
                    str(row["sweeps"]),
                    percent(row["mean_regret"]),
                    percent(row["mean_regret_of_random_pick"]),
                    f"{row['mean_spearman']:.2f} ({row['sweeps_of_three_or_more']})"
                    if row["sweeps_of_three_or_more"]
                    else "",
                )
                for half, row in ((h, rank[h]) for h in ("fitted", "held_out", "all"))
                if row["sweeps"]
            ],
        ),
        *table(
            ("peak memory", "rows", "mean error", "median"),
            [
                (
                    half.replace("_", "-"),
                    str(row["rows"]),
                    percent(row["mean_abs_error"]),
                    percent(row["median_abs_error"]),
                )
                for half, row in ((h, memory[h]) for h in ("fitted", "held_out"))
                if row["rows"]
            ],
        ),
        *_attainable(predictions),
        f"Rows that ran out of memory: {len(oom['found'])} of {oom['rows_out_of_memory']} are "
        f"predicted not to fit; of {oom['rows_that_ran']} that ran, "
        f"{len(oom['ran_but_predicted_not_to_fit'])} are.",
        "",
        "p10 to p90 holds "
        f"{percent(band['held_out']['inside_band_of_other_sources'])} of held-out rows when their "
        "own source does not calibrate the band, and "
        f"{percent(band['held_out']['inside_shipped_band'])} with the shipped bands.",
        "",
    ]
    lines += [f"![{p.stem}]({folder.name}/{p.name})" for p in drawn]
    lines += ["", "Rows without a prediction, and why:", ""]
    reasons: dict[str, list[str]] = {}
    for name, reason in report["not_predicted"].items():
        reasons.setdefault(reason, []).append(name)
    lines += [f"- {reason}: {', '.join(names)}" for reason, names in reasons.items()]
    return [*lines, ""]


_REPEAT_NOISE = 0.02
"""Repeats of one configuration lie this far (median) from their mean."""


def _attainable(predictions: typing.Any) -> list[str]:
    """What a model without error would reach in the rank correlation, given that noise."""
    import numpy as np
    from scipy.stats import spearmanr

    from cost_model.jobs.score import sweeps

    rng = np.random.default_rng(0)
    found = [s for s in sweeps(predictions) if not np.isnan(s.spearman)]
    if not found:
        return []
    best = [
        np.mean(
            [
                np.asarray(spearmanr(s.measured_s, s.measured_s * np.exp(noise)))[0]
                for noise in _REPEAT_NOISE * rng.standard_normal((400, len(s.measured_s)))
            ]
        )
        for s in found
    ]
    return [
        f"A model without error would reach a Spearman of {np.mean(best):.2f} in these sweeps, "
        f"because repeats of one configuration differ by {percent(_REPEAT_NOISE)}.",
        "",
    ]


def _constants() -> list[str]:
    from cost_model.jobs import constants

    loaded = constants.load()
    return [
        f"## The {loaded.n_fitted} fitted constants of the job model",
        "",
        *table(
            ("constant", "family", "value", "prior", "meaning"),
            [
                (e.name, e.family, f"{e.value:.4g}", f"{e.prior:.4g}", e.meaning)
                for e in loaded.entries
                if e.fitted
            ],
        ),
    ]


def _energy() -> list[str]:
    from cost_model import energy_runs

    rows = [row for row in energy_runs.read() if row.error is not None]
    mean = sum(abs(row.error or 0.0) for row in rows) / len(rows)
    return [
        "## Published energy figures (`meshwright energy`)",
        "",
        f"Mean error {percent(mean)} over {len(rows)} training runs.",
        "",
        *table(
            ("run", "predicted MWh", "published MWh", "error"),
            [
                (
                    r.id,
                    f"{r.predicted_mwh:.4g}",
                    f"{r.published_mwh:.4g}",
                    f"{100 * r.error:+.1f} %",
                )
                for r in rows
                if r.error is not None
            ],
        ),
    ]


def _operators() -> list[str]:
    """The held-out errors that the shipped operator calibrations state of themselves."""
    import cost_model

    folder = pathlib.Path(cost_model.__file__).parent / "calibration"
    rows = []
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text()).get("held_out_error", {})
        for name, error in found.items():
            cells = error.values() if isinstance(error, dict) else [error]
            rows.append((path.stem, name, *(_cell(c) for c in cells)))
    if not rows:
        return []
    width = max(len(row) for row in rows)
    first = next(json.loads(p.read_text())["held_out_error"] for p in sorted(folder.glob("*.json")))
    sample = next(iter(first.values()))
    names = list(sample) if isinstance(sample, dict) else ["error"]
    heads = ("device", "operators", *names)[:width]
    return [
        "## Operator times against compiled programs (TPUs) or timed kernels (GPUs), held-out shapes "
        "(`meshwright profile`)",
        "",
        *table(heads, rows),
    ]


def _cell(value: typing.Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _errors(row: dict[str, typing.Any]) -> tuple[str, ...]:
    names = ("mean_abs_error", "median_abs_error", "p95_abs_error", "bias")
    return (str(row["rows"]), *(percent(row[name]) for name in names))
