"""The engine for table problems: one solver for traced programs and industrial instances."""

from placement.solver.engine import solve
from placement.solver.exact import exact
from placement.solver.preparation import prepare
from placement.solver.solution import NEAR, Progress, Solution

__all__ = ["NEAR", "Progress", "Solution", "exact", "prepare", "solve"]
