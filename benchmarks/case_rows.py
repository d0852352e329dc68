"""One row for each case of a benchmark, written as soon as it is known: a stopped run goes on."""

from __future__ import annotations

import argparse
import csv
import io
import json
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

Case = Mapping[str, Any]
"""model, cluster, batch and seq of a zoo model's step; further keys are options of the step."""


def planned(case: Case) -> tuple[Any, Any, tuple[Any, ...], float]:
    """(plan, step, its abstract arguments, seconds of planning) of a case."""
    import placement
    from graphs.zoo import build_train_step, load_model_config

    options = {k: v for k, v in case.items() if k not in ("model", "cluster", "batch", "seq")}
    step, args, donated = build_train_step(
        load_model_config(case["model"]), global_batch=case["batch"], seq_len=case["seq"], **options
    )
    began = time.monotonic()
    plan = placement.optimize(
        step, *args, cluster=case["cluster"], donate_argnums=donated, throw=False
    )
    return plan, step, args, time.monotonic() - began


def rows_of(
    argv: list[str],
    *,
    doc: str,
    cases: Mapping[str, Case],
    out: str,
    run: Callable[[str, Case], dict[str, Any]],
    line: Callable[[dict[str, Any]], str],
) -> list[dict[str, Any]]:
    """Make the rows that are missing, print the line of each and write ``results.csv``.

    ``argv`` are names of cases (all by default), ``--out FOLDER`` and ``--redo``. What comes back
    are the rows of all cases that have one. A case that fails is said and left out.
    """
    from graphs.errors import MeshwrightError
    from placement.compile_cache import write_atomically

    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(cases)}; all by default")
    parser.add_argument("--out", default=out)
    parser.add_argument("--redo", action="store_true", help="make rows again")
    options = parser.parse_args(argv)
    folder = pathlib.Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in cases:
        place = folder / f"{name}.json"
        asked = name in (options.cases or cases)
        if asked and (options.redo or not place.exists()):
            try:
                row = run(name, cases[name])
            except MeshwrightError as error:
                print(f"{name}: {error}", flush=True)
                continue
            write_atomically(place, json.dumps(row, indent=1).encode())
        if place.exists():
            rows.append(json.loads(place.read_text()))
            print(line(rows[-1]), flush=True)
    write_atomically(folder / "results.csv", _table(rows).encode())
    return rows


def _table(rows: list[dict[str, Any]]) -> str:
    """All rows as CSV."""
    fields = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=fields, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
