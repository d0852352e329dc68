"""How a plan is found, written down, applied and verified.

``optimize`` plans a train step; ``optimize_model`` plans a model with its stages, microbatches and
rematerialisation, and ``build`` makes the train step of such a plan; ``partition_specs`` gives just the
parameters' specs; ``verify`` compiles a plan with XLA; ``optimizers`` lists what can propose.
"""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from placement.api import optimize, optimizers, partition_specs
    from placement.plan import Plan
    from placement.verify import verify
    from placement.whole import build, optimize_model

__all__ = [
    "Plan",
    "build",
    "optimize",
    "optimize_model",
    "optimizers",
    "partition_specs",
    "verify",
]

_WHERE = {
    "Plan": "placement.plan",
    "build": "placement.whole",
    "optimize": "placement.api",
    "optimize_model": "placement.whole",
    "optimizers": "placement.api",
    "partition_specs": "placement.api",
    "verify": "placement.verify",
}


class _Package(types.ModuleType):
    """Public names are loaded when first used, so that importing the package is quick."""

    def __getattribute__(self, name: str) -> Any:
        # Before the module's own attributes: importing placement.optimizers or placement.verify
        # would otherwise put the submodule in the function's place.
        if name in ("optimizers", "verify"):
            return _public(name)
        return super().__getattribute__(name)

    def __getattr__(self, name: str) -> Any:
        if name not in _WHERE:
            raise AttributeError(f"module 'placement' has no attribute {name!r}")
        return _public(name)


def _public(name: str) -> Any:
    import importlib

    return getattr(importlib.import_module(_WHERE[name]), name)


sys.modules[__name__].__class__ = _Package
