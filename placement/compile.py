"""Compile a sharded function for a cluster that is not there, in a child process.

The function is lowered here, over an abstract mesh, to StableHLO: shardings, donation, constraints
inside loops and Pallas kernels are in that text, so the child needs no user code. The child
compiles it for the compile-only topology of the cluster (XLA:TPU from libtpu, XLA:GPU from
jax-cuda12-plugin). Results are cached under a key of (StableHLO, topology, device order, library
versions, flags).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from cost_model.layout import MeshLayout, device_order
from graphs.errors import MeshwrightError
from placement import compile_cache, compile_early, hlo

_DUMP = ("--xla_dump_to={dump}", "--xla_dump_hlo_as_text=true")
_GPU_FLAGS = ("--xla_gpu_enable_triton_gemm=false", "--xla_gpu_autotune_level=0")
_TAKEN = "libtpu multi-process lockfile"
"""What libtpu says while another process has it loaded."""
CODE, SCHEDULE, MEMORY = "code", "schedule", "memory"
"""How far to compile."""
_PAUSE_S = 3.0
_POLL_S = 0.05
_REMATERIALIZED = re.compile(r"Involuntary full rematerialization[^\n]*")
_PLUGIN = {
    "tpu": ("libtpu", "libtpu", "tpu"),
    "cuda": ("jax_cuda12_plugin", "jax-cuda12-plugin", "gpu"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """What the compiler said of one program on one cluster. Bytes are per device."""

    status: str
    """``ok``, ``out_of_memory`` or ``failed``."""
    message: str
    """The compiler's sentence where the status is not ok."""
    argument_bytes: int
    output_bytes: int
    temp_bytes: int
    alias_bytes: int
    """Output bytes that share a donated argument's buffer."""
    code_bytes: int
    full_rematerializations: tuple[str, ...]
    """The partitioner's warnings that it replicates a tensor to change its sharding."""
    seconds: float
    """Spent in the compiler when it was compiled, cached or not."""
    cpu_seconds: float
    """Processor time of the same, which other load on the machine does not lengthen; 0: unknown."""
    cached: bool
    text_path: str
    """Gzip-compressed scheduled HLO, empty if there is none."""
    versions: dict[str, str]
    key: str

    @property
    def peak_bytes(self) -> int:
        """Arguments, outputs that are not aliased to them, and temporaries."""
        return self.argument_bytes + self.output_bytes - self.alias_bytes + self.temp_bytes

    def module(self) -> hlo.Module:
        """The scheduled module. MeshwrightError if it did not compile."""
        if not self.text_path:
            why = self.message or (
                self.status if self.status != "ok" else "only memory was asked for"
            )
            raise MeshwrightError(f"there is no compiled module to read: {why}")
        return hlo.parse_module(compile_cache.load_text(pathlib.Path(self.text_path)))


def lower(
    fn: Callable[..., Any],
    abstract_args: Sequence[Any],
    *,
    in_specs: Any,
    out_specs: Any,
    donate_argnums: Sequence[int] = (),
    layout: MeshLayout,
) -> tuple[str, str]:
    """StableHLO text of the sharded function, (with source locations, without).

    The specs are pytrees of PartitionSpec as jax.jit takes shardings; None leaves stay to the
    compiler.
    """
    import jax
    from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

    mesh = AbstractMesh(layout.mesh.axis_sizes, layout.mesh.axis_names)

    def shard(specs: Any) -> Any:
        return jax.tree.map(
            lambda spec: None if spec is None else NamedSharding(mesh, spec),
            specs,
            is_leaf=lambda x: x is None or isinstance(x, PartitionSpec),
        )

    jitted = jax.jit(
        fn,
        in_shardings=shard(tuple(in_specs)),
        out_shardings=shard(out_specs),
        donate_argnums=tuple(donate_argnums),
    )
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jitted.trace(*abstract_args)
    lowered = traced.lower(lowering_platforms=(layout.cluster.platform,))
    return lowered.as_text(debug_info=True), lowered.as_text()


def compile_for_cluster(
    fn: Callable[..., Any],
    abstract_args: Sequence[Any],
    *,
    in_specs: Any,
    out_specs: Any,
    donate_argnums: Sequence[int] = (),
    layout: MeshLayout,
    timeout_s: float = 900.0,
    flags: Sequence[str] = (),
    cache: bool = True,
    until: str = CODE,
) -> Compiled:
    """Compile with the compiler of the layout's cluster; from the cache where it was done before.

    ``until`` SCHEDULE stops XLA:GPU before it generates code, which takes a fifth of the time and
    gives the same schedule and memory; MEMORY stops any compiler as soon as its buffers are assigned
    (XLA:TPU: a twentieth of the time, without a schedule). Outputs that alias no argument then count
    as temporaries, and a program that does not fit has status ``ok``: compare its peak.

    Raises MeshwrightError if the compiler's plugin is missing, the child is killed or runs longer
    than ``timeout_s``, or another compiler than XLA:GPU is asked for its schedule only. A program
    that does not fit or does not compile is a status, not an error.
    """
    if until == SCHEDULE and layout.cluster.platform != "cuda":
        raise MeshwrightError(
            f"only GPUs give a schedule alone; for {layout.cluster.notation} compile to the end, "
            "because XLA:TPU states the cycles of its kernels only then"
        )
    if layout.cluster.platform == "cpu":
        raise MeshwrightError(
            f"cluster {layout.cluster.notation} has no compile-only compiler; "
            "run on its real devices or verify for a TPU or GPU cluster"
        )
    versions = _versions(layout.cluster.platform)
    text, bare = lower(
        fn,
        abstract_args,
        in_specs=in_specs,
        out_specs=out_specs,
        donate_argnums=donate_argnums,
        layout=layout,
    )
    return compile_text(
        text,
        bare,
        layout=layout,
        versions=versions,
        timeout_s=timeout_s,
        flags=flags,
        cache=cache,
        until=until,
    )


def compile_text(
    text: str,
    bare: str,
    *,
    layout: MeshLayout,
    versions: dict[str, str],
    timeout_s: float,
    flags: Sequence[str] = (),
    cache: bool = True,
    until: str = CODE,
) -> Compiled:
    """Compile StableHLO ``text``; ``bare`` (without locations) is what the cache goes by."""
    gpu = layout.cluster.platform == "cuda"
    request = _request(layout, (*flags, *_DUMP) if gpu and until != CODE else flags)
    if until != CODE:
        request["until"] = SCHEDULE if gpu else until
    key = compile_cache.key_of(
        {"module": compile_cache.key_of({"text": bare}), "versions": versions, **request}
    )
    folder = compile_cache.cache_dir("compiled")
    entry = compile_cache.load_entry(folder, key) if cache else None
    text_path = folder / f"{key}.txt.gz"
    textless = request.get("until") == MEMORY
    if entry is not None and (entry["status"] != "ok" or textless or text_path.exists()):
        return compiled_of_entry(entry, key, text_path, versions, cached=True)
    entry, scheduled = _when_free(request, text, timeout_s)
    if scheduled:
        compile_cache.store_text(text_path, scheduled)
    if entry["status"] != "failed":  # a failure may be the environment's, so it is tried again
        compile_cache.store_entry(folder, key, entry)
    return compiled_of_entry(entry, key, text_path, versions, cached=False)


def compiled_of_entry(
    entry: dict[str, Any],
    key: str,
    text_path: pathlib.Path,
    versions: dict[str, str],
    *,
    cached: bool,
) -> Compiled:
    """A Compiled from what a child wrote."""
    numbers = ("argument_bytes", "output_bytes", "temp_bytes", "alias_bytes", "code_bytes")
    return Compiled(
        status=entry["status"],
        message=entry["message"],
        **{name: int(entry.get(name, 0)) for name in numbers},
        full_rematerializations=tuple(entry.get("full_rematerializations", ())),
        seconds=float(entry["seconds"]),
        cpu_seconds=float(entry.get("cpu_seconds", 0.0)),
        cached=cached,
        text_path=str(text_path) if entry["status"] == "ok" and text_path.exists() else "",
        versions=versions,
        key=key,
    )


def _request(layout: MeshLayout, flags: Sequence[str]) -> dict[str, Any]:
    cluster = layout.cluster
    options: dict[str, Any] = dict(cluster.topology_options)
    if cluster.platform == "cuda":
        from placement.gpu_targets import target_config

        options = {"target_config": target_config(cluster.device.name), "topology": ""}
        options["topology"] = cluster.topology_name
    base = _DUMP if cluster.platform == "tpu" else _GPU_FLAGS
    return {
        "platform": cluster.platform,
        "topology_name": cluster.topology_name if cluster.platform == "tpu" else "",
        "topology_options": options,
        "device_order": device_order(layout).reshape(-1).tolist(),
        "flags": [*base, *flags],
    }


@functools.cache
def _versions(platform: str) -> dict[str, str]:
    module, distribution, extra = _PLUGIN[platform]
    if importlib.util.find_spec(module) is None:
        raise MeshwrightError(
            f"the {platform} compiler is not installed (no package {distribution}); "
            f"run: pip install 'meshwright[{extra}]'"
        )
    names = ("jax", "jaxlib", distribution)
    return {name: importlib.metadata.version(name) for name in names}


def _when_free(
    request: dict[str, Any], text: str, timeout_s: float
) -> tuple[dict[str, Any], str | None]:
    """Run the child; while another program holds libtpu, wait and try again."""
    deadline = time.monotonic() + timeout_s
    while True:
        entry, scheduled = _run_child(request, text, max(1.0, deadline - time.monotonic()))
        if entry["status"] != "failed" or _TAKEN not in entry["message"]:
            return entry, scheduled
        if _loaded_here():
            raise MeshwrightError(
                "this process has loaded libtpu itself, which keeps the compiler's process from it; "
                "set JAX_PLATFORMS=cpu before JAX starts"
            )
        if time.monotonic() + _PAUSE_S >= deadline:
            raise MeshwrightError(
                f"another program has been using libtpu for {timeout_s:.0f} s; end it, or remove "
                "libtpu_lockfile from the temporary folder if it is gone, and try again"
            )
        time.sleep(_PAUSE_S)


def _loaded_here() -> bool:
    """Whether libtpu is mapped into this process (JAX loads it where it may use TPUs)."""
    try:
        maps = pathlib.Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return "libtpu.so" in maps


def _run_child(
    request: dict[str, Any], text: str, timeout_s: float
) -> tuple[dict[str, Any], str | None]:
    lock = (
        compile_cache.libtpu_lock()
        if request["platform"] == "tpu"
        else contextlib.nullcontext(None)
    )
    with tempfile.TemporaryDirectory(prefix="meshwright-compile-") as name:
        place = pathlib.Path(name)
        (place / "request.json").write_text(json.dumps(request), encoding="utf-8")
        (place / "module.mlir").write_text(text, encoding="utf-8")
        with lock as held:
            status, stderr, seconds = _wait(request, place, held, timeout_s)
        result = place / "result.json"
        asked = request.get("until", CODE)
        early = None
        if asked != CODE:  # a program that does not fit fails with its buffers dumped
            early = compile_early.early(place / "dump", asked, ended=result.exists())
        if early is not None:
            entry, scheduled = early
            found = {"full_rematerializations": _rematerialized(stderr), "seconds": seconds}
            return entry | found, scheduled
        if not result.exists():
            last = " ".join(stderr.strip().splitlines()[-3:])[-600:]
            ended = (
                f"was ended by signal {signal.Signals(-status).name}"
                if status < 0
                else f"ended with status {status}"
            )
            raise MeshwrightError(
                f"the compiler process {ended} after {seconds:.0f} s without a result "
                f"({last or 'no output'}); free memory or try a smaller program"
            )
        entry = json.loads(result.read_text(encoding="utf-8"))
        if os.environ.get("MESHWRIGHT_DEBUG"):
            sys.stderr.write(stderr)
        entry["full_rematerializations"] = _rematerialized(stderr)
        if entry["status"] != "ok":
            return entry, None
        return entry, (place / "scheduled.txt").read_text(encoding="utf-8")


def _rematerialized(stderr: str) -> list[str]:
    return sorted(set(_REMATERIALIZED.findall(stderr)))


def _end_early(child: Any, dump: pathlib.Path, until: str, deadline: float) -> None:
    """Kill the child once its dump is whole. Nothing tells when, so the folder is looked at: the
    compiler holds the interpreter's lock, and the child could not say so itself."""
    while child.poll() is None and time.monotonic() < deadline:
        seen = compile_early.early(dump, until)
        time.sleep(_POLL_S)
        if seen is not None and compile_early.early(dump, until) == seen:
            child.kill()


def _wait(
    request: dict[str, Any], place: pathlib.Path, held: Any, timeout_s: float
) -> tuple[int, str, float]:
    """Run the child to its end, or until it has dumped the schedule where only that is asked for:
    exit status, standard error, seconds."""
    keep = ("PATH", "HOME", "LANG", "TMPDIR", "PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH")
    environment = {k: os.environ[k] for k in keep if k in os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    errors = place / "stderr.txt"
    started = time.monotonic()
    with errors.open("wb") as stderr:
        child = subprocess.Popen(
            [sys.executable, "-m", "placement.compile_child", str(place)],
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env=environment,
            pass_fds=() if held is None else (held.fileno(),),
        )
        try:
            if request.get("until"):
                _end_early(child, place / "dump", request["until"], started + timeout_s)
            status = child.wait(timeout=max(0.0, started + timeout_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            raise MeshwrightError(
                f"the compiler ran longer than {timeout_s:.0f} s and was stopped; "
                "give a longer timeout_s or a smaller program"
            ) from None
        except BaseException:
            child.kill()
            child.wait()
            raise
    seconds = time.monotonic() - started
    return status, errors.read_text(encoding="utf-8", errors="replace"), seconds
