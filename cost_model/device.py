"""Accelerators, every number with its source.

One YAML file per device in ``cost_model/devices``. A number is written
``key: {value: ..., source: "..."}``; a number without a source does not load. The files give
numbers *per chip*, as vendors publish them. A ``Device`` gives them *per JAX device*, because
plans are over JAX devices: where a chip is listed as several JAX devices
(``jax_devices_per_chip``), rates, capacities, powers and prices are divided by that count.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
from typing import Any

import yaml

from graphs.errors import MeshwrightError

_DTYPE_RATE = {
    "bfloat16": "bfloat16",
    "float16": "bfloat16",
    "float32": "float32",
    "int8": "int8",
    "uint8": "int8",
    "float8_e4m3fn": "float8",
    "float8_e5m2": "float8",
    "float8": "float8",
}
"""Which published rate a JAX dtype runs at; the rest run at the float32 rate."""

_PER_CHIP = (
    "vector_flops_per_s",
    "hbm_capacity_bytes",
    "hbm_available_bytes",
    "hbm_bandwidth_bytes_per_s",
    "cache_bytes",
    "cache_bandwidth_bytes_per_s",
    "link_bandwidth_bytes_per_s",
    "inter_slice_bandwidth_bytes_per_s",
    "host_bandwidth_bytes_per_s",
    "idle_power_w",
    "mean_power_w",
    "max_power_w",
    "price_usd_per_h",
)
"""Keys that the loader divides by ``jax_devices_per_chip``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """One JAX device of an accelerator; all rates and capacities are this device's share."""

    name: str
    family: str
    """``tpu``, ``gpu`` or ``cpu``."""
    compile_topology: str
    """name under which the compiler knows the part (``v4`` for ``v4_megacore``)."""
    calibration: str
    """device whose fitted operator constants apply: its own, or one with the same core."""
    jax_devices_per_chip: int
    """JAX devices listed for one chip, >= 1."""
    peak_flops_per_s: dict[str, float]
    """dense matrix peak by number type: bfloat16, float32, int8, float8 (absent if not native)."""
    achievable_flops_per_s: dict[str, float]
    """best measured matrix rate by number type; empty where not published."""
    vector_flops_per_s: float
    """element-wise peak, float32."""
    hbm_capacity_bytes: float
    hbm_available_bytes: float
    """what the compiler lets one program use; the capacity where it is not known to be less."""
    hbm_bandwidth_bytes_per_s: float
    cache_bytes: float
    """of the last cache before device memory that programs do not address; 0: none is modelled."""
    cache_bandwidth_bytes_per_s: float
    """of fused loops whose arrays lie in that cache."""
    core_clock_hz: float
    matrix_tile: int
    """edge of the matrix unit (or of the usual output tile): shapes round up to it."""
    multiprocessors: int
    """of a GPU, which work on one tile of a result each; 0 where it is not known, and for others."""
    link_bandwidth_bytes_per_s: float
    """one link, one direction, vendor's figure."""
    links_per_device: int
    """NVLink links of a GPU; 1 elsewhere (a torus has its links per axis)."""
    link_efficiency: float
    """sustained share of ``link_bandwidth_bytes_per_s``, in (0, 1]."""
    link_latency_s: float
    """one hop."""
    torus_dims: int
    """2 or 3 for TPUs, 0 otherwise."""
    wrap_rule: str
    """``full_16`` (a dimension of 16 wraps), ``multiple_of_4``, or ``none``."""
    max_chips: int
    """chips in the largest slice; 0 where there is no limit."""
    domain_size: int
    """GPUs in one NVLink domain; 0 for others."""
    in_network_reduction: float
    """how much faster an NVLink all-reduce is than a ring; 1 without reduction in the switch."""
    core_bandwidth_bytes_per_s: float
    """between JAX devices of one chip, one direction; 0 where a chip is one device."""
    inter_node_bandwidth_bytes_per_s: float
    """network between NVLink domains, per device, one direction; 0 for others."""
    inter_node_efficiency: float
    inter_node_latency_s: float
    inter_slice_bandwidth_bytes_per_s: float
    """data-centre network between TPU slices, per device, one direction; 0 for others."""
    inter_slice_efficiency: float
    inter_slice_latency_s: float
    host_bandwidth_bytes_per_s: float
    """between device and host memory, one direction."""
    launch_latency_s: float
    """start of one kernel."""
    collective_latency_s: float
    """start of one collective, before any hop."""
    overlapped_gathers: int
    """1 where the compiler runs all-gathers of weights beside kernels, 0 where kernels wait."""
    cores: int
    """CPU cores that all devices share; 0 for accelerators."""
    idle_power_w: float | None
    mean_power_w: float | None
    max_power_w: float | None
    price_usd_per_h: float | None
    sources: dict[str, str] = dataclasses.field(repr=False)
    """source of every number, by key (``peak_flops_per_s.bfloat16`` for nested ones)."""

    def __post_init__(self) -> None:
        self.validate()

    def __hash__(self) -> int:
        return hash(self.name)

    def validate(self) -> None:
        if self.family not in ("tpu", "gpu", "cpu"):
            raise MeshwrightError(
                f"device {self.name!r} has family {self.family!r}; use tpu, gpu or cpu"
            )
        for key in ("hbm_capacity_bytes", "hbm_bandwidth_bytes_per_s", "core_clock_hz"):
            if not getattr(self, key) > 0:
                raise MeshwrightError(
                    f"device {self.name!r} has {key} {getattr(self, key)}; give a positive number"
                )
        if "bfloat16" not in self.peak_flops_per_s:
            raise MeshwrightError(
                f"device {self.name!r} has no peak_flops_per_s.bfloat16; give it with its source"
            )

    def peak(self, dtype: str) -> float:
        """flops/s of a matrix multiplication in this JAX dtype.

        A type without a native rate runs at the bfloat16 rate (float8 and int8 are upcast) and
        float64 or int32 at the float32 rate.
        """
        rate = _DTYPE_RATE.get(dtype, "float32")
        return self.peak_flops_per_s.get(rate, self.peak_flops_per_s["bfloat16"])


def device_names() -> tuple[str, ...]:
    """Names of all devices that have a file, sorted."""
    folder = importlib.resources.files("cost_model") / "devices"
    return tuple(
        sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))
    )


@functools.cache
def load_device(name: str) -> Device:
    """The device of this name. Raises MeshwrightError if unknown or if a number lacks a source."""
    if name not in device_names():
        raise MeshwrightError(f"unknown device {name!r}; use one of {', '.join(device_names())}")
    path = importlib.resources.files("cost_model") / "devices" / f"{name}.yaml"
    return parse_device(path.read_text(encoding="utf-8"), name)


def parse_device(text: str, where: str) -> Device:
    """A Device from YAML text; ``where`` names it in errors."""
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise MeshwrightError(
            f"device file {where!r} is not valid YAML ({str(error).splitlines()[0]}); mend it"
        ) from error
    if not isinstance(raw, dict):
        raise MeshwrightError(
            f"device file {where!r} holds no keys; write name, family and numbers"
        )
    sources: dict[str, str] = {}
    values: dict[str, Any] = {}
    words = {f.name for f in dataclasses.fields(Device) if f.type == "str"}
    for key, entry in raw.items():
        if key in ("peak_flops_per_s", "achievable_flops_per_s"):
            if not isinstance(entry, dict):
                raise MeshwrightError(f"device file {where!r}: {key} needs one number per type")
            values[key] = {k: _number(where, f"{key}.{k}", v, sources) for k, v in entry.items()}
        elif key in words:
            if not isinstance(entry, str):
                raise MeshwrightError(f"device file {where!r}: {key} is {entry!r}; give a word")
            values[key] = entry
        else:
            values[key] = _number(where, key, entry, sources)
    return _build(where, values, sources)


def _number(where: str, key: str, entry: Any, sources: dict[str, str]) -> float:
    if not isinstance(entry, dict) or not str(entry.get("source") or "").strip():
        raise MeshwrightError(
            f"device file {where!r}: {key} has no source; write {key}: {{value: ..., source: ...}}"
        )
    try:
        value = float(entry["value"])
    except (KeyError, TypeError, ValueError):
        raise MeshwrightError(
            f"device file {where!r}: {key} has value {entry.get('value')!r}; give a number"
        ) from None
    if not 0 <= value < float("inf"):
        raise MeshwrightError(
            f"device file {where!r}: {key} is {value}; give a finite number of at least 0"
        )
    sources[key] = str(entry["source"])
    return value


def _build(where: str, values: dict[str, Any], sources: dict[str, str]) -> Device:
    values = dict(values)
    per_chip = int(values.get("jax_devices_per_chip", 1))
    if per_chip < 1:
        raise MeshwrightError(f"device file {where!r}: jax_devices_per_chip must be at least 1")
    for key in _PER_CHIP:
        if key in values:
            values[key] = values[key] / per_chip
    for key in ("peak_flops_per_s", "achievable_flops_per_s"):
        values[key] = {k: v / per_chip for k, v in values.get(key, {}).items()}
    optional = ("idle_power_w", "mean_power_w", "max_power_w", "price_usd_per_h")
    defaults: dict[str, Any] = dict.fromkeys(optional)
    defaults |= dict(
        compile_topology=values.get("name"),
        calibration=values.get("name"),
        wrap_rule="none",
        links_per_device=1,
    )
    defaults |= dict.fromkeys(
        (
            "torus_dims",
            "max_chips",
            "domain_size",
            "core_bandwidth_bytes_per_s",
            "inter_node_bandwidth_bytes_per_s",
            "inter_node_latency_s",
            "inter_slice_bandwidth_bytes_per_s",
            "inter_slice_latency_s",
            "cache_bytes",
            "cache_bandwidth_bytes_per_s",
            "cores",
            "multiprocessors",
        ),
        0,
    )
    defaults |= dict(
        inter_node_efficiency=1.0, inter_slice_efficiency=1.0, in_network_reduction=1.0
    )
    defaults["overlapped_gathers"] = 1
    defaults["hbm_available_bytes"] = values.get("hbm_capacity_bytes")
    known = {f.name: f for f in dataclasses.fields(Device) if f.name != "sources"}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise MeshwrightError(
            f"device file {where!r} has unknown key {unknown[0]!r}; use the fields of Device"
        )
    merged = defaults | values
    missing = sorted(set(known) - set(merged))
    if missing:
        raise MeshwrightError(f"device file {where!r} lacks {', '.join(missing)}; give each")
    for key, field in known.items():
        if field.type == "int":
            merged[key] = int(merged[key])
    return Device(**merged, sources=sources)


_ITEM_BYTES = {"float64": 8, "float32": 4, "int32": 4, "uint32": 4, "int64": 8}


def item_bytes(dtype: str) -> int:
    """Bytes of one element of a JAX dtype."""
    if dtype in _ITEM_BYTES:
        return _ITEM_BYTES[dtype]
    return 1 if dtype.startswith(("float8", "int8", "uint8", "bool")) else 2
