"""Reads scheduled HLO text: what XLA's compilers say they will run, in order.

The text is XLA's own (``HloModule::ToString``). One line is one instruction::

    [ROOT] %name = TYPE opcode(%operand, ...), attribute=value, ..., backend_config={...}

and a computation is a header line ending in ``{`` up to a line ``}``. In a *scheduled* module
(``is_scheduled=true``) the order of the lines is the order in which the device issues them.

Three notations of replica groups occur (openxla/xla, xla/hlo/ir/{replica_group,mesh_and_axis}.cc):

* explicit ``{{0,1},{2,3}}`` (``{}``: one group of all devices),
* iota ``[G,N]<=[d0,d1,..]T(p0,p1,..)``: arange(prod d) reshaped to d, transposed by p, reshaped to
  [G, N],
* mesh ``mesh['a'=4,'b'=4] {'b'}`` with sub-axes ``'a':(pre)size`` and optional ``device_ids=(..)``.

Trip counts of loops: ``known_trip_count`` where the text has it, else from the condition
``counter < limit`` with the counter's start read from the loop's operand and its step from the
body. The step matters: windowed (collective) matmuls of XLA:TPU count by two.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re

import numpy as np

from graphs.errors import MeshwrightError

UNKNOWN_CYCLES = 9223372036854775807
"""What XLA:TPU writes for "no estimate" (int64 max)."""

COLLECTIVE_KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

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
_PAIR = re.compile(r"\{(\d+),(\d+)\}")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}|trip_count="?(\d+)')
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """What one collective moves, as the text states it. Sizes are per device."""

    kind: str
    """One of COLLECTIVE_KINDS; an all-reduce whose only use is a slice of it is reduce-scatter."""
    name: str
    operand_bytes: int
    result_bytes: int
    dtype: str
    groups: np.ndarray | None
    """[G, N] int device ids that exchange; None for permutes and for "all devices"."""
    pairs: tuple[tuple[int, int], ...]
    """Source and target of each permute, empty for the others."""
    op_name: str

    @property
    def group_size(self) -> int | None:
        return None if self.groups is None else int(self.groups.shape[1])

    @property
    def payload_bytes(self) -> int:
        """The larger of what goes in and what comes out: the whole tensor of one group."""
        return max(self.operand_bytes, self.result_bytes)


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


def collective_of(module: Module, instruction: Instruction) -> Collective | None:
    """The collective this instruction starts or performs, None if it is something else.

    A ``-start`` opcode, an ``async-start`` or fusion around a collective, and a plain one all
    count; ``-done`` does not.
    """
    opcode = instruction.opcode.removesuffix("-start")
    if opcode in COLLECTIVE_KINDS:
        return _describe(opcode, instruction, instruction)
    body = instruction.called.get("calls") or instruction.called.get("async_computation")
    if instruction.opcode not in ("fusion", "async-start", "call") or body is None:
        return None
    computation = module.computations.get(body)
    if computation is None:
        return None
    inner = next(
        (
            i
            for i in computation.instructions
            if i.opcode.removesuffix("-start") in COLLECTIVE_KINDS
        ),
        None,
    )
    if inner is None:
        return None
    kind = inner.opcode.removesuffix("-start")
    if kind == "all-reduce" and "all-reduce-scatter" in computation.name:
        # XLA:TPU's reduce-scatter: a custom fusion of all-reduce and the slice that is kept.
        return _describe("reduce-scatter", inner, instruction)
    return _describe(kind, inner, inner)


def parse_groups(text: str) -> np.ndarray | None:
    """[G, N] device ids of replica groups in any notation; None for "all devices"."""
    text = text.strip()
    if text.startswith("mesh["):
        return _mesh_groups(text)
    if text.startswith("["):
        shape, devices = _iota(text)
        return devices.reshape(shape)
    groups = re.findall(r"\{([\d,\s]+)\}", text)
    if not groups:
        return None
    rows = [[int(x) for x in g.split(",") if x.strip()] for g in groups]
    if len({len(r) for r in rows}) != 1:
        width = max(len(r) for r in rows)
        rows = [r for r in rows if len(r) == width]
    return np.asarray(rows)


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


def _describe(kind: str, inner: Instruction, outer: Instruction) -> Collective:
    arrays = inner.arrays
    if inner.opcode.endswith("-start") and inner.type_text.startswith("(") and len(arrays) > 1:
        # (operand, result, contexts...): what comes out is the second, or the second half.
        payload = [a for a in arrays if a.dtype != "u32" or len(a.shape) > 0]
        half = max(1, len(payload) // 2)
        operands, results = payload[:half], payload[half:] or payload
        if kind == "all-reduce":
            operands = results = list(arrays)
        operand_bytes = sum(a.size_bytes for a in operands)
        result_bytes = sum(a.size_bytes for a in results)
        dtype = results[0].dtype
    else:
        result_bytes = inner.result_bytes
        dtype = arrays[0].dtype if arrays else ""
        operand_bytes = result_bytes
    replica_groups = _replica_groups_text(inner)
    groups = parse_groups(replica_groups) if replica_groups else None
    n = 1 if groups is None else groups.shape[1]
    if kind == "reduce-scatter" and inner.opcode.startswith("all-reduce"):
        result_bytes = outer.arrays[0].size_bytes if outer.arrays else operand_bytes // n
    elif kind == "all-gather" and operand_bytes == result_bytes:
        operand_bytes = result_bytes // n
    elif kind == "reduce-scatter" and operand_bytes == result_bytes:
        operand_bytes = result_bytes * n
    pairs_text = inner.attribute("source_target_pairs")
    return Collective(
        kind=kind,
        name=outer.name,
        operand_bytes=operand_bytes,
        result_bytes=result_bytes,
        dtype=dtype,
        groups=groups,
        pairs=tuple((int(a), int(b)) for a, b in _PAIR.findall(pairs_text)) if pairs_text else (),
        op_name=inner.op_name or outer.op_name,
    )


def _replica_groups_text(instruction: Instruction) -> str | None:
    """The attribute, which in mesh notation holds a comma outside of brackets."""
    text = instruction.attributes_text
    start = text.find("replica_groups=mesh[")
    if start < 0:
        return instruction.attribute("replica_groups")
    start += len("replica_groups=")
    return text[start : text.index("}", text.index("{", start)) + 1]


def _iota(text: str) -> tuple[tuple[int, ...], np.ndarray]:
    match = re.match(r"\[([\d,]+)\](?:<=\[([\d,]+)\](?:T\(([\d,]+)\))?)?", text)
    if match is None:
        raise MeshwrightError(f"replica groups {text!r} are in no known notation; report the text")
    shape = tuple(int(x) for x in match[1].split(","))
    if match[2] is None:
        return shape, np.arange(math.prod(shape))
    dims = tuple(int(x) for x in match[2].split(","))
    devices = np.arange(math.prod(dims)).reshape(dims)
    if match[3] is not None:
        devices = devices.transpose([int(x) for x in match[3].split(",")])
    return shape, devices


def _mesh_groups(text: str) -> np.ndarray:
    axes_text = text[text.index("[") + 1 : text.index("]")]
    names = re.findall(r"'?([\w.\-]+)'?=(\d+)", axes_text)
    sizes = [int(size) for _, size in names]
    devices = np.arange(math.prod(sizes))
    start = text.find("device_ids=(")
    if start >= 0:
        ids = text[start + len("device_ids=(") : text.index("{", start)]
        iota = re.search(r"\[([\d,]+)\]T\(([\d,]+)\)", ids)
        if iota is not None:  # [4,2]T(1,0), with or without the shape before "<="
            dims_text, order = iota[1].split(","), iota[2].split(",")
            devices = devices.reshape([int(x) for x in dims_text])
            devices = devices.transpose([int(x) for x in order]).reshape(-1)
        else:
            listed = [int(x) for x in re.findall(r"\d+", ids)]
            devices = np.asarray(listed[-len(devices) :])
    chosen = re.findall(
        r"'?([\w.\-]+)'?(?::\((\d+)\)(\d+))?", text[text.rindex("{") + 1 : text.rindex("}")]
    )
    # Split every axis that is used in part into (pre, size, post), then move the chosen last.
    dims: list[int] = []
    position: dict[tuple[str, int], int] = {}
    for name, size in names:
        cuts = sorted({(int(pre), int(part)) for n, pre, part in chosen if n == name and pre})
        if not cuts:
            position[name, 0] = len(dims)
            dims.append(int(size))
            continue
        covered = 1
        for pre, part in cuts:
            if pre > covered:
                dims.append(pre // covered)
            position[name, pre] = len(dims)
            dims.append(part)
            covered = pre * part
        if int(size) > covered:
            dims.append(int(size) // covered)
    grouped = [position[name, int(pre) if pre else 0] for name, pre, _ in chosen]
    others = [d for d in range(len(dims)) if d not in grouped]
    width = math.prod(dims[d] for d in grouped)
    return devices.reshape(dims).transpose(others + grouped).reshape(-1, width)


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
