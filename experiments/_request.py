"""What was asked for, kept inside the plan file, so that the same step can be built again."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from graphs.errors import MeshwrightError
from placement.experiments import _hydra
from placement.experiments._arguments import write_text

_NOT_OF_THE_STEP = ("out", "report", "verify", "baselines")


def add(path: str, overrides: list[str]) -> None:
    """Writes the overrides of ``meshwright plan`` into a plan file."""
    content = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    kept = [text for text in overrides if text.split("=")[0] not in _NOT_OF_THE_STEP]
    content["request"] = {"overrides": kept}
    write_text(path, json.dumps(content))


def title_of(path: str) -> str:
    """What the plan's step is called; empty for a plan that a program wrote."""
    content = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    if "request" not in content:
        return ""
    config = config_of(path, [])
    return str(config.module or config.model.name)


def overrides_of(path: str) -> list[str] | None:
    """The overrides in a plan file; None where there is no file or it holds none."""
    try:
        content = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        return list(content["request"]["overrides"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def config_of(path: str, overrides: list[str]) -> Any:
    """The configuration that the plan was made with, with further overrides.

    Raises:
        MeshwrightError: the file is not JSON, or a program wrote it without a request.
    """
    try:
        content = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        kept = content["request"]["overrides"]
    except FileNotFoundError:
        raise MeshwrightError(
            f"there is no plan file {path!r}; meshwright plan writes one"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise MeshwrightError(
            f"plan file {path!r} does not say how its step is built; add the overrides it was "
            "planned with, such as model=llama3_8b, or plan again with meshwright plan"
        ) from None
    return _hydra.compose("plan", [*kept, *overrides])
