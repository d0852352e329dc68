"""Programs run in a process of their own, on eight host devices."""

import json
import os
import subprocess
import sys
from typing import Any

# XLA:CPU's concurrent order lets devices wait for each other's collectives on a loaded machine
FLAGS = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_cpu_enable_concurrency_optimized_scheduler=false"
)


def run_on_eight_devices(program: str, argument: Any, timeout_s: float) -> Any:
    """What the program's last line says in JSON; ``argument`` is its sys.argv[1] in JSON."""
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(argument)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        env={**os.environ, "XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])
