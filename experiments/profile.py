"""meshwright profile device=NAME: what every operator costs on one device, and the fit to it.

For a TPU each operator is compiled by XLA's TPU compiler, here, with no TPU, and the compiler's
cycles are read; for ``cpu`` and on a machine with a GPU the operator runs and is timed. Finished
measurements are kept: a run that was stopped continues where it was.

examples:
  meshwright profile device=v5e
  meshwright profile device=cpu kinds=[matmul] scale=0.2
  meshwright profile device=v5e measure=false out=cost_model/calibration
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import pathlib
from collections import Counter
from typing import Any

from graphs.errors import MeshwrightError
from placement.experiments import _hydra
from placement.experiments._arguments import write_text


def main(argv: list[str]) -> int:
    if _hydra.wants_help(argv):
        print(_hydra.help_text(__doc__, "profile"))
        return 0
    config = _hydra.compose("profile", argv)
    device = _hydra.instantiate(config.device)
    items = _cases(config, device)
    store = _Store(config.cache, device.name)
    if config.measure:
        _measure(config, device, items, store)
    records = list(store.records.values())
    if not records:
        raise MeshwrightError(f"nothing of {device.name} is measured yet; leave measure=true")
    failed = [r for r in records if "error" in r]
    folder = pathlib.Path(str(config.out))
    write_text(str(folder / f"{device.name}.csv"), _table(records, device))
    print(
        f"{len(records) - len(failed)} measured, {len(failed)} failed: {folder}/{device.name}.csv"
    )
    for reason, count in Counter(r["error"][:100] for r in failed).most_common(5):
        print(f"  {count} x {reason}")
    if config.fit:
        _fit(folder, device)
    return 0 if len(failed) < len(records) else 1


def _cases(config: Any, device: Any) -> list[Any]:
    from cost_model.calibration.programs import PROGRAMS
    from cost_model.calibration.shapes import cases

    kinds = _hydra.plain(config.kinds)
    unknown = sorted(set(kinds or ()) - set(PROGRAMS))
    if unknown:
        raise MeshwrightError(f"no operator {unknown[0]!r}; kinds are {', '.join(PROGRAMS)}")
    largest = 1e9 if device.family == "cpu" else None
    items = {
        item.name: item
        for draw in range(int(config.draws))
        for item in cases(int(config.seed) + draw, float(config.scale), largest)
        if not kinds or item.kind in kinds
    }
    return list(items.values())


class _Store:
    """Finished measurements of one device, one JSON line each, for these library versions."""

    def __init__(self, folder: str | None, device: str) -> None:
        from cost_model.calibration.measure import cache_dir, versions

        tag = hashlib.sha256(json.dumps(versions(), sort_keys=True).encode()).hexdigest()[:12]
        root = pathlib.Path(folder or cache_dir() / "profile")
        root.mkdir(parents=True, exist_ok=True)
        self.path = root / f"{device}-{tag}.jsonl"
        self.records: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the last line of a run that was killed while writing
                self.records[record["name"]] = record

    def add(self, record: dict[str, Any]) -> None:
        self.records[record["name"]] = record
        line = json.dumps(record) + "\n"
        handle = os.open(self.path, os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o644)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)


def _measure(config: Any, device: Any, items: list[Any], store: _Store) -> None:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from cost_model.calibration.measure import compile_cases, time_cases

    left = [c for c in items if c.name not in store.records]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        bar = progress.add_task(
            f"profiling {device.name}", total=len(items), completed=len(items) - len(left)
        )

        def on_record(record: dict[str, Any]) -> None:
            store.add(record)
            progress.advance(bar)

        chunk = max(1, int(config.chunk))
        for start in range(0, len(left), chunk):
            part = left[start : start + chunk]
            if device.family == "tpu":
                compile_cases(device, part, timeout_s=float(config.timeout_s), on_record=on_record)
            else:
                time_cases(device, part, on_record=on_record)


def _table(records: list[dict[str, Any]], device: Any) -> str:
    """CSV of every measurement in the store, versions in its first line."""
    from cost_model.calibration.measure import versions
    from cost_model.calibration.programs import parse_case

    text = io.StringIO()
    said = " ".join(f"{k}={v}" for k, v in versions().items())
    text.write(f"# {device.name} {said}\n")
    out = csv.writer(text, lineterminator="\n")
    numbers = ("cycles", "seconds", "kernels", "unknown_kernels", "copy_bytes", "error")
    out.writerow(("kind", "variant", "dtype", "dims", *numbers))
    for record in records:
        item = parse_case(record["name"])
        dims = " ".join(f"{k}={v}" for k, v in item.dims)
        values = [record.get(key, "") for key in numbers]
        out.writerow((item.kind, item.variant, item.dtype, dims, *values))
    return text.getvalue()


def _fit(folder: pathlib.Path, device: Any) -> None:
    from cost_model.calibration.fit import fit_profile, read_profile

    text = (folder / f"{device.name}.csv").read_text()
    fitted, errors = fit_profile(device, read_profile(text, device.core_clock_hz))
    write_text(str(folder / f"{device.name}.json"), json.dumps(fitted, indent=1) + "\n")
    print("error on shapes that the fit did not see: median, 95th percentile")
    for kind, (n, median, high) in errors.items():
        print(f"  {kind:12} {n:4} shapes  {median:6.1%}  {high:6.1%}")
