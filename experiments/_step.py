"""The train step that a configuration names: a model of the zoo, or the user's own function."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

from graphs.errors import MeshwrightError
from placement.experiments import _hydra


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """A function to plan."""

    title: str
    """how a reader calls it."""
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    """abstract: pytrees of jax.ShapeDtypeStruct."""
    donate_argnums: tuple[int, ...]
    tokens_per_step: int | None
    """None for a user's function."""


def step_of(config: Any) -> Step:
    """The step of a configuration with the keys ``module``, ``model`` and ``train``.

    Raises:
        MeshwrightError: the module cannot be imported, or returns something else.
    """
    if config.module is not None:
        return _from_module(config.module)
    model = _hydra.instantiate(config.model)
    train = config.train
    built = _hydra.instantiate(train)(model)
    function, arguments, donate_argnums = built
    seq_len = train.seq_len or model.seq_len
    return Step(
        title=model.name,
        function=function,
        arguments=arguments,
        donate_argnums=donate_argnums,
        tokens_per_step=train.global_batch * seq_len,
    )


def _from_module(name: str) -> Step:
    module_name, colon, function_name = name.partition(":")
    if not colon or not module_name or not function_name:
        raise MeshwrightError(
            f"module={name!r} does not name a function: write module=package.module:function"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise MeshwrightError(
            f"module={name!r} cannot be imported ({error}): "
            "run from the folder that holds it, or install it"
        ) from error
    build = getattr(module, function_name, None)
    if not callable(build):
        raise MeshwrightError(
            f"module={name!r}: {module_name} has no function {function_name!r}; "
            "name one that returns (train_step, abstract_args, donate_argnums)"
        )
    try:
        inspect.signature(build).bind()
    except (TypeError, ValueError) as error:
        raise MeshwrightError(
            f"module={name!r} names a function with arguments ({error}): name one that takes none"
        ) from error
    built = build()
    if not (isinstance(built, tuple) and len(built) == 3 and callable(built[0])):
        raise MeshwrightError(
            f"module={name!r} returned {type(built).__name__}: "
            "return (train_step, abstract_args, donate_argnums)"
        )
    function, arguments, donate_argnums = built
    if not isinstance(arguments, tuple | list) or isinstance(donate_argnums, str):
        raise MeshwrightError(
            f"module={name!r}: abstract_args must be a tuple of the step's arguments, "
            "and donate_argnums a tuple of their indices"
        )
    donated = (donate_argnums,) if isinstance(donate_argnums, int) else tuple(donate_argnums)
    return Step(
        title=name,
        function=function,
        arguments=tuple(arguments),
        donate_argnums=donated,
        tokens_per_step=None,
    )
