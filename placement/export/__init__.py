"""Plans and experts' configurations in the words of other frameworks, and back."""

from __future__ import annotations

from graphs.errors import MeshwrightError
from placement.export.axis_rules import LogicalAxisRules
from placement.export.axlearn import AxLearn
from placement.export.json_layout import JsonLayout
from placement.export.layout import JobLayout, layout_of_case
from placement.export.levanter import Levanter
from placement.export.maxtext import MaxText
from placement.export.megatron import Megatron
from placement.export.nemo import NeMo
from placement.export.target import Export, Lost, Target
from placement.export.torchtitan import TorchTitan

__all__ = [
    "Export",
    "JobLayout",
    "Lost",
    "Target",
    "layout_of_case",
    "target",
    "target_names",
]


def _targets() -> dict[str, Target]:
    made = (
        MaxText(),
        Megatron(),
        NeMo(),
        TorchTitan(),
        AxLearn(),
        Levanter(),
        LogicalAxisRules(),
        JsonLayout(),
    )
    return {t.name: t for t in made}


def target_names() -> tuple[str, ...]:
    return tuple(_targets())


def target(name: str) -> Target:
    """The framework of that name.

    Raises:
        MeshwrightError: unknown name.
    """
    found = _targets().get(name)
    if found is None:
        raise MeshwrightError(f"unknown target {name!r}; choose one of {', '.join(_targets())}")
    return found
