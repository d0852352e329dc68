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
_DEVICE_PARAMETER = re.compile(r"^allocation \d+: size (\d+), page \d+, parameter", re.MULTILINE)
"""An argument in the device's memory: other memories have a colour there."""
_DEVICE_TOTAL = re.compile(r"^Memory Space: default[^\n]*\nTotal bytes: (\d+)", re.MULTILINE)
_BUFFERS, _USAGE = (
    "after_optimizations-buffer-assignment",
    "after_optimizations-memory-usage-report",
)
_TOTAL = re.compile(r"^Total bytes: (\d+)", re.MULTILINE)


def early(dump: pathlib.Path, until: str) -> tuple[dict[str, Any], str] | None:
    """(numbers of a compiled entry, scheduled HLO or nothing) as soon as the dump holds what is asked
    for: ``schedule`` of XLA:GPU, ``memory`` of XLA:TPU. None before."""
    return scheduled(dump) if until == "schedule" else assigned(dump)


def assigned(dump: pathlib.Path) -> tuple[dict[str, Any], str] | None:
    """As :func:`scheduled`, once XLA:TPU has dumped its buffers; the text is empty."""
    if not any(dump.glob("*after_buffer_assignment.txt")):  # the dump after the one of the buffers
        return None
    found = [next(dump.glob(f"*{ending}.txt"), None) for ending in (_BUFFERS, _USAGE)]
    if None in found:
        return None
    buffers, usage = (p.read_text(encoding="utf-8", errors="replace") for p in found if p)
    total = _DEVICE_TOTAL.search(usage)
    if total is None:
        return None
    arguments = sum(int(m[1]) for m in _DEVICE_PARAMETER.finditer(buffers))
    entry = {"status": "ok", "message": "", "argument_bytes": arguments}
    return {**entry, "temp_bytes": int(total[1]) - arguments}, ""


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
