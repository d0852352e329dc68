"""Published energy figures against the energy model: ``cost_model/data/energy.csv``.

A training row gives device-hours and what they used. The prediction takes the hours, the device
and the PUE from the row and the power from the activity of a training job; where a source states
that it leaves host and network out, so does the prediction. A power cap that the row states
replaces the device's maximum.
"""

from __future__ import annotations

import csv
import dataclasses
import pathlib
import re

from cost_model import energy
from cost_model.jobs.hardware import canonical
from graphs.errors import MeshwrightError

FILE = pathlib.Path(__file__).parent / "data" / "energy.csv"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnergyRow:
    """One published figure beside its prediction."""

    id: str
    published_mwh: float | None
    predicted_mwh: float | None
    published_tco2e: float | None
    predicted_tco2e: float | None
    reason: str
    """why there is no prediction."""

    @property
    def error(self) -> float | None:
        if self.predicted_mwh is None or not self.published_mwh:
            return None
        return self.predicted_mwh / self.published_mwh - 1


def read(path: str | pathlib.Path = FILE) -> list[EnergyRow]:
    """A prediction, or the reason for none, for every row."""
    try:
        with pathlib.Path(path).open(newline="", encoding="utf-8-sig") as file:
            return [_row(raw) for raw in csv.DictReader(file)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise MeshwrightError(f"cannot read energy file {str(path)!r}; give a CSV file") from error


def _row(raw: dict[str, str]) -> EnergyRow:
    def number(name: str) -> float | None:
        try:
            return float(raw.get(name) or "")
        except ValueError:
            return None

    it, total = number("it_energy_mwh"), number("total_energy_mwh")
    hours, grid = number("device_hours"), number("grid_gco2_per_kwh")
    published = total if total is not None else it
    power, reason = None, ""
    if raw.get("kind") != "training":
        reason = f"a row of kind {raw.get('kind')!r}, not a training run"
    elif hours is None:
        reason = "device_hours are not stated by the source"
    else:
        try:
            power = _power_w(raw.get("hardware") or "")
        except MeshwrightError as error:
            reason = str(error)
    predicted = carbon = None
    if power is not None and hours is not None:
        basis = raw.get("power_basis") or ""
        cap = re.search(r"(\d+) W cap", basis)
        if cap:
            power = min(power, float(cap[1]))
        mean = energy.device_power_w(power, *_training_shares())
        host = 0.0 if "no interconnect/host" in basis else energy.activity("host_share")
        pue = (number("pue") or 1.0) if total is not None else 1.0
        predicted = mean * (1 + host) * hours * pue / 1e6
        carbon = predicted * grid / 1e3 if grid is not None else None
    return EnergyRow(
        id=raw.get("id") or "",
        published_mwh=published,
        predicted_mwh=predicted,
        published_tco2e=number("emissions_tco2e"),
        predicted_tco2e=carbon,
        reason=reason,
    )


def _training_shares() -> tuple[float, float]:
    compute = energy.activity("training_compute")
    return compute, 1 - compute


def _power_w(hardware: str) -> float:
    if hardware == "tpu_v3":
        return energy.max_power_w("tpu_v3")
    return energy.max_power_w(canonical(hardware))
