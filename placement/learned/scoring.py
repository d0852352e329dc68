"""How good a policy's first choices are, on recorded outcomes.

The ranking weighs preference, expected step time and the chance of fitting the memory,

    score = preference - VALUE_WEIGHT value + FIT_WEIGHT log sigmoid(fit / FIT_SCALE).

The fit head is surer of itself on problems it has not seen than it should be; the scale and the
weights were chosen on the validation split, for few first choices that do not fit. Where members of a
policy disagree on whether a candidate fits, the doubtful one counts (:func:`cautious`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

VALUE_WEIGHT = 2.0
FIT_WEIGHT, FIT_SCALE = 24.0, 3.0


def ranking(preference: np.ndarray, fit: np.ndarray, value: np.ndarray) -> np.ndarray:
    """[K] scores, best highest."""
    return preference - VALUE_WEIGHT * value + fit_score(fit)


def fit_score(fit: np.ndarray) -> np.ndarray:
    """[K] what the chance of fitting adds to a score, at most 0."""
    return -FIT_WEIGHT * np.logaddexp(0.0, -np.asarray(fit) / FIT_SCALE)


def cautious(fits: Sequence[np.ndarray]) -> np.ndarray:
    """[K] logit of fitting from those of M members, [K] each: their mean, but the lowest where a
    member thinks that a candidate rather does not fit."""
    said = np.asarray(fits)
    lowest = said.min(axis=0)
    return np.where(lowest < 0.0, lowest, said.mean(axis=0))


def report(pairs: Iterable[tuple[Any, Any]]) -> dict[str, float]:
    """Means over the problems of (batch, heads) pairs.

    regret: geometric mean of the first choice's step time over the best recorded, less 1, where it
    fits; regret_3 the best of the first three; missed: share of problems whose first choice does
    not fit though a recorded one does; infeasible_recall: share of the candidates that do not fit
    to which the fit head gives less than one half; value_error: mean of |log| errors.
    """
    top, third, missed, error, caught, alarms = [], [], [], [], [], []
    for batch, heads in pairs:
        for b in range(len(batch.recorded)):
            there = np.asarray(batch.recorded[b]) > 0
            if not there.any():
                continue
            fits = np.asarray(batch.fits[b])[there] > 0
            time = np.asarray(batch.log_time[b])[there]
            fit = np.asarray(heads.fit[b])[there]
            value = np.asarray(heads.value[b])[there]
            score = ranking(np.asarray(heads.preference[b])[there], fit, value)
            caught += list(fit[~fits] < 0)
            alarms += list(fits[fit < 0])
            if not fits.any():
                continue
            error += list(np.abs(value - time)[fits])
            best = time[fits].min()
            order = np.argsort(-score, kind="stable")
            missed.append(not fits[order[0]])
            if fits[order[0]]:
                top.append(time[order[0]] - best)
            if fits[order[:3]].any():
                third.append(time[order[:3]][fits[order[:3]]].min() - best)
    return {
        "regret": float(np.exp(np.mean(top)) - 1.0) if top else float("nan"),
        "regret_3": float(np.exp(np.mean(third)) - 1.0) if third else float("nan"),
        "missed": float(np.mean(missed)) if missed else float("nan"),
        "infeasible_recall": float(np.mean(caught)) if caught else float("nan"),
        "false_alarms": float(np.mean(alarms)) if alarms else 0.0,
        "value_error": float(np.mean(error)) if error else float("nan"),
    }
