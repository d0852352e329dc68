"""The models that ship, by name: `configs/model/*.yaml` read without hydra."""

from __future__ import annotations

import dataclasses
import difflib
import pathlib

from graphs.errors import MeshwrightError
from graphs.zoo.config import ModelConfig


def model_names() -> tuple[str, ...]:
    """Names that load_model_config takes, sorted."""
    return tuple(sorted(path.stem for path in _folder().glob("*.yaml")))


def load_model_config(name: str) -> ModelConfig:
    """The shipped model of that name, such as "llama3_8b". Raises MeshwrightError."""
    import yaml

    names = model_names()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=3) or names
        raise MeshwrightError(f"model {name!r} is unknown; choose one of {', '.join(close)}")
    fields = yaml.safe_load((_folder() / f"{name}.yaml").read_text(encoding="utf-8"))
    fields.pop("_target_", None)
    unknown = set(fields) - {field.name for field in dataclasses.fields(ModelConfig)}
    if unknown:
        raise MeshwrightError(
            f"model file {name}.yaml has unknown fields {', '.join(sorted(unknown))}; "
            "remove them or fix their spelling"
        )
    return ModelConfig(**fields)


def _folder() -> pathlib.Path:
    # graphs comes before placement in import order, so the files are found beside it by path:
    # placement/configs in an installed wheel, configs in a checkout
    root = pathlib.Path(__file__).resolve().parents[2]
    for folder in (root / "placement" / "configs" / "model", root / "configs" / "model"):
        if folder.is_dir():
            return folder
    raise MeshwrightError(
        f"no model configurations beside {root}; reinstall the package with its data files"
    )
