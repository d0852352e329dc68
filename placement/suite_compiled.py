"""suite=compiled: every optimizer's plan compiled by XLA and timed by its schedule.

For each case (``suite_compiled_cases.yaml``: a real train step and a cluster) each optimizer plans,
XLA's compiler for that cluster compiles the plan, and :mod:`placement.schedule` times what it made.

* ``plan`` is the product: ``placement.optimize`` with its default optimizer.
* The hand-tuned rules are written as experts write them: shardings of arguments and results and
  constraints on activations. What only a planner pins, the copy of a tensor that one operation
  reads, is left to XLA's propagation. ``RULE@pinned`` pins that too, so that the program is the
  one that the cost model scored; such rows stand against no plan, they are for
  :mod:`placement.compiled_fidelity`.
* ``autosharding`` is XLA's own auto-sharding in its own environment
  (``python -m placement.peers.setup_env``), given the same program without shardings.

One file per (case, optimizer) is written under ``out/rows`` as soon as it is known, and what was
planned under ``out/records`` (:mod:`placement.compiled_fidelity`), so a stopped run goes on where
it was; compiles are cached besides. ``redo=[plan]`` plans those again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.resources
import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from graphs.errors import MeshwrightError
from placement import compile_cache
from placement.compile_cache import write_atomically
from placement.suite_rows import (
    BASELINES,
    PEER,
    PINNED,
    PLAN,
    Row,
    as_csv,
    as_line,
    is_pinned,
    is_plan,
    load_rows,
    print_table,
    summarize,
)


def load_cases(path: str | None = None) -> dict[str, dict[str, Any]]:
    """The cases by name. MeshwrightError where the file is not a mapping of cases."""
    import yaml

    if path is None:
        file = importlib.resources.files("placement") / "suite_compiled_cases.yaml"
        text = file.read_text(encoding="utf-8")
    else:
        try:
            text = pathlib.Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise MeshwrightError(
                f"the cases file {path} cannot be read ({error.strerror}); give another"
            ) from error
    cases = yaml.safe_load(text)
    if not isinstance(cases, dict) or not all(
        isinstance(c, dict) and {"cluster", "model", "step"} <= set(c) for c in cases.values()
    ):
        raise MeshwrightError(
            f"the cases file {path} must map names to cluster, model and step of each case"
        )
    return cases


def evaluate(
    *,
    out: str = "out/compiled",
    file: str | None = None,
    cases: Sequence[str] | None = None,
    optimizers: Sequence[str] | None = None,
    redo: Sequence[str] = (),
    optimizer: str | None = None,
    time_limit_s: float = 10.0,
    timeout_s: float = 1800.0,
    meshes: int = 0,
    results: str | None = None,
) -> int:
    """Run what is missing, then write ``results.csv`` and ``summary.json`` and print the table.

    Args:
      out: folder of rows and results.
      file: another file of cases.
      cases: names of cases, all where None.
      optimizers: ``plan``, ``autosharding`` and names of rules, these also as ``RULE@pinned``; where
        None all but the pinned ones.
      redo: optimizers whose rows are made again.
      optimizer: what ``plan`` uses, its default where None.
      time_limit_s: of planning.
      timeout_s: of one compile.
      meshes: other meshes of each case that are planned and compiled as well, every operand
        pinned, to compare the cost model with (`placement.compiled_fidelity`). Their rows are named
        ``plan@data=4,model=2`` and stand against no rule.
      results: also copy the results to this folder.

    Returns:
      0 if every row is there, 1 if some case failed for a reason other than memory.
    """
    every = load_cases(file)
    unknown = sorted(set(cases or ()) - set(every))
    if unknown:
        raise MeshwrightError(f"no case {unknown[0]!r}; use one of {', '.join(every)}")
    wanted = list(cases or every)
    names = list(optimizers or (PLAN, PEER, *BASELINES))
    folder = pathlib.Path(out)
    (folder / "rows").mkdir(parents=True, exist_ok=True)
    for name in wanted:
        own = [*names, *(_other_meshes(name, every[name], meshes, time_limit_s) if meshes else ())]
        missing = {
            which: folder / "rows" / f"{name}.{which}.json"
            for which in own
            if which in redo or not (folder / "rows" / f"{name}.{which}.json").exists()
        }
        # Plans are made first, so that the compiler is not kept from others while planning.
        ready = [
            (
                place,
                _prepare(
                    name,
                    every[name],
                    which,
                    optimizer=optimizer,
                    time_limit_s=time_limit_s,
                    timeout_s=timeout_s,
                    records=folder / "records",
                ),
            )
            for which, place in missing.items()
        ]
        with compile_cache.libtpu_lock() if ready else contextlib.nullcontext():
            for place, compile_it in ready:
                row = compile_it()
                write_atomically(place, json.dumps(dataclasses.asdict(row), indent=1).encode())
                print(as_line(row), flush=True)
    rows = load_rows(folder, every)
    summary = summarize(rows)
    for target in (folder, *((pathlib.Path(results),) if results else ())):
        target.mkdir(parents=True, exist_ok=True)
        write_atomically(target / "results.csv", as_csv(rows).encode())
        write_atomically(target / "summary.json", json.dumps(summary, indent=1).encode())
    print_table(summary)
    return int(any(r.status in ("failed", "error") for r in rows if r.case in wanted))


def _prepare(
    name: str,
    case: Mapping[str, Any],
    which: str,
    *,
    optimizer: str | None,
    time_limit_s: float,
    timeout_s: float,
    records: pathlib.Path,
) -> Callable[[], Row]:
    """Plan; what is returned compiles and makes the row."""
    from graphs.zoo import ModelConfig, build_train_step

    program = build_train_step(ModelConfig(name=name, **case["model"]), **case["step"])
    try:
        if which == PEER:
            return lambda: _guarded(
                name, case, which, lambda: _peer(name, case, program, timeout_s)
            )
        plan, planning = _plan(case["cluster"], program, which, optimizer, time_limit_s)
    except MeshwrightError as error:
        row = _row(name, case, which, status="error", message=str(error))
        return lambda: row
    return lambda: _guarded(
        name,
        case,
        which,
        lambda: _compile(name, case, which, program, plan, planning, timeout_s, records),
    )


def _guarded(name: str, case: Mapping[str, Any], which: str, make: Callable[[], Row]) -> Row:
    try:
        return make()
    except MeshwrightError as error:
        return _row(name, case, which, status="error", message=str(error))


def _other_meshes(name: str, case: Mapping[str, Any], count: int, time_limit_s: float) -> list[str]:
    """Names of plans on other meshes: evenly from the best to those predicted twice as slow."""
    from graphs.zoo import ModelConfig, build_train_step

    program = build_train_step(ModelConfig(name=name, **case["model"]), **case["step"])
    plan, _ = _plan(case["cluster"], program, PLAN, None, time_limit_s)
    slowest = 2.0 * plan.estimate.step_time_s
    shapes = [
        ",".join(f"{axis}={n}" for axis, n in found["mesh_shape"].items())
        for found in sorted(plan.alternatives, key=lambda a: a["step_time_s"])
        if found["fits"] and found["step_time_s"] <= slowest
        and found["mesh_shape"] != plan.mesh_shape
    ]  # fmt: skip
    shapes = list(dict.fromkeys(shapes))
    picked = np.unique(np.linspace(0, len(shapes) - 1, min(count, len(shapes))).astype(int))
    return [f"{PLAN}@{shapes[i]}" for i in picked]


def _plan(
    cluster: str, program: Any, which: str, optimizer: str | None, time_limit_s: float
) -> tuple[Any, float]:
    """The plan of a row's name, and the seconds it took."""
    import placement

    step, args, donated = program
    chosen: dict[str, Any] = {"pin_operands": is_pinned(which)}
    if not is_plan(which):
        chosen["optimizer"] = which.removesuffix(PINNED)
    if is_plan(which) and optimizer is not None:
        chosen["optimizer"] = optimizer
    if is_plan(which) and "@" in which:
        sizes = (part.split("=") for part in which.partition("@")[2].split(","))
        chosen["mesh_shape"] = {axis: int(n) for axis, n in sizes}
    began = time.monotonic()
    plan = placement.optimize(
        step,
        *args,
        cluster=cluster,
        donate_argnums=donated,
        time_limit_s=time_limit_s,
        throw=False,
        **chosen,
    )
    return plan, time.monotonic() - began


def _compile(
    name: str,
    case: Mapping[str, Any],
    which: str,
    program: Any,
    plan: Any,
    planning_time_s: float,
    timeout_s: float,
    records: pathlib.Path,
) -> Row:
    from placement.compiled_fidelity import record_of
    from placement.verify import compile_plan

    step, args, _ = program
    compiled, scheduled = compile_plan(plan, step, *args, timeout_s=timeout_s)
    record = dataclasses.asdict(record_of(name, which, plan, scheduled))
    records.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, separators=(",", ":")) + "\n"
    write_atomically(records / f"{name}.{which}.json", text.encode())
    status = compiled.status
    if status == "ok" and compiled.peak_bytes > plan.layout().cluster.device.hbm_available_bytes:
        status = "out_of_memory"
    return _row(
        name,
        case,
        which,
        status=status,
        message=compiled.message,
        mesh_shape=plan.mesh_shape,
        compiled=compiled,
        scheduled=scheduled,
        predicted_step_time_s=float(plan.estimate.step_time_s),
        predicted_peak_memory_bytes=float(plan.estimate.peak_memory_bytes),
        planning_time_s=planning_time_s,
    )


def _peer(name: str, case: Mapping[str, Any], program: Any, timeout_s: float) -> Row:
    from cost_model.cluster import parse_cluster
    from placement.network import chip_of, layout_timer
    from placement.peers.autosharding import compile_automatically
    from placement.schedule import schedule

    step, args, donated = program
    compiled, layout = compile_automatically(
        step,
        args,
        cluster=parse_cluster(case["cluster"]),
        donate_argnums=donated,
        timeout_s=timeout_s,
    )
    scheduled = None
    if compiled.status == "ok":
        scheduled = schedule(compiled.module(), chip=chip_of(layout), timer=layout_timer(layout))
    return _row(
        name,
        case,
        PEER,
        status=compiled.status,
        message=compiled.message,
        mesh_shape=layout.mesh.shape,
        compiled=compiled,
        scheduled=scheduled,
        planning_time_s=compiled.seconds,
    )


def _row(
    name: str,
    case: Mapping[str, Any],
    which: str,
    *,
    status: str,
    message: str,
    mesh_shape: Mapping[str, int] | None = None,
    compiled: Any = None,
    scheduled: Any = None,
    **measured: float,
) -> Row:
    versions = compiled.versions if compiled else {"jax": importlib.metadata.version("jax")}
    return Row(
        case=name,
        cluster=case["cluster"],
        optimizer=which,
        status=status,
        message=message[:300],
        mesh_shape=" ".join(f"{k}={v}" for k, v in (mesh_shape or {}).items()),
        step_time_s=scheduled.step_time_s if scheduled else None,
        compute_time_s=scheduled.compute_time_s if scheduled else None,
        exposed_comm_time_s=scheduled.exposed_comm_time_s if scheduled else None,
        peak_memory_bytes=float(compiled.peak_bytes) if scheduled else None,
        predicted_step_time_s=measured.get("predicted_step_time_s"),
        predicted_peak_memory_bytes=measured.get("predicted_peak_memory_bytes"),
        planning_time_s=measured.get("planning_time_s"),
        compile_time_s=compiled.seconds if compiled else None,
        compile_cpu_time_s=(compiled.cpu_seconds or None) if compiled else None,
        kernels=scheduled.kernels if scheduled else 0,
        unknown_kernels=scheduled.unknown_kernels if scheduled else 0,
        full_rematerializations=len(compiled.full_rematerializations) if compiled else 0,
        versions=" ".join(f"{k}=={v}" for k, v in versions.items()),
    )
