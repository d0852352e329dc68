"""Numbers as a reader wants them, and text made safe for HTML."""

from __future__ import annotations

import html
import math


def escape(text: object) -> str:
    return html.escape(str(text), quote=True)


def seconds(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    for limit, scale, unit in ((1.0, 1.0, "s"), (1e-3, 1e3, "ms"), (1e-6, 1e6, "µs")):
        if abs(value) >= limit:
            return f"{_significant(value * scale)} {unit}"
    return "0 s" if value == 0 else f"{_significant(value * 1e9)} ns"


def memory(value: float | None) -> str:
    """Bytes in binary units."""
    if value is None or not math.isfinite(value):
        return "–"
    size, unit = float(value), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if abs(size) < 1024 or unit == "PiB":
            break
        size /= 1024
    return f"{size:.0f} B" if unit == "B" else f"{_significant(size)} {unit}"


def quantity(value: float | None, unit: str) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    if unit == "s":
        return seconds(value)
    if unit == "bytes":
        return memory(value)
    if unit in ("", "1"):
        return _significant(value)
    for prefix, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= scale:
            return f"{_significant(value / scale)} {prefix}{unit}"
    return f"{_significant(value)} {unit}"


def share(part: float, whole: float) -> str:
    return "–" if not whole else f"{100 * part / whole:.1f} %"


def _significant(value: float) -> str:
    """Three significant figures, never in exponent form for everyday sizes."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 6)}f}"
