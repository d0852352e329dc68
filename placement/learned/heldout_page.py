"""The page about the learned optimizer: what was trained on what, and what the numbers say."""

from __future__ import annotations

import json
import os
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from cost_model.cluster import parse_cluster
from placement.compile_cache import write_atomically
from placement.learned import outcomes
from placement.learned.baselines import UNLIMITED
from placement.learned.contenders import HURRIED, LEARNED, UNIFORM, UNTRAINED, is_hurried
from placement.learned.heldout_report import EVALUATIONS, SECONDS, cell, policies, table
from placement.learned.heldout_summary import (
    RESAMPLES,
    TEN,
    Runs,
    best_of,
    mean_against,
    mean_ratio,
)
from placement.learned.heldout_targets import measured_again, targets
from placement.learned.problems import SPLITS, VERSION, load_split
from placement.learned.search import SHALLOW

_INTRO = """# The learned optimizer

Written by `{command}` (runs that are recorded are not repeated).

`optimizer=learned` plans a whole job in one SPMD program: a graph network reads the traced program,
the cluster and the batch, and ranks all *outer candidates* (rematerialisation, microbatches, mesh);
the best are opened, message passing completes each, the schedule simulation judges, and what is
learned from each result decides which is opened next. What is left of more than {shallow} evaluations
is spent on local search over whole plans.
"""

_CLEARLY = 1.03
"""Ratio from which the learned search is said to fall short."""

_METHOD = """## How it is judged

One run records the best plan against evaluations and against seconds. An evaluation is one complete
plan scored by the simulation; message passing and exact solves score none and are compared by the
clock. Seconds are processor seconds of one process, tracing and tables included; work that several
runs share is charged to each. *Ratio* is the step time over that of the best plan any run found
(`engine` opens every candidate). A run without a fitting plan counts as {ten:g}; "found" says how
many had one where not all had. Problems on which no run found a fitting plan are left out. Means are
geometric, over seeds, then problems; in brackets 95 % bootstrap intervals ({resamples} resamples of
problems and seeds). Columns from 256 on hold only the problems on which runs were given so many. The
space has meshes of up to {axes} axes.

| optimizer | what it is |
|---|---|
| learned | the shipped policy |
| learned_1s, traced_learned_1s | it knows that it has one second, or one after tracing |
| untrained, uniform | the same search with random weights, with no preference |
| engine, engine_random | message passing under candidates in the product's order, in random order |
| evolution, annealing, tree_search, random | score short plans, completed by single changes |
| random_nodes | a random choice for every node |
| heuristic | one greedy sweep under candidates in the product's order |
| rules | nine hand-tuned rules, each on every mesh of its kind and every rematerialisation |
"""


def write_page(
    path: pathlib.Path,
    rows: Sequence[Mapping[str, Any]],
    command: str,
    results: pathlib.Path,
    judge: str,
    again: Mapping[str, tuple[str, Sequence[Mapping[str, Any]]]],
    compiled: str = "",
) -> None:
    """Write the page; ``results`` holds the pictures, ``judge`` names the present cost model,
    ``again`` maps folders of later runs to their command and rows, ``compiled`` is the section of
    :mod:`placement.learned.compiled_report`."""
    runs = Runs(rows)
    axes = max(int(r["max_axes"]) for r in rows)
    parts = [
        _INTRO.format(command=command, shallow=SHALLOW),
        _problems(),
        _weights(),
        _METHOD.format(ten=TEN, resamples=RESAMPLES, axes=axes),
        _judged(rows, judge),
        _pictures(os.path.relpath(results, path.parent)),
        _targets(runs),
        *(_again(folder, by, found, judge) for folder, (by, found) in again.items()),
        compiled,
        _failures(runs),
        _training_adds(runs),
        _tables(runs),
        _ablations(runs),
    ]
    write_atomically(path, ("\n".join(p for p in parts if p).rstrip() + "\n").encode())


def _judged(rows: Sequence[Mapping[str, Any]], judge: str) -> str:
    used = sorted({str(r["judge"]) for r in rows if r.get("judge")})
    if used == [judge]:
        return f"All runs were judged by the present cost model ({judge}).\n"
    return (
        f"These runs were judged by another state of the cost model ({', '.join(used)}) than this "
        f"tree's ({judge}): all optimizers by the same one, so that they compare, but step times "
        "differ from what the tree now gives. With another `out` folder the suite runs anew.\n"
    )


def _grid(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [list(head), ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(map(str, r)) + " |" for r in rows) + "\n"


def _problems() -> str:
    lines = []
    for split in SPLITS:
        problems = load_split(split)
        families = Counter(p.family for p in problems)
        devices = Counter(parse_cluster(p.cluster).device.name for p in problems)
        sizes = [parse_cluster(p.cluster).n_devices for p in problems]
        limited = sum(p.global_batch < n for p, n in zip(problems, sizes))
        lines.append(
            [split, str(len(problems)), _counts(families), _counts(devices),
             f"{min(sizes):,} to {max(sizes):,}", f"{limited}"]
        )  # fmt: skip
    head = (
        "split",
        "problems",
        "families",
        "devices",
        "cluster sizes",
        "fewer sequences than devices",
    )
    return (
        f"## Problems ({VERSION})\n\nArchitectures of the zoo and random ones around them, batches "
        "limited, tight in memory, or roomy; nothing held out occurs in train or validation.\n\n"
        + _grid(head, lines)
    )


def _counts(counter: Counter) -> str:
    return ", ".join(f"{k} {n}" for k, n in counter.most_common())


def _weights() -> str:
    from graphs.errors import MeshwrightError
    from placement.learned.policy import load_policy

    try:
        policy = load_policy(LEARNED)
    except MeshwrightError as error:
        return f"## Training\n\n{error}\n"
    count = policy.n_parameters
    n_outcomes = [len(outcomes.load(p).index) for p in load_split("train") if _there(p)]
    text = f"## Training\n\nThe shipped policy has {count:,} parameters."
    if n_outcomes:
        text += (
            f" It learned from {sum(n_outcomes):,} judged candidates of {len(n_outcomes)} problems."
        )
    config = json.loads(policy.facts.get("config", "{}"))
    facts = {k: v for k, v in policy.facts.items() if k != "config"} | config
    lines = [[k, str(v)] for k, v in sorted(facts.items()) if len(str(v)) < 120]
    return text + "\n\n" + _grid(("fact", "value"), lines)


def _there(problem) -> bool:
    return outcomes.path_of(problem).exists()


def _pictures(folder: str) -> str:
    return (
        "## Best plan against evaluations and seconds\n\n"
        f"![against evaluations]({folder}/evaluations.png)\n\n"
        f"![against processor seconds]({folder}/seconds.png)\n"
    )


def _targets(runs: Runs) -> str:
    parts = []
    for name in policies(runs):
        if name != LEARNED and not name.startswith("seed"):
            continue
        lines = [
            [t.text, t.measured, {True: "met", False: "**missed**", None: "not measured"}[t.met]]
            for t in targets(runs, name)
        ]
        if lines:
            title = "Targets" if name == LEARNED else f"Targets, policy {name}"
            parts.append(f"## {title}\n\n" + _grid(("on held-out problems", "measured", ""), lines))
    return "\n".join(parts)


def _again(folder: str, command: str, rows: Sequence[Mapping[str, Any]], judge: str) -> str:
    """What a later run of a part of the suite says of targets and of large budgets."""
    runs = Runs(rows)
    lines = [
        [name, t.text, t.measured, "met" if t.met else "**missed**"]
        for name in policies(runs)
        for t in measured_again(runs, name)
    ]
    text = (
        f"## Measured again: {folder}\n\nLater runs of the present search on a part of the suite, by "
        f"`{command}`. {_judged(rows, judge)}\n"
    )
    text += _grid(("policy", "on the problems run", "measured", ""), lines)
    budget = max(int(r["max_evaluations"]) for r in runs.rows if r["optimizer"] not in UNLIMITED)
    if budget > SHALLOW:
        names = [o for o in runs.optimizers if not is_hurried(o)]
        times = [
            [p, *(", ".join(f"{c.at_evaluations(budget):.5g}" for c in runs.curves(p, o))
                  for o in names)]
            for p in runs.problems
        ]  # fmt: skip
        text += f"\nStep times in seconds after {budget:,} evaluations, one for each seed:\n\n"
        text += _grid(("problem", *names), times)
    return text


def _failures(runs: Runs) -> str:
    """Problems on which the learned search ends clearly above the best known plan."""
    lines = []
    cluster = {r["problem"]: r["cluster"] for r in runs.rows}
    model = {r["problem"]: r["model"] for r in runs.rows}
    for p in runs.of_split(None):
        curves = runs.curves(p, LEARNED)
        if not curves:
            continue
        ratio = mean_ratio(runs, LEARNED, lambda c: c.at_evaluations(64), [p])
        if ratio is not None and ratio.value > _CLEARLY:
            best = min(
                (o for o in runs.optimizers if runs.curves(p, o)),
                key=lambda o: runs.logs(
                    p, o, lambda c: c.at_evaluations(c.total_evaluations)
                ).min(),
            )
            seconds = sum(c.total_seconds for c in curves) / len(curves)
            lines.append([p, model[p], cluster[p], f"{ratio.value:.2f}", best, f"{seconds:.1f}"])
    never = sorted(set(runs.split_of) - set(runs.problems))
    text = "## Where it falls short\n\n"
    if lines:
        head = ("problem", "model", "cluster", "ratio at 64", "best by", "seconds spent")
        text += _grid(head, lines) + "\n"
    if never:
        text += f"No optimizer found a fitting plan of {', '.join(never)}.\n\n"
    return text + (
        "Limits of these numbers: only the first problems of each split were run; means at one second "
        "depend on what a run without a plan counts as, since tracing alone takes most of it; a target "
        "counts as met by its mean even where the interval does not exclude the opposite; seconds were "
        "taken on a machine busy with other programs, which makes processor time longer than on an "
        "idle one, for all optimizers; bounds of runs judged by another state of the cost model than "
        "this tree's price hideable communication at nothing and ignore memory, later ones do neither; "
        "meshes of three axes and plans judged by XLA:TPU are not part of this page.\n"
    )


def _training_adds(runs: Runs) -> str:
    problems = [p for p in runs.of_split(None) if runs.curves(p, LEARNED)]
    lines = []
    for other in (UNTRAINED, UNIFORM, "engine", "engine_random"):
        cells = []
        for n in (1, 4, 16, 64):
            at = lambda c, n=n: c.at_evaluations(n)  # noqa: E731
            known = [p for p in problems if runs.curves(p, other)]
            mean = mean_against(runs, LEARNED, at, best_of(runs, [other], at), known)
            cells.append(
                "" if mean is None else f"{mean.value:.3f} ({mean.low:.3f} to {mean.high:.3f})"
            )
        lines.append([f"learned over {other}", *cells])
    text = (
        "## What training adds\n\nStep times of the learned search over those of the same search "
        "with random weights and with no preference, and of message passing under enumerated "
        f"candidates, over all {len(problems)} problems; below 1 the learned one is faster. Random "
        "weights come with the same closed-form estimates and the same correction by what is found, "
        "so that the first row is what training itself adds; the rest is the search's.\n\n"
    )
    return text + _grid(("at evaluations", "1", "4", "16", "64"), lines)


def _tables(runs: Runs) -> str:
    order = [LEARNED, HURRIED, UNTRAINED, UNIFORM, "engine", "engine_random", "evolution",
             "annealing", "tree_search", "random", "random_nodes", "heuristic", "rules"]  # fmt: skip
    parts = []
    for split in (*runs.splits, None):
        n = len(runs.of_split(split))
        title = split or "all splits"
        by_count = table(
            runs,
            "evaluations",
            EVALUATIONS,
            [o for o in order if o not in (HURRIED, "rules")],
            split,
        )
        by_clock = table(runs, "seconds", SECONDS, order, split)
        parts.append(
            f"## {title}: {n} problems\n\n"
            + _grid(("ratio at evaluations", *map("{:,}".format, EVALUATIONS)), by_count)
            + "\n"
            + _grid(("ratio at seconds", *map("{:g}".format, SECONDS)), by_clock)
        )
    return "\n".join(parts)


def _ablations(runs: Runs) -> str:
    """Policies beside the shipped one, over the problems on which all of them ran."""
    names = [n for n in policies(runs) if n != LEARNED]
    if not names:
        return ""
    names = [LEARNED, *names, UNTRAINED, UNIFORM]
    common = [p for p in runs.of_split(None) if all(runs.curves(p, n) for n in names)]
    lines = []
    for name in names:
        means = [
            mean_ratio(runs, name, lambda c, n=n: c.at_evaluations(n), common) for n in (1, 16, 64)
        ]
        lines.append([name, *map(cell, means)])
    head = ("ratio at evaluations", "1", "16", "64")
    return f"## Other policies, {len(common)} problems\n\n" + _grid(head, lines)
