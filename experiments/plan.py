"""meshwright plan [KEY=VALUE …]: plan a training step for a cluster, with no accelerator.

Writes the plan (out=), prints what it expects, and on request verifies it with XLA's compiler
(verify=true), plans with every hand-tuned rule as well (baselines=true) and draws the report
(report=out/report.html).

examples:
  meshwright plan model=llama3_8b cluster=v5e:16x16 train.global_batch=256
  meshwright plan model=llama3_70b cluster=v5p:8x8x16 mesh_shape={data:64,model:16}
  meshwright plan module=my_pkg.my_mod:build cluster=h100:8x8
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator
from typing import Any

from placement.experiments import _hydra, _pareto, _request, _summary
from placement.experiments._arguments import check_writable
from placement.experiments._step import Step, step_of


def main(argv: list[str]) -> int:
    if _hydra.wants_help(argv):
        print(_hydra.help_text(__doc__, "plan"))
        return 0
    config = _hydra.compose("plan", argv)
    # Planning needs no device; without this JAX would look for the TPU that libtpu promises.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import placement
    from placement.report import write_report
    from placement.solver.preparation import prepare

    for path in filter(None, (config.out, config.report)):
        check_writable(path)
    console = _summary.console()
    # On a new machine the solver's loops are compiled first: that is not planning.
    prepare()
    cluster = _hydra.instantiate(config.cluster)
    step = step_of(config)
    region = _hydra.instantiate(config.region)
    front: list[_pareto.Point] = []
    if config.objective == "pareto":
        front = _pareto.front(
            lambda objective: _optimize(config, step, cluster.notation, objective=objective),
            cluster,
            region,
        )
        plan = front[0].plan
    else:
        plan = _optimize(config, step, cluster.notation)
    plan.save(config.out)
    _request.add(config.out, argv)
    for line in _summary.plan_lines(plan, step.title, cluster, step.tokens_per_step):
        console.print(line)
    used = _pareto.energy_of(plan, cluster, region)
    if used is not None:
        console.print(_summary.energy_line(used, region.name))
    console.print(f"wrote {config.out}")
    if front:
        console.print(_summary.front_table(front))
        beside = pathlib.Path(config.out).with_suffix(".pareto.json")
        _summary.write_json(str(beside), [_summary.front_row(p) for p in front])
        console.print(f"wrote {beside}")
    verification = None
    if config.verify:
        console.print("compiling with XLA for the cluster …")
        verification = placement.verify(plan, step.function, *step.arguments)
        console.print(_summary.verification_table(verification))
    baselines = []
    if config.baselines:
        baselines = list(_baselines(config, step, cluster.notation))
        rows = [_summary.row_of("this plan", plan, cluster)]
        rows += [_summary.row_of(name, other, cluster) for name, other in baselines]
        console.print(_summary.comparison_table(rows))
        beside = pathlib.Path(config.out).with_suffix(".baselines.json")
        _summary.write_json(str(beside), rows)
        console.print(f"wrote {beside}")
    if config.report:
        write_report(
            plan,
            config.report,
            title=step.title,
            baselines=dict(baselines),
            verification=verification,
            tokens_per_step=step.tokens_per_step,
            pareto=[
                (point.objective, point.plan.estimate.step_time_s, value, _pareto.UNITS[measure])
                for point in front
                for measure, value in point.measures.items()
                if measure in _pareto.UNITS and value is not None
            ],
        )
        console.print(f"wrote {config.report}: open it in a browser")
    return 0 if verification is None or verification.fits else 1


def _optimize(
    config: Any,
    step: Step,
    cluster: str,
    *,
    optimizer: str | None = None,
    objective: str | None = None,
    throw: bool = True,
) -> Any:
    import placement

    return placement.optimize(
        step.function,
        *step.arguments,
        cluster=cluster,
        objective=objective or config.objective,
        optimizer=optimizer or config.optimizer.name,
        mesh_shape=_hydra.plain(config.mesh_shape),
        donate_argnums=step.donate_argnums,
        time_limit_s=config.time_limit_s,
        max_evaluations=config.max_evaluations,
        seed=config.seed,
        throw=throw,
    )


def _baselines(config: Any, step: Step, cluster: str) -> Iterator[tuple[str, Any]]:
    """(name, plan) of every hand-tuned rule; one that does not fit has a status that says so."""
    from placement.optimizers import HAND_TUNED

    for name in HAND_TUNED:
        if name != config.optimizer.name:
            objective = "time" if config.objective == "pareto" else config.objective
            yield (
                name,
                _optimize(config, step, cluster, optimizer=name, objective=objective, throw=False),
            )
