"""How a plan is found, written down, applied and verified.

``optimize`` plans a train step, ``partition_specs`` gives just the parameters' specs, ``verify``
compiles a plan with XLA, ``optimizers`` lists what can propose.
"""

from __future__ import annotations

from typing import Any

__all__ = ["Plan", "optimize", "optimizers", "partition_specs", "verify"]

_WHERE = {
    "Plan": "placement.plan",
    "optimize": "placement.api",
    "optimizers": "placement.api",
    "partition_specs": "placement.api",
    "verify": "placement.verify",
}


def __getattr__(name: str) -> Any:
    """Load public names when they are first used, so that importing the package is quick."""
    if name not in _WHERE:
        raise AttributeError(f"module 'placement' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value
