"""What every optimizer takes and gives.

An optimizer proposes an assignment for the tables of one mesh. Hand-tuned rules, search, exact
solvers and learned policies share this interface, so that all are compared on equal terms.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np

from cost_model.tables import Tables


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """What one call may spend."""

    time_limit_s: float
    max_evaluations: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assignment:
    """One choice for each node."""

    choices: np.ndarray
    """[nodes] int64."""
    table_cost_s: float
    lower_bound_s: float
    """Lower bound of the table cost on this mesh; 0 where the optimizer gives none."""
    feasible: bool
    """Whether it keeps the memory limit."""
    evaluations: int
    """Complete assignments scored."""


class Optimizer(Protocol):
    def __call__(self, tables: Tables, key: int, budget: Budget) -> Assignment: ...
