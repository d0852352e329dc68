"""The child process that runs a compiler: ``python -m placement.compile_child FOLDER``.

``FOLDER/request.json`` and ``FOLDER/module.mlir`` go in; ``FOLDER/result.json`` and
``FOLDER/scheduled.txt`` come out. A crash, a kill or a time limit hit here leaves the parent whole.

The StableHLO is compiled as it is, with the options that ``jax.jit(...).lower(...).compile()``
uses, over the devices of a compile-only topology in the order that the request gives. Measured to
give the same schedule and the same bytes as compiling directly with ``topologies.make_mesh``.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
import time
import traceback
from typing import Any


def main(folder: str) -> int:
    """Compile what the folder holds. The exit status is 0 whenever a result was written."""
    place = pathlib.Path(folder)
    request = json.loads((place / "request.json").read_text(encoding="utf-8"))
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["XLA_FLAGS"] = " ".join(request["flags"]).format(dump=place / "dump")
    started = time.monotonic()
    try:
        result: dict[str, Any] = _compile(request, place)
    except Exception as error:
        traceback.print_exc()
        message = f"{type(error).__name__}: {error}"
        result = {"status": _status_of(message), "message": _sentence(message)}
    result["seconds"] = time.monotonic() - started
    result["cpu_seconds"] = time.process_time()
    temporary = place / "result.json.part"
    temporary.write_text(json.dumps(result), encoding="utf-8")
    os.replace(temporary, place / "result.json")
    return 0


def _compile(request: dict[str, Any], place: pathlib.Path) -> dict[str, Any]:
    import numpy as np
    from jax.experimental import topologies
    from jax.interpreters import mlir
    from jaxlib import xla_client
    from jaxlib.mlir import ir

    description = topologies.get_topology_desc(
        request["topology_name"], platform=request["platform"], **request["topology_options"]
    )
    order = request["device_order"]
    devices = sorted(description.devices, key=_device_key)
    devices = [devices[i] for i in order]
    options = xla_client.CompileOptions()
    options.num_replicas = 1
    options.num_partitions = len(devices)
    options.device_assignment = xla_client.DeviceAssignment.create(
        np.asarray([[d.id for d in devices]])
    )
    build = options.executable_build_options
    build.use_spmd_partitioning = True
    build.use_shardy_partitioner = True
    with mlir.make_ir_context():
        module = ir.Module.parse((place / "module.mlir").read_text(encoding="utf-8"))
        executable = devices[0].client.compile(
            module, xla_client.DeviceList(tuple(devices)), options
        )
    stats = executable.get_compiled_memory_stats()
    result: dict[str, Any] = {
        "status": "ok",
        "message": "",
        "argument_bytes": stats.argument_size_in_bytes,
        "output_bytes": stats.output_size_in_bytes,
        "temp_bytes": stats.temp_size_in_bytes,
        "alias_bytes": stats.alias_size_in_bytes,
        "code_bytes": stats.generated_code_size_in_bytes,
        "reported_peak_bytes": getattr(stats, "peak_memory_in_bytes", 0),
    }
    dumped = sorted((place / "dump").glob("*after_codegen.txt"), key=lambda p: -p.stat().st_size)
    if dumped:
        os.replace(dumped[0], place / "scheduled.txt")
    else:
        text = "\n".join(m.to_string() for m in executable.hlo_modules())
        (place / "scheduled.txt").write_text(text, encoding="utf-8")
    return result


def _device_key(device: Any) -> tuple[Any, ...]:
    """The order in which cost_model.layout.device_order numbers devices."""
    core = getattr(device, "core_on_chip", None)
    if core is None:  # GPUs and CPUs are numbered in order; their coordinates are not a torus
        return (device.id,)
    slice_index = getattr(device, "slice_index", None) or 0
    return (slice_index, *reversed(tuple(device.coords)), core)


def _status_of(message: str) -> str:
    memory = ("RESOURCE_EXHAUSTED", "Ran out of memory", "exceeds the available", "OOM")
    return "out_of_memory" if any(word in message for word in memory) else "failed"


def _sentence(message: str) -> str:
    """The first lines of the compiler's message, on one line."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return " ".join(lines[:6])[:1500]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
