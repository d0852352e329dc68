"""Fits the constants of cost_model.compute, matmul and gpu_matmul to a profile, and says how well they
predict.

Least squares on the logarithm of cycles with a soft loss, so that a few odd kernels do not bend the
fit. Every fourth shape (by a hash of its name) is held out for the stated error; the shipped
constants are then fitted to all shapes.
"""

from __future__ import annotations

import csv
import dataclasses
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from cost_model.calibration.counts import (
    VECTOR_KINDS,
    counts,
    pass_elements,
    vector_instructions,
)
from cost_model.calibration.fit_contraction import fit_contraction, program_cycles
from cost_model.calibration.fit_gpu import (
    CACHE_BOUNDS,
    GPU_LOOPS,
    TILED_BOUNDS,
    cache_constants,
    unpadded,
)
from cost_model.calibration.least_squares import least_squares
from cost_model.calibration.programs import Case, parse_case
from cost_model.compute import (
    Work,
    attention_flops,
    class_cycles,
    kernel_cycles,
    loop_cycles,
    work_features,
)
from cost_model.device import Device, item_bytes
from cost_model.fitted import Calibration, nearby_residuals, parse_calibration
from cost_model.matmul import matmul_cycles, matmul_features
from cost_model.product import Product
from graphs.errors import MeshwrightError

Errors = dict[str, tuple[int, float, float]]
"""kind -> shapes held out, median and 95th percentile of |predicted / measured - 1|."""

_MATMUL_BOUNDS: dict[str, tuple[float, float, float]] = {
    "start": (4000, 500, 20000),
    "compute_factor": (1.03, 0.5, 3.0),
    "memory_factor": (1.3, 0.9, 3.0),
    "drain_16": (10, 0.01, 100),
    "drain_32": (5, 0.01, 100),
    "drain_k": (0.5, 1e-3, 50),
    "load_32": (0.1, 1e-4, 50),
    "copy_ragged": (10, 1e-2, 200),
    "turn_left": (0.1, 1e-4, 30),
    "turn_right": (0.1, 1e-4, 30),
    "per_product": (10, 1e-2, 3000),
    "block": (1024, 128, 16384),
    "sharpness": (2.5, 1.0, 12),
}
"""Start, least and greatest value of each constant in the fit."""
_NO_ESTIMATE = ("ragged_dot",)
"""Kinds whose compiler estimate is no time: 3 to 140 times a dense product of every group."""
_LEAST_CYCLES = 1000
"""No kernel starts in less; a smaller sum means that one has no estimate."""
_LOOPS = ("elementwise", "optimizer", "reduce")
"""Kinds that show what a loop costs of which bytes, instructions and passes are known."""
_BARE = ("add", "exp", "max_row", "cumsum", "argmax_row")
"""Programs that are no fused loop: single instructions, whose windows are not tuned, and scans."""
_LARGE_REGISTERS = 500
"""Registers from which the start of a kernel is of no weight."""
_RESIDENT_BYTES = [0.0, *(2.0**20 * x for x in (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 110, 120))]
"""On-chip sizes tried; the fit takes the one with the least error."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One measured case."""

    case: Case
    cycles: float
    """of the core clock; seconds times the clock where a device was timed."""

    @property
    def held_out(self) -> bool:
        return zlib.crc32(self.case.name.encode()) % 4 == 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """A profile file: usable rows, versions, and what could not be used."""

    rows: tuple[Row, ...]
    versions: dict[str, str]
    failed: int
    unknown: int
    """rows left out because the compiler gives no number for one of their kernels."""


def read_profile(text: str, clock_hz: float) -> Profile:
    """Reads the CSV of ``meshwright profile``. Raises MeshwrightError if it is no such file."""
    first, _, rest = text.partition("\n")
    if not first.startswith("# "):
        raise MeshwrightError("the profile has no version line; write it with meshwright profile")
    try:
        return _rows_of(first, csv.DictReader(rest.splitlines()), clock_hz)
    except (KeyError, TypeError, ValueError, AttributeError, csv.Error) as error:
        raise MeshwrightError(
            f"the profile has a row that is no measurement ({type(error).__name__}: {error}); "
            "write it again with meshwright profile"
        ) from error


def _rows_of(first: str, raws: Iterable[dict[str, str]], clock_hz: float) -> Profile:
    versions = dict(part.split("=", 1) for part in first.split()[2:])
    rows, failed, unknown = [], 0, 0
    for raw in raws:
        if raw["error"]:
            failed += 1
            continue
        if int(raw["unknown_kernels"] or 0):
            unknown += 1
            continue
        # a sort alone shows only the cycles of its neighbours
        few = raw["cycles"] and float(raw["cycles"]) < _LEAST_CYCLES
        if few or (raw["cycles"] and raw["kind"] in _NO_ESTIMATE):
            unknown += 1
            continue
        cycles = float(raw["cycles"]) if raw["cycles"] else float(raw["seconds"]) * clock_hz
        name = f"{raw['kind']}.{raw['variant']}.{raw['dtype']}:{raw['dims'].replace(' ', ',')}"
        if cycles > 0:
            rows.append(Row(case=parse_case(name), cycles=cycles))
    return Profile(rows=tuple(rows), versions=versions, failed=failed, unknown=unknown)


def fit_profile(device: Device, profile: Profile) -> tuple[dict[str, Any], Errors]:
    """The content of the calibration file, and the error on the held-out shapes."""
    seen = [r for r in profile.rows if not r.held_out]
    errors = errors_of(device, fit_rows(device, seen, profile.versions), profile.rows)
    content = fit_rows(device, profile.rows, profile.versions)
    content["held_out_error"] = {
        k: {"shapes": n, "median": round(m, 4), "p95": round(h, 4)}
        for k, (n, m, h) in errors.items()
    }
    return content, errors


def fit_rows(device: Device, rows: Sequence[Row], versions: dict[str, str]) -> dict[str, Any]:
    """Constants and residuals fitted to these rows."""
    content: dict[str, Any] = {"versions": versions, "constants": {}, "neighbours": {}}
    dots = [r for r in rows if r.case.kind == "matmul"]
    if dots:
        constants, points, residuals = _fit_matmul(device, dots)
        content["constants"]["matmul"] = constants
        _add_neighbours(content, "matmul", points, residuals)
    fused_dots = [r for r in rows if r.case.kind == "fused"]
    if dots and len(fused_dots) >= 8:
        measured = np.array([r.cycles for r in fused_dots])
        content["constants"]["contraction"] = fit_contraction(
            device, parse_calibration(content), [r.case for r in fused_dots], measured
        )
    resident = content["constants"].get("matmul", {}).get("resident_bytes", 0.0)
    kinds, bare_kernels = _LOOPS, _BARE
    if device.multiprocessors:
        kinds, bare_kernels = GPU_LOOPS, ()
    fused = [r for r in rows if r.case.kind in kinds and r.case.variant not in bare_kernels]
    if len(fused) >= 8:
        content["constants"]["vector"] = _fit_any_loop(device, fused)
    bare = _bare_cycles(rows)
    if bare and not device.multiprocessors:
        content["constants"]["program"] = {"bare_cycles": bare}
    single = content["constants"].get("vector", {}).get("start")
    for kind in VECTOR_KINDS:
        own = [r for r in rows if r.case.kind == kind]
        if not own:
            continue
        dots = content["constants"].get("matmul")
        cache = cache_constants(kind, content["constants"].get("vector", {}))
        whole = _fit_vector(device, own, resident, dots, cache=cache)[0]
        content["constants"][kind] = whole
        if single is not None and kind != "attention":
            # a variant is one kernel unless its small shapes say otherwise
            whole = whole | {"start": single}
        for variant in sorted({r.case.variant for r in own}):
            some = [r for r in own if r.case.variant == variant]
            constants, points, residuals = _fit_vector(
                device, some, resident, dots, near=whole, cache=cache
            )
            content["constants"][f"{kind}.{variant}"] = constants
            _add_neighbours(content, f"{kind}.{variant}", points, residuals)
    return content


def _bare_cycles(rows: Sequence[Row]) -> float:
    """Cycles of a register in element-wise kernels that are no fusion; 0 where none is large."""
    found = []
    for row in rows:
        if row.case.kind == "elementwise" and row.case.variant in _BARE:
            registers = counts([row.case])[0].registers
            if registers >= _LARGE_REGISTERS:
                found.append(row.cycles / registers)
    return float(f"{np.median(found):.4g}") if found else 0.0


def _add_neighbours(
    content: dict[str, Any], group: str, points: np.ndarray, residuals: np.ndarray
) -> None:
    content["neighbours"][group] = {
        "points": points.round(3).tolist(),
        "residuals": residuals.round(4).tolist(),
    }


def errors_of(device: Device, content: dict[str, Any], rows: Sequence[Row]) -> Errors:
    """Error of these constants on the held-out rows, by kind and over all."""
    fit = parse_calibration(content)
    found: dict[str, list[float]] = {}
    for row in rows:
        if row.held_out:
            predicted = predict_cycles(device, fit, row.case)
            found.setdefault(row.case.kind, []).append(abs(predicted / row.cycles - 1))
    found["all"] = [e for es in list(found.values()) for e in es]
    return {
        k: (len(e), float(np.median(e)), float(np.percentile(e, 95))) for k, e in found.items() if e
    }


def predict_cycles(device: Device, fit: Calibration, item: Case) -> float:
    """Cycles of a case under this calibration."""
    if item.kind == "matmul":
        product = _product([item])
        model = matmul_cycles(device, fit.constants["matmul"], product)
        if "matmul" in fit.neighbours:
            features = matmul_features(device, product)
            model = model * np.exp(nearby_residuals(*fit.neighbours["matmul"], features))
        return float(model[0])
    if item.kind == "fused":
        return float(program_cycles(device, fit, [item])[0])
    group = f"{item.kind}.{item.variant}"
    fallback = item.kind if item.kind in fit.constants else "vector"
    work = _work(device, item, fit.constants["matmul"])
    return float(kernel_cycles(device, fit, group, work, fallback))


def _work(device: Device, item: Case, dots: Mapping[str, float] | None) -> Work:
    """What a case moves and computes; the contractions of attention as the fit has them alone."""
    work = counts([item])[0]
    if device.multiprocessors:
        work = unpadded(work, item)
    if item.kind != "attention" or dots is None:
        return work
    d = dict(item.dims)
    b, q, k, width = (np.array(float(x)) for x in (d["b"] * d["h"], d["q"], d["k"], d["d"]))
    rounds = 2.5 if item.variant.startswith("grad") else 1.0
    flops = float(attention_flops(device, dots, b, q, k, width, rounds))
    return dataclasses.replace(work, flops=flops)


def _product(items: Sequence[Case]) -> Product:
    """The products of these cases."""
    dims = [dict(c.dims) for c in items]
    b, m, k, n = (np.array([float(d.get(x, 1)) for d in dims]) for x in "bmkn")
    forms, _, wide = zip(*(c.variant.partition("_") for c in items))
    return Product(
        b=b,
        m=m,
        k=k,
        n=n,
        size=np.array([item_bytes(c.dtype) for c in items]),
        out=np.array([item_bytes(t or c.dtype) for t, c in zip(wide, items)]),
        turned=(np.array([f == "tn" for f in forms]), np.array([f == "nt" for f in forms])),
    )


def _fit_matmul(device: Device, rows: list[Row]) -> tuple[dict[str, float], np.ndarray, np.ndarray]:
    product = _product([r.case for r in rows])
    measured = np.array([r.cycles for r in rows])

    def cycles(c: dict[str, float]) -> np.ndarray:
        return matmul_cycles(device, c, product)

    if device.multiprocessors:
        tiled, _ = least_squares(cycles, TILED_BOUNDS, measured)
        return tiled, matmul_features(device, product), np.log(measured / cycles(tiled))
    best: tuple[float, dict[str, float]] | None = None
    for resident in _RESIDENT_BYTES if device.family == "tpu" else [0.0]:
        fixed = {"resident_bytes": resident}
        constants, loss = least_squares(
            lambda c, fixed=fixed: cycles(c | fixed), _MATMUL_BOUNDS, measured
        )
        if best is None or loss < best[0]:
            best = (loss, constants | fixed)
    assert best is not None
    residuals = np.log(measured / cycles(best[1]))
    return best[1], matmul_features(device, product), residuals


def _fit_vector(
    device: Device,
    rows: list[Row],
    resident_bytes: float,
    dots: dict[str, float] | None,
    near: dict[str, float] | None = None,
    cache: dict[str, float] | None = None,
) -> tuple[dict[str, float], np.ndarray, np.ndarray]:
    """Constants, features and residuals; drawn to the constants ``near`` of the whole kind.

    ``cache`` are constants of the device that are known already.
    """
    works = [_work(device, r.case, dots) for r in rows]
    names = [f.name for f in dataclasses.fields(Work)]
    work = Work(**{n: np.array([float(getattr(w, n)) for w in works]) for n in names})
    measured = np.array([r.cycles for r in rows])
    bounds = {
        "start": (2000.0, 50.0, 60000.0),
        "memory_factor": (1.3, 0.01, 50.0),
        "register_cycles": (5.0, 1e-3, 3000.0),
        "sharpness": (3.0, 1.0, 12.0),
    }
    if (0 < work.narrow.sum() < len(rows)) or (near and "narrow_cycles" in near):
        bounds["narrow_cycles"] = (2.0, 1e-3, 300.0)
    if np.any(work.flops > 0):
        bounds["compute_factor"] = (1.3, 0.1, 50.0)
    if np.any(work.pieces > 0):
        bounds["per_piece"] = (1.0, 1e-3, 20000.0)
    fixed = {"resident_bytes": resident_bytes} | (cache or {})
    constants, _ = least_squares(
        lambda c: class_cycles(device, c | fixed, work), bounds, measured, near
    )
    constants |= fixed
    residuals = np.log(measured / class_cycles(device, constants, work))
    return constants, work_features(work), residuals


def _fit_any_loop(device: Device, rows: list[Row]) -> dict[str, float]:
    """Constants of loops of which only bytes, instructions and passing elements are known."""
    cases = [r.case for r in rows]
    n_bytes = np.array([w.n_bytes for w in counts(cases)])
    instructions = np.array([vector_instructions(c) for c in cases])
    elements = np.array([pass_elements(c) for c in cases])
    bounds = {
        "start": (2000.0, 50.0, 60000.0),
        "memory_factor": (1.3, 0.5, 10.0),
        "vector_factor": (2.0, 0.1, 100.0),
        "pass_cycles": (5.0, 0.01, 100.0),
        "sharpness": (4.0, 3.0, 12.0),
    }
    if device.multiprocessors:
        bounds |= CACHE_BOUNDS
    measured = np.array([r.cycles for r in rows])
    return least_squares(
        lambda c: loop_cycles(device, c, n_bytes, instructions, elements), bounds, measured
    )[0]
