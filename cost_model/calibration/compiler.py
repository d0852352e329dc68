"""Child process that compiles operator programs with the TPU compiler and prints their cycles.

Reads ``{"topology": ..., "cases": [...]}`` from standard input, writes one JSON line for each case
as soon as it is done. Run by ``meshwright profile`` under a file lock: two processes that use
libtpu at once collide. Environment: JAX_PLATFORMS=cpu and TPU_SKIP_MDS_QUERY=1.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import sys
import tempfile
import time

from cost_model.calibration.cycles import read_cycles
from cost_model.calibration.programs import Case, build


def main() -> int:
    request = json.load(sys.stdin)
    dump = pathlib.Path(tempfile.mkdtemp(prefix="meshwright_profile_"))
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={dump} --xla_dump_hlo_as_text=true"
    )
    try:
        _compile_all(request, dump)
    finally:
        shutil.rmtree(dump, ignore_errors=True)
    return 0


def _compile_all(request: dict, dump: pathlib.Path) -> None:
    import jax
    from jax.experimental import topologies

    options = request.get("options", {})
    topology = topologies.get_topology_desc(request["topology"], platform="tpu", **options)
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    for index, raw in enumerate(request["cases"]):
        item = Case(**{**raw, "dims": tuple((k, v) for k, v in raw["dims"])})
        start = time.perf_counter()
        record: dict = {"name": item.name}
        try:
            program, arguments = build(item)
            # the name appears in the dump's file names
            program_name = f"case_{index}_end"

            def named(*args: object, program: object = program) -> object:
                return program(*args)  # type: ignore[operator]

            named.__name__ = program_name
            jitted = jax.jit(named, in_shardings=sharding, out_shardings=sharding)
            jitted.lower(*arguments).compile()
            files = sorted(dump.glob(f"*{program_name}*after_codegen.txt"))
            totals = read_cycles(files[-1].read_text())
            record |= {
                "cycles": totals.cycles,
                "kernels": totals.kernels,
                "unknown_kernels": totals.unknown_kernels,
                "copy_bytes": totals.copy_bytes,
            }
        except Exception as error:
            # a case that does not compile is a result: the caller lists it with its reason
            record["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        shutil.rmtree(dump, ignore_errors=True)
        dump.mkdir()
        record["compile_s"] = round(time.perf_counter() - start, 3)
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    sys.exit(main())
