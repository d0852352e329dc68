"""The collectives of compiled text: kind, bytes, who exchanges with whom.

Three notations of replica groups occur (openxla/xla, xla/hlo/ir/{replica_group,mesh_and_axis}.cc):

* explicit ``{{0,1},{2,3}}`` (``{}``: one group of all devices),
* iota ``[G,N]<=[d0,d1,..]T(p0,p1,..)``: arange(prod d) reshaped to d, transposed by p, reshaped to
  [G, N],
* mesh ``mesh['a'=4,'b'=4] {'b'}`` with sub-axes ``'a':(pre)size`` and optional ``device_ids=(..)``.
"""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np

from graphs.errors import MeshwrightError
from placement.hlo import Computation, Instruction, Module

COLLECTIVE_KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_PAIR = re.compile(r"\{(\d+),(\d+)\}")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')


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


def async_fusion_phase(module: Module, i: Instruction) -> tuple[str | None, int | None]:
    """Where in an async_collective_fusion this fusion stands: start, fused or done."""
    if i.opcode != "fusion":
        return None, None
    body = module.computations.get(i.called.get("calls", ""))
    if body is None:
        return None, None
    inner = next((x for x in body.instructions if x.opcode in COLLECTIVE_KINDS), None)
    if inner is None or "async_collective_fusion_config" not in inner.attributes_text:
        return None, None
    targets = {
        match[1]
        for x in body.instructions
        if x.opcode == "custom-call" and (match := _TARGET.search(x.attributes_text))
    }
    if "AsyncCollectiveStart" in targets:
        return "start", inner.channel_id
    if "AsyncCollectiveDone" in targets:
        return "done", inner.channel_id
    return "fused", inner.channel_id


def windowed_kind(scope: Computation, what: Collective) -> str | None:
    """all-gather or reduce-scatter if this permute is a step of a windowed matmul."""
    if not what.op_name.endswith("dot_general") or ring_length(what.pairs) < 2:
        return None
    if "windowed_dot_general_body_ag" in scope.name:
        return "all-gather"
    if "windowed_dot_general_body_rs" in scope.name:
        return "reduce-scatter"
    # Prologue, epilogue and unrolled windows: a reduction permutes what it has just added up.
    seen, name = 0, what.name
    instruction = scope.by_name.get(name)
    while instruction is not None and seen < 6 and instruction.operands:
        source = scope.by_name.get(instruction.operands[0])
        if source is None:
            break
        if source.opcode in ("broadcast", "add") or "add" in source.name:
            return "reduce-scatter"
        if source.opcode == "while" or "windowed" in source.attributes_text:
            return "reduce-scatter" if "_rs" in source.attributes_text else "all-gather"
        instruction, seen = source, seen + 1
    return "all-gather"


def ring_length(pairs: tuple[tuple[int, int], ...]) -> int:
    """Length of the cycle through the first source, 0 if the pairs do not close."""
    following = dict(pairs)
    if not following:
        return 0
    start = pairs[0][0]
    device, length = following[start], 1
    while device != start:
        if device not in following or length > len(following):
            return 0
        device, length = following[device], length + 1
    return length


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
