"""meshwright report PLAN.json [--out REPORT.html]: draw a plan as one self-contained HTML page.

example:
  meshwright report out/plan.json --out out/report.html
"""

from __future__ import annotations

import pathlib

from placement.experiments import _arguments, _request


def main(argv: list[str]) -> int:
    parser = _arguments.parser("report", __doc__)
    parser.add_argument("plan", help="a plan file")
    parser.add_argument("--out", help="file to write; the plan's name with .html without it")
    given = parser.parse_args(argv)

    import placement
    from placement.report import write_report

    out = given.out or str(pathlib.Path(given.plan).with_suffix(".html"))
    plan = placement.Plan.load(given.plan)
    write_report(plan, out, title=_request.title_of(given.plan))
    print(f"wrote {out}: open it in a browser")
    return 0
