"""Everything that proposes, under one interface."""

from __future__ import annotations

from placement.optimizers.interface import Assignment, Budget, Optimizer
from placement.optimizers.rules import RULES, rule_optimizer
from placement.optimizers.sampling import annealing, random
from placement.optimizers.solvers import exact, heuristic, search

HAND_TUNED: dict[str, Optimizer] = {rule.name: rule_optimizer(rule) for rule in RULES}
"""Experts' rules by name."""

OPTIMIZERS: dict[str, Optimizer] = {
    "search": search,
    "exact": exact,
    "heuristic": heuristic,
    "random": random,
    "annealing": annealing,
    **HAND_TUNED,
}
"""All optimizers by name."""

__all__ = ["HAND_TUNED", "OPTIMIZERS", "Assignment", "Budget", "Optimizer"]
