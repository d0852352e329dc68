"""Copies of activations that a resharding makes: gathered operands, live while their readers run.

Whether a copy exists depends on two choices, the source's and the reader's; a table problem counts
memory by single choices. So the exact bytes are added to the memory profile of an assignment
(:meth:`cost_model.simulate.Simulator.memory_profile`), and :func:`with_operands` gives the solver a
problem that counts every copy a reader's choice can need, for where the assignment found without
them does not fit.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from cost_model.problem import Problem


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operand:
    """An activation that a node reads in another sharding than its source holds it."""

    source: int
    node: int
    interval: tuple[int, int]
    """Half-open, in op positions: from the first to after the last reader."""
    held_bytes: np.ndarray
    """[P, Q] :func:`held_bytes` over distinct specs; 0 where no copy is made."""
    rows: np.ndarray
    """[S_source] row of each choice of the source."""
    columns: np.ndarray
    """[S_node] column of each choice of the reader."""


def held_bytes(seconds: np.ndarray, n_bytes: float, shards: np.ndarray) -> np.ndarray:
    """[P, Q] bytes of the copy that a resharding makes.

    Args:
      seconds: [P, Q] of the resharding.
      n_bytes: of the whole tensor.
      shards: [Q] devices that share it in each of the reader's specs.
    """
    return np.where(seconds > 0, n_bytes / shards[None, :], 0.0)


def add_operands(profile: np.ndarray, operands: tuple[Operand, ...], assignment) -> None:
    """Add the copies of an assignment ([nodes]) to changes of live bytes ([positions + 1])."""
    for o in operands:
        amount = o.held_bytes[o.rows[assignment[o.source]], o.columns[assignment[o.node]]]
        if amount:
            profile[o.interval[0]] += amount
            profile[min(o.interval[1], len(profile) - 1)] -= amount


def with_operands(problem: Problem, operands: tuple[Operand, ...]) -> Problem:
    """The problem with every copy that a reader's choice can need counted in its memory."""
    values = [o.held_bytes.max(axis=0, initial=0.0)[o.columns] for o in operands]
    kept = [(o, v) for o, v in zip(operands, values) if v.any()]
    sizes = [len(v) for _, v in kept]
    return dataclasses.replace(
        problem,
        usage_nodes=np.concatenate([problem.usage_nodes, [o.node for o, _ in kept]]).astype(
            np.int32
        ),
        usage_intervals=np.concatenate(
            [problem.usage_intervals, np.array([o.interval for o, _ in kept], int).reshape(-1, 2)]
        ),
        usage_offsets=np.concatenate(
            [problem.usage_offsets, problem.usage_offsets[-1] + np.cumsum(sizes, dtype=int)]
        ),
        usages=np.concatenate([problem.usages, *(v for _, v in kept)]),
    )
