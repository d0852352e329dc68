"""The devices that a launch runs on, settled before JAX starts."""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Any

from graphs.errors import MeshwrightError

_FORCED = "--xla_force_host_platform_device_count"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """The processes of one job; None where JAX finds it out from the machine."""

    coordinator: str | None
    """host:port of process 0."""
    count: int | None
    index: int | None


def processes_of(config: Any) -> Processes | None:
    """From the keys, else JAX's environment variables; None for a job of one process."""
    coordinator = config.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    if not config.distributed and not coordinator:
        return None
    return Processes(
        coordinator=coordinator,
        count=_number("processes", config.processes, "JAX_NUM_PROCESSES"),
        index=_number("process", config.process, "JAX_PROCESS_ID"),
    )


def devices_for(cluster: Any, processes: Processes | None) -> list[Any]:
    """The devices of the whole job. For cpu:N this machine is made to show N, over all processes.

    Raises MeshwrightError where JAX cannot show the cluster's devices.
    """
    of_host = cluster.platform == "cpu"
    if of_host:
        count = processes.count if processes else 1
        if not count or cluster.n_devices % count:
            raise MeshwrightError(
                f"cluster={cluster.notation} over {count or 'an unknown number of'} processes: "
                "give processes= a divisor of the number of devices"
            )
        flags = re.sub(rf"{_FORCED}=\d+", "", os.environ.get("XLA_FLAGS", ""))
        mine = cluster.n_devices // count
        os.environ["XLA_FLAGS"] = f"{flags} {_FORCED}={mine}".strip()
        os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    join(processes)
    try:
        found = jax.devices()
    except RuntimeError as error:
        raise MeshwrightError(
            f"JAX finds no device here ({' '.join(str(error).split())[:200]}); "
            "use cluster=cpu:8 for a run on this machine's cores"
        ) from error
    if of_host and processes is None:
        found = found[: cluster.n_devices]
    return list(found)


def join(processes: Processes | None) -> None:
    """Meet the other processes of the job; nothing to do for a job of one.

    Raises MeshwrightError where they do not meet.
    """
    if processes is None:
        return
    import jax

    try:
        jax.distributed.initialize(
            coordinator_address=processes.coordinator,
            num_processes=processes.count,
            process_id=processes.index,
        )
    except (ValueError, RuntimeError) as error:
        first = " ".join(str(error).split())[:200]
        raise MeshwrightError(
            f"the processes of this job did not meet ({first}); give coordinator=host:port, "
            "processes= and process="
        ) from error


def _number(key: str, given: int | None, variable: str) -> int | None:
    if given is not None:
        return int(given)
    text = os.environ.get(variable)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise MeshwrightError(
            f"{variable}={text!r} is not a whole number; set it so or give {key}="
        ) from None
