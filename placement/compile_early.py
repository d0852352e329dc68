"""What a compiler has decided before it generates code: its process may be ended there.

XLA:GPU spends four fifths of a compile on generating code, after the module is scheduled and its
buffers are assigned. What it dumps before is the same scheduled HLO and the same memory as those of
the executable. XLA:TPU has assigned its buffers after a twentieth of its time, but states the cycles
of kernels only with their code, so that its memory is all that is known early.
"""

from __future__ import annotations

import pathlib
import re
from typing import Any

_PARAMETER = re.compile(r"^allocation \d+: size (\d+), parameter", re.MULTILINE)
_ALLOCATION = re.compile(
    r"^allocation \d+: size (\d+), page \d+, (parameter|maybe-live-out|preallocated-temp)",
    re.MULTILINE,
)
"""An array in the device's memory: other memories have a colour there."""
_TOTAL = re.compile(r"^Memory Space: default[^\n]*\nTotal bytes: (\d+)", re.MULTILINE)
_BUFFERS, _USAGE = (
    "after_optimizations-buffer-assignment",
    "after_optimizations-memory-usage-report",
)
_TOTAL = re.compile(r"^Total bytes: (\d+)", re.MULTILINE)


def early(
    dump: pathlib.Path, until: str, *, ended: bool = False
) -> tuple[dict[str, Any], str] | None:
    """(numbers of a compiled entry, scheduled HLO or nothing) as soon as the dump holds what is asked
    for: ``schedule`` of XLA:GPU, ``memory`` of XLA:TPU. None before. ``ended``: nothing follows."""
    return scheduled(dump) if until == "schedule" else assigned(dump, ended=ended)


def assigned(dump: pathlib.Path, *, ended: bool = False) -> tuple[dict[str, Any], str] | None:
    """As :func:`scheduled`, once XLA:TPU has dumped its buffers; the text is empty.

    What kernels hold on chip while they run (``thread-local``) takes no memory of the device, though
    the compiler's own report of usage adds it up.
    """
    if not ended and not any(dump.glob("*after_buffer_assignment.txt")):  # what is dumped next
        return None
    found = next(dump.glob("*after_optimizations-buffer-assignment.txt"), None)
    if found is None:
        return None
    sizes = {"parameter": 0, "maybe-live-out": 0, "preallocated-temp": 0}
    for size, kind in _ALLOCATION.findall(found.read_text(encoding="utf-8", errors="replace")):
        sizes[kind] += int(size)
    names = ("argument_bytes", "output_bytes", "temp_bytes")
    entry = {"status": "ok", "message": "", **dict(zip(names, sizes.values()))}
    return (entry, "") if any(sizes.values()) else None


def scheduled(dump: pathlib.Path) -> tuple[dict[str, Any], str] | None:
    """(numbers of a compiled entry, scheduled HLO) once the dump holds them; None before.

    Bytes are per device; outputs that alias no argument count as temporaries.
    """
    if not any(dump.glob("*.ll")):  # the first code: what was dumped before is whole
        return None

    def text_of(ending: str) -> str:
        found = dump.glob(f"*_gpu_after_optimizations{ending}.txt")
        return max(found, key=lambda p: p.stat().st_size).read_text(encoding="utf-8")

    arguments = sum(map(int, _PARAMETER.findall(text_of("-buffer-assignment"))))
    total = sum(map(int, _TOTAL.findall(text_of("-memory-usage-report"))))
    entry = {"status": "ok", "message": "", "argument_bytes": arguments}
    return {**entry, "temp_bytes": total - arguments}, text_of("")
