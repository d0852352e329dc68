"""meshwright evaluate suite=NAME [KEY=VALUE …]: score optimizers over a suite of cases.

A suite is a file suite/NAME.yaml that names a function; the other keys are its arguments.

examples:
  meshwright evaluate suite=experts out=out/experts
  meshwright evaluate suite=compiled out=out/compiled
"""

from __future__ import annotations

from graphs.errors import MeshwrightError
from placement.experiments import _hydra


def main(argv: list[str]) -> int:
    suites = _hydra.groups().get("suite", [])
    named = next((a for a in argv if a.startswith("suite=")), None)
    if _hydra.wants_help(argv):
        print(_help(named, suites))
        return 0
    if named is None:
        raise MeshwrightError(f"no suite named: write suite=, one of {', '.join(suites)}")
    inside = [a if a.startswith(("suite=", "suite.")) else _moved(a) for a in argv]
    config = _hydra.compose("evaluate", inside)
    return int(_hydra.instantiate(config.suite) or 0)


def _moved(override: str) -> str:
    """``cases=FILE`` of the command line is ``suite.cases=FILE`` of the configuration."""
    plus = override[: len(override) - len(override.lstrip("+~"))]
    return f"{plus}suite.{override[len(plus) :]}"


def _help(named: str | None, suites: list[str]) -> str:
    from omegaconf import OmegaConf

    text = f"{(__doc__ or '').strip()}\n\nsuites: {', '.join(suites)}"
    if named is not None:
        text += f"\n\nkeys and defaults of {named}:\n"
        text += OmegaConf.to_yaml(_hydra.compose("evaluate", [named]).suite).rstrip()
    return text
