"""Let a policy act on the training problems, and keep what its candidates turn out to be worth.

    python -m placement.learned.collect policy=WEIGHTS [evaluations=8] [split=train]

Recorded samples are spread over the whole space; a policy that has learned from them prefers regions
that they hardly touch. Here the learned search runs a few evaluations on every training problem, and
the candidates it opens join the recorded ones, in files of their own under the cache folder
(``learned/<version>/visited``). A stopped run goes on where it was; several processes may run.
"""

from __future__ import annotations

import io
import pathlib
import sys
import time
import zipfile
from typing import Any

import numpy as np

from graphs.errors import MeshwrightError
from placement.compile_cache import cache_dir, write_atomically
from placement.learned.problems import VERSION, PlanningProblem, load_split

FIELDS = ("index", "step_time_s", "memory_bytes", "fits")


def path_of(problem: PlanningProblem) -> pathlib.Path:
    """The file of a problem."""
    return cache_dir("learned", VERSION, "visited") / f"{problem.name}.npz"


def load(problem: PlanningProblem) -> dict[str, np.ndarray]:
    """FIELDS of the candidates visited; empty where none are recorded."""
    try:
        with np.load(path_of(problem), allow_pickle=False) as file:
            return {k: file[k] for k in FIELDS}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise MeshwrightError(
            f"the visited candidates at {path_of(problem)} cannot be read; remove the file"
        ) from error


def visited(split: str, name: str) -> bool:
    """Whether the policy of this name has visited all problems of a split."""
    return all(_mark(p, name).exists() for p in load_split(split))


def _mark(problem: PlanningProblem, name: str) -> pathlib.Path:
    return path_of(problem).with_suffix(f".{name}")


def visit(problem: PlanningProblem, policy: str, evaluations: int) -> dict[str, np.ndarray]:
    """Search a problem for a few evaluations; what was known before is kept."""
    from placement.learned.instance import Instance
    from placement.learned.search import plan_instance

    found = plan_instance(
        Instance(problem), max_evaluations=evaluations, time_limit_s=np.inf, policy=policy
    )
    opened = found.opened
    new = {
        "index": np.array(list(opened), np.int64),
        "step_time_s": np.array([o.step_time_s for o in opened.values()]),
        "memory_bytes": np.array([o.memory_bytes for o in opened.values()]),
        "fits": np.array([o.fits for o in opened.values()], bool),
    }
    old = load(problem)
    if old:
        fresh = ~np.isin(old["index"], new["index"])
        new = {k: np.concatenate([old[k][fresh], new[k]]) for k in FIELDS}
    return new


def main(argv: list[str]) -> int:
    """Visit the problems that this policy has not visited yet."""
    given = dict(a.split("=", 1) for a in argv)
    policy, evaluations = given.get("policy", "learned"), int(given.get("evaluations", "8"))
    mark = pathlib.Path(policy).resolve().parent.name if policy != "learned" else policy
    problems = load_split(given.get("split", "train"))
    for n, problem in enumerate(problems):
        done = _mark(problem, mark)
        try:
            done.touch(exist_ok=False)  # claimed: another process need not do it
        except FileExistsError:
            continue
        began = time.monotonic()
        try:
            found = visit(problem, policy, evaluations)
            buffer = io.BytesIO()
            np.savez_compressed(buffer, **dict[str, Any](found))
            write_atomically(path_of(problem), buffer.getvalue())
        except BaseException:
            done.unlink(missing_ok=True)
            raise
        fitting = found["step_time_s"][found["fits"]]
        best = fitting.min() if len(fitting) else float("nan")
        print(
            f"{n + 1}/{len(problems)} {problem.name} {problem.cluster}: best of "
            f"{len(found['index'])} visited {best:.4g} s; {time.monotonic() - began:.1f} s",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
