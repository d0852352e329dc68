"""What a whole-job estimate needs of a device, as columns.

All numbers are of one JAX device (half a chip on tpu7x, whose two chiplets JAX shows as two
devices) and come from ``cost_model/devices/*.yaml``, which name the source of each.
"""

from __future__ import annotations

import dataclasses
import functools
import typing

import numpy as np

from cost_model.device import device_names, load_device
from graphs.errors import MeshwrightError

FAMILIES = ("volta", "ampere", "hopper", "blackwell", "tpu")

# Names that tables of runs use, and the device file they mean.
_ALIASES = {
    "tpu_v4": "v4_megacore",
    "v4": "v4_megacore",  # two cores, one JAX device: how published v4 training runs use it
    "tpu_v5e": "v5e",
    "tpu_v5p": "v5p",
    "tpu_v6e": "v6e",
    "tpu7x_ironwood": "tpu7x",
    "a100_80g_sxm": "a100",
    "a100_80g": "a100",
    "a100_40g_sxm": "a100_40g",
    "h100_sxm": "h100",
    "h200_sxm": "h200",
    "h800": "h100",
    "b200_sxm": "b200",
    "b300_sxm": "b300",
    "gb200_nvl72": "gb200",
    "gb300_nvl72": "gb300",
    "v100_32g": "v100",
    "blackwell_184gib": "gb200",
    "h100_96g_hbm2e_500w": "h100",
}

# A device sold in another variant: what differs from its file (torchtitan's benchmark notes: H100
# with 96 GB HBM2e at 2.4 TB/s behind a 500 W power limit).
_VARIANTS = {
    "h100_96g_hbm2e_500w": {
        "hbm_bytes": 94.5 * 2**30,
        "hbm_bytes_per_s": 2.4e12,
        # power above the idle 150 W of the part, capped against full
        "power_share": (500 - 150) / (700 - 150),
    },
}

_FAMILY = {"a100": "ampere", "h100": "hopper", "h200": "hopper", "v100": "volta"}
# Multiprocessors that share a matmul's output tiles (XLA's target files).
_SM_COUNT = {"volta": 80.0, "ampere": 108.0, "hopper": 132.0, "blackwell": 148.0, "tpu": 1.0}
# A power-bound part runs its matmuls at clocks that follow the 0.6th power of what it may draw
# above idle (P ~ f V^2 with V rising less than f near the efficient point).
_CLOCK_PER_POWER = 0.6
# GB300 is GB200 with 1400 W in place of 1200 W (ml-engineering's power table), 200 W of it idle.
_GB300_POWER = (1400 - 200) / (1200 - 200)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceColumns:
    """Arrays [J] unless said otherwise, one entry per job."""

    family: np.ndarray
    """[J] int index into FAMILIES."""
    peak_flops_per_s: np.ndarray
    """dense bf16, as published."""
    matmul_flops_per_s: np.ndarray
    """the best measured bf16 matmul where published, else the peak."""
    low_precision_gain: np.ndarray
    """fp8 best matmul over the bf16 one; 1 where there is no gain."""
    integer_gain: np.ndarray
    """int8 matmul peak over the bf16 one; 1 where there is no gain."""
    hbm_bytes: np.ndarray
    hbm_bytes_per_s: np.ndarray
    link_bytes_per_s: np.ndarray
    """fast-network bytes a device sustains in a second over all its links, one way."""
    links: np.ndarray
    """torus neighbours on TPUs; 0 on a switched network."""
    domain: np.ndarray
    """devices that share the fast network."""
    network_bytes_per_s: np.ndarray
    """slow-network bytes a device sustains in a second, one way."""
    host_bytes_per_s: np.ndarray
    """to and from host memory, one way."""
    sm_count: np.ndarray
    array_width: np.ndarray
    """systolic array width on TPUs, 0 on GPUs."""
    devices_per_chip: np.ndarray
    max_power_w: np.ndarray
    """NaN where nobody has published it."""

    def take(self, index: np.ndarray | slice) -> DeviceColumns:
        return DeviceColumns(
            **{f.name: getattr(self, f.name)[index] for f in dataclasses.fields(self)}
        )

    def replace(self, **columns: np.ndarray) -> DeviceColumns:
        return dataclasses.replace(self, **columns)


def known_devices() -> tuple[str, ...]:
    """Every name that `device_columns` takes."""
    return tuple(sorted({*_ALIASES, *(name for name in device_names() if name != "cpu")}))


def canonical(name: str) -> str:
    """The device file of a name; an unknown one is an error that lists what exists."""
    base = _ALIASES.get(name, name)
    if base not in device_names() or base == "cpu":
        raise MeshwrightError(
            f"hardware {name!r} is not known; use one of {', '.join(known_devices())}"
        )
    return base


def device_columns(names: typing.Sequence[str]) -> DeviceColumns:
    """The devices of J jobs, by name."""
    records = {name: _record(name) for name in set(names)}
    fields = [f.name for f in dataclasses.fields(DeviceColumns)]
    arrays = {
        field: np.array(
            [records[name][field] for name in names], int if field == "family" else float
        )
        for field in fields
    }
    return DeviceColumns(**arrays)


@functools.cache
def _record(name: str) -> dict[str, float]:
    device = load_device(canonical(name))
    change = _VARIANTS.get(name, {})
    tpu = device.family == "tpu"
    family = "tpu" if tpu else _FAMILY.get(device.name.split("_")[0], "blackwell")
    peak = device.peak_flops_per_s["bfloat16"]
    best = device.achievable_flops_per_s.get("bfloat16")
    best8 = device.achievable_flops_per_s.get("float8")
    if best is None:
        # a part without a measurement: the share of its peak that its nearest relative reaches
        near = load_device("gb200") if family == "blackwell" else device
        best = peak * near.achievable_flops_per_s.get("bfloat16", near.peak_flops_per_s["bfloat16"])
        best /= near.peak_flops_per_s["bfloat16"]
        best8 = near.achievable_flops_per_s.get("float8")
        if device.name == "gb300" and best8:
            best, best8 = (x * _GB300_POWER**_CLOCK_PER_POWER for x in (best, best8))
    if best8 is None:
        best8 = best * device.peak_flops_per_s.get("float8", peak) / peak
    slow = change.get("power_share", 1.0) ** _CLOCK_PER_POWER
    links = 2.0 * device.torus_dims if tpu else float(device.links_per_device)
    slow_network = (
        device.inter_slice_bandwidth_bytes_per_s * device.inter_slice_efficiency
        or device.inter_node_bandwidth_bytes_per_s * device.inter_node_efficiency
    )
    return {
        "family": FAMILIES.index(family),
        "peak_flops_per_s": peak,
        "matmul_flops_per_s": best * slow,
        "low_precision_gain": max(best8 / best, 1.0),
        "integer_gain": max(device.peak_flops_per_s.get("int8", peak) / peak, 1.0),
        "hbm_bytes": change.get("hbm_bytes", device.hbm_capacity_bytes),
        "hbm_bytes_per_s": change.get("hbm_bytes_per_s", device.hbm_bandwidth_bytes_per_s),
        "link_bytes_per_s": device.link_bandwidth_bytes_per_s * links * device.link_efficiency,
        "links": links if tpu else 0.0,
        "domain": float(device.max_chips * device.jax_devices_per_chip)
        if tpu
        else float(device.domain_size),
        "network_bytes_per_s": slow_network,
        "host_bytes_per_s": device.host_bandwidth_bytes_per_s,
        "sm_count": _SM_COUNT[family],
        "array_width": float(device.matrix_tile) if tpu else 0.0,
        "devices_per_chip": float(device.jax_devices_per_chip),
        "max_power_w": float("nan") if device.max_power_w is None else device.max_power_w,
    }
