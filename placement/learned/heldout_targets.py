"""What the learned optimizer has to show on held-out problems, and whether it does."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable

import numpy as np

from placement.learned.anytime import Curve
from placement.learned.baselines import ENGINES, SCORING
from placement.learned.contenders import LEARNED, hurried_name, traced_name
from placement.learned.heldout_summary import (
    WITHIN,
    Mean,
    Runs,
    best_of,
    evaluations_to_near,
    mean_against,
    mean_ratio,
)

SECONDS = (0.1, 1.0, 10.0)
LARGE = 1024
"""Devices from which the outer space is called large."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """One number that was asked for."""

    text: str
    measured: str
    met: bool | None
    """None where it was not measured."""


def targets(runs: Runs, learned: str = LEARNED) -> list[Target]:
    """All targets, for a policy by name."""
    held_out = [p for p in runs.problems if runs.split_of[p] != "validation"]
    everywhere = [p for p in held_out if runs.curves(p, learned)]
    if not everywhere:
        return []
    hurried = _hurried(runs, learned, everywhere)
    return [
        *_greedy(runs, learned, everywhere),
        *_at_64(runs, learned, everywhere),
        _to_near(runs, learned, everywhere),
        _deep(runs, learned),
        *_seconds(runs, learned, hurried, everywhere),
        _experts(runs, learned, everywhere),
        *_unseen(runs, learned),
        *_gaps(runs, learned, hurried),
    ]


def _hurried(runs: Runs, learned: str, problems: list[str]) -> str:
    """The policy's run that knows of its one second; its usual run where there is none."""
    name = hurried_name(learned)
    return name if all(runs.curves(p, name) for p in problems) else learned


STRONGEST = ("engine", "evolution", "annealing", "random", "rules")
"""Of each kind, by the tables of the whole suite."""


def measured_again(runs: Runs, learned: str) -> list[Target]:
    """Those targets that runs of a part of the suite can answer: all of them where the strongest of
    each kind of optimizer ran; else whether the first proposal fits, one second, and large budgets."""
    if set(STRONGEST) <= set(runs.optimizers):
        return [t for t in targets(runs, learned) if t.met is not None]
    held_out = [p for p in runs.problems if runs.split_of[p] != "validation"]
    mine = [p for p in held_out if runs.curves(p, learned)]
    found = [_deep(runs, learned)]
    if mine:
        hurried = _hurried(runs, learned, mine)
        found.append(_first_fits(runs, learned, mine))
        if set(ENGINES) & set(runs.optimizers):  # the best other by seconds
            found += _in_seconds(runs, hurried, 1.0, mine)
            found += _large_in_one_second(runs, hurried, mine)
        found += _gaps(runs, learned, hurried)
    return [t for t in found if t.met is not None]


def _at(n: int) -> Callable[[Curve], float]:
    return lambda curve: curve.at_evaluations(n)


def _by(seconds: float) -> Callable[[Curve], float]:
    return lambda curve: curve.at_seconds(seconds)


def _last(curve: Curve) -> float:
    return curve.step_time_s[-1] if curve.step_time_s else math.inf


def _said(mean: Mean | None) -> str:
    if mean is None:
        return "not measured"
    return f"{mean.value:.3f} ({mean.low:.3f} to {mean.high:.3f}; {mean.problems} problems)"


def _ratio_target(text: str, mean: Mean | None, limit: float, extra: str = "") -> Target:
    met = None if mean is None else mean.value <= limit
    return Target(text=text, measured=_said(mean) + extra, met=met)


def _greedy(runs: Runs, learned: str, problems: list[str]) -> Iterable[Target]:
    rules = [p for p in problems if runs.curves(p, "rules")]
    mean = mean_against(runs, learned, _at(1), best_of(runs, ["rules"], _last), rules)
    none = sum(math.isinf(_last(runs.curves(p, "rules")[0])) for p in rules)
    extra = f"; no rule fits on {none} of them" if none else ""
    yield _ratio_target(
        "one evaluation: geometric mean at most 1.00 of the best hand-tuned rule per case",
        mean, 1.0, extra,
    )  # fmt: skip
    yield _first_fits(runs, learned, problems)


def _first_fits(runs: Runs, learned: str, problems: list[str]) -> Target:
    found = mean_ratio(runs, learned, _at(1), problems)
    assert found is not None
    return Target(
        text="one evaluation fits in at least 99 % of the problems with a known fitting plan",
        measured=f"{found.found:.1%} of {found.problems} problems",
        met=found.found >= 0.99,
    )


def _at_64(runs: Runs, learned: str, problems: list[str]) -> Iterable[Target]:
    scoring = [o for o in SCORING if o in runs.optimizers]
    means = {o: mean_ratio(runs, o, _at(64), problems) for o in scoring}
    known = {o: m.value for o, m in means.items() if m is not None}
    if not known:
        return
    best = min(known, key=lambda o: known[o])
    yield _ratio_target(
        f"64 evaluations: at most 0.90 of the best optimizer that scores plans ({best})",
        mean_against(runs, learned, _at(64), best_of(runs, [best], _at(64)), problems), 0.9,
    )  # fmt: skip
    yield _ratio_target(
        "64 evaluations: the same against the best of them on each problem",
        mean_against(runs, learned, _at(64), best_of(runs, scoring, _at(64)), problems), 0.9,
    )  # fmt: skip


def _to_near(runs: Runs, learned: str, problems: list[str]) -> Target:
    ratios, reached = [], 0
    scorers = [o for o in SCORING if o in runs.optimizers]
    for p in problems:
        mine = evaluations_to_near(runs, learned, p)
        theirs = min((evaluations_to_near(runs, o, p) for o in scorers), default=math.inf)
        reached += math.isfinite(theirs)
        if math.isfinite(mine) or math.isfinite(theirs):
            ratios.append(mine / theirs if math.isfinite(theirs) else 0.0)
    mine = [evaluations_to_near(runs, learned, p) for p in problems]
    text = (
        f"to within {WITHIN - 1:.0%} of the best known plan: at most a tenth of the evaluations "
        "of the best optimizer that scores plans"
    )
    value = float(np.median(ratios)) if ratios else math.inf
    measured = (
        f"learned gets there on {np.isfinite(mine).sum()} of {len(mine)} problems (median "
        f"{np.median(mine):.3g} evaluations), the others on {reached}; median share {value:.2g} "
        "(0 where only the learned one gets there)"
    )
    return Target(text=text, measured=measured, met=value <= 0.1)


def _deep(runs: Runs, learned: str) -> Target:
    text = "4,096 evaluations: never worse than the best optimizer that scores plans by over 0.5 %"
    worst, count = -math.inf, 0
    for p in runs.problems:
        mine = runs.deep_enough(p, learned, 4096)
        theirs = [
            _last(c) for o in SCORING for c in runs.deep_enough(p, o, 4096) if o != "heuristic"
        ]
        if not mine or not theirs:
            continue
        count += 1
        worst = max(worst, float(np.mean([_last(c) for c in mine])) / min(theirs))
    if not count:
        return Target(text=text, measured="not measured", met=None)
    return Target(
        text=text,
        measured=f"worst ratio {worst:.4f} over {count} problems (learned with what it was given)",
        met=worst <= 1.005,
    )


def _seconds(runs: Runs, learned: str, hurried: str, problems: list[str]) -> Iterable[Target]:
    for limit in SECONDS:
        yield from _in_seconds(runs, hurried if limit <= 1.0 else learned, limit, problems)
    yield from _large_in_one_second(runs, hurried, problems)


def _in_seconds(runs: Runs, name: str, limit: float, problems: list[str]) -> Iterable[Target]:
    others = [o for o in (*SCORING, *ENGINES, "rules") if o in runs.optimizers]
    mine = mean_ratio(runs, name, _by(limit), problems)
    means = {o: m for o in others if (m := mean_ratio(runs, o, _by(limit), problems))}
    if mine is None or not means:
        return
    best = min(means, key=lambda o: means[o].value)
    found = mean_against(runs, name, _by(limit), best_of(runs, [best], _by(limit)), problems)
    text = f"{limit:g} s of processor time: no worse than the best other ({best})"
    if mine.found == means[best].found == 0.0:
        yield Target(text=text, measured="no optimizer has a plan by then", met=None)
        return
    shares = f"; has a plan in {mine.found:.0%} of runs, {best} in {means[best].found:.0%}"
    yield _ratio_target(text, found, 1.0, shares)


def _large_in_one_second(runs: Runs, hurried: str, problems: list[str]) -> Iterable[Target]:
    others = [o for o in (*SCORING, *ENGINES, "rules") if o in runs.optimizers]
    large = [p for p in problems if runs.devices_of[p] >= LARGE]
    means = {o: m for o in others if (m := mean_ratio(runs, o, _by(1.0), large))}
    if means:
        best = min(means, key=lambda o: means[o].value)
        reference = best_of(runs, [best], _by(1.0))
        mine = mean_against(runs, hurried, _by(1.0), reference, large)
        had = mean_ratio(runs, hurried, _by(1.0), large)
        share = 0.0 if had is None else had.found
        yield _ratio_target(
            f"1 s, jobs of {LARGE:,} devices and more: at most 0.95 of the best other ({best})",
            mine, 0.95,
            f"; has a plan in {share:.0%} of runs, {best} in {means[best].found:.0%}",
        )  # fmt: skip


def _experts(runs: Runs, learned: str, problems: list[str]) -> Target:
    rules = [p for p in problems if runs.curves(p, "rules")]
    return _ratio_target(
        "64 evaluations: at most 0.82 of the best hand-tuned rule per case",
        mean_against(runs, learned, _at(64), best_of(runs, ["rules"], _last), rules), 0.82,
    )  # fmt: skip


def _unseen(runs: Runs, learned: str) -> Iterable[Target]:
    seen = mean_ratio(runs, learned, _at(64), runs.of_split("validation"))
    for split in runs.splits:
        if split == "validation":
            continue
        text = f"{split} loses at most 3 points against validation (64 evaluations)"
        there = mean_ratio(runs, learned, _at(64), runs.of_split(split))
        if seen is None or there is None:
            yield Target(text=text, measured="not measured", met=None)
            continue
        lost = 100.0 * (there.value - seen.value)
        yield Target(
            text=text,
            measured=f"{there.value:.3f} against {seen.value:.3f} of the best known: "
            f"{lost:+.1f} points",
            met=lost <= 3.0,
        )


def _gaps(runs: Runs, learned: str, hurried: str) -> Iterable[Target]:
    """To the bound, after a second that counts tracing, and after one that does not."""
    yield _gap(
        runs, hurried, "median gap to the lower bound at most 5 % at one second", lambda _: 1.0
    )
    name = traced_name(learned)
    if all(runs.curves(p, name) for p in runs.bounds):
        text = "median gap to the lower bound at most 5 % one second after the program is traced"
        yield _gap(runs, name, text, lambda p: 1.0 + runs.traced_s[p])


def _gap(runs: Runs, optimizer: str, text: str, seconds: Callable[[str], float]) -> Target:
    gaps, least = [], []
    for p, bound in runs.bounds.items():
        times = [c.at_seconds(seconds(p)) for c in runs.curves(p, optimizer)]
        if times and bound > 0:
            gaps.append(1.0 - bound / float(np.mean(times)))
            known = min(_last(c) for o in runs.optimizers for c in runs.curves(p, o))
            least.append(1.0 - bound / known)
    if not gaps:
        return Target(text=text, measured="not measured", met=None)
    return Target(
        text=text,
        measured=f"{np.median(gaps):.1%} over {len(gaps)} problems; {np.median(least):.1%} for the "
        "best plan that any run found in any time",
        met=bool(np.median(gaps) <= 0.05),
    )
