"""The compiled parts of a run under a plan: first state, step, evaluation."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from graphs.errors import MeshwrightError
from graphs.zoo.config import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """Functions over arrays that lie on the plan's mesh."""

    init: Callable[[int], Any]
    """seed -> (params, opt_state)."""
    step: Callable[..., Any]
    """params, opt_state, batch -> params, opt_state, {"loss": scalar}; takes the state's memory."""
    evaluate: Callable[..., Any]
    """params, batch -> mean loss, a scalar."""
    abstract_state: Any
    """(params, opt_state) of jax.ShapeDtypeStruct."""
    state_shardings: Any
    """the same tree of shardings."""
    batch_shardings: dict[str, Any]
    """by name of the batch's arrays."""


def build_program(
    plan: Any,
    step: Callable,
    arguments: tuple[Any, ...],
    *,
    model: ModelConfig,
    train: Mapping[str, Any],
    devices: Any = None,
) -> Program:
    """The zoo's step under a plan that is bound to it.

    arguments: the step's, abstract. train: the options that the step was built with. devices:
    those of the mesh, ``jax.devices()`` where None. Raises MeshwrightError where the number of
    devices is not the plan's.
    """
    import jax
    from flax import nnx

    from graphs.zoo import init_state
    from graphs.zoo.options import RunOptions
    from graphs.zoo.train_step import abstract_model, loss_of

    mesh = plan.mesh(devices)
    if not set(mesh.devices.flat) >= set(jax.local_devices()) and jax.process_count() > 1:
        raise MeshwrightError(
            f"the plan's {mesh.devices.size} devices leave out some of this process; "
            "plan for all devices of the job"
        )
    *state_shardings, batch_shardings = plan.in_shardings(mesh)
    state_shardings = tuple(state_shardings)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    options = RunOptions(**_taken(train, RunOptions))
    graphdef, _ = abstract_model(model, options)
    init_options = _taken(train, init_state)

    def init(key):
        return init_state(model, key, **init_options)

    def evaluate(params, batch):
        return loss_of(nnx.merge(graphdef, params), batch)

    jit_init = jax.jit(init, out_shardings=state_shardings)
    return Program(
        init=lambda seed: jit_init(jax.random.key(seed)),
        step=jax.jit(
            plan.apply(step),
            in_shardings=(*state_shardings, batch_shardings),
            # the state goes back to where the next step reads it
            out_shardings=(*state_shardings, plan.out_shardings(mesh)[2]),
            donate_argnums=(0, 1),
        ),
        evaluate=jax.jit(
            evaluate,
            in_shardings=(state_shardings[0], batch_shardings),
            out_shardings=whole,
        ),
        abstract_state=tuple(arguments[:2]),
        state_shardings=state_shardings,
        batch_shardings=batch_shardings,
    )


def _taken(options: Mapping[str, Any], by: Callable) -> dict[str, Any]:
    """Those of the options that a function takes."""
    names = inspect.signature(by).parameters
    return {name: value for name, value in options.items() if name in names}
