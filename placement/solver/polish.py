"""Local search in chunks: repair, descent, annealing and recombination of core assignments."""

from __future__ import annotations

import dataclasses
import functools
import time

import numpy as np

from placement.solver import _blocks, _exchange
from placement.solver.incumbent import Incumbent

_REPAIRS = 12
_BLOCK = 20
_LARGEST_BLOCK = 600
_HUBS = 0.1
_HOT, _HOT_BEYOND = 0.9, 0.65
"""Share of an annealing that is warm; the rest descends, or repairs and descends."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Style:
    """How an annealing moves."""

    heat: float
    """Temperature at the start, in mean costs of a node."""
    block_size: int
    hubs: float
    """Share of the moves that try every state of their root."""
    beyond: float
    """Share of the limit by which usage may pass it while warm: a better assignment is often reached
    through one that does not fit."""


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

    block = _BLOCK
    """Nodes of a move at which most is found soonest."""

    def __init__(self, incumbent: Incumbent, seed: int) -> None:
        self.incumbent, self.core = incumbent, incumbent.core
        self.rng = np.random.default_rng(seed)
        self.moves_per_s = 20_000.0

    def sibling(self) -> Polish:
        """Another search of the same incumbent, for another thread."""
        return Polish(self.incumbent, int(self.rng.integers(2**31)))

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
        block_size: int = _BLOCK,
        heat: float = 0.0,
        noise: float = 1.0,
        penalty: float = 0.0,
        hubs: float = _HUBS,
        beyond: float = 0.0,
    ) -> None:
        """Run moves; ``heat`` and ``noise`` are in units of the mean cost of a node."""
        best = self.incumbent
        core = (
            self.core if beyond == 0 else self.core._replace(limit=self.core.limit * (1 + beyond))
        )
        unit = abs(float(walk.state[0])) / max(len(walk.x), 1)
        began = time.monotonic()
        best.evaluations += _blocks.search(
            core,
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
            hubs,
            int(self.rng.integers(2**31)),
        )
        spent = max(time.monotonic() - began, 1e-6)
        speed = n_moves * (block_size / _BLOCK) / spent
        self.moves_per_s = 0.7 * self.moves_per_s + 0.3 * speed

    def moves_in(self, seconds: float, block_size: int = _BLOCK) -> int:
        """Moves in blocks of this size that fit about this many seconds."""
        moves = self.moves_per_s * seconds * _BLOCK / block_size
        return int(min(max(moves, 50 * _BLOCK / block_size, 1), 1_000_000))

    def any_block(self) -> int:
        """A size of blocks, small ones as likely as large ones.

        Small ones find most; where they are at an end, large trees still change many nodes at once.
        """
        return int(_BLOCK * (_LARGEST_BLOCK / _BLOCK) ** self.rng.random())

    def repair(
        self, walk: Walk, prices: np.ndarray, n_moves: int, hubs: float = _HUBS
    ) -> np.ndarray:
        """Raise the prices where the limit is broken until it is not; returns those prices."""
        start = 1e-4 * abs(float(walk.state[0])) / (self.core.limit or 1.0)
        penalty = max(float(prices.max(initial=0.0)), start)
        for _ in range(_REPAIRS):
            if walk.feasible or self.incumbent.expired():
                break
            penalty *= 3.0
            prices = prices + penalty * (walk.use > self.core.limit)
            self.moves(walk, prices, n_moves, penalty=penalty, hubs=hubs)
        return prices

    def local_search(
        self,
        x: np.ndarray,
        prices: np.ndarray,
        n_moves: int,
        block_size: int = _BLOCK,
        hubs: float = _HUBS,
    ) -> Walk:
        """Repair x if need be, then improve it in blocks of about this size."""
        walk = self.walk(x)
        repaired = self.repair(walk, prices, max(n_moves // 6, 50), hubs)
        if walk.feasible and not self.incumbent.expired():
            noise = float(self.rng.integers(2))
            self.moves(walk, prices, n_moves, noise=noise, block_size=block_size, hubs=hubs)
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
        taken = _exchange.cross(self.core, walk.x, walk.use, y, walk.state, 3)
        best.evaluations += 1
        if taken:
            best.offer(walk.x)

    def any_style(self) -> Style:
        """A style of annealing, drawn: no one style leaves every basin."""
        rng = self.rng
        return Style(
            heat=10.0 ** rng.uniform(-2.5, -0.5),
            block_size=int(_BLOCK * 10.0 ** rng.random()),
            hubs=float(rng.uniform(0.0, 0.9)),
            beyond=float(10.0 ** rng.uniform(-3.0, -2.0) * rng.integers(2)),
        )

    def anneal(self, x: np.ndarray, prices, style: Style, seconds: float) -> Walk:
        """Cool over the time from the style's heat to nothing, then descend."""
        walk = self.walk(x)
        began = time.monotonic()
        hot = _HOT_BEYOND if style.beyond else _HOT
        n_moves = self.moves_in(min(0.1, seconds / 20), style.block_size)
        run = functools.partial(self.moves, block_size=style.block_size, hubs=style.hubs)
        while (done := (time.monotonic() - began) / seconds) < hot and not self.incumbent.over():
            heat = style.heat * (1.0 - done / hot)
            run(walk, prices(), n_moves, heat=heat, noise=0.3, beyond=style.beyond)
        if style.beyond:
            walk = self.walk(walk.x)
            self.repair(walk, prices(), n_moves)
        while time.monotonic() - began < seconds and walk.feasible and not self.incumbent.over():
            run(walk, prices(), n_moves, noise=float(self.rng.integers(2)))
        self.incumbent.offer(walk.best_x)
        self.incumbent.offer(walk.x)
        return walk
