"""Runs inside the peer's environment, as a file: ``python autosharding_child.py FOLDER``.

Compiles ``FOLDER/module.mlir`` (StableHLO text without shardings) with XLA's
auto-sharding on a mesh of the whole topology, with the options that ``jax.jit(f,
in_shardings=AUTO(mesh), out_shardings=AUTO(mesh))`` of jax 0.6.2 sets. Imports nothing but jax.
"""
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false

import io
import json
import os
import pathlib
import sys
import time
import traceback


def main(folder):
    place = pathlib.Path(folder)
    request = json.loads((place / "request.json").read_text())
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["XLA_FLAGS"] = f"--xla_dump_to={place / 'dump'} --xla_dump_hlo_as_text=true"
    started = time.monotonic()
    try:
        result = compile_automatically(request, place)
    except Exception as error:
        traceback.print_exc()
        lines = f"{type(error).__name__}: {error}".splitlines()
        message = " ".join(line.strip() for line in lines[:6])[:1500]
        memory = "RESOURCE_EXHAUSTED" in message or "Ran out of memory" in message
        result = {"status": "out_of_memory" if memory else "failed", "message": message}
    result["seconds"] = time.monotonic() - started
    result["cpu_seconds"] = time.process_time()
    temporary = place / "result.json.part"
    temporary.write_text(json.dumps(result))
    os.replace(temporary, place / "result.json")


def compile_automatically(request, place):
    import numpy as np
    from jax.experimental import topologies
    from jax.interpreters import mlir
    from jaxlib import xla_client
    from jaxlib.mlir import ir

    description = topologies.get_topology_desc(request["topology_name"], platform="tpu")
    found = sorted(description.devices, key=lambda d: (*reversed(d.coords), d.core_on_chip))
    devices = [found[i] for i in request["device_order"]]
    with mlir.make_ir_context():
        module = ir.Module.parse((place / "module.mlir").read_text())
        module.operation.attributes["mhlo.num_partitions"] = ir.IntegerAttr.get(
            ir.IntegerType.get_signless(32), len(devices)
        )
        functions = [f for f in module.body.operations if f.attributes["sym_name"].value == "main"]
        signature = functions[0].type
        n_in, n_out = len(signature.inputs), len(signature.results)
        code = io.BytesIO()
        module.operation.write_bytecode(code)
    options = xla_client.CompileOptions()
    options.num_replicas = 1
    options.num_partitions = len(devices)
    options.device_assignment = xla_client.DeviceAssignment.create(
        np.array([[d.id for d in devices]])
    )
    build = options.executable_build_options
    build.use_spmd_partitioning = True
    build.use_auto_spmd_partitioning = True
    build.auto_spmd_partitioning_mesh_shape = request["mesh_shape"]
    build.auto_spmd_partitioning_mesh_ids = np.arange(len(devices))
    build.allow_spmd_sharding_propagation_to_parameters = [True] * n_in
    build.allow_spmd_sharding_propagation_to_output = [True] * n_out
    executable = devices[0].client.compile(
        code.getvalue(), xla_client.DeviceList(tuple(devices)), options
    )
    stats = executable.get_compiled_memory_stats()
    dumped = sorted((place / "dump").glob("*after_codegen.txt"), key=lambda p: -p.stat().st_size)
    os.replace(dumped[0], place / "scheduled.txt")
    return {
        "status": "ok",
        "message": "",
        "argument_bytes": stats.argument_size_in_bytes,
        "output_bytes": stats.output_size_in_bytes,
        "temp_bytes": stats.temp_size_in_bytes,
        "alias_bytes": stats.alias_size_in_bytes,
        "code_bytes": stats.generated_code_size_in_bytes,
        "parameter_shardings": shardings(executable.get_parameter_shardings()),
        "output_shardings": shardings(executable.get_output_shardings()),
    }


def shardings(found):
    """The compiler's choice for each array, as text."""
    return [" ".join(str(s).split()) for s in (found or ())]


if __name__ == "__main__":
    main(sys.argv[1])
