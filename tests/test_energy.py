"""Energy, carbon and money against published figures, and their accounting."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

from cost_model import energy, energy_runs
from cost_model.device import load_device
from graphs.errors import MeshwrightError

CLEAN = energy.Region(name="clean", grid_gco2_per_kwh=30.0, pue=1.1, source="test")
DIRTY = energy.Region(name="dirty", grid_gco2_per_kwh=600.0, pue=1.1, source="test")


def _step(**change):
    given = {
        "n_devices": 8,
        "step_time_s": 2.0,
        "compute_time_s": 1.5,
        "network_time_s": 0.3,
        "region": CLEAN,
    }
    return energy.step_energy(load_device("h100"), **{**given, **change})


def test_published_energies_are_met():
    rows = energy_runs.read()
    errors = [abs(row.error) for row in rows if row.error is not None]
    assert len(errors) >= 10
    assert np.mean(errors) <= 0.10


def test_rows_without_a_prediction_say_why():
    for row in energy_runs.read():
        assert (row.predicted_mwh is None) == bool(row.reason), row.id


def test_power_lies_between_idle_and_maximum():
    for share in np.linspace(0, 1, 5):
        power = energy.device_power_w(700.0, float(share), float(1 - share))
        assert 0.1 * 700 <= power <= 700


def test_more_work_takes_more_energy_and_devices_add():
    assert _step(compute_time_s=1.9).energy_j > _step().energy_j
    assert _step(n_devices=16).energy_j == pytest.approx(2 * _step().energy_j)


def test_carbon_follows_the_grid_and_money_the_price():
    clean, dirty = _step(), _step(region=DIRTY)
    assert dirty.energy_j == clean.energy_j
    assert dirty.carbon_g == pytest.approx(20 * clean.carbon_g)
    cheap = _step(price=energy.Price(name="p", usd_per_device_hour=1.0, source="test"))
    assert cheap.cost_usd == pytest.approx(8 * 2.0 / 3600)


def test_unpublished_power_is_an_error_that_says_what_to_do():
    with pytest.raises(MeshwrightError, match="not published"):
        energy.max_power_w("v5p")


def test_regions_without_a_source_are_refused():
    with pytest.raises(MeshwrightError):
        energy.Region(name="x", grid_gco2_per_kwh=1.0, pue=1.1, source="")


@pytest.mark.parametrize("group", ["region", "price"])
def test_every_configuration_is_built(group):
    import yaml

    files = sorted((pathlib.Path(__file__).parent.parent / "configs" / group).glob("*.yaml"))
    assert files
    for path in files:
        data = yaml.safe_load(path.read_text())
        kind = getattr(energy, data.pop("_target_").rsplit(".", 1)[1])
        built = kind(**data)
        assert built.name == path.stem and built.source
