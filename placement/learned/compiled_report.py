"""Whether learning from the compiler made plans that the compiler finds better.

On problems that were not learned from, two questions, of the policy as it shipped (*before*) and after
the second stage (*after*):

* Of the candidates that were compiled, how much slower than the fastest is the one that each would
  take: the simulation's favourite, the policies' first choice, and the simulation corrected by what the
  value head learned, ``simulated * exp(value after - value before)``.
* Which plan does the learned search end with under each policy, after one evaluation and after more,
  and how fast is it in the compiler's schedule. These plans are compiled for it.

The stage is kept if the plans that the longer search ends with are faster on the validation split
(geometric mean, below 1 by more than its interval); the test split says what that is worth. Means are
geometric over problems; intervals are 95 % bootstraps over problems.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from graphs.errors import MeshwrightError
from placement.compile_cache import write_atomically
from placement.learned import compiled_outcomes
from placement.learned.policy import Policy
from placement.learned.problems import PlanningProblem, load_split
from placement.learned.scoring import cautious, ranking

JUDGED = ("compiled_validation", "compiled_test")
BUDGETS = (1, 12)
"""Evaluations of the searches whose plans are compiled."""
_RESAMPLES = 2000


def choices(
    folder: pathlib.Path, split: str, policies: Mapping[str, Policy]
) -> dict[str, list[float]]:
    """Who chooses -> compiled step time of what it takes over the fastest, one of each problem."""
    found: dict[str, list[float]] = {}
    for rows, arrays, index in _recorded(folder, split):
        seconds = np.array([r.compiled_s for r in rows])
        simulated = np.array([r.simulated_s for r in rows])
        said = {name: _said(policy, arrays, index) for name, policy in policies.items()}
        takes = {"simulation": int(simulated.argmin())}
        takes |= {name: int(score.argmax()) for name, (score, _) in said.items()}
        if {"before", "after"} <= set(said):
            learned = said["after"][1] - said["before"][1]
            takes["corrected"] = int((np.log(simulated) + learned).argmin())
        for name, k in takes.items():
            found.setdefault(name, []).append(float(seconds[k] / seconds.min()))
    if not found:
        raise MeshwrightError(
            f"no problem of {split} has two compiled candidates under {folder}; run "
            f"python -m placement.learned.compiled_outcomes split={split} out={folder}"
        )
    return found


def _recorded(folder: pathlib.Path, split: str):
    from placement.learned.dataset import observed

    for problem in load_split(split):
        if not compiled_outcomes.path_of(folder, problem).exists():
            continue
        rows = [r for r in compiled_outcomes.load(folder, problem) if r.status == "ok"]
        if len(rows) > 1:
            arrays, _, _ = observed(problem)
            yield rows, arrays, np.array([r.index for r in rows])


def _said(policy: Policy, arrays: Any, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """([K] score, [K] value) of the candidates at ``index``."""
    heads = policy.said(arrays)
    fit = cautious([h.fit for h in heads])
    preference, value = (
        np.mean([getattr(h, k) for h in heads], 0) for k in ("preference", "value")
    )
    return ranking(preference, fit, value)[index], value[index]


def judge_plans(
    folder: pathlib.Path, problem: PlanningProblem, policies: Mapping[str, Policy]
) -> dict[str, list[dict[str, Any]]]:
    """The plans that the search ends with under each policy, compiled.

    Equal plans are compiled once, and what is recorded of the same policies is kept.
    """
    from placement.learned.instance import Instance
    from placement.learned.search import plan_instance

    path = folder / "plans" / f"{problem.name}.json"
    weights = {name: _fingerprint(policy) for name, policy in policies.items()}
    if path.exists():
        recorded = json.loads(path.read_text(encoding="utf-8"))
        if recorded["weights"] == weights:
            return recorded["plans"]
    instance = Instance(problem)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in policies}
    made: dict[tuple[int, bytes], dict[str, Any]] = {}
    for name, policy in policies.items():
        for budget in BUDGETS:
            found = plan_instance(
                instance.fork(), max_evaluations=budget, time_limit_s=np.inf, policy=policy
            )
            row: dict[str, Any] = {"evaluations": budget, "status": "nothing fits"}
            if found.outcome is not None and found.outer is not None:
                index = instance.outers.index(found.outer)
                key = (index, found.outcome.choices.tobytes())
                if key not in made:
                    one = compiled_outcomes.compile_candidate(instance, index, found.outcome)
                    made[key] = dataclasses.asdict(one)
                row |= made[key]
            rows[name].append(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"weights": weights, "plans": rows}, indent=1) + "\n"
    write_atomically(path, text.encode())
    return rows


def _fingerprint(policy: Policy) -> str:
    """Of the weights."""
    digest = hashlib.sha256()
    for member in policy.members:
        for name in sorted(member):
            digest.update(np.ascontiguousarray(member[name]).tobytes())
    return digest.hexdigest()[:12]


def plans(
    folder: pathlib.Path, split: str, policies: Mapping[str, Policy], count: int | None = None
) -> dict[int, list[tuple[float, float]]]:
    """Evaluations -> (compiled seconds before, after) of each problem where both have a plan; of
    the first ``count`` recorded problems."""
    found: dict[int, list[tuple[float, float]]] = {b: [] for b in BUDGETS}
    recorded = (p for p in load_split(split) if compiled_outcomes.path_of(folder, p).exists())
    for problem in itertools.islice(recorded, count):
        rows = judge_plans(folder, problem, policies)
        for a, b in zip(rows["before"], rows["after"], strict=True):
            if a["status"] == b["status"] == "ok":
                found[a["evaluations"]].append((a["compiled_s"], b["compiled_s"]))
    return found


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """(geometric mean, low, high), 95 % bootstrap."""
    logs = np.log(np.asarray(ratios, np.float64))
    rng = np.random.default_rng(0)
    means = rng.choice(logs, (_RESAMPLES, len(logs))).mean(1)
    low, high = np.exp(np.quantile(means, (0.025, 0.975)))
    return float(np.exp(logs.mean())), float(low), float(high)


def summarize(
    folder: pathlib.Path, policies: Mapping[str, Policy], count: int | None = None
) -> dict[str, Any]:
    """What :func:`choices` and :func:`plans` find, and whether the stage is kept."""
    splits: dict[str, Any] = {}
    for split in JUDGED:
        chosen = choices(folder, split, policies)
        pairs = plans(folder, split, policies, count)
        splits[split] = {
            "problems": len(next(iter(chosen.values()))),
            "over_the_fastest": {name: interval(ratios) for name, ratios in chosen.items()},
            "after_over_before": {
                str(budget): {
                    "problems": len(found),
                    "equal": sum(a == b for a, b in found),
                    "ratio": interval([b / a for a, b in found]) if found else None,
                    "faster": sum(b < a for a, b in found),
                    "slower": sum(b > a for a, b in found),
                }
                for budget, found in pairs.items()
            },
        }
    ratio = splits[JUDGED[0]]["after_over_before"][str(BUDGETS[-1])]["ratio"]
    trained = [p for p in load_split("compiled_train")
               if compiled_outcomes.path_of(folder, p).exists()]  # fmt: skip
    return {
        "kept": bool(ratio is not None and ratio[2] < 1.0),
        "trained_on": len(trained),
        "judged": count,
        "splits": splits,
    }


def write(
    folder: pathlib.Path, policies: Mapping[str, Policy], count: int | None = None
) -> dict[str, Any]:
    """Write ``compiler.json`` and ``compiler.png`` into the folder; the summary.

    ``count``: problems of each split whose plans are compiled, all that are recorded where None.
    """
    summary = summarize(folder, policies, count)
    write_atomically(folder / "compiler.json", (json.dumps(summary, indent=1) + "\n").encode())
    _draw(summary, folder / "compiler.png")
    return summary


_NAMES = {
    "simulation": "the simulation's favourite",
    "before": "first choice of the shipped policy",
    "after": "first choice after the second stage",
    "corrected": "the simulation, corrected by the value head",
}


def section(folder: str, page: pathlib.Path) -> str:
    """The section of a page in the folder ``page`` on what ``folder`` holds."""
    try:
        text = (pathlib.Path(folder) / "compiler.json").read_text(encoding="utf-8")
        summary = json.loads(text)
    except (OSError, ValueError) as error:
        raise MeshwrightError(
            f"{folder}/compiler.json cannot be read; run meshwright train_policy policy=compiler "
            f"compiled={folder}"
        ) from error
    splits = summary["splits"]
    table = ["| compiled time over that of the fastest | " + " | ".join(splits) + " |"]
    table.append("| --- " * (1 + len(splits)) + "|")
    for name, words in _NAMES.items():
        cells = [_cell(s["over_the_fastest"][name]) for s in splits.values()]
        table.append(f"| {words} | " + " | ".join(cells) + " |")
    plans = ["| plans after over before | " + " | ".join(splits) + " |"]
    plans.append("| --- " * (1 + len(splits)) + "|")
    for budget in map(str, BUDGETS):
        rows = [s["after_over_before"][budget] for s in splits.values()]
        cells = [
            f"{_cell(r['ratio'])}; faster on {r['faster']}, slower on {r['slower']} of "
            f"{r['problems']}"
            for r in rows
        ]
        plans.append(f"| {budget} evaluations | " + " | ".join(cells) + " |")
    problems = ", ".join(f"{s['problems']} of {name}" for name, s in splits.items())
    kept = "kept" if summary["kept"] else "not kept: the shipped weights are those before it"
    judged = "" if summary["judged"] is None else f" judged={summary['judged']}"
    return f"""## Learning from the compiler

A second stage goes on from the shipped weights with XLA's schedules as the reward: `meshwright
train_policy policy=compiler compiled={folder}
record=false{judged} out=out/compiler` (`record=true` compiles the rest of the splits first). XLA:GPU
compiled candidates of {summary["trained_on"]} programs as far as its schedule; library products are
timed by the device's formula, other kernels by the bytes they move, collectives by what it emitted.
Judged on {problems}, none of them learned from:

{chr(10).join(table)}

{chr(10).join(plans)}

By the validation split the stage is {kept}.

![choices]({os.path.relpath(pathlib.Path(folder) / "compiler.png", page)})
"""


def _cell(found: Sequence[float] | None) -> str:
    return "none" if found is None else "{:.3f} ({:.3f} to {:.3f})".format(*found)


def lines(summary: Mapping[str, Any]) -> list[str]:
    """The summary as sentences."""
    found = []
    for split, said in summary["splits"].items():
        for name, (mean, low, high) in said["over_the_fastest"].items():
            found.append(
                f"{split}: the choice of {name} takes {mean:.3f} ({low:.3f} to {high:.3f}) of the "
                f"fastest compiled candidate, {said['problems']} problems"
            )
        for budget, row in said["after_over_before"].items():
            if row["ratio"]:
                mean, low, high = row["ratio"]
                found.append(
                    f"{split}: plans after {budget} evaluations take {mean:.3f} ({low:.3f} to "
                    f"{high:.3f}) of those before; faster on {row['faster']}, slower on "
                    f"{row['slower']} of {row['problems']}"
                )
    kept = "is kept" if summary["kept"] else "is not kept"
    return [*found, f"the stage {kept}, by the validation split"]


def _draw(summary: Mapping[str, Any], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panes = pyplot.subplots(1, len(JUDGED), figsize=(9, 3.2), sharey=True)
    for pane, split in zip(panes, JUDGED):
        rows = dict(summary["splits"][split]["over_the_fastest"])
        for at, (mean, low, high) in enumerate(rows.values()):
            pane.errorbar(at, mean, [[mean - low], [high - mean]], fmt="o", capsize=4)
        pane.set_xticks(range(len(rows)), list(rows), fontsize=8)
        pane.set_title(f"{split}, {summary['splits'][split]['problems']} problems", fontsize=9)
        pane.grid(alpha=0.3)
    panes[0].set_ylabel("compiled time of the choice\nover the fastest compiled", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
