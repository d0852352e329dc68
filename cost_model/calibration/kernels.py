"""Time of operator programs on a GPU: the kernels' own, as the profiler of the driver reports it.

A call of a small program takes longer on the host than on the device, so programs are not timed by
the clock of the host. All runs of a program are launched without waiting; its time is that in which
the device works on any of them (kernels, copies), divided by their number. What the device waits
for between kernels is not in it.
"""

from __future__ import annotations

import concurrent.futures
import functools
import math
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from cost_model.calibration.programs import Case, build
from graphs.errors import MeshwrightError

_RUNS = 10
_COMPILING = 14
"""Programs compiled at a time; none runs meanwhile."""
_BLOCK = 1 << 24
"""Random values of which arguments are made: they repeat after so many."""


def time_kernels(items: Sequence[Case], on_record: Callable[[dict[str, Any]], None]) -> None:
    """Compiles every case, runs it ``_RUNS`` times on the first GPU, and records its seconds.

    A case that does not compile or run is recorded with its error. Raises MeshwrightError where
    the profiler sees no kernel of any case.
    """
    import jax

    errors: dict[str, str] = {}
    with concurrent.futures.ThreadPoolExecutor(_COMPILING) as pool:
        compiled = list(pool.map(lambda item: _guarded(errors, item, _compile, item), items))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for item, program in zip(items, compiled):
                if program is not None:
                    _guarded(errors, item, _run, item, program)
        seconds = kernel_seconds(read_trace(folder))
    if not seconds and not errors:
        raise MeshwrightError(
            "the profiler reports no kernel of this GPU; allow profiling (CUPTI) and run again"
        )
    for item in items:
        record: dict[str, Any] = {"name": item.name}
        if item.name in errors:
            record["error"] = errors[item.name]
        elif item.name in seconds:
            record["seconds"] = seconds[item.name] / _RUNS
        else:
            record["error"] = "the profiler reports no kernel"
        on_record(record)


def kernel_seconds(data: Any) -> dict[str, float]:
    """Seconds in which a device worked during each annotation of a jax.profiler.ProfileData.

    By name of the annotation; those in which no device worked are absent.
    """
    work: list[tuple[float, float]] = []
    spans: list[tuple[str, float, float]] = []
    for plane in data.planes:
        for line in plane.lines:
            if plane.name.startswith("/device:GPU") and line.name.startswith("Stream"):
                work += [(e.start_ns, e.start_ns + e.duration_ns) for e in line.events]
            elif plane.name.startswith("/host"):
                named = [e for e in line.events if e.name.startswith(_MARK)]
                spans += [(e.name[len(_MARK) :], e.start_ns, e.end_ns) for e in named]
    pieces = union(work)
    starts = np.array([p[0] for p in pieces])
    found = {}
    for name, begin, end in spans:
        first, last = np.searchsorted(starts, (begin, end))
        busy = sum(b - a for a, b in pieces[first:last])
        if busy:
            found[name] = busy * 1e-9
    return found


def union(pieces: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Disjoint pieces in order that cover the same."""
    out: list[tuple[float, float]] = []
    for begin, end in sorted(pieces):
        if out and begin <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((begin, end))
    return out


_MARK = "case "


def _guarded(errors: dict[str, str], item: Case, do: Callable[..., Any], *values: Any) -> Any:
    """What ``do`` gives; None, and the reason in ``errors``, where it fails."""
    try:
        return do(*values)
    except Exception as error:
        # a case that does not run is a result: it is listed with its reason
        errors[item.name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        return None


def _compile(item: Case) -> Any:
    import jax

    program, arguments = build(item)
    return jax.jit(program).lower(*arguments).compile()


def _run(item: Case, program: Any) -> None:
    import jax

    values = [jax.device_put(v) for v in arguments_of(item)]
    jax.block_until_ready(program(*values))
    with jax.profiler.TraceAnnotation(_MARK + item.name):
        for _ in range(_RUNS):
            result = program(*values)  # earlier results are freed: runs follow each other in order
        jax.block_until_ready(result)


def arguments_of(item: Case) -> list[np.ndarray]:
    """Values for a case: random numbers, because constant ones take less power and time; rows of
    the table for an index, the same number of rows for every group of a ragged product."""
    _, arguments = build(item)
    dims = dict(item.dims)
    rng = np.random.default_rng(0)
    block = _block()
    values = []
    for a in arguments:
        shape, dtype = a.shape, np.dtype(a.dtype)
        if item.kind == "ragged_dot" and dtype == np.int32:
            values.append(np.full(shape, dims["m"] // dims["g"], dtype))
        elif dtype == np.int32:
            high = dims.get("v", dims.get("c", 1)) if shape else 1
            values.append(rng.integers(0, high, shape, dtype))
        else:
            some = block[: math.prod(shape)].astype(dtype)
            values.append(np.resize(some, shape))
    return values


@functools.cache
def _block() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(_BLOCK, np.float32)


def read_trace(folder: str) -> Any:
    """The jax.profiler.ProfileData of the newest trace under ``folder``."""
    import jax

    found = sorted(pathlib.Path(folder).rglob("*.xplane.pb"))
    if not found:
        raise MeshwrightError("the profiler wrote no trace; run again")
    return jax.profiler.ProfileData.from_file(str(found[-1]))
