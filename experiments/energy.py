"""meshwright energy [ENERGY.csv] [out=DIR]: published energy figures against the energy model.

Writes energy.csv (id, predicted and published MWh and tCO2e, reason) and summary.json to the folder
(default out/energy).
"""

from __future__ import annotations

import csv
import io
import json
import os

from placement.experiments import _arguments, _hydra


def main(argv: list[str]) -> int:
    if _hydra.wants_help(argv):
        print((__doc__ or "").strip())
        return 0
    from cost_model import energy_runs

    out = next((a[4:] for a in argv if a.startswith("out=")), "out/energy")
    paths = [a for a in argv if not a.startswith("out=")]
    rows = energy_runs.read(paths[0] if paths else energy_runs.FILE)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = "id predicted_mwh published_mwh predicted_tco2e published_tco2e reason".split()
    writer.writerow(names)
    for row in rows:
        values = (getattr(row, name) for name in names)
        writer.writerow(
            ["" if v is None else f"{v:.5g}" if isinstance(v, float) else v for v in values]
        )
    _arguments.write_text(os.path.join(out, "energy.csv"), text.getvalue())
    found = {row.id: row.error for row in rows if row.error is not None}
    mean = sum(abs(e) for e in found.values()) / len(found) if found else None
    summary = {
        "rows": len(rows),
        "rows_compared": len(found),
        "mean_abs_error": mean,
        "errors": found,
    }
    _arguments.write_text(os.path.join(out, "summary.json"), json.dumps(summary, indent=1) + "\n")
    for name, error in found.items():
        print(f"{name:44s} {100 * error:+6.1f} %")
    if mean is not None:
        print(
            f"mean error {100 * mean:.1f} % over {len(found)} published energies; written to {out}"
        )
    return 0
