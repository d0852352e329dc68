"""What XLA's compiler makes of candidates: recorded schedules of small programs.

    python -m placement.learned.compiled_outcomes split=compiled_train out=FOLDER

The learned search plans each problem; of the candidates that it opened some are compiled for their
cluster by XLA:GPU, as far as its schedule, pinned as the product would apply them: the fastest few and
some that the simulation finds slower. Recorded are the step time of the compiler's schedule and
whether the program fits. One ``.json`` file per problem is written under the folder, so a stopped run
goes on where it was. Where the compiler fails for another reason than memory the candidate is recorded
with what it said and not learned from.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from graphs.errors import MeshwrightError
from placement.compile_cache import write_atomically
from placement.learned.problems import PlanningProblem, load_split

if TYPE_CHECKING:
    from placement.learned.dataset import Example
    from placement.learned.instance import Instance, Outcome, Outer

RANKS = (0, 1, 2, 4, 8)
"""Places, by simulated step time, of the candidates that are compiled."""
EVALUATIONS = 12
"""Plans that the search may judge before."""
FOLDER = "records"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledOutcome:
    """One candidate, predicted and compiled. Bytes are per device."""

    index: int
    """Into Instance.outers."""
    remat: str
    microbatches: int
    mesh_shape: dict[str, int]
    simulated_s: float
    simulated_bytes: float
    status: str
    """``ok``, ``out_of_memory`` or ``failed``."""
    compiled_s: float | None
    """Step time of the compiler's schedule; None where it did not compile."""
    compiled_bytes: float | None
    message: str
    """The compiler's sentence where the status is not ok."""


def compile_candidate(
    instance: Instance, index: int, outcome: Outcome, *, timeout_s: float = 900.0
) -> CompiledOutcome:
    """Compile the completed plan of a candidate for its cluster."""
    from placement.compile import SCHEDULE
    from placement.verify import compile_plan

    outer = instance.outers[index]
    plan, step, args = _plan(instance, outer, outcome)
    compiled, scheduled = compile_plan(
        plan, step, *args, timeout_s=timeout_s, cache=False, until=SCHEDULE
    )
    status = compiled.status
    if status == "ok" and compiled.peak_bytes > instance.cluster.device.hbm_available_bytes:
        status = "out_of_memory"
    return CompiledOutcome(
        index=index,
        remat=str(outer.remat),
        microbatches=outer.microbatches,
        mesh_shape=dict(plan.mesh_shape),
        simulated_s=outcome.step_time_s,
        simulated_bytes=outcome.memory_bytes,
        status=status,
        compiled_s=scheduled.step_time_s if scheduled else None,
        compiled_bytes=float(compiled.peak_bytes) if scheduled else None,
        message=compiled.message[:200],
    )


def _plan(instance: Instance, outer: Outer, outcome: Outcome):
    """(plan, train step, abstract arguments) of a completed candidate."""
    from cost_model.simulate import Simulator
    from cost_model.tables import build_tables
    from graphs.zoo import build_train_step
    from placement.candidate import Candidate, plan_of
    from placement.learned.instance import EXPOSURE

    problem = instance.problem
    step, args, donated = build_train_step(
        problem.config(),
        global_batch=problem.global_batch,
        seq_len=problem.seq_len,
        optimizer=problem.optimizer,
        microbatches=outer.microbatches,
        remat=str(outer.remat),
        scan=problem.scan,
    )
    now = time.monotonic()
    tables = build_tables(  # those of the instance do not keep what its plan reports
        instance.analysis(outer.remat, outer.microbatches),
        outer.layout,
        usage_limit_bytes=instance.limit_bytes,
        exposure=EXPOSURE,
    )
    best = Candidate(
        layout=outer.layout,
        simulator=Simulator.of(tables),
        choices=outcome.choices,
        optimizer="search",
        step_time_s=outcome.step_time_s,
        memory_bytes=outcome.memory_bytes,
        score=outcome.step_time_s,
        table_cost_s=0.0,
        table_bound_s=0.0,
    )
    plan = plan_of(
        best,
        [best],
        program=(step, args, donated),
        objective="time",
        pin_operands=True,
        limit_bytes=instance.limit_bytes,
        lower_bound_s=0.0,
        evaluations=1,
        planning_time_s=time.monotonic() - now,
        status="feasible" if outcome.fits else "does not fit",
    )
    return plan, step, args


def chosen(opened: dict[int, Outcome], ranks: Sequence[int] = RANKS) -> list[int]:
    """Candidates at the given places by simulated step time, of those that fit.

    Candidates of one variant and mesh shape that are equally fast differ in the order of devices only;
    one of them stands for all.
    """
    fitting = sorted((o.step_time_s, k) for k, o in opened.items() if o.fits)
    different = [k for n, (t, k) in enumerate(fitting) if not n or t > fitting[n - 1][0]]
    return [different[r] for r in ranks if r < len(different)]


def record(problem: PlanningProblem, *, timeout_s: float = 900.0) -> list[CompiledOutcome]:
    """Plan a problem and compile some of its candidates."""
    from placement.learned.instance import Instance
    from placement.learned.search import plan_instance

    instance = Instance(problem)
    found = plan_instance(instance, max_evaluations=EVALUATIONS, time_limit_s=np.inf)
    opened = dict(found.opened)
    return [compile_candidate(instance, k, opened[k], timeout_s=timeout_s) for k in chosen(opened)]


def path_of(folder: pathlib.Path, problem: PlanningProblem) -> pathlib.Path:
    return folder / FOLDER / f"{problem.name}.json"


def load(folder: pathlib.Path, problem: PlanningProblem) -> list[CompiledOutcome]:
    """Recorded outcomes. MeshwrightError where there are none or the file is not one of them."""
    path = path_of(folder, problem)
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [CompiledOutcome(**row) for row in rows]
    except (OSError, ValueError, TypeError) as error:
        raise MeshwrightError(
            f"no compiled outcomes of {problem.name} at {path}; run "
            f"python -m placement.learned.compiled_outcomes split={problem.split} out={folder}"
        ) from error


def load_examples(folder: pathlib.Path, split: str) -> list[Example]:
    """Examples whose times and fits are the compiler's, of the problems recorded."""
    from placement.learned.dataset import Example, observed

    found = []
    for problem in load_split(split):
        if not path_of(folder, problem).exists():
            continue
        rows = [r for r in load(folder, problem) if r.status != "failed"]
        if not rows:
            continue
        arrays, ideal_s, limit_bytes = observed(problem)
        fits = np.array([r.status == "ok" for r in rows])
        times = [r.simulated_s if r.compiled_s is None else r.compiled_s for r in rows]
        used = [r.simulated_bytes if r.compiled_bytes is None else r.compiled_bytes for r in rows]
        found.append(
            Example(
                name=problem.name,
                arrays=arrays,
                ideal_s=ideal_s,
                index=np.array([r.index for r in rows], np.int64),
                step_time_s=np.array(times, np.float64),
                memory_ratio=np.array(used, np.float64) / limit_bytes,
                fits=fits,
            )
        )
    if not found:
        raise MeshwrightError(
            f"no compiled outcomes of split {split!r} under {folder}; run "
            f"python -m placement.learned.compiled_outcomes split={split} out={folder}"
        )
    return found


def main(argv: list[str]) -> int:
    """Record what is missing of a split."""
    given: dict[str, Any] = dict(a.split("=", 1) for a in argv)
    folder = pathlib.Path(given.get("out", "out/compiled_outcomes"))
    problems = load_split(given.get("split", "compiled_train"))
    for n, problem in enumerate(problems[: int(given.get("problems", len(problems)))]):
        path = path_of(folder, problem)
        if path.exists():
            continue
        began = time.monotonic()
        rows = record(problem)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps([dataclasses.asdict(r) for r in rows], indent=1) + "\n"
        write_atomically(path, text.encode())
        ratios = [r.compiled_s / r.simulated_s for r in rows if r.compiled_s is not None]
        print(
            f"{n + 1}/{len(problems)} {problem.name} {problem.cluster}: compiled over simulated "
            f"{', '.join(f'{x:.2f}' for x in ratios) or 'nothing'}; "
            f"{time.monotonic() - began:.0f} s",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
