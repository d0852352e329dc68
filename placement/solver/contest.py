"""One contest instance solved against a wall-clock limit that counts everything.

The limit runs from the start of the process and covers start-up, reading, compiled loops and
output. A timer thread prints the best assignment found so far when the limit is near, whatever the
rest is doing, and ends the process.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Callable

import numpy as np

from cost_model import iopddl
from cost_model.problem import Problem
from graphs.errors import MeshwrightError
from placement.solver.solution import Progress, Solution

OPTIMIZERS = ("search", "exact", "learned")
"""What ``solve_file`` can run; ``learned`` is the search from the policy's start."""


def solve_file(
    path: str,
    *,
    timeout_s: float,
    seed: int = 0,
    optimizer: str = "search",
    started: float | None = None,
    say: Callable[[str], None] = print,
) -> int:
    """Print progress, then the chosen strategies as the last line; returns the exit status.

    ``started`` is the time.monotonic() from which the limit runs (default: this process's start).
    """
    if optimizer not in OPTIMIZERS:
        raise MeshwrightError(
            f"no solver named {optimizer!r}; choose one of {', '.join(OPTIMIZERS)}"
        )
    if not 0.0 < timeout_s < math.inf:
        raise MeshwrightError(f"the timeout is {timeout_s:g} s; give a positive number of seconds")
    started = _process_start() if started is None else started
    run = _Watched(path, started + timeout_s - _margin(timeout_s), say)
    run.watch()
    try:
        problem = iopddl.read(path)
        run.begin(problem)
        solution = _solve(problem, run, seed, optimizer)
    except MemoryError:
        raise MeshwrightError(f"{path} does not fit in this machine's memory") from None
    finally:
        run.stop()
    return run.answer(solution)


def _solve(problem: Problem, run: _Watched, seed: int, optimizer: str) -> Solution:
    left = run.deadline - time.monotonic()
    if optimizer == "exact":
        from placement.solver.exact import exact

        return exact(problem, time_limit_s=max(left - 0.2, 0.0))
    from placement.solver.engine import solve

    propose = None
    if optimizer == "learned":
        from placement.solver.policy import propose
    return solve(
        problem,
        time_limit_s=max(left, 0.0),
        seed=seed,
        on_progress=run.progress,
        patient=True,
        propose=propose,
    )


class _Watched:
    """The best answer so far, and the timer that prints it when time is up."""

    def __init__(self, path: str, deadline: float, say: Callable[[str], None]) -> None:
        self.path, self.deadline, self.say = path, deadline, say
        self.began = time.monotonic()
        self.problem: Problem | None = None
        self.best: np.ndarray | None = None
        self.printed = (-math.inf, math.inf, -math.inf)
        self.lock = threading.Lock()
        self.timer: threading.Timer | None = None
        self.done = False

    def watch(self) -> None:
        wait = max(self.deadline + 0.15 - time.monotonic(), 0.0)
        self.timer = threading.Timer(wait, self._time_up)
        self.timer.daemon = True
        self.timer.start()

    def begin(self, problem: Problem) -> None:
        self.problem = problem
        self.say(
            f"{problem.name}: {problem.n_nodes} nodes, {problem.n_edges} edges, "
            f"{len(problem.node_costs)} strategies, usage limit {problem.usage_limit:g}"
        )

    def progress(self, snapshot: Progress) -> None:
        if snapshot.assignment is not None:
            self.best = snapshot.assignment
        now, cost, bound = time.monotonic(), snapshot.cost, snapshot.lower_bound
        at, last_cost, last_bound = self.printed
        moved = cost < last_cost * (1 - 1e-3) or bound > last_bound + 1e-3 * abs(bound)
        if now - at < (0.5 if moved else 5.0) and not (math.isinf(last_cost) and cost < math.inf):
            return
        self.printed = (now, cost, bound)
        self._line(cost, bound)

    def _line(self, cost: float, bound: float) -> None:
        gap = (cost - bound) / cost if 0.0 < cost < math.inf else math.inf if cost else 0.0
        shown = "none" if math.isinf(cost) else f"{cost:.10g}"
        percent = "" if math.isinf(gap) else f"  gap {100 * max(gap, 0.0):.3f} %"
        spent = time.monotonic() - self.began
        self.say(f"{spent:8.2f} s  cost {shown}  bound {bound:.10g}{percent}")

    def stop(self) -> None:
        with self.lock:
            self.done = True
        if self.timer is not None:
            self.timer.cancel()

    def answer(self, solution: Solution) -> int:
        assert self.problem is not None
        if not solution.feasible:
            why = {
                "infeasible": "no assignment keeps the usage limit and avoids forbidden costs",
                "unknown": "no feasible assignment was found within the time limit",
            }[solution.status]
            self.say(f"{self.path}: {why}")
            self.say("[]")
            return 1
        self._line(solution.cost, solution.lower_bound)
        self.say(_listed(self.problem, solution.assignment))
        return 0

    def _time_up(self) -> None:
        with self.lock:
            if self.done:
                return
            if self.best is not None and self.problem is not None:
                self.say(_listed(self.problem, self.best))
                status = 0
            else:
                doing = "reading the file" if self.problem is None else "preparing"
                self.say(f"{self.path}: time ran out while {doing}; raise --timeout")
                self.say("[]")
                status = 1
            sys.stdout.flush()
            os._exit(status)


def _listed(problem: Problem, assignment: np.ndarray) -> str:
    return str(assignment[: iopddl.n_listed_nodes(problem)].tolist())


def _margin(timeout_s: float) -> float:
    """Kept for the last compiled chunk to return, for output and for leaving the process."""
    return min(0.08 * timeout_s + 0.3, 3.0)


def _process_start() -> float:
    """time.monotonic() at which this process started, where the system tells."""
    try:
        with open("/proc/self/stat", encoding="ascii") as file:
            ticks = int(file.read().rsplit(")", 1)[1].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
        return time.monotonic() - max(age, 0.0)
    except (OSError, ValueError, IndexError, AttributeError):
        return time.monotonic()


if __name__ == "__main__":
    sys.exit(solve_file(sys.argv[1], timeout_s=float(sys.argv[2]), seed=int(sys.argv[3])))
