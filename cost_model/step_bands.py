"""Error bands of estimated steps: the 10th and 90th percentile, from compiled steps.

    p10 = T exp(q10),  p90 = T exp(q90)

with quantiles of log(compiled / predicted) over the rows of suite=compiled, calibrated as those of
whole jobs are (:mod:`cost_model.jobs.bands`), a case in the place of a source. Kinds: plans whose
operands are all pinned, and plans that leave operands to XLA's propagation, as hand-tuned rules do.
Both are of TPUs; other devices get the band of all rows.
"""

from __future__ import annotations

import pathlib

import numpy as np

from cost_model.jobs import bands

FILE = pathlib.Path(__file__).parent / "calibration" / "step_bands.yaml"
PLANNED, LEFT = "planned", "left to XLA"


def kind_of(family: str, pinned: bool) -> str:
    """The kind under which a step's band is kept."""
    return (PLANNED if pinned else LEFT) if family == "tpu" else family


def step_band(family: str, pinned: bool) -> tuple[float, float]:
    """Factors of the step time at the 10th and the 90th percentile."""
    loaded = bands.load(FILE)
    low, high = loaded.by_kind.get(kind_of(family, pinned), loaded.everywhere)
    return float(np.exp(low)), float(np.exp(high))
