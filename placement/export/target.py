"""What every target does: write a layout in its own words, read them back.

What a target cannot express is not declared by hand: the text is read back, and every field that
did not survive is listed with the target's reason for it.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any

from graphs.errors import MeshwrightError
from placement.export.layout import JobLayout, changed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lost:
    """A field that the target's text does not carry."""

    field: str
    wanted: object
    written: object
    """what a reader of the text would take it for."""
    why: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """A layout in a target's words."""

    target: str
    text: str
    lost: tuple[Lost, ...]


class Target(abc.ABC):
    """One framework."""

    name: str
    suffix: str
    """of the file to write."""
    reasons: Mapping[str, str] = {}
    """why a field is lost, by field."""

    @abc.abstractmethod
    def write(self, layout: JobLayout) -> str:
        """The flags or file, as near to the layout as the target can come."""

    @abc.abstractmethod
    def parse(self, text: str) -> JobLayout:
        """The layout that a text of this target describes; may trip over any other text."""

    def read(self, text: str) -> JobLayout:
        """The layout that the text describes.

        Raises:
            MeshwrightError: the text lacks what the target always says, or is of another kind.
        """
        try:
            return self.parse(text)
        except (
            AttributeError,
            IndexError,
            KeyError,
            OverflowError,
            TypeError,
            ValueError,
        ) as error:
            raise MeshwrightError(
                f"the text is not as {self.name} has it ({type(error).__name__}: {error}); "
                "export it again"
            ) from error

    def export(self, layout: JobLayout) -> Export:
        text = self.write(layout)
        lost = tuple(
            Lost(
                field=field,
                wanted=wanted,
                written=written,
                why=self.reasons.get(field, f"{self.name} has no setting for it"),
            )
            for field, (wanted, written) in changed(layout, self.read(text)).items()
        )
        return Export(target=self.name, text=text, lost=lost)


def named_degrees(sizes: Mapping[str, int]) -> dict[str, Any]:
    """Degrees by their field names, to be given to JobLayout as keywords."""
    return dict(sizes)


def number(settings: Mapping[str, str], key: str, default: int | None = None) -> int:
    """A whole number of a target's settings.

    Raises:
        MeshwrightError: it is missing and has no default, or is no whole number.
    """
    text = settings.get(key)
    if text is None:
        if default is None:
            raise MeshwrightError(f"the text has no setting {key!r}; export it again")
        return default
    try:
        return int(float(text))
    except ValueError:
        raise MeshwrightError(f"the setting {key}={text!r} is not a whole number") from None


def maybe(settings: Mapping[str, str], key: str) -> int | None:
    return number(settings, key) if key in settings else None


def words_of(value: float | int) -> str:
    return f"{value:g}" if isinstance(value, float) and value != int(value) else str(int(value))
