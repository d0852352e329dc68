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

from placement.experiments import _hydra, _request, _summary
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

    console = _summary.console()
    cluster = _hydra.instantiate(config.cluster)
    step = step_of(config)
    plan = _optimize(config, step, cluster.notation, config.optimizer.name, throw=True)
    plan.save(config.out)
    _request.add(config.out, argv)
    for line in _summary.plan_lines(plan, step.title, cluster, step.tokens_per_step):
        console.print(line)
    console.print(f"wrote {config.out}")
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
        )
        console.print(f"wrote {config.report}: open it in a browser")
    return 0 if verification is None or verification.fits else 1


def _optimize(config: Any, step: Step, cluster: str, optimizer: str, *, throw: bool) -> Any:
    import placement

    return placement.optimize(
        step.function,
        *step.arguments,
        cluster=cluster,
        objective=config.objective,
        optimizer=optimizer,
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
            yield name, _optimize(config, step, cluster, name, throw=False)
