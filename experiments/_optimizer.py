"""The optimizer that a configuration chooses."""

from __future__ import annotations

import dataclasses

from graphs.errors import MeshwrightError


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerChoice:
    """What placement.optimize takes as ``optimizer``."""

    name: str
    """one of placement.optimizers()."""

    def __post_init__(self) -> None:
        from placement.api import optimizers

        known = sorted(optimizers())
        if self.name not in known:
            raise MeshwrightError(
                f"no optimizer named {self.name!r}: choose one of {', '.join(known)}"
            )
