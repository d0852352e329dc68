"""Eight devices on this machine, and compiles of a run kept for it, set before JAX starts."""

import os
import shutil
import tempfile

import pytest
from hypothesis import settings

# Compiling for this machine is much of the suite's time: little effort for each program
_FLAGS = {
    "--xla_force_host_platform_device_count": "8",
    "--xla_backend_optimization_level": "0",
    "--xla_llvm_disable_expensive_passes": "true",
}
_given = os.environ.get("XLA_FLAGS", "")
_added = (f"{name}={value}" for name, value in _FLAGS.items() if name not in _given)
os.environ["XLA_FLAGS"] = " ".join([_given, *_added]).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")


def pytest_configure(config: pytest.Config) -> None:
    """... and once for equal programs of one run, in all its processes; never those of another."""
    if hasattr(config, "workerinput"):
        return  # the environment is the controller's
    folder = tempfile.mkdtemp(prefix="meshwright-compiled-")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": folder,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


# A busy machine is no failure: examples have no deadline. The same examples in every run of a
# commit, so that a failure belongs to a change; MESHWRIGHT_FUZZ=1 draws new ones instead.
settings.register_profile("steady", deadline=None, derandomize="MESHWRIGHT_FUZZ" not in os.environ)
settings.load_profile("steady")
