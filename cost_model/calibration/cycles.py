"""What the TPU compiler says of a compiled program: cycles of each kernel, bytes of each copy.

The scheduled program (``*after_codegen.txt`` of a dump) carries ``estimated_cycles`` in the
``backend_config`` of every kernel. Values that are no estimate are counted apart: the sentinel
2^63 - 1 (work on the sparse cores) and absurd ones (masked custom fusions of ragged_dot).
"""

from __future__ import annotations

import dataclasses
import re

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_WHILE = re.compile(r" while\(.*?condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_COPY = re.compile(r"= \((\w+)\[([\d,]*)\][^ ]*S\(1\).*? copy-start\(")
_CONSTANT = re.compile(r"= s32\[\][^ ]* constant\((\d+)\)")
_BITS = re.compile(r"(\d+)")
_ABSURD_CYCLES = 10**11
"""about a minute: no single kernel of a case takes that long."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cycles:
    """Sum over the kernels of one program."""

    cycles: int
    kernels: int
    unknown_kernels: int
    """kernels whose estimate is not a number to trust."""
    copy_bytes: int
    """bytes of asynchronous copies from device memory to on-chip memory."""


def read_cycles(text: str) -> Cycles:
    """Totals of a scheduled program; a loop body counts as often as its condition's constant."""
    bodies: dict[str, list[str]] = {}
    entry, current = "", ""
    for line in text.splitlines():
        match = _COMPUTATION.match(line)
        if match:
            current = match.group(1)
            bodies[current] = []
            if line.startswith("ENTRY"):
                entry = current
        elif current:
            bodies[current].append(line)
    return _total(bodies, entry)


def _total(bodies: dict[str, list[str]], name: str) -> Cycles:
    cycles = kernels = unknown = copied = 0
    for line in bodies.get(name, ()):
        match = _CYCLES.search(line)
        if match:
            value = int(match.group(1))
            known = value < _ABSURD_CYCLES
            kernels += 1
            unknown += not known
            cycles += value if known else 0
        elif " sort(" in line:
            kernels += 1
            unknown += 1
        copy = _COPY.search(line)
        if copy:
            copied += _bytes(copy.group(1), copy.group(2))
        loop = _WHILE.search(line)
        if loop:
            trips = _trips(bodies.get(loop.group(1), ()))
            inner = _total(bodies, loop.group(2))
            cycles += trips * inner.cycles
            kernels += trips * inner.kernels
            unknown += trips * inner.unknown_kernels
            copied += trips * inner.copy_bytes
    return Cycles(cycles=cycles, kernels=kernels, unknown_kernels=unknown, copy_bytes=copied)


def _trips(condition: list[str] | tuple[()]) -> int:
    found = [int(m.group(1)) for line in condition if (m := _CONSTANT.search(line))]
    return max(found, default=1)


def _bytes(dtype: str, dims: str) -> int:
    bits = _BITS.search(dtype)
    size = max(1, int(bits.group(1)) // 8) if bits else 1
    for d in dims.split(","):
        size *= int(d or 1)
    return size
