"""The optimizer that a configuration chooses."""

from __future__ import annotations

import dataclasses

from graphs.errors import MeshwrightError


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerChoice:
    """What placement.optimize takes as ``optimizer``."""

    name: str
    """a key of placement.optimizers.OPTIMIZERS."""

    def __post_init__(self) -> None:
        from placement.optimizers import OPTIMIZERS

        known = sorted(OPTIMIZERS)
        if self.name not in known:
            raise MeshwrightError(
                f"no optimizer named {self.name!r}: choose one of {', '.join(known)}"
            )
