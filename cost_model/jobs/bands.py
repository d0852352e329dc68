"""Error bands: the 10th and 90th percentile of a prediction, from validation residuals.

    p10 = T exp(q10),  p90 = T exp(q90)

q10 and q90 are quantiles of log(measured / predicted) over held-out rows of the job's kind: its
accelerator's vendor, dense or with experts, 16-bit or narrower. A source weighs as the square root
of its rows. A kind with few rows borrows from all: quantiles are mixed n/(n + 10) to 10/(n + 10).
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import typing

import numpy as np
import yaml

from cost_model.jobs.columns import Jobs
from cost_model.jobs.hardware import FAMILIES

FILE = pathlib.Path(__file__).with_name("bands.yaml")
BORROW = 10.0
_TPU = FAMILIES.index("tpu")
COVERED = 0.8
_TAILS = (0.1, 0.09, 0.08, 0.07, 0.06, 0.05, 0.04, 0.03, 0.02)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bands:
    """Quantiles of log(measured / predicted)."""

    by_kind: dict[str, tuple[float, float]]
    everywhere: tuple[float, float]
    tail: float = 0.1
    """the share of rows that the calibration leaves out at each end."""

    def of(self, jobs: Jobs) -> tuple[np.ndarray, np.ndarray]:
        """[J] factors of the prediction at the 10th and the 90th percentile."""
        pairs = [self.by_kind.get(kind, self.everywhere) for kind in kinds(jobs)]
        low, high = np.array(pairs).reshape(-1, 2).T
        return np.exp(low), np.exp(high)


def kinds(jobs: Jobs) -> list[str]:
    """[J] the kind of case of each job."""
    return [
        f"{'tpu' if family == _TPU else 'gpu'}-{'experts' if experts > 0 else 'dense'}-"
        f"{'narrow' if width < 2 else '16bit'}"
        for family, experts, width in zip(jobs.device.family, jobs.n_experts, jobs.matmul_bytes)
    ]


def calibrate(
    log_residuals: np.ndarray, kind: typing.Sequence[str], source: typing.Sequence[str]
) -> Bands:
    """Bands from residuals log(measured / predicted) of rows, their kinds and sources.

    Quantiles of known sources are too narrow for a source not seen: the tails are cut where bands
    calibrated without a source hold 80 % of its rows, at 10 % at most.
    """
    for tail in _TAILS:
        if np.mean(coverage(log_residuals, kind, source, tail)) >= COVERED:
            break
    return _calibrate(log_residuals, kind, source, tail)


def _calibrate(
    log_residuals: np.ndarray, kind: typing.Sequence[str], source: typing.Sequence[str], tail: float
) -> Bands:
    if not len(log_residuals):
        return Bands(by_kind={}, everywhere=(-0.25, 0.25))
    count = {name: sum(s == name for s in source) for name in set(source)}
    weight = np.array([1.0 / np.sqrt(count[name]) for name in source])
    everywhere = _quantiles(log_residuals, weight, tail)
    by_kind = {}
    for name in sorted(set(kind)):
        here = np.array([k == name for k in kind])
        own = _quantiles(log_residuals[here], weight[here], tail)
        share = here.sum() / (here.sum() + BORROW)
        by_kind[name] = tuple(float(share * a + (1 - share) * b) for a, b in zip(own, everywhere))
    return Bands(by_kind=typing.cast(dict, by_kind), everywhere=everywhere, tail=tail)


def coverage(
    log_residuals: np.ndarray, kind: typing.Sequence[str], source: typing.Sequence[str], tail: float
) -> np.ndarray:
    """[R] bool: inside the band calibrated on the rows of all other sources with these tails."""
    inside = np.zeros(len(log_residuals), bool)
    names = np.array(source)
    for name in set(source):
        out = names == name
        rest = _calibrate(
            log_residuals[~out],
            [k for k, o in zip(kind, out) if not o],
            [s for s, o in zip(source, out) if not o],
            tail,
        )
        for index in np.flatnonzero(out):
            low, high = rest.by_kind.get(kind[int(index)], rest.everywhere)
            inside[index] = low <= log_residuals[index] <= high
    return inside


def save(bands: Bands, path: pathlib.Path) -> None:
    data = {
        "tail": bands.tail,
        "everywhere": [round(v, 4) for v in bands.everywhere],
        "by_kind": {k: [round(x, 4) for x in v] for k, v in bands.by_kind.items()},
    }
    temporary = path.with_suffix(".tmp")
    temporary.write_text(yaml.safe_dump(data, sort_keys=False))
    os.replace(temporary, path)


@functools.cache
def load(path: pathlib.Path = FILE) -> Bands:
    """The shipped bands."""
    data = yaml.safe_load(path.read_text())
    return Bands(
        by_kind={k: tuple(v) for k, v in data["by_kind"].items()},
        everywhere=tuple(data["everywhere"]),
        tail=data["tail"],
    )


def _quantiles(values: np.ndarray, weight: np.ndarray, tail: float) -> tuple[float, float]:
    order = np.argsort(values)
    place = (np.cumsum(weight[order]) - 0.5 * weight[order]) / weight.sum()
    low, high = np.interp([tail, 1 - tail], place, values[order])
    return float(low), float(high)
