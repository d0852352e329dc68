"""The learned search under several policies, as optimizers of the held-out suite."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from placement.learned.anytime import Curve


def contenders(
    extra: Mapping[str, str | None],
) -> tuple[dict[str, Callable[..., Curve]], list[str]]:
    """(optimizer by name, what is missing in words); `extra` maps names to weights files."""
    return {}, ["no learned search yet"]
