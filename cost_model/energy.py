"""Energy, carbon and money of a training step, from what each device does.

    device_w = max_w * (i + (1 - i) * (c * f_compute + n * f_network))
    energy_j = devices * device_w * (1 + host) * seconds * PUE
    carbon_g = energy_kwh * grid_g_per_kwh ,   cost_usd = devices * hours * price

i the idle share of the maximum power, c and n what computing and communicating draw of the rest, f
the shares of a step in which a device computes or only communicates; host what surrounds a device.
Every number and its source: the device files and `power.yaml`. PUE (power usage effectiveness) is
the data centre's total over its equipment (arXiv:2104.10350).
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import typing

import yaml

from cost_model.device import Device, load_device
from graphs.errors import MeshwrightError

_FILE = pathlib.Path(__file__).with_name("power.yaml")
_J_PER_KWH = 3.6e6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Region:
    """Where a job runs."""

    name: str
    grid_gco2_per_kwh: float
    pue: float
    """data centre's total power over its equipment's, >= 1."""
    source: str

    def __post_init__(self) -> None:
        if self.grid_gco2_per_kwh < 0 or self.pue < 1 or not self.source:
            raise MeshwrightError(
                f"region {self.name!r} has grid {self.grid_gco2_per_kwh} and PUE {self.pue}; "
                "give a grid of at least 0, a PUE of at least 1, and a source"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Price:
    """What a device costs."""

    name: str
    usd_per_device_hour: float
    source: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Energy:
    """What one step, or one run, uses."""

    energy_j: float
    """with the cooling and supply of the data centre."""
    carbon_g: float
    cost_usd: float | None
    """None where the device has no published price."""


@functools.lru_cache(maxsize=1)
def _table() -> dict[str, typing.Any]:
    return yaml.safe_load(_FILE.read_text())


def activity(name: str) -> float:
    """One constant of `power.yaml`."""
    return float(_table()["activity"][name]["value"])


def max_power_w(name: str) -> float:
    """The most a device draws; raises MeshwrightError where nobody has published it."""
    known = _table()["devices"]
    if name in known:
        return float(known[name]["max_power_w"])
    power = load_device(name).max_power_w
    if power is None:
        raise MeshwrightError(
            f"the power of device {name!r} is not published; "
            "use a device with max_power_w in its file, or objective=time"
        )
    return power


def device_power_w(max_w: float, compute_share: float, network_share: float = 0.0) -> float:
    """Mean power of a device that computes and only communicates for these shares of the time."""
    idle = activity("idle_share")
    busy = activity("compute_share") * compute_share + activity("network_share") * network_share
    return max_w * (idle + (1 - idle) * busy)


def devices_energy_j(
    device: Device, *, n_devices: int, step_time_s: float, compute_time_s: float
) -> float | None:
    """Joules that the devices alone draw in a step: busy while they compute, waiting otherwise.

    None where nobody has published the device's power.
    """
    try:
        max_w = max_power_w(device.name)
    except MeshwrightError:
        return None
    share = min(compute_time_s / step_time_s, 1.0) if step_time_s > 0 else 0.0
    return n_devices * step_time_s * device_power_w(max_w, share, 1.0 - share)


def step_energy(
    device: Device,
    *,
    n_devices: int,
    step_time_s: float,
    compute_time_s: float,
    network_time_s: float,
    region: Region,
    price: Price | None = None,
) -> Energy:
    """Energy, carbon and money of a step in which every device computes for `compute_time_s` and
    waits on the network for `network_time_s`."""
    power = device_power_w(
        max_power_w(device.name),
        min(compute_time_s / step_time_s, 1.0),
        min(network_time_s / step_time_s, 1.0),
    )
    return account(power, n_devices * step_time_s, region, price or _list_price(device))


def account(device_w: float, device_seconds: float, region: Region, price: Price | None) -> Energy:
    """Energy, carbon and money of devices that draw `device_w` each."""
    energy = device_w * (1 + activity("host_share")) * device_seconds * region.pue
    return Energy(
        energy_j=energy,
        carbon_g=energy / _J_PER_KWH * region.grid_gco2_per_kwh,
        cost_usd=price.usd_per_device_hour * device_seconds / 3600 if price else None,
    )


def _list_price(device: Device) -> Price | None:
    if device.price_usd_per_h is None:
        return None
    return Price(
        name=device.name,
        usd_per_device_hour=device.price_usd_per_h,
        source=device.sources.get("price_usd_per_h", ""),
    )
