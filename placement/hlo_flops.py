"""Floating-point operations of compiled kernels, for those that the compiler does not time."""

from __future__ import annotations

import math
import re

from placement.hlo import Computation, Instruction, Module

_DIM_LABELS = re.compile(r"dim_labels=\w+_(\w+)->")
_GEMM = re.compile(r'custom_call_target="__cublas[^"]*"')
_GEMM_DIMS = re.compile(r'"(\w+)_dimensions":\[([^\]]*)\]')
_CONTRACTING = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")


def matmul_flops(module: Module, scope: Computation, i: Instruction) -> float:
    """Multiply-adds times two of the matmuls in a kernel (dot, convolution, a call of cuBLAS), fusions
    entered."""
    body = module.computations.get(i.called.get("calls", ""))
    if body is not None:
        return sum(matmul_flops(module, body, x) for x in body.instructions)
    if (product := library_product(scope, i)) is not None:
        return 2.0 * math.prod(product[:4])
    if i.opcode not in ("dot", "convolution") or len(i.operands) < 2 or not i.arrays:
        return 0.0
    output = math.prod(i.arrays[0].shape)
    lhs, rhs = (scope.by_name.get(name) for name in i.operands[:2])
    if i.opcode == "dot" and lhs is not None and lhs.arrays:
        dims = _CONTRACTING.search(i.attributes_text)
        contracted = [int(d) for d in dims[1].split(",") if d] if dims else []
        return 2.0 * output * math.prod(lhs.arrays[0].shape[d] for d in contracted)
    labels = _DIM_LABELS.search(i.attributes_text)
    if rhs is None or not rhs.arrays or labels is None or "o" not in labels[1]:
        return 0.0
    shape = rhs.arrays[0].shape
    return 2.0 * output * math.prod(shape) / max(1, shape[labels[1].index("o")])


def library_product(
    scope: Computation, i: Instruction
) -> tuple[int, int, int, int, str, str] | None:
    """(batch, m, k, n, type of the operands, of the result) of a call of cuBLAS; else None."""
    if i.opcode != "custom-call" or _GEMM.search(i.attributes_text) is None:
        return None
    sides = [scope.by_name.get(name) for name in i.operands[:2]]
    if len(sides) < 2 or not i.arrays or any(s is None or not s.arrays for s in sides):
        return None
    left, right = (s.arrays[0] for s in sides if s is not None)
    dims = {
        name: [int(d.strip(' "')) for d in text.split(",") if d]
        for name, text in _GEMM_DIMS.findall(i.attributes_text)
    }
    batch = math.prod(left.shape[d] for d in dims.get("lhs_batch", ()))
    k = math.prod(left.shape[d] for d in dims.get("lhs_contracting", ()))
    m, n = (math.prod(x.shape) // max(1, batch * k) for x in (left, right))
    return batch, m, k, n, left.dtype, i.arrays[0].dtype
