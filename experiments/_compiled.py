"""Sections of docs/fidelity.md on whole steps through the compiler, and the bands they calibrate."""

from __future__ import annotations

import csv
import pathlib
import typing

import numpy as np

from placement.experiments._markdown import percent, table


def compiled_section(folder: pathlib.Path, refit: bool) -> list[str]:
    """Lines of the section; nothing where ``folder`` holds no rows.

    With ``refit`` the error bands of estimated steps are calibrated on these rows and written into
    the package first.
    """
    from cost_model import step_bands
    from cost_model.jobs import bands as bands_module
    from placement.compiled_fidelity import (
        FITS_WITH_CARE,
        FITTED,
        calibrate_bands,
        compare,
        summarize,
    )
    from placement.suite_compiled import load_cases

    if not (folder / "rows").is_dir():
        return []
    compared, left_out = compare(folder, load_cases())
    if not compared:
        return []
    bands, inside = calibrate_bands(compared)
    if refit:
        bands_module.save(bands, step_bands.FILE)
        bands_module.load.cache_clear()
    found = summarize(compared)
    lines = [
        "## Whole train steps through the TPU compiler (`meshwright evaluate suite=compiled meshes=4`)",
        "",
        f"{found['rows']} plans of {len(found['cases'])} cases compiled by XLA:TPU and timed by its "
        "schedule, predicted again by the present model from the assignments that were compiled. "
        "`plans` are this planner's, every operand pinned, as in `pinned rules` (`RULE@pinned`); "
        "`rules` leave operands to XLA's propagation, which the model does not follow. The shares of "
        "`cost_model/calibration/fused.csv` were set on the cases "
        f"{', '.join(FITTED)}; the other cases are held out of these shares, while which collectives "
        "and copies XLA emits was read off steps of all cases.",
        "",
        *table(
            ("steps", "rows", "step time error", "bias", "memory error", "bias"),
            [(name, *_errors(row)) for name, row in found["groups"].items()],
        ),
        *table(
            (
                "case",
                "rows",
                "step time error",
                "bias",
                "memory error",
                "bias",
                "Spearman",
                "regret",
                "pinned rows",
                "Spearman of these",
                "regret",
            ),
            [
                (
                    name,
                    *_errors(row),
                    *_ranking(row),
                    str(row["pinned"]["rows"]),
                    *_ranking(row["pinned"]),
                )
                for name, row in found["cases"].items()
            ],
        ),
        f"Mean Spearman within a case {_number(found['mean_spearman'])}, of plans and pinned rules "
        f"alone {_number(found['pinned']['mean_spearman'])}; trusting the model's favourite costs "
        f"{_share(found['mean_regret'])} on average over the cases of two rows or more, among plans "
        f"and pinned rules {_share(found['pinned']['mean_regret'])}.",
        "",
        f"Of {found['out_of_memory']} plans that the compiler refuses for memory, "
        f"{len(found['out_of_memory_predicted_to_fit'])} are predicted to need less than "
        f"{percent(FITS_WITH_CARE)} of it" + _named(found["out_of_memory_predicted_to_fit"]) + ".",
        "",
    ]
    for group, totals in found["collectives"].items():
        kinds = sorted({key.rsplit(" ", 1)[0] for key in totals})
        lines += table(
            (f"collective bytes of {group}, all rows", "predicted GB", "compiled GB"),
            [
                (
                    kind.replace("_", "-"),
                    f"{totals.get(f'{kind} predicted', 0.0) / 1e9:.2f}",
                    f"{totals.get(f'{kind} compiled', 0.0) / 1e9:.2f}",
                )
                for kind in kinds
            ],
        )
    lines += [
        f"p10 to p90 of an estimate holds {percent(inside)} of the rows when their own case does "
        "not calibrate the band.",
        "",
    ]
    if left_out:
        lines += ["Rows that were not predicted again, and why:", ""]
        reasons: dict[str, list[str]] = {}
        for text in left_out:
            name, _, reason = text.partition(": ")
            reasons.setdefault(reason, []).append(name)
        lines += [f"- {reason}: {', '.join(names)}" for reason, names in reasons.items()]
        lines += [""]
    return lines


def memory_section(path: pathlib.Path) -> list[str]:
    """Lines on the peak memory of planned steps of real models; nothing without their results."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["status"] == "ok"]
    if not rows:
        return []
    sizes = [(float(r["predicted_peak_bytes"]), float(r["peak_bytes"])) for r in rows]
    errors = [predicted / compiled - 1.0 for predicted, compiled in sizes]
    mean, bias = float(np.abs(errors).mean()), float(np.mean(errors))
    return [
        "## Peak memory of real models (`python benchmarks/memory.py`)",
        "",
        "Plans of published models, compiled by XLA:TPU up to its buffer assignment. No constant was "
        "set and no rule of the memory model read on them; DeepSeek-V2 showed that plans laid out "
        "some sums so that the partitioner gathers, which was mended. Predictions are those made when "
        f"they were compiled: mean error {percent(mean)}, bias {percent(bias)}.",
        "",
        *table(
            ("model", "cluster", "batch", "length", "remat", "mesh", "predicted GiB", "compiled GiB",
             "error"),
            [
                (
                    *(r[k] for k in ("model", "cluster", "batch", "seq", "remat", "mesh_shape")),
                    f"{predicted / 2**30:.2f}", f"{compiled / 2**30:.2f}", percent(error),
                )
                for r, (predicted, compiled), error in zip(rows, sizes, errors)
            ],
        ),
    ]  # fmt: skip


def _errors(row: dict[str, typing.Any]) -> tuple[str, ...]:
    names = ("mean_abs_step_error", "step_bias", "mean_abs_memory_error", "memory_bias")
    return (str(row["rows"]), *(percent(row[name]) for name in names))


def _ranking(row: dict[str, typing.Any]) -> tuple[str, str]:
    return _number(row["spearman"]), _share(row["regret"])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _share(value: float | None) -> str:
    return "" if value is None else percent(value)


def _named(names: list[str]) -> str:
    return f" ({', '.join(names)})" if names else ""
