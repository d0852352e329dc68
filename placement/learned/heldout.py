"""suite=heldout: every optimizer on problems that the policy has not seen.

One run is a problem, an optimizer and a seed; it records the whole curve of its best plan against
evaluations and against processor seconds, so one run answers for every smaller budget. Runs are kept
as ``rows/PROBLEM.OPTIMIZER.SEED.json`` under ``out`` and are not repeated; a stopped suite goes on
where it was. All runs on one problem share traced programs and tables, whose seconds are charged to
each of them (:mod:`placement.learned.instance`).

* ``engine`` opens every candidate there is, so that the best plan known of each problem is the best
  near-optimal completion of the whole outer space, or better.
* Optimizers whose result depends on the seed run with ``seeds`` of them.
* ``deep`` problems of each split are also given ``deep_evaluations``, with ``deep_seeds``.
* ``learned`` is the shipped policy; ``untrained`` has the same network with random weights,
  ``uniform`` no preference at all; ``learned_1`` is the policy of another training seed, where its
  weights are given. They run through the same search.

Policies need weights; what is missing is skipped and said.
"""

from __future__ import annotations

import hashlib
import heapq
import importlib.resources
import inspect
import json
import math
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from graphs.collecting import settle
from graphs.errors import MeshwrightError
from placement.compile_cache import write_atomically
from placement.learned.anytime import Curve
from placement.learned.problems import SPLITS, PlanningProblem, load_split

EVALUATION_SPLITS = tuple(s for s in SPLITS if s != "train")


NO_LIMIT = 1 << 30
COMMAND = "command.txt"
"""File of a folder that says by what its runs were made."""
_COMMAND = "meshwright evaluate suite=heldout"
BOUND_S, BOUND_ROUNDS = 1.0, 32
"""Seconds of one round of a candidate's bound, and most rounds."""


def evaluate(
    *,
    out: str = "out/heldout",
    splits: Sequence[str] | None = None,
    problems: int = 20,
    optimizers: Sequence[str] | None = None,
    seeds: int = 5,
    evaluations: int = 64,
    deep: int = 0,
    deep_evaluations: int = 4096,
    deep_seeds: int = 2,
    seconds: float = 600.0,
    max_axes: int = 2,
    bounds: int = 0,
    policies: Mapping[str, str | None] | None = None,
    document: str | None = None,
    again: Sequence[str] | None = None,
    compiled: str | None = None,
) -> int:
    """Run what is missing, then write tables, pictures and, if asked for, the document.

    Args:
      out: folder of rows and results.
      splits: names, validation and all held-out ones where None.
      problems: how many of each split, the first ones.
      optimizers: names, all where None.
      seeds: runs of optimizers whose result depends on the seed.
      evaluations: plans that one run may judge.
      deep: problems of each split with `deep_evaluations` as well.
      deep_evaluations: plans that a deep run may judge.
      deep_seeds: seeds of deep runs.
      seconds: processor seconds that one run may take.
      max_axes: most mesh axes of a candidate; 2 is what ``placement.optimize`` searches.
      bounds: problems of each split whose lower bound over all candidates is computed.
      policies: name -> weights file, for policies beside the shipped one.
      document: page to write.
      again: folders of later runs of a part of the suite, whose results the page adds.
      compiled: folder of ``meshwright train_policy compiled=``, whose comparison the page adds.

    Returns:
      0.
    """
    from placement.learned import compiled_report, heldout_page, heldout_report
    from placement.learned.baselines import BASELINES
    from placement.learned.contenders import hurried_name, traced_name

    given = _arguments(locals())
    folder = pathlib.Path(out)
    (folder / "rows").mkdir(parents=True, exist_ok=True)
    wanted = list(splits or EVALUATION_SPLITS)
    if unknown := sorted(set(wanted) - set(EVALUATION_SPLITS)):
        raise MeshwrightError(
            f"no split {unknown[0]!r} to evaluate; use one of {', '.join(EVALUATION_SPLITS)}"
        )
    runners: dict[str, Callable[..., Curve]] = {**BASELINES, **_learned(dict(policies or {}))}
    # not run unless they are named
    asked_for = {name(p) for p in policies or {} for name in (hurried_name, traced_name)}
    names = list(optimizers or [n for n in runners if n not in asked_for])
    if missing := sorted(set(names) - set(runners)):
        raise MeshwrightError(f"no optimizer {missing[0]!r}; use one of {', '.join(runners)}")
    warm = False
    for problem, rank in _in_turn(wanted, problems):
        todo = list(
            _missing(
                folder, problem, names, seeds, evaluations,
                deep_seeds if rank < deep else 0, deep_evaluations,
            )
        )  # fmt: skip
        wants_bound = rank < bounds and not _path(folder, problem.name, "bound", 0).exists()
        if (todo or wants_bound) and not warm:
            _warm_up()
            warm = True
        if todo or wants_bound:
            _run(folder, problem, todo, runners, max_axes, wants_bound, seconds)
    rows = load_rows(folder)
    heldout_report.write(folder, rows)
    if problems:
        write_atomically(folder / COMMAND, f"{_COMMAND} {given}\n".encode())
    if document:
        later = {f: (_made_by(pathlib.Path(f)), load_rows(pathlib.Path(f))) for f in again or ()}
        page = pathlib.Path(document)
        section = compiled_report.section(compiled, page.parent) if compiled else ""
        made_by = f"{_COMMAND} {given}"
        heldout_page.write_page(page, rows, made_by, folder, judge_id(), later, section)
    return 0


def _made_by(folder: pathlib.Path) -> str:
    try:
        return (folder / COMMAND).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise MeshwrightError(
            f"{folder / COMMAND} does not say how its runs were made; run the suite there"
        ) from error


def _arguments(given: Mapping[str, Any]) -> str:
    """Arguments of :func:`evaluate` that are not its defaults, as the command line takes them."""
    defaults = inspect.signature(evaluate).parameters
    return " ".join(
        f"{k}={_text(v)}" for k, v in given.items() if k in defaults and v != defaults[k].default
    )


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return "'{" + ", ".join(f"{k}: {v}" for k, v in value.items()) + "}'"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "'[" + ",".join(map(str, value)) + "]'"
    return str(value)


def load_rows(folder: pathlib.Path) -> list[dict[str, Any]]:
    """All runs recorded in a folder, each with its ``curve`` as a Curve."""
    rows = []
    for path in sorted((folder / "rows").glob("*.json")):
        row = json.loads(path.read_text(encoding="utf-8"))
        if "curve" in row:
            row["curve"] = Curve.from_json(json.dumps(row["curve"]))
        rows.append(row)
    if not rows:
        raise MeshwrightError(f"no runs under {folder}; let the suite run some")
    return rows


def _in_turn(splits: Sequence[str], count: int) -> Iterator[tuple[PlanningProblem, int]]:
    """The first problems of each split, splits in turn, so that a stopped suite is balanced."""
    lists = [load_split(s)[:count] for s in splits]
    for rank in range(max(map(len, lists))):
        for problems in lists:
            if rank < len(problems):
                yield problems[rank], rank


def _missing(folder, problem, names, seeds, evaluations, deep_seeds, deep_evaluations):
    """(optimizer, seed, evaluations) of runs without a row, those that fill the store first."""
    from placement.learned.baselines import BASELINES, SCORING, SEEDED, UNLIMITED
    from placement.learned.contenders import LEARNED, is_hurried

    for name in sorted(names, key=lambda n: n != "engine"):
        fixed = name in BASELINES and name not in SEEDED
        deepens = name == LEARNED or (name in SCORING and name in SEEDED)
        for seed in range(1 if fixed or is_hurried(name) else seeds):
            budget = deep_evaluations if deepens and seed < deep_seeds else evaluations
            if name in UNLIMITED:
                budget = NO_LIMIT
            path = _path(folder, problem.name, name, seed)
            if path.exists():
                row = json.loads(path.read_text(encoding="utf-8"))
                if row["max_evaluations"] >= budget:
                    continue
            yield name, seed, budget


def _run(folder, problem, todo, runners, max_axes: int, wants_bound: bool, seconds: float) -> None:
    from placement.learned.instance import Instance

    settle()  # what earlier problems left is no work of this one
    instance = Instance(problem, max_axes=max_axes)
    common = dict(
        problem=problem.name,
        split=problem.split,
        family=problem.family,
        cluster=problem.cluster,
        n_devices=instance.cluster.n_devices,
        model=problem.model["name"],
        candidates=len(instance.outers),
        max_axes=max_axes,
        judge=judge_id(),
    )
    for name, seed, budget in todo:
        curve = runners[name](
            instance.fork(), max_evaluations=budget, time_limit_s=seconds, seed=seed
        )
        row = common | dict(
            optimizer=name, seed=seed, max_evaluations=budget, time_limit_s=seconds,
            traced_s=instance.tracing_s, curve=curve.to_dict(),
        )  # fmt: skip
        _write(_path(folder, problem.name, name, seed), row)
        best = curve.step_time_s[-1] if curve.step_time_s else float("nan")
        print(
            f"{problem.name} {name} seed {seed}: {best:.5g} s after {curve.total_evaluations} "
            f"evaluations, {curve.total_seconds:.1f} s",
            flush=True,
        )
    if wants_bound:
        bound = bound_s(instance)
        proven = bound if math.isfinite(bound) else None  # it is infinite where nothing fits
        row = common | dict(optimizer="bound", seed=0, bound_s=proven)
        _write(_path(folder, problem.name, "bound", 0), row)


def _warm_up() -> None:
    """Load and compile what the first run of a process would otherwise be charged for, by a problem
    that none of the runs is on: what JAX keeps of a program would make tracing it again cheaper."""
    from placement.learned.baselines import annealing
    from placement.learned.instance import Instance
    from placement.solver.preparation import prepare

    prepare()
    instance = Instance(load_split("train")[0], max_axes=1)
    annealing(instance, max_evaluations=4, time_limit_s=30.0, seed=0)
    instance.evaluate(instance.outers[0])


_UNREAD = re.compile(r"jobs/|data/|energy|.*(step_bands|collectives_published|critical)")


def judge_id() -> str:
    """Names the state of the judge: a hash of the sources and data of graphs and cost_model, those
    of whole jobs, energy, error bands and paths left out, which it does not read."""
    digest = hashlib.sha256()
    for package in ("graphs", "cost_model"):
        root = pathlib.Path(str(importlib.resources.files(package)))
        for path in sorted(root.rglob("*")):
            name = path.relative_to(root).as_posix()
            if path.suffix in (".py", ".yaml", ".json", ".csv") and not _UNREAD.match(name):
                digest.update(name.encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def bound_s(instance) -> float:
    """A lower bound of the simulated step time over all candidates.

    The candidate of the least bound is always the next to get a round, until that bound is the best
    plan's, or it has had BOUND_ROUNDS.
    """
    from placement.bound import rounds

    best = math.inf
    starts = []
    for outer in instance.outers:
        outcome = instance.evaluate(outer)
        best = min(best, outcome.step_time_s) if outcome.fits else best
        starts.append(outcome.choices)
    queue = [(0.0, 0, k) for k in range(len(starts))]  # bound, rounds, candidate
    running = {}
    while True:
        bound, count, k = heapq.heappop(queue)
        if bound >= best or count >= BOUND_ROUNDS:
            return min(best, bound)
        outer = instance.outers[k]
        if k not in running:
            running[k] = rounds(
                instance.simulator(outer),
                starts[k],
                limit_bytes=instance.limit_bytes,
                time_limit_s=BOUND_S,
                plans=False,
            )
        found = next(running[k])
        judged = instance.judge(outer, found.choices)
        best = min(best, judged.step_time_s) if judged.fits else best
        bound = max(bound, found.bound_s)
        if bound >= best:
            del running[k]  # it will not be looked at again
        heapq.heappush(queue, (bound, count + 1, k))


def _path(folder: pathlib.Path, problem: str, optimizer: str, seed: int) -> pathlib.Path:
    return folder / "rows" / f"{problem}.{optimizer}.{seed}.json"


def _write(path: pathlib.Path, row: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(row, separators=(",", ":")).encode())


def _learned(extra: dict[str, str | None]) -> dict[str, Callable[..., Curve]]:
    """The learned search under each policy there is."""
    from placement.learned import contenders

    found, notes = contenders.contenders(extra)
    for note in notes:
        print(note, file=sys.stderr)
    return found
