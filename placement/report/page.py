"""The page itself."""

from __future__ import annotations

from placement.report.data import ReportData


def render(data: ReportData) -> str:
    """The page as one string of HTML."""
    raise NotImplementedError


def write(data: ReportData, path: str) -> None:
    """Writes the page, whole or not at all."""
    raise NotImplementedError
