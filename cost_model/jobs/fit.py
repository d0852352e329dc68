"""Fit the constants on the rows of the fitted half, tied to their priors.

    minimise  sum_r w_r rho(log T_r / M_r)^2 / sigma^2  +  sum_c (log v_c / prior_c)^2 / std_c^2

T predicted, M measured, rho soft-L1, sigma the scatter of one configuration measured twice (about
4 %). Rows of one source and device weigh together as the square root of their number, so that a
long sweep of one model does not outvote the rest.
"""

from __future__ import annotations

import collections
import pathlib

import numpy as np
import yaml

from cost_model.jobs.columns import Jobs
from cost_model.jobs.constants import Constants
from cost_model.jobs.memory import memory
from cost_model.jobs.predict import settled
from cost_model.jobs.runs import Run, jobs_of
from cost_model.jobs.step import step_time

SIGMA = 0.04
MEMORY = ("allocator_share", "context_bytes", "logit_bytes")
"""constants of the memory model, fitted on peaks; the others on step times."""


def fitted_rows(rows: tuple[Run, ...]) -> list[Run]:
    """The rows that the fit may see."""
    return [
        run
        for run in rows
        if run.record is not None and run.measured_step_time_s and not run.exclude and run.fitted
    ]


def fit(rows: tuple[Run, ...], start: Constants) -> Constants:
    """The constants with the fitted values."""
    from scipy.optimize import least_squares

    chosen = fitted_rows(rows)
    jobs, _ = settled(chosen, start)
    measured = np.array([run.measured_step_time_s for run in chosen])
    weights = _weights(chosen)
    free = [entry for entry in start.entries if entry.fitted and entry.name not in MEMORY]
    prior = np.log([entry.prior for entry in free])
    std = np.array([entry.prior_log_std for entry in free])

    def residuals(z: np.ndarray) -> np.ndarray:
        constants = start.with_values(_values(free, prior + std * z))
        error = np.log(_predict(jobs, constants) / measured) / SIGMA
        robust = np.sign(error) * np.sqrt(2 * (np.sqrt(1 + error * error) - 1))
        return np.concatenate([np.sqrt(weights) * robust, z])

    z0 = np.zeros(len(free))
    best = least_squares(residuals, z0, bounds=(-2.5, 2.5), max_nfev=60)
    return start.with_values(_values(free, prior + std * best.x))


def fit_memory(rows: tuple[Run, ...], start: Constants) -> Constants:
    """The constants of the memory model, on measured peaks of the fitted half."""
    from scipy.optimize import least_squares

    chosen = [
        run
        for run in rows
        if run.record is not None
        and run.measured_memory_gb
        and run.fitted
        and not (run.exclude or run.analytic)
    ]
    jobs = jobs_of(chosen)
    measured = np.array([run.measured_memory_gb for run in chosen]) * 2**30
    free = [entry for entry in start.entries if entry.fitted and entry.name in MEMORY]
    prior = np.log([entry.prior for entry in free])
    std = np.array([entry.prior_log_std for entry in free])

    def residuals(z: np.ndarray) -> np.ndarray:
        constants = start.with_values(_values(free, prior + std * z))
        error = np.log(memory(jobs, constants).peak_bytes / measured) / SIGMA
        return np.concatenate([error / len(chosen) ** 0.25, z])

    best = least_squares(residuals, np.zeros(len(free)), bounds=(-2.5, 2.5))
    return start.with_values(_values(free, prior + std * best.x))


def save(constants: Constants, path: pathlib.Path) -> None:
    """Write the constants with their values, priors and meanings."""
    import dataclasses
    import os

    data = {"constants": [dataclasses.asdict(entry) for entry in constants.entries]}
    for entry in data["constants"]:
        entry["value"] = float(f"{entry['value']:.4g}")
    temporary = path.with_suffix(".tmp")
    temporary.write_text(yaml.safe_dump(data, sort_keys=False, width=100))
    os.replace(temporary, path)


def _predict(jobs: Jobs, constants: Constants) -> np.ndarray:
    return step_time(jobs, constants).step_time_s


def _weights(rows: list[Run]) -> np.ndarray:
    keys = [(run.source, run.hardware, run.dtype in ("bf16", "fp16")) for run in rows]
    count = collections.Counter(keys)
    return np.array([1.0 / np.sqrt(count[key]) for key in keys])


def _values(free, logs: np.ndarray) -> dict[str, float]:
    return {entry.key: float(np.exp(v)) for entry, v in zip(free, logs)}
