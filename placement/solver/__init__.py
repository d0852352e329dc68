"""The engine for table problems: one solver for traced programs and industrial instances."""

from placement.solver.engine import solve
from placement.solver.exact import exact
from placement.solver.solution import Progress, Solution
from placement.solver.warm import warm

__all__ = ["Progress", "Solution", "exact", "solve", "warm"]
