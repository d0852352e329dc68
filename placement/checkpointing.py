"""A step that leaves to the plan what its backward pass keeps.

A train step that has an argument ``checkpoint_policy`` and hands it to ``jax.checkpoint`` is planned
with each of POLICIES: with the one that keeps the least on all meshes, then with the others on the best
of these. The plan names the policy, and :meth:`placement.Plan.apply` gives it to the step.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from graphs.errors import MeshwrightError

ARGUMENT = "checkpoint_policy"
POLICIES = (
    "nothing_saveable",
    "dots_with_no_batch_dims_saveable",
    "dots_saveable",
    "everything_saveable",
)
"""Names in ``jax.checkpoint_policies``, least memory first."""


def takes_policy(fn: Callable) -> bool:
    """Whether a function has an argument ARGUMENT that can be given by name."""
    try:
        found = inspect.signature(fn).parameters.get(ARGUMENT)
    except (TypeError, ValueError):  # a callable without a signature
        return False
    by_name = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return found is not None and found.kind in by_name


def with_policy(fn: Callable, name: str) -> Callable:
    """The function under a policy; itself where the name is empty. MeshwrightError if it takes none."""
    if not name:
        return fn
    if not takes_policy(fn):
        raise MeshwrightError(
            f"the plan chose the checkpoint policy {name}, but the function has no argument "
            f"{ARGUMENT}; pass the function that was planned or plan again"
        )
    import jax

    return functools.partial(fn, **{ARGUMENT: getattr(jax.checkpoint_policies, name)})


def known_policy(name: str) -> str:
    """The name. MeshwrightError where it is not one of POLICIES."""
    if name not in POLICIES:
        raise MeshwrightError(
            f"unknown checkpoint policy {name!r}; use one of {', '.join(POLICIES)}"
        )
    return name


def plan_policies(
    plan_with: Callable[..., Any],
    *,
    pinned: str | None,
    objective: str,
    mesh_shape: Mapping[str, int] | None,
    start: float,
    time_limit_s: float,
):
    """The best plan over policies.

    Args:
      plan_with: ``plan_with(policy, mesh_shape, time_limit_s)`` gives the Plan under one policy.
      pinned: the only policy to try.
      objective: what the plan minimises.
      mesh_shape: pins the mesh.
      start: time.monotonic() when planning began.
      time_limit_s: seconds for all of it.
    """
    from placement.trials import Trials, best_meshes, fits

    trials = Trials(deadline=start + time_limit_s, objective=objective)
    first, *others = (known_policy(pinned),) if pinned else POLICIES
    share = 0.5 if others else 1.0
    plan = trials.add(first, plan_with(first, mesh_shape, trials.slice(share)))
    meshes = [mesh_shape] if mesh_shape else best_meshes(plan)
    for policy in others if fits(plan) else ():
        for shape in meshes:
            if not trials.over():
                trials.add(policy, plan_with(policy, shape, trials.slice(0.2)))
    best = trials.together(trials.best(), start)
    tried = len(set(trials.labels))
    said = f"checkpoint policy {best.checkpoint_policy}, of {tried} tried."
    return dataclasses.replace(best, reasons=(*best.reasons, said))
