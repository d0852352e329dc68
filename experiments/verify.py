"""meshwright verify PLAN.json [KEY=VALUE …]: compile a plan with XLA's compiler and compare.

The step is built again from what the plan file says of it; overrides are those of meshwright plan.
The compiler runs in a child process, for hardware that need not be here.

examples:
  meshwright verify out/plan.json
  meshwright verify out/plan.json report=out/report.html
  meshwright verify out/plan.json memory=true     its memory alone, which XLA:TPU knows in seconds
"""

from __future__ import annotations

import os

from graphs.errors import MeshwrightError
from placement.experiments import _hydra, _request, _summary
from placement.experiments._step import step_of


def main(argv: list[str]) -> int:
    if _hydra.wants_help(argv):
        print((__doc__ or "").strip())
        return 0
    memory_only, argv = _taken("memory", argv)
    paths = [a for a in argv if "=" not in a]
    if len(paths) != 1:
        raise MeshwrightError("verify takes one plan file: meshwright verify out/plan.json")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    config = _request.config_of(paths[0], [a for a in argv if "=" in a])
    import placement

    plan = placement.Plan.load(paths[0])
    step = step_of(config)
    verification = placement.verify(plan, step.function, *step.arguments, memory_only=memory_only)
    _summary.console().print(_summary.verification_table(verification))
    if config.report:
        from placement.report import write_report

        write_report(
            plan,
            config.report,
            title=step.title,
            verification=verification,
            tokens_per_step=step.tokens_per_step,
        )
        print(f"wrote {config.report}")
    return 0 if verification.fits else 1


def _taken(key: str, argv: list[str]) -> tuple[bool, list[str]]:
    """Whether ``key=true`` is among the arguments, and the others."""
    values = {"true": True, "false": False}
    given = [a.partition("=")[2].lower() for a in argv if a.startswith(f"{key}=")]
    for value in given:
        if value not in values:
            raise MeshwrightError(f"{key}={value} is neither true nor false; write {key}=true")
    return any(values[v] for v in given), [a for a in argv if not a.startswith(f"{key}=")]
