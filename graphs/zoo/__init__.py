"""Real train steps of public architectures.

`build_train_step(load_model_config("llama3_8b"), global_batch=256)` gives a JAX function and the
shapes of its arguments, with nothing allocated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from graphs.zoo.config import ModelConfig
from graphs.zoo.registry import load_model_config, model_names

if TYPE_CHECKING:
    from graphs.zoo.train_step import (
        active_parameter_count,
        build_train_step,
        init_state,
        parameter_count,
    )

__all__ = [
    "ModelConfig",
    "active_parameter_count",
    "build_train_step",
    "init_state",
    "load_model_config",
    "model_names",
    "parameter_count",
]


def __getattr__(name: str):
    # flax and optax take a second to import, which reading a config need not wait for
    if name in __all__:
        from graphs.zoo import train_step

        return getattr(train_step, name)
    raise AttributeError(f"module 'graphs.zoo' has no attribute {name!r}")
