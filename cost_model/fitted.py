"""The constants fitted to a device's profile, and residuals at its profiled shapes.

They come from ``cost_model/calibration/DEVICE.json``, fitted to the cycles that XLA's TPU compiler
states, or to kernels timed on a GPU; without a file, defaults give the roofline of the device's
datasheet.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import importlib.resources
import json
from collections.abc import Mapping

import numpy as np

from cost_model.device import Device

MATMUL_DEFAULTS: dict[str, float] = {
    "compute_factor": 1.05,
    "memory_factor": 1.2,
    "drain_16": 0.01,
    "drain_32": 0.01,
    "drain_k": 0.001,
    "load_32": 0.001,
    "copy_ragged": 0.001,
    "turn_left": 0.0,
    "turn_right": 0.0,
    "per_product": 0.1,
    "block": 2048.0,
    "sharpness": 8.0,
    "resident_bytes": 1.0,
}
"""Constants of a device without a profile: a roofline."""


VECTOR_DEFAULTS: dict[str, float] = {
    "memory_factor": 1.2,
    "vector_factor": 2.0,
    "pass_cycles": 0.0,
    "sharpness": 8.0,
}
"""Constants of vector operators on a device without a profile."""

PROGRAM_DEFAULTS: dict[str, float] = {
    "matmul": 1.0,
    "pass_cycles": 0.0,
    "reduce_cycles": 0.0,
    "bare_cycles": 0.0,
}
"""Constants of operators inside whole programs where nothing is known: contractions as alone, loops
by their bytes and instructions. ``bare_cycles`` is for kernels that XLA does not fuse."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """What was fitted to the profile of one device."""

    constants: Mapping[str, Mapping[str, float]]
    """class of operator -> constant -> value, in cycles unless the name says otherwise."""
    neighbours: Mapping[str, tuple[np.ndarray, np.ndarray]]
    """class -> features [P, F] of its profiled shapes, log of measured over modelled cycles [P]."""
    versions: Mapping[str, str]
    """versions of jax and compiler that the profile was made with; empty without a profile."""


@functools.cache
def load_calibration(name: str) -> Calibration:
    """The shipped fit of this device; defaults where it has no profile."""
    folder = importlib.resources.files("cost_model") / "calibration"
    if not (folder / f"{name}.json").is_file():
        return parse_calibration({})
    raw = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    table = csv.DictReader((folder / "fused.csv").read_text(encoding="utf-8").splitlines())
    shares = {row["constant"]: float(row["value"]) for row in table if row["device"] == name}
    return parse_calibration(raw, shares)


def parse_calibration(raw: dict, shares: Mapping[str, float] | None = None) -> Calibration:
    """A Calibration from the content of a fitted file.

    ``shares`` says what is left of a pass through the vector unit (``pass_share``), of the pass of
    a reduction (``reduce_share``) and of a contraction (``matmul``) where XLA fuses them with their
    neighbours, as it does in whole programs.
    """
    neighbours = {
        group: (np.asarray(entry["points"], np.float64), np.asarray(entry["residuals"], np.float64))
        for group, entry in raw.get("neighbours", {}).items()
    }
    constants = {
        "matmul": MATMUL_DEFAULTS,
        "vector": VECTOR_DEFAULTS,
        "program": PROGRAM_DEFAULTS,
    }
    for group, values in raw.get("constants", {}).items():
        constants[group] = constants.get(group, {}) | values
    if shares:
        cycles = constants["vector"]["pass_cycles"]
        constants["program"] |= {
            "pass_cycles": shares.get("pass_share", 0.0) * cycles,
            "reduce_cycles": shares.get("reduce_share", 0.0) * cycles,
            "matmul": shares.get("matmul", 1.0),
        }
    return Calibration(
        constants=constants,
        neighbours=neighbours,
        versions=raw.get("versions", {}),
    )


_REACH = 1.2
"""Distance over which a residual matters, in octaves of one side."""
_DOUBT = 0.15
"""Weight of no residual at all, so that far shapes follow the formula. Both were chosen by leaving one
out among the shapes that are fitted, over all five TPUs."""


def nearby_residuals(points: np.ndarray, residuals: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Residuals averaged over near points with Gaussian weights, drawn to zero far from all."""
    flat = features.reshape(-1, features.shape[-1])
    few, back = np.unique(flat, axis=0, return_inverse=True)  # choices repeat their local shapes
    square = np.zeros((len(few), len(points)))
    for f in range(points.shape[1]):
        square += (few[:, f, None] - points[:, f]) ** 2
    weight = np.exp(square / -(_REACH**2))
    mean = weight @ residuals / (weight.sum(-1) + _DOUBT)
    return mean[back.reshape(-1)].reshape(features.shape[:-1])


def soft_max(sharpness: float, *terms: np.ndarray) -> np.ndarray:
    """(sum x^p)^(1/p), which is the largest term for large p, without overflow."""
    largest = np.maximum.reduce(np.broadcast_arrays(*terms))
    largest = np.maximum(largest, 1e-30)
    return largest * sum((x / largest) ** sharpness for x in terms) ** (1 / sharpness)


def start_cycles(device: Device, c: Mapping[str, float]) -> float:
    """Cycles before a kernel does anything."""
    return c.get("start", device.launch_latency_s * device.core_clock_hz)
