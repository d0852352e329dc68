"""The Python API: a train step and a cluster in, a Plan out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from graphs.errors import MeshwrightError

OBJECTIVES = ("time", "memory", "energy", "carbon", "cost")
_WRITING = 0.15
"""Times the seconds of tracing that it takes to write a plan down when the search is over."""


def optimizers() -> tuple[str, ...]:
    """Names of all optimizers."""
    from placement.mesh_search import LEARNED
    from placement.optimizers import OPTIMIZERS

    return (LEARNED, *OPTIMIZERS)


def optimize(
    train_step: Callable,
    *abstract_args: Any,
    cluster: str,
    objective: str = "time",
    optimizer: str = "search",
    mesh_shape: Mapping[str, int] | None = None,
    donate_argnums: Sequence[int] = (0, 1),
    time_limit_s: float = 10.0,
    max_evaluations: int | None = None,
    seed: int = 0,
    throw: bool = True,
    strict: bool = False,
    max_axes: int = 2,
    checkpoint_policy: str | None = None,
    pin_operands: bool | None = None,
):
    """Plan a train step on a cluster.

    A step with an argument ``checkpoint_policy`` leaves it to the plan which of
    :data:`placement.checkpointing.POLICIES` its ``jax.checkpoint`` follows.

    Args:
      train_step: any JAX function.
      abstract_args: its arguments, pytrees of arrays or ``jax.ShapeDtypeStruct``.
      cluster: notation, ``v5e:16x16``, ``4*v5e:16x16``, ``h100:8x64``, ``cpu:8``.
      objective: what the plan minimises: time | memory | energy | carbon | cost.
      optimizer: one of :func:`optimizers`, or ``learned``: the trained policy says in which order
        meshes are searched; without its weights it is ``search``, with a warning.
      mesh_shape: pins the mesh, axis name -> size; None searches it, or takes the one that the
        function's own sharding constraints name.
      donate_argnums: arguments whose memory the results take: the training state.
      time_limit_s: seconds to plan in; the best plan found by then is returned, with
        ``status="time_limit"`` where the search was cut short. Where nothing fits by then, other
        meshes are tried for as long again, at least for 10 s, before it says so.
      max_evaluations: limit on complete assignments scored.
      seed: the same seed gives the same plan.
      throw: raise InfeasibleError where no plan fits; else return the one that needs the least
        memory, with the reason in ``status``.
      strict: raise for primitives without a sharding rule instead of keeping them whole.
      max_axes: most mesh axes searched where the mesh is free.
      checkpoint_policy: pins the policy of a step that takes one.
      pin_operands: constrain what every operation reads, so that the compiled program is the one that
        was scored. None does so except for hand-tuned rules, which leave it to XLA's propagation.

    Raises:
      MeshwrightError: for arguments that cannot be planned, in one sentence.
    """
    from placement import checkpointing

    start = time.monotonic()
    if not time_limit_s > 0:
        raise MeshwrightError(f"time_limit_s is {time_limit_s}; give a positive number of seconds")
    options: dict[str, Any] = dict(
        cluster=cluster,
        objective=objective,
        optimizer=optimizer,
        donate_argnums=donate_argnums,
        max_evaluations=max_evaluations,
        seed=seed,
        strict=strict,
        max_axes=max_axes,
        pin_operands=pin_operands,
    )

    def plan_with(policy: str, shape: Mapping[str, int] | None, seconds: float):
        step = checkpointing.with_policy(train_step, policy)
        plan = _plan(step, abstract_args, mesh_shape=shape, time_limit_s=seconds, **options)
        return dataclasses.replace(plan, checkpoint_policy=policy)

    if checkpointing.takes_policy(train_step):
        plan = checkpointing.plan_policies(
            plan_with,
            pinned=checkpoint_policy,
            objective=objective,
            mesh_shape=mesh_shape,
            start=start,
            time_limit_s=time_limit_s,
        )
    elif checkpoint_policy is not None:
        raise MeshwrightError(
            f"checkpoint_policy={checkpoint_policy} is given, but the step has no argument "
            f"{checkpointing.ARGUMENT}; add one and hand it to jax.checkpoint, or leave it out"
        )
    else:
        plan = plan_with("", mesh_shape, time_limit_s)
    if throw:
        plan.raise_if_infeasible()
    return plan


def _plan(
    train_step: Callable,
    abstract_args: Sequence[Any],
    *,
    cluster: str,
    objective: str,
    optimizer: str,
    mesh_shape: Mapping[str, int] | None,
    donate_argnums: Sequence[int],
    time_limit_s: float,
    max_evaluations: int | None,
    seed: int,
    strict: bool,
    max_axes: int,
    pin_operands: bool | None,
):
    """The plan of one program, feasible or not."""
    from cost_model.cluster import parse_cluster
    from graphs.groups import group
    from graphs.rules.manual import user_mesh
    from graphs.trace import trace
    from placement.mesh_search import GRACE_S, LEARNED, MeshSearch
    from placement.optimizers import OPTIMIZERS

    start = time.monotonic()
    if objective not in OBJECTIVES:
        raise MeshwrightError(
            f"unknown objective {objective!r}; use one of {', '.join(OBJECTIVES)}"
        )
    notes: tuple[str, ...] = ()
    policy = None
    if optimizer == LEARNED:
        from placement.learned.advice import shipped_policy

        optimizer = "search"
        policy, why_not = shipped_policy()
        notes = () if policy else (why_not,)
    if optimizer not in OPTIMIZERS:
        raise MeshwrightError(
            f"unknown optimizer {optimizer!r}; use one of {', '.join(optimizers())}"
        )
    parsed = parse_cluster(cluster)
    if mesh_shape is not None:
        _layouts(parsed, mesh_shape, max_axes)  # refuse it before tracing
    donated = tuple(n for n in donate_argnums if n < len(abstract_args))
    graph = trace(train_step, *abstract_args, donate_argnums=donated)
    grouping = group(graph, strict=strict)
    layouts = _layouts(parsed, mesh_shape or user_mesh(graph.ops), max_axes)
    writing_s = _WRITING * (time.monotonic() - start)
    search = MeshSearch(
        grouping=grouping,
        layouts=layouts,
        optimizer=optimizer,
        objective=objective,
        deadline=start + time_limit_s - writing_s,
        grace_s=max(time_limit_s, GRACE_S),
        max_evaluations=max_evaluations,
        seed=seed,
        policy=policy,
        pin_operands=pin_operands,
    )
    search.run()
    plan = search.plan(train_step, abstract_args, donated, start)
    return dataclasses.replace(plan, warnings=(*notes, *plan.warnings))


def _layouts(cluster, mesh_shape, max_axes):
    from cost_model.layout import enumerate_layouts, layout_for

    if mesh_shape is not None:
        return [layout_for(cluster, mesh_shape)]
    return enumerate_layouts(cluster, max_axes=max_axes)


def partition_specs(train_step: Callable, *abstract_args: Any, cluster: str, **kwargs: Any):
    """The PartitionSpecs of the first argument (the parameters) in one line.

    Takes what :func:`optimize` takes.
    """
    return optimize(train_step, *abstract_args, cluster=cluster, **kwargs).in_specs[0]
