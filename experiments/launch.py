"""meshwright launch [KEY=VALUE …]: train a language model under a plan on the devices at hand.

Plans (or loads plan=), then trains a zoo model on text that ships with Python, byte by byte, and
leaves plan.json, metrics.jsonl, checkpoints/ and tensorboard/ in out=. The same command again goes
on from the last checkpoint; another cluster=, optimizer= or mesh_shape= reshards it.

examples:
  meshwright launch
  meshwright launch model=tiny cluster=cpu:8 optimizer=fsdp steps=100 out=out/fsdp
  meshwright launch plan=out/plan.json steps=1000
  meshwright launch cluster=cpu:8 distributed=true coordinator=localhost:9911 processes=2 process=0
  meshwright launch --multirun optimizer=fsdp,zero1,search out=out/sweep
  meshwright launch --multirun hydra/launcher=slurm model=gpt2_small cluster=h100:8x1 seed=0,1
"""

from __future__ import annotations

import contextlib
import fcntl
import pathlib
import time
from collections.abc import Iterator
from typing import Any

from graphs.errors import MeshwrightError
from placement.experiments import _arguments, _devices, _hydra, _pareto, _request, _summary, _sweep
from placement.experiments._progress import Progress

_OF_THE_STEP = ("model", "train", "cluster")
_OF_THE_PLAN = ("optimizer", "mesh_shape", "objective", "time_limit_s", "max_evaluations", "seed")
_OF_THE_PLACE = ("out", "distributed", "coordinator", "processes", "process")
_PATIENCE_S = 600


def main(argv: list[str]) -> int:
    if _hydra.wants_help(argv):
        print(_hydra.help_text(__doc__, "launch"))
        return 0
    if _sweep.wanted(argv):
        return _sweep.run(argv)
    config = _config(argv)
    cluster = _hydra.instantiate(config.cluster)
    devices = _devices.devices_for(cluster, _devices.processes_of(config))
    import jax

    from graphs.zoo import active_parameter_count
    from placement.training.batches import Batches
    from placement.training.checkpoint import Position
    from placement.training.corpus import VOCABULARY, load_corpus
    from placement.training.loop import Schedule, train
    from placement.training.metrics import Yardstick, model_flops
    from placement.training.program import build_program

    schedule = Schedule(
        steps=config.steps,
        checkpoint_every=config.checkpoint_every,
        eval_every=config.eval_every,
        eval_batches=config.eval_batches,
    )
    model = _hydra.instantiate(config.model)
    if model.vocab_size < VOCABULARY:
        raise MeshwrightError(
            f"model {model.name!r} has vocab_size={model.vocab_size} and a byte takes "
            f"{VOCABULARY}; add model.vocab_size={VOCABULARY}"
        )
    options = _hydra.plain(config.train)
    function, arguments, donated = _hydra.instantiate(config.train)(model)
    abstract_batch = arguments[2]
    global_batch, seq_len = abstract_batch["inputs"].shape
    corpus = load_corpus(config.text)
    texts = [
        Batches(
            text=text,
            names=tuple(abstract_batch),
            global_batch=global_batch,
            seq_len=seq_len,
            seed=config.seed,
        )
        for text in (corpus.train, corpus.validation)
    ]
    out = _arguments.writable_folder(config.out)
    plan = _plan_of(config, argv, (function, arguments, donated), cluster)
    tokens = global_batch * seq_len
    energy = _pareto.energy_of(plan, cluster, _hydra.instantiate(config.region))
    yardstick = Yardstick(
        tokens=tokens,
        model_flops=model_flops(
            model,
            active_parameters=active_parameter_count(model),
            tokens=tokens,
            seq_len=seq_len,
        ),
        peak_flops_per_s=cluster.device.peak(options["compute_dtype"]) * cluster.n_devices,
        predicted_step_time_s=plan.estimate.step_time_s,
        predicted_energy_j=None if energy is None else energy.energy_j,
    )
    program = build_program(plan, function, arguments, model=model, train=options, devices=devices)
    progress = Progress(schedule.steps, out, shown=jax.process_index() == 0)
    progress.say(*_summary.plan_lines(plan, model.name, cluster, tokens))
    with _alone(out, jax.process_index()), progress:
        train(
            program,
            batches=texts[0],
            validation=texts[1],
            schedule=schedule,
            yardstick=yardstick,
            start=Position(
                step=0,
                windows=0,
                seed=config.seed,
                seq_len=seq_len,
                text=corpus.fingerprint,
                model=model.name,
            ),
            out=out,
            on_start=progress.start,
            on_row=progress.row,
        )
        if jax.process_index() == 0:
            _summary.write_json(str(out / _sweep.RESULT), _result(out, argv))
    return 0


def _result(out: pathlib.Path, argv: list[str]) -> dict[str, Any]:
    """The whole run in a few numbers, with what was asked for."""
    from placement.training.metrics import read_metrics, summary_of

    rows = read_metrics(out / "metrics.jsonl")
    asked = [t for t in argv if _root(t) not in _OF_THE_PLACE]
    return {"overrides": asked, "steps": rows[-1]["step"]} | summary_of(rows)


def _config(argv: list[str]) -> Any:
    """With plan=, the model, the step and the cluster are those that the plan was made for."""
    config = _hydra.compose("launch", argv)
    if config.plan is None:
        return config
    planned = _request.config_of(config.plan, [t for t in argv if _root(t) in _OF_THE_STEP])
    if planned.module is not None:
        raise MeshwrightError(
            f"plan {config.plan!r} is of module={planned.module}, which says nothing of its first "
            "parameters; launch trains the models of model="
        )
    for key in _OF_THE_STEP:
        config[key] = planned[key]
    return config


def _plan_of(config: Any, argv: list[str], step: tuple[Any, Any, Any], cluster: Any) -> Any:
    """The plan given, or the one of an earlier launch into the same folder, or a new one.

    One process plans; the others read what it wrote.
    """
    import jax

    from placement import Plan

    function, arguments, donated = step
    if config.plan is not None:
        return Plan.load(config.plan).bind(function, *arguments)
    path = pathlib.Path(config.out) / "plan.json"
    request = _as_overrides(config, argv)
    if jax.process_index() == 0 and not _still_holds(path, request, function, arguments):
        import placement
        from placement.solver.preparation import prepare

        prepare()
        plan = placement.optimize(
            function,
            *arguments,
            cluster=cluster.notation,
            objective=config.objective,
            optimizer=config.optimizer.name,
            mesh_shape=_hydra.plain(config.mesh_shape),
            donate_argnums=donated,
            time_limit_s=config.time_limit_s,
            max_evaluations=config.max_evaluations,
            seed=config.seed,
        )
        plan.save(path)
        _request.add(str(path), request)
    _wait_for(path, request)
    return Plan.load(path).bind(function, *arguments)


def _still_holds(
    path: pathlib.Path, request: list[str], function: Any, arguments: tuple[Any, ...]
) -> bool:
    """Whether the file is a plan of the same request for the same program."""
    from placement import Plan

    if _request.overrides_of(str(path)) != request:
        return False
    try:
        Plan.load(path).bind(function, *arguments)
    except MeshwrightError:
        # Of another version of the program: it is planned again.
        path.unlink(missing_ok=True)
        return False
    return True


def _wait_for(path: pathlib.Path, request: list[str]) -> None:
    """Until process 0 has written the plan of this request. By the file, not by a barrier:
    those of the CPU give up after 30 seconds, and planning may take longer."""
    deadline = time.monotonic() + _PATIENCE_S
    while _request.overrides_of(str(path)) != request:
        if time.monotonic() > deadline:
            raise MeshwrightError(
                f"process 0 wrote no plan to {str(path)!r} in {_PATIENCE_S} seconds; "
                "put out= on a disk that all processes share"
            )
        time.sleep(0.2)


def _as_overrides(config: Any, argv: list[str]) -> list[str]:
    """The overrides with which ``meshwright plan`` would plan the same step."""
    kept = [t for t in argv if _root(t) in _OF_THE_STEP + _OF_THE_PLAN]
    chosen = {"model": "tiny", "train": "adamw_cosine", "cluster": "cpu_8"}
    given = {t.split("=")[0] for t in kept}
    defaults = [f"{key}={name}" for key, name in chosen.items() if key not in given]
    return [*defaults, *kept]


def _root(override: str) -> str:
    """``train`` of ``+train.clip_norm=1``."""
    return override.lstrip("+~").split("=")[0].split(".")[0]


@contextlib.contextmanager
def _alone(folder: pathlib.Path, process: int) -> Iterator[None]:
    """Holds the folder, so that no other launch writes to it meanwhile; process 0 holds it for all.

    The lock is the kernel's, and gone with the process, however that ends.
    """
    if process:
        yield
        return
    with open(folder / "lock", "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MeshwrightError(
                f"another launch is writing to {str(folder)!r}; wait for it, end it, or give "
                "another out="
            ) from None
        yield
