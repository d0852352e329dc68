"""Reads scheduled HLO text: what XLA's compilers say they will run, in order.

The text is XLA's own (``HloModule::ToString``). One line is one instruction::

    [ROOT] %name = TYPE opcode(%operand, ...), attribute=value, ..., backend_config={...}

and a computation is a header line ending in ``{`` up to a line ``}``. In a *scheduled* module
(``is_scheduled=true``) the order of the lines is the order in which the device issues them.
Collectives are read by :mod:`placement.hlo_collectives`, loops by :mod:`placement.hlo_loops`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re

from graphs.errors import MeshwrightError

UNKNOWN_CYCLES = 9223372036854775807
"""What XLA:TPU writes for "no estimate" (int64 max)."""

_DTYPE_BITS = {
    "pred": 8,
    "s2": 2,
    "u2": 2,
    "s4": 4,
    "u4": 4,
    "s8": 8,
    "u8": 8,
    "s16": 16,
    "u16": 16,
    "s32": 32,
    "u32": 32,
    "s64": 64,
    "u64": 64,
    "f16": 16,
    "bf16": 16,
    "f32": 32,
    "f64": 64,
    "c64": 64,
    "c128": 128,
    "f4e2m1fn": 4,
}

_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"(?:^|\s)([a-z][a-z0-9\-]*)\(")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) ")
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,<=]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(r"\b(?:calls|body|condition|to_apply|async_computation)=%?([\w.\-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_SOL_US = re.compile(r'"exec_time_us":([0-9.e+\-]+),"name":"sol"')


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Array:
    """One array of an instruction's result type, per device."""

    dtype: str
    shape: tuple[int, ...]
    memory_space: int
    """XLA's memory space S(n): 0 the device memory, 1 on-chip vector memory on TPUs."""

    @property
    def size_bytes(self) -> int:
        return (math.prod(self.shape) * _dtype_bits(self.dtype) + 7) // 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instruction:
    """One line of the text. The heavier fields are parsed when first asked for."""

    name: str
    opcode: str
    type_text: str
    """The result type as written, layouts included."""
    arguments_text: str
    """What stands between the parentheses of the opcode."""
    attributes_text: str
    """Everything after them."""
    is_root: bool

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the operands, in order."""
        return tuple(re.findall(r"%([\w.\-]+)", self.arguments_text))

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays of the result, a tuple flattened."""
        return parse_type(self.type_text)

    @property
    def result_bytes(self) -> int:
        return sum(a.size_bytes for a in self.arrays)

    @functools.cached_property
    def called(self) -> dict[str, str]:
        """attribute → computation, for calls, body, condition, to_apply, ..."""
        return {
            match[0].split("=")[0]: match[1] for match in _CALLED.finditer(self.attributes_text)
        }

    @property
    def estimated_cycles(self) -> int | None:
        """The compiler's cycles of this kernel; None where it gives none or "unknown"."""
        match = _CYCLES.search(self.attributes_text)
        if match is None or int(match[1]) >= UNKNOWN_CYCLES:
            return None
        return int(match[1])

    @property
    def sol_time_s(self) -> float | None:
        """XLA:GPU's speed-of-light seconds of this instruction, where it gives them."""
        match = _SOL_US.search(self.attributes_text)
        return float(match[1]) * 1e-6 if match else None

    @property
    def channel_id(self) -> int | None:
        match = _CHANNEL.search(self.attributes_text)
        return int(match[1]) if match else None

    @property
    def op_name(self) -> str:
        """The JAX name stack of the operation, empty where there is none."""
        match = _OP_NAME.search(self.attributes_text)
        return match[1] if match else ""

    def attribute(self, name: str) -> str | None:
        """The text of a simple attribute (up to the next comma outside brackets)."""
        start = self.attributes_text.find(f"{name}=")
        if start < 0:
            return None
        text = self.attributes_text[start + len(name) + 1 :]
        depth = 0
        for i, c in enumerate(text):
            if c in "{[(":
                depth += 1
            elif c in "}])":
                depth -= 1
            elif c == "," and depth == 0:
                return text[:i]
        return text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Computation:
    name: str
    instructions: tuple[Instruction, ...]
    """In schedule order."""

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {i.name: i for i in self.instructions}

    @property
    def root(self) -> Instruction:
        return next((i for i in self.instructions if i.is_root), self.instructions[-1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Module:
    name: str
    computations: dict[str, Computation]
    entry: str
    n_partitions: int
    """Devices of the SPMD program; 1 where the text does not say."""

    @property
    def entry_computation(self) -> Computation:
        return self.computations[self.entry]


def parse_type(text: str) -> tuple[Array, ...]:
    """The arrays in a result type, tuples flattened in order; opaque and token types are left."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(text):
        if dtype not in _DTYPE_BITS and not dtype.startswith("f8"):
            continue
        space = re.search(r"S\((\d+)\)", layout)
        found.append(
            Array(
                dtype=dtype,
                shape=tuple(int(d.lstrip("<=")) for d in dims.split(",") if d),
                memory_space=int(space[1]) if space else 0,
            )
        )
    return tuple(found)


def parse_module(text: str) -> Module:
    """Parse HLO text. MeshwrightError where it is not HLO or has no entry computation."""
    computations: dict[str, Computation] = {}
    module_name, entry, n_partitions = "", None, 1
    name: str | None = None
    instructions: list[Instruction] = []
    for line in text.splitlines():
        if line.startswith("HloModule"):
            module_name = line.split()[1].rstrip(",")
            match = re.search(r"num_partitions=(\d+)", line)
            n_partitions = int(match[1]) if match else 1
        elif name is None:
            if line.endswith("{") and "->" in line:
                match = _HEADER.match(line)
                if match is not None:
                    name, instructions = match[2], []
                    if match[1]:
                        entry = name
        elif line.startswith("}"):
            computations[name] = Computation(name=name, instructions=tuple(instructions))
            name = None
        else:
            instruction = _parse_instruction(line)
            if instruction is not None:
                instructions.append(instruction)
    if entry is None or name is not None:
        raise MeshwrightError(
            "the text is not a whole HLO module: "
            + ("no ENTRY computation found" if entry is None else f"%{name} is not closed")
            + "; compile again and keep the whole dump"
        )
    return Module(
        name=module_name, computations=computations, entry=entry, n_partitions=n_partitions
    )


def _dtype_bits(dtype: str) -> int:
    return _DTYPE_BITS.get(dtype, 8 if dtype.startswith("f8") else 0)


def _parse_instruction(line: str) -> Instruction | None:
    match = _INSTRUCTION.match(line)
    if match is None:
        return None
    opcode = _OPCODE.search(line, match.end())
    if opcode is None:
        return None
    start = opcode.end()
    end = line.find(")", start)
    depth = line.count("(", start, end)
    while depth > 0 and end >= 0:
        following = line.find(")", end + 1)
        depth += line.count("(", end, following) - 1
        end = following
    if end < 0:
        end = len(line)
    return Instruction(
        name=match[2],
        opcode=opcode[1],
        type_text=line[match.end() : opcode.start(1)].strip(),
        arguments_text=line[start:end],
        attributes_text=line[end + 1 :],
        is_root=bool(match[1]),
    )
