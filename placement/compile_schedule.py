"""The schedule of XLA:GPU without its code.

XLA:GPU spends four fifths of a compile on generating code, after the module is scheduled and its
buffers are assigned, and that decides nothing of either. What it dumps before is the same scheduled
HLO and the same memory as those of the executable, so its process may be ended there.
"""

from __future__ import annotations

import pathlib
import re
from typing import Any

_PARAMETER = re.compile(r"^allocation \d+: size (\d+), parameter", re.MULTILINE)
_TOTAL = re.compile(r"^Total bytes: (\d+)", re.MULTILINE)


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
