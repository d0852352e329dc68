"""What candidates of a problem turn out to be worth: recorded data for training.

    python -m placement.learned.outcomes split=train

For each problem a stratified sample of outer candidates (four program variants; in each of them
meshes of two and three axes, from even to uneven) is completed by the engine and judged by the
simulation. One ``.npz`` file per problem is written under the cache folder, ``learned/<version>``,
so a stopped run goes on where it was and several processes may run at once.
"""

from __future__ import annotations

import dataclasses
import io
import pathlib
import sys
import time
import zipfile

import numpy as np

from graphs.errors import MeshwrightError
from placement.compile_cache import cache_dir, write_atomically
from placement.learned.instance import Instance, Outer
from placement.learned.problems import VERSION, PlanningProblem, load_splits

N_VARIANTS = 4
PER_VARIANT = ((2, 2), (3, 1))
"""(mesh axes, candidates of them) in each variant; the first variant has more."""
IN_FIRST_VARIANT = ((1, 1), (2, 3), (3, 1))
KEPT_PLANS = 3
_CLAIMED_S = 900.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcomes:
    """K judged candidates of one problem."""

    index: np.ndarray
    """[K] int64 into Instance.outers."""
    step_time_s: np.ndarray
    """[K] float64; of no meaning where it does not fit."""
    memory_bytes: np.ndarray
    """[K] float64."""
    fits: np.ndarray
    """[K] bool."""
    seconds: np.ndarray
    """[K] float64 processor seconds that each took."""
    best: np.ndarray
    """[<=KEPT_PLANS] int64 positions in K of the fastest that fit, fastest first."""
    choices: tuple[np.ndarray, ...]
    """for each of `best` the choices, [nodes] int64."""


def folder() -> pathlib.Path:
    """Where outcomes are kept."""
    return cache_dir("learned", VERSION)


def path_of(problem: PlanningProblem) -> pathlib.Path:
    return folder() / f"{problem.name}.npz"


def load(problem: PlanningProblem) -> Outcomes:
    """Recorded outcomes of a problem. MeshwrightError where there are none."""
    path = path_of(problem)
    try:
        with np.load(path, allow_pickle=False) as file:
            data = {k: file[k] for k in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise MeshwrightError(
            f"no outcomes of {problem.name} at {path}; run "
            f"python -m placement.learned.outcomes split={problem.split}"
        ) from error
    choices = tuple(data[f"choices_{n}"] for n in range(len(data["best"])))
    names = [f.name for f in dataclasses.fields(Outcomes) if f.name != "choices"]
    return Outcomes(choices=choices, **{k: data[k] for k in names})


def sample(instance: Instance, rng: np.random.Generator) -> list[int]:
    """Indices into instance.outers, stratified."""
    variants = list(dict.fromkeys((o.remat, o.microbatches) for o in instance.outers))
    chosen = [variants[0]]
    # one of each rematerialisation, microbatches at random, the heaviest memory saver among them
    for remat in dict.fromkeys(r for r, _ in variants):
        others = [v for v in variants if v[0] == remat and v not in chosen]
        if others and len(chosen) < N_VARIANTS:
            chosen.append(others[rng.choice(len(others))])
    picked: list[int] = []
    for n, variant in enumerate(chosen):
        for axes, count in IN_FIRST_VARIANT if n == 0 else PER_VARIANT:
            pool = [
                i
                for i, o in enumerate(instance.outers)
                if (o.remat, o.microbatches) == variant and len(o.layout.mesh.axis_sizes) == axes
            ]
            picked += _spread(rng, instance.outers, pool, count)
    return picked


def _spread(
    rng: np.random.Generator, outers: tuple[Outer, ...], pool: list[int], count: int
) -> list[int]:
    """`count` of the pool, one from each part of it from even to uneven meshes."""
    pool = sorted(pool, key=lambda i: max(outers[i].layout.mesh.axis_sizes))
    if not pool:
        return []
    parts = np.array_split(np.array(pool), min(count, len(pool)))
    return [int(rng.choice(part)) for part in parts]


def record(problem: PlanningProblem) -> Outcomes:
    """Judge a sample of candidates."""
    instance = Instance(problem)
    # the number in the name seeds, so that every process draws the same sample
    rng = np.random.default_rng([len(problem.split), int(problem.name.rsplit("_", 1)[1])])
    index = sample(instance, rng)
    found = [instance.evaluate(instance.outers[i]) for i in index]
    fits = np.array([f.fits for f in found], bool)
    time_s = np.array([f.step_time_s for f in found])
    order = np.argsort(np.where(fits, time_s, np.inf), kind="stable")
    best = order[: min(KEPT_PLANS, int(fits.sum()))]
    return Outcomes(
        index=np.array(index, np.int64),
        step_time_s=time_s,
        memory_bytes=np.array([f.memory_bytes for f in found]),
        fits=fits,
        seconds=np.array([f.seconds for f in found]),
        best=best.astype(np.int64),
        choices=tuple(found[i].choices for i in best),
    )


def store(problem: PlanningProblem, outcomes: Outcomes) -> None:
    """Write the file of a problem."""
    data = {
        f.name: getattr(outcomes, f.name)
        for f in dataclasses.fields(Outcomes)
        if f.name != "choices"
    }
    data |= {f"choices_{n}": c for n, c in enumerate(outcomes.choices)}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **data)
    write_atomically(path_of(problem), buffer.getvalue())


def _claim(problem: PlanningProblem) -> bool:
    """Whether this process takes the problem; a claim of a dead process lapses."""
    mark = folder() / f".{problem.name}.claim"
    try:
        if time.time() - mark.stat().st_mtime < _CLAIMED_S:
            return False
        mark.unlink(missing_ok=True)
    except FileNotFoundError:
        pass
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def main(argv: list[str]) -> int:
    """Record what is missing of the splits named."""
    problems = load_splits(argv)
    for n, problem in enumerate(problems):
        if path_of(problem).exists() or not _claim(problem):
            continue
        began, spent = time.monotonic(), time.process_time()
        outcomes = record(problem)
        store(problem, outcomes)
        (folder() / f".{problem.name}.claim").unlink(missing_ok=True)
        best = outcomes.step_time_s[outcomes.best[0]] if len(outcomes.best) else float("nan")
        print(
            f"{n + 1}/{len(problems)} {problem.name} {problem.cluster}: {len(outcomes.index)} "
            f"candidates, {int(outcomes.fits.sum())} fit, best {best:.4g} s; "
            f"{time.monotonic() - began:.1f} s, {time.process_time() - spent:.1f} of processor",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
