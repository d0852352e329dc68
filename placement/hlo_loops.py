"""Trip counts of compiled loops.

``known_trip_count`` where the text has it, else from the condition ``counter < limit`` with the
counter's start read from the loop's operand and its step from the body. The step matters: windowed
(collective) matmuls of XLA:TPU count by two.
"""

from __future__ import annotations

import re

from placement.hlo import Computation, Instruction, Module

_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}|trip_count="?(\d+)')


def trip_count(module: Module, caller: Computation, loop: Instruction) -> int | None:
    """Iterations of a while loop; None where the text does not fix them."""
    match = _TRIP_COUNT.search(loop.attributes_text)
    if match is not None:
        return int(match[1] or match[2])
    condition = module.computations[loop.called["condition"]]
    compare = _through_fusion(module, condition.root)
    if compare is None or compare.opcode != "compare" or len(condition.root.operands) < 2:
        return None
    direction = compare.attribute("direction")
    sides = [_value(module, condition, name) for name in condition.root.operands[:2]]
    indices = [_tuple_index(condition, name) for name in condition.root.operands[:2]]
    for counter, limit, strict, inclusive in ((0, 1, "LT", "LE"), (1, 0, "GT", "GE")):
        index, bound = indices[counter], sides[limit]
        if index is None or bound is None or direction not in (strict, inclusive):
            continue
        body = module.computations[loop.called["body"]]
        step = _step(module, body, index) or 1
        start = _initial(module, caller, loop, index)
        span = bound - (start or 0) + (direction == inclusive)
        return max(0, -(-span // step))
    return None


def _through_fusion(module: Module, instruction: Instruction) -> Instruction | None:
    body = instruction.called.get("calls")
    if instruction.opcode == "fusion" and body in module.computations:
        return module.computations[body].root
    return instruction


def _resolve(computation: Computation, name: str) -> Instruction | None:
    """The instruction behind copies, bitcasts and conversions."""
    instruction = computation.by_name.get(name)
    while instruction is not None and instruction.opcode in (
        "copy",
        "bitcast",
        "convert",
        "copy-done",
        "copy-start",
    ):
        if not instruction.operands:
            return None
        instruction = computation.by_name.get(instruction.operands[0])
    return instruction


def _value(module: Module, computation: Computation, name: str) -> int | None:
    """The integer a name stands for, where it is a constant."""
    instruction = _resolve(computation, name)
    if instruction is None or instruction.opcode != "constant":
        return None
    match = re.fullmatch(r"\{?\s*(-?\d+)\s*\}?", instruction.arguments_text)
    return int(match[1]) if match else None


def _tuple_index(computation: Computation, name: str) -> int | None:
    instruction = _resolve(computation, name)
    if instruction is None or instruction.opcode != "get-tuple-element":
        return None
    index = instruction.attribute("index")
    return int(index) if index is not None else None


def _initial(module: Module, caller: Computation, loop: Instruction, index: int) -> int | None:
    source = _resolve(caller, loop.operands[0])
    if source is None or source.opcode != "tuple" or index >= len(source.operands):
        return None
    return _value(module, caller, source.operands[index])


def _step(module: Module, body: Computation, index: int) -> int | None:
    """What one iteration adds to tuple element ``index``, following chains of additions."""
    root = body.root
    if root.opcode != "tuple" or index >= len(root.operands):
        return None
    total, name = 0, root.operands[index]
    for _ in range(16):
        instruction = _resolve(body, name)
        if instruction is None:
            return None
        if instruction.opcode == "get-tuple-element":
            return total if _tuple_index(body, name) == index and total > 0 else None
        scope, arguments = body, instruction.operands
        if instruction.opcode == "fusion":
            scope = module.computations[instruction.called["calls"]]
            inner = scope.root
            if inner.opcode != "add":
                return None
            parameters = {
                i.name: int(i.arguments_text) for i in scope.instructions if i.opcode == "parameter"
            }
            values = [_value(module, scope, o) for o in inner.operands]
            names = [
                instruction.operands[parameters[o]] if o in parameters else None
                for o in inner.operands
            ]
        elif instruction.opcode == "add":
            values = [_value(module, scope, o) for o in arguments]
            names = list(arguments)
        else:
            return None
        values = [
            v if v is not None or n is None else _value(module, body, n)
            for v, n in zip(values, names)
        ]
        if values[1] is not None and names[0] is not None:
            total, name = total + values[1], names[0]
        elif values[0] is not None and names[1] is not None:
            total, name = total + values[0], names[1]
        else:
            return None
    return None
