"""Operator time model against the profiles that ship: error on shapes that a fit has not seen.

    python benchmarks/operators.py [DEVICE ...] [--out out/operators.json]

For each device the constants are fitted to three quarters of its profile (cost_model/calibration/
DEVICE.csv) and the other quarter, chosen by a hash of the shape, is predicted. ``aligned`` counts
the matrix multiplications whose sides are all multiples of 128.
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import pathlib

import numpy as np
from rich.console import Console
from rich.table import Table

from cost_model.calibration.fit import Profile, fit_rows, predict_cycles, read_profile
from cost_model.device import Device, load_device
from cost_model.fitted import parse_calibration

FOLDER = importlib.resources.files("cost_model") / "calibration"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("devices", nargs="*", default=None)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/operators.json"))
    arguments = parser.parse_args()
    names = arguments.devices or [
        n
        for n in ("v4", "v5e", "v5p", "v6e", "tpu7x", "h200", "cpu")
        if (FOLDER / f"{n}.csv").is_file()
    ]
    table = Table(title="|predicted / profile - 1| on held-out shapes")
    for head in ("device", "operator", "shapes", "median", "95 %"):
        table.add_column(head, justify="left" if head in ("device", "operator") else "right")
    results = {}
    for name in names:
        device = load_device(name)
        profile = read_profile((FOLDER / f"{name}.csv").read_text(), device.core_clock_hz)
        errors = held_out_errors(device, profile)
        results[name] = {
            "versions": profile.versions,
            "rows": len(profile.rows),
            "failed": profile.failed,
            "without_estimate": profile.unknown,
            "errors": {
                kind: {
                    "shapes": len(e),
                    "median": float(np.median(e)),
                    "p95": float(np.percentile(e, 95)),
                }
                for kind, e in errors.items()
            },
        }
        for kind, e in results[name]["errors"].items():
            cells = (f"{e['shapes']}", f"{e['median']:.1%}", f"{e['p95']:.1%}")
            table.add_row(name, kind, *cells)
        table.add_section()
    Console().print(table)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {arguments.out}")
    return 0


def held_out_errors(device: Device, profile: Profile) -> dict[str, list[float]]:
    """Relative errors by kind of operator, ``aligned`` and ``all``."""
    seen = [r for r in profile.rows if not r.held_out]
    fit = parse_calibration(fit_rows(device, seen, profile.versions))
    found: dict[str, list[float]] = {}
    for row in profile.rows:
        if not row.held_out:
            continue
        error = abs(predict_cycles(device, fit, row.case) / row.cycles - 1)
        found.setdefault(row.case.kind, []).append(error)
        sides = [v for k, v in row.case.dims if k in "mkn"]
        if row.case.kind == "matmul" and all(v % 128 == 0 for v in sides):
            found.setdefault("aligned", []).append(error)
        found.setdefault("all", []).append(error)
    return dict(sorted(found.items(), key=lambda kv: kv[0] == "all"))


if __name__ == "__main__":
    raise SystemExit(main())
