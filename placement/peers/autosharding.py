"""XLA's own auto-sharding as a peer: the same train step, planned by the compiler.

The train step is lowered here without any sharding to StableHLO text, which the peer's older jaxlib
parses (operations that it lacks are written in older ones), and compiled there with the mesh of the
physical topology. What comes back is its scheduled HLO, scored by :mod:`placement.schedule` like
every other plan. Planning time is what the compile took: the peer has no planning apart from it.
"""

from __future__ import annotations

import json
import math
import pathlib
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from cost_model.cluster import Cluster
from cost_model.layout import MeshLayout, device_order, layout_for
from graphs.errors import MeshwrightError
from placement import compile_cache
from placement.compile import Compiled, compiled_of_entry
from placement.peers.setup_env import AUTOSHARDING_REQUIREMENTS, autosharding_python

_SQUARE = re.compile(r"chlo\.square (%[\w#]+) : (tensor<[^>]*>) -> tensor<[^>]*>")


def auto_layout(cluster: Cluster) -> MeshLayout:
    """The mesh given to the peer: the physical axes, the first ones as one beyond two.

    On three axes of four devices it passed 22 GiB of memory, on two it does not.
    """
    sizes = [axis.size for axis in cluster.physical_axes]
    sizes = [math.prod(sizes[:-1]), sizes[-1]] if len(sizes) > 2 else sizes
    return layout_for(cluster, {f"axis{i}": size for i, size in enumerate(sizes)})


def compile_automatically(
    fn: Callable[..., Any],
    abstract_args: Sequence[Any],
    *,
    cluster: Cluster,
    donate_argnums: Sequence[int] = (),
    timeout_s: float = 1800.0,
) -> tuple[Compiled, MeshLayout]:
    """Let XLA's auto-sharding plan and compile ``fn``; cached.

    Raises MeshwrightError where the environment is missing or the child dies or runs out of time.
    """
    if cluster.platform != "tpu":
        raise MeshwrightError(
            f"XLA auto-sharding is set up for TPU clusters, not {cluster.notation}; "
            "give a TPU cluster"
        )
    layout = auto_layout(cluster)
    text = _lower_unsharded(fn, abstract_args, donate_argnums)
    request = {
        "topology_name": cluster.topology_name,
        "device_order": device_order(layout).reshape(-1).tolist(),
        "mesh_shape": list(layout.mesh.axis_sizes),
    }
    versions = {n: v for n, v in (r.split("==") for r in AUTOSHARDING_REQUIREMENTS)}
    key = compile_cache.key_of(
        {
            "module": compile_cache.key_of({"text": text}),
            "peer": "xla auto-sharding",
            "versions": versions,
            **request,
        }
    )
    folder = compile_cache.cache_dir("compiled")
    text_path = folder / f"{key}.txt.gz"
    entry = compile_cache.load_entry(folder, key)
    cached = entry is not None and (entry["status"] != "ok" or text_path.exists())
    if entry is None or not cached:
        entry, scheduled = _run(request, text, timeout_s)
        if scheduled is not None:
            compile_cache.store_text(text_path, scheduled)
        compile_cache.store_entry(folder, key, entry)
    return compiled_of_entry(entry, key, text_path, versions, cached=cached), layout


def _lower_unsharded(
    fn: Callable[..., Any], abstract_args: Sequence[Any], donate_argnums: Sequence[int]
) -> str:
    import jax

    jitted = jax.jit(fn, donate_argnums=tuple(donate_argnums))
    return jitted.trace(*abstract_args).lower(lowering_platforms=("tpu",)).as_text()


def _in_older_operations(text: str) -> str:
    """Rewrites what jaxlib 0.6.2 does not know: chlo.square."""
    return _SQUARE.sub(r"stablehlo.multiply \1, \1 : \2", text)


def _run(request: dict[str, Any], text: str, timeout_s: float) -> tuple[dict[str, Any], str | None]:
    python = autosharding_python()
    child = pathlib.Path(__file__).with_name("autosharding_child.py")
    with tempfile.TemporaryDirectory(prefix="meshwright-peer-") as name:
        place = pathlib.Path(name)
        (place / "request.json").write_text(json.dumps(request), encoding="utf-8")
        (place / "module.mlir").write_text(_in_older_operations(text), encoding="utf-8")
        started = time.monotonic()
        with compile_cache.libtpu_lock() as lock, (place / "stderr.txt").open("wb") as stderr:
            started = time.monotonic()
            try:
                subprocess.run(
                    [str(python), str(child), str(place)],
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                    env={"HOME": str(pathlib.Path.home()), "PATH": "/usr/bin:/bin"},
                    pass_fds=(lock.fileno(),),
                    timeout=timeout_s,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                raise MeshwrightError(
                    f"XLA auto-sharding ran longer than {timeout_s:.0f} s and was stopped; "
                    "give a longer timeout_s or a smaller program"
                ) from None
        result = place / "result.json"
        if not result.exists():
            errors = (place / "stderr.txt").read_text(errors="replace").strip().splitlines()
            raise MeshwrightError(
                f"XLA auto-sharding ended after {time.monotonic() - started:.0f} s without a "
                f"result ({' '.join(errors[-2:])[-300:]}); try a smaller program"
            )
        entry = json.loads(result.read_text(encoding="utf-8"))
        if entry["status"] != "ok":
            return entry, None
        return entry, (place / "scheduled.txt").read_text(encoding="utf-8")
