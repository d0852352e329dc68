"""The learned search under several policies, as optimizers of the held-out suite."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from graphs.errors import MeshwrightError
from placement.learned.anytime import Curve

LEARNED, HURRIED, UNTRAINED, UNIFORM = "learned", "learned_1s", "untrained", "uniform"
HURRY_S = 1.0
"""Limit of the hurried run, which knows that it has no more."""


def hurried_name(policy: str) -> str:
    """The optimizer that is a policy's hurried run."""
    return f"{policy}_{HURRY_S:g}s"


def traced_name(policy: str) -> str:
    """The optimizer that is a policy's hurried run, its limit counted from the traced program on."""
    return f"traced_{hurried_name(policy)}"


def is_hurried(optimizer: str) -> bool:
    """Whether it is the hurried run of some policy."""
    return optimizer.endswith(hurried_name(""))


def contenders(
    extra: Mapping[str, str | None],
) -> tuple[dict[str, Callable[..., Curve]], list[str]]:
    """(optimizer by name, what is missing in words); `extra` maps names to weights files.

    Each trained policy runs three times, the second time as one that knows that it has HURRY_S, the
    third time as one that has as much after tracing.
    """
    from placement.learned.policy import load_policy

    found: dict[str, Callable[..., Curve]] = {
        UNTRAINED: lambda instance, **budget: _run(
            instance, load_policy(UNTRAINED, seed=budget["seed"]), **budget
        ),
        UNIFORM: lambda instance, **budget: _run(instance, load_policy(UNIFORM), **budget),
    }
    notes = []
    for name, path in {LEARNED: LEARNED, **extra}.items():
        if path is None:
            continue
        try:
            policy = load_policy(path)
        except MeshwrightError as error:
            notes.append(f"{name} is skipped: {error}")
            continue
        found[name] = _planner(policy)
        found[hurried_name(name)] = _planner(policy, lambda _: HURRY_S)
        found[traced_name(name)] = _planner(policy, lambda instance: HURRY_S + instance.tracing_s)
    return found, notes


def _planner(
    policy: Any, longest_s: Callable[[Any], float] = lambda _: float("inf")
) -> Callable[..., Curve]:
    def run(instance, *, max_evaluations: int, time_limit_s: float, seed: int) -> Curve:
        limit = min(time_limit_s, longest_s(instance))
        return _run(
            instance, policy, max_evaluations=max_evaluations, time_limit_s=limit, seed=seed
        )

    return run


def _run(instance, policy, **budget) -> Curve:
    from placement.learned.search import plan_instance

    return plan_instance(instance, policy=policy, **budget).curve
