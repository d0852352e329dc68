"""meshwright export (PLAN.json | --case ID) --to TARGET: a plan as another framework's flags.

The text goes to standard output or to --out; what the target cannot express is listed on standard
error, a line each.

examples:
  meshwright export out/plan.json --to maxtext
  meshwright export --case iron-dsv3-128 --to megatron --out job.sh
"""

from __future__ import annotations

import csv
import sys
from importlib.resources import files

from graphs.errors import MeshwrightError
from placement.experiments import _arguments, _request


def main(argv: list[str]) -> int:
    from placement import export

    parser = _arguments.parser("export", __doc__)
    parser.add_argument("plan", nargs="?", help="a plan file")
    parser.add_argument("--case", help="an expert's configuration by its case_id")
    parser.add_argument("--cases", help="a CSV file with the columns of hand_tuned_cases.csv")
    parser.add_argument("--to", required=True, help=", ".join(export.target_names()))
    parser.add_argument("--out", help="file to write; standard output without it")
    given = parser.parse_args(argv)
    target = export.target(given.to)
    if (given.plan is None) == (given.case is None):
        raise MeshwrightError("export takes a plan file or --case ID, and not both")
    if given.case is not None:
        layout, notes = _case(given.case, given.cases), ()
    else:
        layout, notes = _plan(given.plan)
    made = target.export(layout)
    if given.out:
        _arguments.write_text(given.out, made.text)
        print(f"wrote {given.out}")
    else:
        sys.stdout.write(made.text)
    for lost in made.lost:
        print(
            f"not expressed: {lost.field} {lost.wanted!r} reads as {lost.written!r} in "
            f"{target.name}: {lost.why}",
            file=sys.stderr,
        )
    for note in notes:
        print(f"not expressed: {note}", file=sys.stderr)
    return 0


def _plan(path: str):
    from placement.export.from_plan import layout_of_plan
    from placement.plan import Plan

    plan = Plan.load(path)
    train = _request.config_of(path, []).train
    return layout_of_plan(
        plan,
        grad_accum=train.microbatches,
        remat=train.remat,
        precision={"float16": "fp16"}.get(train.compute_dtype, "bf16"),
    )


def _case(case_id: str, path: str | None):
    from placement.export import layout_of_case

    if path is None:
        text = (files("cost_model") / "data" / "hand_tuned_cases.csv").read_text(encoding="utf-8")
    else:
        with open(path, encoding="utf-8", newline="") as source:
            text = source.read()
    rows = {row.get("case_id"): row for row in csv.DictReader(text.splitlines())}
    if case_id not in rows:
        raise MeshwrightError(
            f"no case {case_id!r} among {len(rows)}; take a case_id of the file's first column"
        )
    return layout_of_case(rows[case_id])
