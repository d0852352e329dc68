"""Measurements of operator programs: compiler cycles for TPUs, real time for cpu and gpu."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from cost_model.calibration.kernels import arguments_of, time_kernels
from cost_model.calibration.programs import Case, build
from cost_model.device import Device
from graphs.errors import MeshwrightError

Record = dict[str, Any]
"""name, then seconds or cycles with their counts, or error."""


def cache_dir() -> pathlib.Path:
    """``$MESHWRIGHT_CACHE_DIR`` or ``~/.cache/meshwright``, made if it is not there."""
    root = os.environ.get("MESHWRIGHT_CACHE_DIR")
    folder = pathlib.Path(root).expanduser() if root else pathlib.Path.home() / ".cache/meshwright"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def versions() -> dict[str, str]:
    """Versions of what measures, and the compiler's flags where there are any."""
    from importlib import metadata

    found = {}
    for package in ("jax", "jaxlib", "libtpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    flags = os.environ.get("XLA_FLAGS", "").split()
    chosen = [f for f in flags if f.startswith("--xla_gpu")]
    if chosen:
        found["XLA_FLAGS"] = ",".join(chosen)
    return found


def compile_cases(
    device: Device, items: list[Case], *, timeout_s: float, on_record: Callable[[Record], None]
) -> None:
    """Compiles every case for one device in child processes; a hung case is killed and recorded.

    Raises MeshwrightError where the TPU compiler is not installed.
    """
    if "libtpu" not in versions():
        raise MeshwrightError(
            f"profiling {device.name} needs the TPU compiler; pip install 'meshwright[tpu]'"
        )
    left = list(items)
    with _libtpu_lock():
        while left:
            done = _one_child(device, left, timeout_s, on_record)
            if done < len(left):
                on_record({"name": left[done].name, "error": f"no result within {timeout_s} s"})
                done += 1
            left = left[done:]


def _one_child(
    device: Device, items: list[Case], timeout_s: float, on_record: Callable[[Record], None]
) -> int:
    """Number of cases that answered before the child ended or a deadline passed."""
    ones = "x".join("1" * device.torus_dims)
    options = {"chip_config_name": "megacore"} if device.name.endswith("_megacore") else {}
    request = {
        "topology": f"{device.compile_topology}:{ones}",
        "options": options,
        "cases": [dataclasses.asdict(c) for c in items],
    }
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    child = subprocess.Popen(
        [sys.executable, "-m", "cost_model.calibration.compiler"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
    )
    assert child.stdin and child.stdout
    done = 0
    try:
        child.stdin.write(json.dumps(request))
        child.stdin.close()
        for line in _lines(child, timeout_s):
            on_record(json.loads(line))
            done += 1
    finally:
        child.kill()
        child.wait()
    if done == 0 and child.returncode not in (0, -9):
        raise MeshwrightError(
            f"the TPU compiler process ended with status {child.returncode} "
            "before its first result; run again, and see whether another process holds libtpu"
        )
    return done


def _lines(child: subprocess.Popen[str], timeout_s: float) -> Iterator[str]:
    """Lines as they come; ends at the end of the stream or when none comes for timeout_s."""
    assert child.stdout and child.stderr
    streams = {child.stdout.fileno(): b"", child.stderr.fileno(): b""}
    out = child.stdout.fileno()
    deadline = time.monotonic() + timeout_s
    open_streams = set(streams)
    while out in open_streams:
        ready, _, _ = select.select(list(open_streams), [], [], max(0, deadline - time.monotonic()))
        if not ready:
            return
        for stream in ready:
            data = os.read(stream, 1 << 16)
            if not data:
                open_streams.discard(stream)
            elif stream == out:
                streams[out] += data
                deadline = time.monotonic() + timeout_s
        *whole, streams[out] = streams[out].split(b"\n")
        for line in whole:
            yield line.decode()


@contextlib.contextmanager
def _libtpu_lock() -> Iterator[None]:
    with open(cache_dir() / "libtpu.lock", "ab") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def time_cases(device: Device, items: list[Case], *, on_record: Callable[[Record], None]) -> None:
    """Runs every case on the first JAX device of this family and records its time: the best of up
    to 20 by the clock on a CPU, that of its kernels on a GPU.

    Raises MeshwrightError where JAX finds no such device.
    """
    import jax

    platform = {"cpu": "cpu", "gpu": "gpu"}[device.family]
    try:
        target = jax.devices(platform)[0]
    except RuntimeError as error:
        raise MeshwrightError(
            f"profiling {device.name} runs real kernels and JAX finds no {platform} here; "
            "run it on a machine that has one"
        ) from error
    if platform == "gpu":
        time_kernels(items, on_record)
        return
    for item in items:
        record: Record = {"name": item.name}
        try:
            program, _ = build(item)
            with jax.default_device(target):
                values = [jax.device_put(v) for v in arguments_of(item)]
                record["seconds"] = _best_time_s(jax.jit(program), values)
        except Exception as error:
            # a case that does not run is a result: it is listed with its reason
            record["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        on_record(record)


def _best_time_s(program: Any, values: list[Any]) -> float:
    import jax

    jax.block_until_ready(program(*values))
    best, spent = float("inf"), 0.0
    for _ in range(20):
        start = time.perf_counter()
        jax.block_until_ready(program(*values))
        took = time.perf_counter() - start
        best, spent = min(best, took), spent + took
        if spent > 0.2:
            break
    return best
