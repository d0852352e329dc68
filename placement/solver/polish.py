"""Local search in chunks: repair, descent, annealing and recombination of core assignments."""

from __future__ import annotations

import dataclasses
import time

import numpy as np

from placement.solver import _blocks
from placement.solver.incumbent import Incumbent

_REPAIRS = 12


@dataclasses.dataclass(kw_only=True)
class Walk:
    """A core assignment that compiled loops change in place."""

    x: np.ndarray
    """[N] int32."""
    use: np.ndarray
    """[T] bytes live."""
    best_x: np.ndarray
    """[N] int32, the best visited."""
    state: np.ndarray
    """[4] cost of x, its excess, cost of best_x, its excess."""

    @property
    def feasible(self) -> bool:
        return self.state[1] <= 0.0


class Polish:
    """Local search that offers what it finds to the incumbent."""

    def __init__(self, incumbent: Incumbent, seed: int) -> None:
        self.incumbent, self.core = incumbent, incumbent.core
        self.rng = np.random.default_rng(seed)
        self.moves_per_s = 20_000.0

    def walk(self, x: np.ndarray) -> Walk:
        cost, excess, use = self.incumbent.measure(x)
        state = np.array([cost, excess, cost, excess])
        return Walk(x=x.copy(), use=use, best_x=x.copy(), state=state)

    def moves(
        self,
        walk: Walk,
        prices: np.ndarray,
        n_moves: int,
        *,
        block_size: int = 20,
        heat: float = 0.0,
        noise: float = 1.0,
        penalty: float = 0.0,
    ) -> None:
        """Run moves; ``heat`` and ``noise`` are in units of the mean cost of a node."""
        best = self.incumbent
        unit = abs(float(walk.state[0])) / max(len(walk.x), 1)
        began = time.monotonic()
        best.evaluations += _blocks.search(
            self.core,
            walk.x,
            walk.use,
            walk.best_x,
            walk.state,
            prices,
            n_moves,
            int(max(0, min(n_moves, best.budget - best.evaluations))),
            block_size,
            heat * unit,
            noise * unit,
            penalty,
            int(self.rng.integers(2**31)),
        )
        spent = max(time.monotonic() - began, 1e-6)
        self.moves_per_s = 0.7 * self.moves_per_s + 0.3 * n_moves / spent

    def moves_in(self, seconds: float) -> int:
        """Moves that fit about this many seconds."""
        return int(min(max(self.moves_per_s * seconds, 50), 1_000_000))

    def repair(self, walk: Walk, prices: np.ndarray, n_moves: int) -> np.ndarray:
        """Raise the prices where the limit is broken until it is not; returns those prices."""
        start = 1e-4 * abs(float(walk.state[0])) / (self.core.limit or 1.0)
        penalty = max(float(prices.max(initial=0.0)), start)
        for _ in range(_REPAIRS):
            if walk.feasible or self.incumbent.expired():
                break
            penalty *= 3.0
            prices = prices + penalty * (walk.use > self.core.limit)
            self.moves(walk, prices, n_moves, penalty=penalty)
        return prices

    def local_search(self, x: np.ndarray, prices: np.ndarray, n_moves: int) -> Walk:
        """Repair x if need be, then improve it."""
        walk = self.walk(x)
        repaired = self.repair(walk, prices, max(n_moves // 6, 50))
        if walk.feasible and not self.incumbent.expired():
            self.moves(walk, prices, n_moves, noise=float(self.rng.integers(2)))
        elif not walk.feasible:
            prices = repaired
        self.incumbent.offer(walk.best_x)
        return walk

    def cross(self, y: np.ndarray) -> None:
        """Improve the incumbent by the parts of y that are better."""
        best = self.incumbent
        if best.x is None or not best.feasible:
            return
        walk = self.walk(best.x)
        taken = _blocks.cross(self.core, walk.x, walk.use, y, walk.state, 3)
        best.evaluations += 1
        if taken:
            best.offer(walk.x)

    def anneal(self, x: np.ndarray, prices, heat: float, seconds: float) -> Walk:
        """Cool from ``heat`` to nothing over the time, then descend."""
        walk = self.walk(x)
        began = time.monotonic()
        while not self.incumbent.over():
            left = 1.0 - (time.monotonic() - began) / seconds
            if left <= 0.0:
                break
            warm = heat * max(left - 0.1, 0.0)
            self.moves(walk, prices(), self.moves_in(min(0.1, seconds / 20)), heat=warm, noise=0.3)
        self.incumbent.offer(walk.best_x)
        self.incumbent.offer(walk.x)
        return walk
