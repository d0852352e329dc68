"""Bytes that compiled kernels move, for those that the compiler does not time.

A kernel reads its operands and writes its results, with the exceptions that XLA makes in loops over
stacked arrays: what is only sliced or gathered from is read there alone, and an array that is updated
in place is touched where it is updated. Work space of library calls is not counted.
"""

from __future__ import annotations

import math

from placement.hlo import Array, Computation, Instruction, Module

_SLICES = ("dynamic-slice", "slice", "gather")
_UPDATES = ("dynamic-update-slice", "scatter")
_SAME = ("bitcast", "reshape")
"""They name the same bytes."""


def moved_bytes(module: Module, scope: Computation, i: Instruction) -> float:
    """Bytes of device memory that an instruction reads and writes."""
    body = module.computations.get(i.called.get("calls", ""))
    if i.opcode == "fusion" and body is not None:
        return _fusion_bytes(scope, i, body)
    sources = [scope.by_name.get(name) for name in i.operands]
    if i.opcode in _SLICES:
        return 2.0 * i.result_bytes + sum(map(_bytes, sources[1:]))
    if i.opcode in _UPDATES:
        return _update_bytes(scope, i)
    results = i.arrays[:1] if i.opcode == "custom-call" and _has_work_space(i) else i.arrays
    return float(sum(map(_size, results)) + sum(map(_bytes, sources)))


def _fusion_bytes(scope: Computation, i: Instruction, body: Computation) -> float:
    users: dict[str, list[Instruction]] = {}
    for x in body.instructions:
        for name in x.operands:
            users.setdefault(name, []).append(x)
    root = body.root
    results = [root] if root.opcode != "tuple" else [body.by_name[n] for n in root.operands]
    total, updated, copied = 0.0, set(), set()
    for result, array in zip(results, i.arrays):
        made = _behind(body, result)
        copied.add(made.name)
        if made.opcode in _UPDATES and made.operands:
            total += _update_bytes(body, made) / 2.0
            updated.add(_behind(body, body.by_name[made.operands[0]]).name)
        else:
            total += _size(array)
    for x in body.instructions:
        if x.opcode != "parameter":
            continue
        position = int(x.arguments_text)
        source = scope.by_name.get(i.operands[position]) if position < len(i.operands) else None
        readers = _readers(users, x.name)
        whole = _bytes(source)
        read = sum(_read_of(body, reader, name, x.name in updated) for reader, name in readers)
        total += whole if x.name in copied else min(whole, read)
    return total


def _readers(users: dict[str, list[Instruction]], name: str) -> list[tuple[Instruction, str]]:
    """(instruction, the name that it reads by) of all that read a value under any of its names."""
    found = []
    for x in users.get(name, ()):
        if x.opcode in _SAME:
            found += _readers(users, x.name)
        else:
            found.append((x, name))
    return found


def _read_of(body: Computation, reader: Instruction, name: str, in_place: bool) -> float:
    if reader.opcode in _SLICES and reader.operands[0] == name:
        return float(reader.result_bytes)
    if reader.opcode in _UPDATES and reader.operands[0] == name and in_place:
        return _update_bytes(body, reader) / 2.0 if reader.opcode == "scatter" else 0.0
    if reader.opcode == "tuple":
        return 0.0
    return math.inf


def _update_bytes(scope: Computation, i: Instruction) -> float:
    """Of an update in place: what is written, and read or made for it."""
    at = len(i.operands) - 1 if i.opcode == "scatter" else 1
    new = scope.by_name.get(i.operands[at]) if at < len(i.operands) else None
    return 2.0 * min(sum(map(_size, new.arrays)) if new is not None else 0, i.result_bytes)


def _behind(body: Computation, x: Instruction) -> Instruction:
    """What a value is under other names."""
    while x.opcode in _SAME and x.operands and x.operands[0] in body.by_name:
        x = body.by_name[x.operands[0]]
    return x


def _bytes(source: Instruction | None) -> float:
    if source is None or source.opcode == "tuple":
        return 0.0
    return float(sum(map(_size, source.arrays)))


def _size(a: Array) -> int:
    return a.size_bytes if a.memory_space == 0 else 0


def _has_work_space(i: Instruction) -> bool:
    last = i.arrays[-1] if len(i.arrays) > 1 else None
    return last is not None and last.dtype == "s8" and len(last.shape) == 1
