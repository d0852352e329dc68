"""Eight devices on this machine, set before JAX starts."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    ).strip()

from hypothesis import settings

# A busy machine is no failure: examples have no deadline. The same examples in every run of a
# commit, so that a failure belongs to a change; MESHWRIGHT_FUZZ=1 draws new ones instead.
settings.register_profile("steady", deadline=None, derandomize="MESHWRIGHT_FUZZ" not in os.environ)
settings.load_profile("steady")
