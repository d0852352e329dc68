r"""Seconds of an operator on one device, vectorised over shapes.

A matrix multiplication of ``b`` products [m, k] @ [k, n] takes, in cycles of the core clock,

    start + (compute^p + memory^p + drain^p)^(1/p) + load + copy + turn + per_product b

- compute: ``compute_factor`` times the peak cycles on padded shapes; the matrix unit is T wide, k
  rounds up to T, one of m and n to T and the other to 8, whichever pads less (tile quantisation);
- memory: ``memory_factor`` times bytes over bandwidth. One operand of at most ``resident_bytes`` is
  brought on chip ahead of the kernel (the compiler's cross-program prefetch: the larger if it fits,
  else the smaller) and costs nothing; with none on chip, both are read again for every ``block`` of
  the other side;
- drain: results leave the matrix unit in registers of 8 x 128: ``drain_16`` or ``drain_32`` cycles
  each by result width, ``drain_k`` more for each 1024 of k (partial sums);
- load: ``load_32`` cycles per register of 32-bit operands (split for the 16-bit matrix unit);
- copy: where a side is no multiple of 8 and the batch is, the compiler keeps the batch in the
  registers' rows and copies the result, ``copy_ragged`` per register.
- turn: an operand that lies transposed in memory is turned each time it is read, ``turn_left`` or
  ``turn_right`` cycles per register.

Everything else moves data and works on vectors: per class of operator (element-wise, reductions,
moves, gathers, ...) ``start + (memory^p + vector^p)^(1/p) + per_piece pieces``: vector is
``register_cycles`` per register of the widest operand (``narrow_cycles`` more with 16-bit types),
plus ``compute_factor`` times the peak cycles of multiply-adds inside (attention, ragged dots). What
passes between the kernels of one operator (scores of attention) goes through device memory, written
and read, only where it exceeds ``resident_bytes``. Of loops known only by bytes, instructions and
elements (``elementwise_time_s``), a register costs ``pass_cycles`` in every pass, however narrow
its type, and ``vector_factor`` times its instructions at the vector unit's peak.

Constants, and for matrix multiplications the residuals at the profiled shapes (averaged over near
shapes), come from ``cost_model/calibration/DEVICE.json``, fitted to the cycles that XLA's TPU
compiler states; without a file, defaults give the roofline of the device's datasheet.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import importlib.resources
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cost_model.device import Device

_ITEM_BYTES = {"float64": 8, "float32": 4, "int32": 4, "uint32": 4, "int64": 8}

MATMUL_DEFAULTS: dict[str, float] = {
    "compute_factor": 1.05,
    "memory_factor": 1.2,
    "drain_16": 0.01,
    "drain_32": 0.01,
    "drain_k": 0.001,
    "load_32": 0.001,
    "copy_ragged": 0.001,
    "turn_left": 0.0,
    "turn_right": 0.0,
    "per_product": 0.1,
    "block": 2048.0,
    "sharpness": 8.0,
    "resident_bytes": 1.0,
}
"""Constants of a device without a profile: a roofline."""


VECTOR_DEFAULTS: dict[str, float] = {
    "memory_factor": 1.2,
    "vector_factor": 2.0,
    "pass_cycles": 0.0,
    "sharpness": 8.0,
}
"""Constants of vector operators on a device without a profile."""

PROGRAM_DEFAULTS: dict[str, float] = {
    "matmul": 1.0,
    "pass_cycles": 0.0,
    "reduce_cycles": 0.0,
    "bare_cycles": 0.0,
}
"""Constants of operators inside whole programs where nothing is known: contractions as alone, loops
by their bytes and instructions. ``bare_cycles`` is for kernels that XLA does not fuse."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """What was fitted to the profile of one device."""

    constants: Mapping[str, Mapping[str, float]]
    """class of operator -> constant -> value, in cycles unless the name says otherwise."""
    neighbours: Mapping[str, tuple[np.ndarray, np.ndarray]]
    """class -> features [P, F] of its profiled shapes, log of measured over modelled cycles [P]."""
    versions: Mapping[str, str]
    """versions of jax and compiler that the profile was made with; empty without a profile."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What an operator moves and computes; scalars or arrays of one shape."""

    n_bytes: Any
    """bytes between device memory and the core, reads and writes."""
    registers: Any
    """registers of 8 x 128 elements of the widest operand."""
    flops: Any = 0.0
    """on the matrix unit."""
    pieces: Any = 0.0
    """rows looked up, groups, heads: what starts something of its own."""
    narrow: Any = False
    """whether 16-bit types are packed or unpacked."""
    spill_bytes: Any = 0.0
    """size of what passes between kernels of the operator."""


def item_bytes(dtype: str) -> int:
    """Bytes of one element of a JAX dtype."""
    if dtype in _ITEM_BYTES:
        return _ITEM_BYTES[dtype]
    return 1 if dtype.startswith(("float8", "int8", "uint8", "bool")) else 2


@functools.cache
def load_calibration(name: str) -> Calibration:
    """The shipped fit of this device; defaults where it has no profile."""
    folder = importlib.resources.files("cost_model") / "calibration"
    if not (folder / f"{name}.json").is_file():
        return parse_calibration({})
    raw = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    table = csv.DictReader((folder / "fused.csv").read_text(encoding="utf-8").splitlines())
    shares = {row["constant"]: float(row["value"]) for row in table if row["device"] == name}
    return parse_calibration(raw, shares)


def parse_calibration(raw: dict, shares: Mapping[str, float] | None = None) -> Calibration:
    """A Calibration from the content of a fitted file.

    ``shares`` says what is left of a pass through the vector unit (``pass_share``), of the pass of
    a reduction (``reduce_share``) and of a contraction (``matmul``) where XLA fuses them with their
    neighbours, as it does in whole programs.
    """
    neighbours = {
        group: (np.asarray(entry["points"], np.float64), np.asarray(entry["residuals"], np.float64))
        for group, entry in raw.get("neighbours", {}).items()
    }
    constants = {
        "matmul": MATMUL_DEFAULTS,
        "vector": VECTOR_DEFAULTS,
        "program": PROGRAM_DEFAULTS,
    }
    for group, values in raw.get("constants", {}).items():
        constants[group] = constants.get(group, {}) | values
    if shares:
        cycles = constants["vector"]["pass_cycles"]
        constants["program"] |= {
            "pass_cycles": shares.get("pass_share", 0.0) * cycles,
            "reduce_cycles": shares.get("reduce_share", 0.0) * cycles,
            "matmul": shares.get("matmul", 1.0),
        }
    return Calibration(
        constants=constants,
        neighbours=neighbours,
        versions=raw.get("versions", {}),
    )


def matmul_time_s(
    device: Device,
    batch: ArrayLike,
    m: ArrayLike,
    k: ArrayLike,
    n: ArrayLike,
    dtype: str = "bfloat16",
    out_dtype: str | None = None,
    turned: tuple[bool, bool] = (False, False),
) -> np.ndarray:
    """Seconds of batch x [m, k] @ [k, n], operands of ``dtype``, result of ``out_dtype``.

    ``turned`` says which operand lies transposed in memory: [k, m], [n, k].
    """
    shape = np.broadcast_arrays(*(np.asarray(x, dtype=np.float64) for x in (batch, m, k, n)))
    b, m, k, n = shape
    size, out = item_bytes(dtype), item_bytes(out_dtype or dtype)
    fit = load_calibration(device.calibration)
    cycles = matmul_cycles(device, fit.constants["matmul"], b, m, k, n, size, out, turned, dtype)
    if "matmul" in fit.neighbours:
        features = matmul_features(b, m, k, n, size, out, turned)
        cycles = cycles * np.exp(nearby_residuals(*fit.neighbours["matmul"], features))
    return np.where(b * m * k * n > 0, cycles / device.core_clock_hz, 0.0)


def matmul_cycles(
    device: Device,
    c: Mapping[str, float],
    b: np.ndarray,
    m: np.ndarray,
    k: np.ndarray,
    n: np.ndarray,
    size: int | np.ndarray,
    out: int | np.ndarray,
    turned: tuple[Any, Any] = (False, False),
    dtype: str = "bfloat16",
) -> np.ndarray:
    """The formula of the module docstring; ``size`` and ``out`` are bytes of an element."""
    width = device.matrix_tile
    hz = device.core_clock_hz
    peak = device.achievable_flops_per_s.get("bfloat16") if device.family == "gpu" else None
    peak = (peak or device.peak("bfloat16")) * device.peak(dtype) / device.peak("bfloat16")
    padded = np.minimum(_up(m, 8) * _up(n, width), _up(m, width) * _up(n, 8))
    compute = c["compute_factor"] * 2 * b * padded * _up(k, width) / (peak / hz)
    left, right, result = b * m * k * size, b * k * n * size, b * m * n * out
    limit = c["resident_bytes"]
    large, small = np.maximum(left, right), np.minimum(left, right)
    resident = np.where(large <= limit, large, np.where(small <= limit, small, 0.0))
    again = left * np.maximum(1, n / c["block"]) + right * np.maximum(1, m / c["block"])
    moved = np.where(resident > 0, left + right - resident, again) + result
    memory = c["memory_factor"] * moved / (device.hbm_bandwidth_bytes_per_s / hz)
    registers = b * np.minimum(_up(m, 8) * _up(n, 128), _up(m, 128) * _up(n, 8)) / 1024
    wide = np.asarray(out) > 2
    drain = registers * (np.where(wide, c["drain_32"], c["drain_16"]) + c["drain_k"] * k / 1024)
    load = np.where(np.asarray(size) > 2, c["load_32"] * (left + right) / 4096, 0.0)
    ragged = ((b % 8 == 0) | (b == 2) | (b == 4)) & ((m % 8 > 0) | (n % 8 > 0))
    copy = np.where(ragged, c["copy_ragged"] * registers, 0.0)
    turn = c["turn_left"] * np.asarray(turned[0]) * b * m * k * np.maximum(1, n / c["block"])
    turn = turn + c["turn_right"] * np.asarray(turned[1]) * b * k * n * np.maximum(
        1, m / c["block"]
    )
    peak_of_three = _soft_max(c["sharpness"], compute, memory, drain)
    return _start(device, c) + peak_of_three + load + copy + turn / 1024 + c["per_product"] * b


def matmul_features(
    b: np.ndarray,
    m: np.ndarray,
    k: np.ndarray,
    n: np.ndarray,
    size: int | np.ndarray,
    out: int | np.ndarray,
    turned: tuple[Any, Any] = (False, False),
) -> np.ndarray:
    """[..., F] coordinates in which near shapes have near residuals."""
    columns = [np.log2(np.maximum(x, 1)) for x in (m, k, n, b)]
    columns += [2.0 * (np.broadcast_to(x, m.shape) > 2) for x in (size, out)]
    columns += [0.5 * (x % 128 > 0) for x in (m, k, n)]
    columns += [0.5 * np.broadcast_to(x, m.shape) for x in turned]
    return np.stack(columns, axis=-1)


_REACH = 0.8
"""Distance over which a residual matters, in octaves of one side."""
_DOUBT = 0.15
"""Weight of no residual at all, so that far shapes follow the formula."""


def nearby_residuals(points: np.ndarray, residuals: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Residuals averaged over near points with Gaussian weights, drawn to zero far from all."""
    flat = features.reshape(-1, features.shape[-1])
    few, back = np.unique(flat, axis=0, return_inverse=True)  # choices repeat their local shapes
    square = np.zeros((len(few), len(points)))
    for f in range(points.shape[1]):
        square += (few[:, f, None] - points[:, f]) ** 2
    weight = np.exp(square / -(_REACH**2))
    mean = weight @ residuals / (weight.sum(-1) + _DOUBT)
    return mean[back.reshape(-1)].reshape(features.shape[:-1])


def _soft_max(sharpness: float, *terms: np.ndarray) -> np.ndarray:
    """(sum x^p)^(1/p), which is the largest term for large p, without overflow."""
    largest = np.maximum.reduce(np.broadcast_arrays(*terms))
    largest = np.maximum(largest, 1e-30)
    return largest * sum((x / largest) ** sharpness for x in terms) ** (1 / sharpness)


def kernel_cycles(
    device: Device, fit: Calibration, group: str, work: Work, fallback: str = "vector"
) -> np.ndarray:
    """Cycles of vector kernels of the class ``group`` (of ``fallback`` where it has no fit)."""
    c = fit.constants.get(group)
    if c is None:
        return class_cycles(device, fit.constants[fallback], work)
    cycles = class_cycles(device, c, work)
    if group in fit.neighbours:
        cycles = cycles * np.exp(nearby_residuals(*fit.neighbours[group], work_features(work)))
    return cycles


def class_cycles(device: Device, c: Mapping[str, float], work: Work) -> np.ndarray:
    """The second formula of the module docstring."""
    hz = device.core_clock_hz
    spilled = np.where(work.spill_bytes > c.get("resident_bytes", 0.0), 2 * work.spill_bytes, 0.0)
    moved = work.n_bytes + spilled
    memory = c["memory_factor"] * moved / (device.hbm_bandwidth_bytes_per_s / hz)
    each = c.get("register_cycles", 0.0) + c.get("narrow_cycles", 0.0) * np.asarray(work.narrow)
    flops = c.get("compute_factor", 1.1) * work.flops / (device.peak("bfloat16") / hz)
    vector = each * work.registers + flops
    start = c.get("start", device.launch_latency_s * hz)
    pieces = c.get("per_piece", 0.0) * np.asarray(work.pieces)
    return start + _soft_max(c["sharpness"], np.asarray(memory), np.asarray(vector)) + pieces


def work_features(work: Work) -> np.ndarray:
    """[..., F] coordinates in which near operators of one class have near residuals."""
    columns = (work.n_bytes, work.registers, work.pieces)
    shape = np.broadcast_shapes(*(np.shape(x) for x in columns))
    logs = [np.broadcast_to(np.log2(np.maximum(x, 1.0)), shape) for x in columns]
    return np.stack([*logs, np.broadcast_to(1.0 * np.asarray(work.narrow), shape)], axis=-1)


def memory_bound_time_s(device: Device, n_bytes: ArrayLike) -> np.ndarray:
    """Seconds to move n_bytes (reads plus writes) through device memory in one kernel."""
    return elementwise_time_s(device, n_bytes, 0.0)


def elementwise_time_s(
    device: Device, n_bytes: ArrayLike, vector_flops: ArrayLike, pass_elements: ArrayLike = 0.0
) -> np.ndarray:
    """Seconds of fused element-wise kernels: the longer of their bytes and their vector work.

    ``pass_elements`` are the elements that pass through the vector unit, whatever their width: the
    widest operand of each kernel, and once more for every reduction whose result is used again (a
    softmax passes three times, a root-mean-square norm twice).
    """
    n_bytes, work = np.asarray(n_bytes, dtype=np.float64), np.asarray(vector_flops, np.float64)
    passes = np.asarray(pass_elements, dtype=np.float64)
    c = load_calibration(device.calibration).constants["vector"]
    cycles = loop_cycles(device, c, n_bytes, work, passes)
    return np.where(n_bytes + work + passes > 0, cycles / device.core_clock_hz, 0.0)


def loop_cycles(
    device: Device, c: Mapping[str, float], n_bytes: Any, vector_flops: Any, pass_elements: Any
) -> np.ndarray:
    """start + softmax(memory, pass_cycles per register + vector_factor at the vector peak)."""
    hz = device.core_clock_hz
    memory = c["memory_factor"] * n_bytes / (device.hbm_bandwidth_bytes_per_s / hz)
    vector = c["vector_factor"] * vector_flops / (device.vector_flops_per_s / hz)
    vector = vector + c["pass_cycles"] * pass_elements / 1024
    return _start(device, c) + _soft_max(c["sharpness"], memory, vector)


def attention_time_s(
    device: Device,
    batch: ArrayLike,
    heads: ArrayLike,
    q_len: ArrayLike,
    kv_len: ArrayLike,
    head_dim: ArrayLike,
    dtype: str = "bfloat16",
) -> np.ndarray:
    """Seconds of unfused attention: scores, softmax over [batch, heads, q, kv], values."""
    pairs = np.asarray(batch, dtype=np.float64) * np.asarray(heads, dtype=np.float64)
    q, kv = np.asarray(q_len, dtype=np.float64), np.asarray(kv_len, dtype=np.float64)
    d = np.asarray(head_dim, dtype=np.float64)
    registers = pairs * np.ceil(q / 8) * np.ceil(kv / 128)
    fit = load_calibration(device.calibration)
    if "attention.full" not in fit.constants:
        inner = matmul_time_s(device, pairs, q, d, kv, dtype)
        outer = matmul_time_s(device, pairs, q, kv, d, dtype)
        moved = 2 * item_bytes(dtype) * pairs * q * kv
        return inner + outer + elementwise_time_s(device, moved, 12 * pairs * q * kv)
    work = Work(
        n_bytes=2 * pairs * (q + kv) * d * item_bytes(dtype),
        registers=registers,
        flops=attention_flops(device, fit.constants["matmul"], pairs, q, kv, d, 1.0),
        pieces=pairs,
        spill_bytes=4 * pairs * q * kv,
    )
    return kernel_cycles(device, fit, "attention.full", work) / device.core_clock_hz


def attention_flops(
    device: Device,
    c: Mapping[str, float],
    pairs: np.ndarray,
    q: np.ndarray,
    kv: np.ndarray,
    d: np.ndarray,
    rounds: float,
) -> np.ndarray:
    """What the peak would do in the time of attention's contractions, as they run alone: scores
    [q, kv] of ``pairs`` heads, and values [q, d]; a gradient has 2.5 rounds of the two."""
    scores = matmul_cycles(device, c, pairs, q, d, kv, 2, 4)
    values = matmul_cycles(device, c, pairs, q, kv, d, 2, 2)
    return rounds * (scores + values) * device.peak("bfloat16") / device.core_clock_hz


def gather_time_s(
    device: Device, rows: ArrayLike, width: ArrayLike, dtype: str = "bfloat16"
) -> np.ndarray:
    """Seconds to look up rows of ``width`` elements."""
    rows, width = np.asarray(rows, dtype=np.float64), np.asarray(width, dtype=np.float64)
    work = Work(
        n_bytes=2 * rows * width * item_bytes(dtype),
        registers=np.ceil(rows / 8) * np.ceil(width / 128),
        pieces=rows,
        narrow=item_bytes(dtype) < 4,
    )
    fit = load_calibration(device.calibration)
    return kernel_cycles(device, fit, "index.gather", work) / device.core_clock_hz


def sort_time_s(device: Device, rows: ArrayLike, length: ArrayLike) -> np.ndarray:
    """Seconds to sort rows of 4-byte keys: a bitonic network, log2(n) (log2(n) + 1) / 2 passes."""
    rows, length = np.asarray(rows, dtype=np.float64), np.asarray(length, dtype=np.float64)
    depth = np.log2(np.maximum(length, 2))
    registers = np.ceil(rows / 8) * np.ceil(length / 128) * depth * (depth + 1) / 2
    work = Work(n_bytes=8 * rows * length, registers=registers, pieces=rows / 8)
    fit = load_calibration(device.calibration)
    return kernel_cycles(device, fit, "sort.sort", work) / device.core_clock_hz


def _start(device: Device, c: Mapping[str, float]) -> float:
    return c.get("start", device.launch_latency_s * device.core_clock_hz)


def _up(x: np.ndarray, tile: int) -> np.ndarray:
    return np.ceil(x / tile) * tile
