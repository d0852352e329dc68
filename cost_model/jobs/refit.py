"""Fit the constants and the bands, and write both."""

from __future__ import annotations

import pathlib
import typing

import numpy as np

from cost_model.jobs import bands, constants, fit, predict, score
from cost_model.jobs.bands import Bands
from cost_model.jobs.constants import Constants
from cost_model.jobs.runs import Run


def refit(rows: typing.Sequence[Run], folder: pathlib.Path) -> tuple[Constants, Bands]:
    """Constants from the fitted half, bands from the held-out half; written to the folder as
    constants.yaml and bands.yaml."""
    all_rows = tuple(rows)
    shipped = constants.load()
    priors = shipped.with_values({entry.key: entry.prior for entry in shipped.entries})
    fitted = fit.fit(all_rows, fit.fit_memory(all_rows, priors))
    fit.save(fitted, folder / "constants.yaml")
    held = [p for p in score.timed(predict.predict_runs(all_rows, fitted)) if not p.run.fitted]
    residual = np.array(
        [np.log((p.run.measured_step_time_s or 1.0) / (p.step_time_s or 1.0)) for p in held]
    )
    found = bands.calibrate(residual, [p.kind for p in held], [p.run.source for p in held])
    bands.save(found, folder / "bands.yaml")
    return constants.load(folder / "constants.yaml"), found
