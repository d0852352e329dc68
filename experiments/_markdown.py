"""Markdown tables and percentages of the pages that commands write."""

from __future__ import annotations

import typing


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def table(heads: typing.Sequence[str], rows: typing.Sequence[typing.Sequence[str]]) -> list[str]:
    """Lines of a table, and an empty one."""
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    lines += [f"| {' | '.join(cell for cell in row)} |" for row in rows]
    return [*lines, ""]
