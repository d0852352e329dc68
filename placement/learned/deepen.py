"""What a large budget is spent on once the best candidates are opened: local search over plans.

Message passing completes a candidate by the tables' costs, which charge a fixed share of the
communication that may hide; the simulation knows how much of it really hides. Where the two disagree,
better plans differ from every completion in many nodes at once. Four arms look for them, in turns of
TURN evaluations; an arm that improved the best plan goes on at once:

* ``Evolution`` breeds short plans over all candidates, the first ones on those believed best.
* ``Annealing`` imposes one decision of a short plan at a time on the best plans, and changes single
  nodes.
* ``Descent`` changes single nodes of the best plans, those that the tables price lowest first.
* ``Opening`` completes the candidates that are left, by expected improvement.

A plan that was judged before is not judged again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from cost_model.problem import Problem
from placement.learned.anytime import Recorder
from placement.learned.baselines import offspring, penalised
from placement.learned.completion import cheapest_others, prices
from placement.learned.encoding import (
    ACTIVATION_OPTIONS,
    FSDP,
    MEMORY_PRICES,
    STATE_OPTIONS,
    Speaker,
    random_plan,
)
from placement.learned.genome import Genome, genome_of, index_of
from placement.learned.instance import Instance, Outcome

TURN = 64
"""Evaluations of one turn."""
POOL = 16
PROMISING = 4
"""Candidates believed best that a first generation has plans on."""
STALE = 256
"""Evaluations without a better plan in the pool after which evolution begins anew."""
BEST = 3
"""Candidates whose best plans are worked on."""
PICKS = 4
"""Choices of a node that are tried, cheapest first."""
HOT, COLD = 0.05, 0.0005
FIRST_CYCLE = 32
_DRAWS = 32
"""Plans drawn in vain, all judged before, until a random one is taken."""


class Arm(Protocol):
    def step(self) -> bool:
        """Judge one more plan, at least; False where nothing is left to try."""
        ...


def in_turns(recorder: Recorder, arms: Sequence[Arm]) -> None:
    """Spend what is left of the budget."""
    alive = True
    while alive and not recorder.over():
        alive = False
        for arm in arms:
            more = improved = True
            while more and improved and not recorder.over():
                before, end = recorder.best, recorder.evaluations + TURN
                while more and recorder.evaluations < end and not recorder.over():
                    more = arm.step()
                improved = recorder.best is not before
            alive |= more


class Judge:
    """Judges plans of any candidate, each once, and keeps the best of each candidate."""

    def __init__(self, instance: Instance, recorder: Recorder, plans: dict[int, Outcome]) -> None:
        self.instance, self.recorder, self.plans = instance, recorder, plans
        self._known: dict[tuple[int, bytes], float] = {}

    def known(self, k: int, choices: np.ndarray) -> bool:
        return (k, choices.tobytes()) in self._known

    def __call__(self, k: int, choices: np.ndarray) -> float:
        """Log of the step time, with excess memory charged; lower is better."""
        key = (k, choices.tobytes())
        if key not in self._known:
            outer = self.instance.outers[k]
            found = self.recorder.offer(outer, self.instance.judge(outer, choices))
            self._known[key] = penalised(found, self.instance.limit_bytes)
            if found.fits and (
                k not in self.plans or found.step_time_s < self.plans[k].step_time_s
            ):
                self.plans[k] = found
        return self._known[key]

    def best(self) -> list[int]:
        """Candidates by the step time of their best plan."""
        return sorted(self.plans, key=lambda k: (self.plans[k].step_time_s, k))[:BEST]

    def speaker(self, k: int) -> Speaker:
        outer = self.instance.outers[k]
        return self.instance.shared(
            ("speaker", *self.instance.key(outer)),
            lambda: Speaker.of(self.instance.tables(outer)),
            size=lambda s: s.tables.problem.edge_costs.nbytes // 8 + 1,
        )


class Opening:
    """Candidates that are left."""

    def __init__(self, open_next: Callable[[], bool]) -> None:
        self.step = open_next


class Evolution:
    """Steady-state evolution of short plans, begun anew where it is stale."""

    def __init__(
        self, judge: Judge, rng: np.random.Generator, promising: Callable[[], Sequence[int]]
    ) -> None:
        self.judge, self.rng, self.promising = judge, rng, promising
        self.pool: list[tuple[float, Genome]] = []
        self.waiting: list[Genome] = []
        self.best = math.inf
        self.stale = 0
        self._begin()

    def _begin(self) -> None:
        i, rng = self.judge.instance, self.rng
        self.pool, self.best, self.stale = [], math.inf, 0
        chosen = list(self.promising())[:PROMISING]
        self.waiting = [genome_of(i, k, p) for k in chosen for p in (FSDP, random_plan(rng))]
        others = rng.integers(0, len(i.outers), POOL - len(self.waiting))
        self.waiting += [genome_of(i, int(k), random_plan(rng)) for k in others]

    def step(self) -> bool:
        i = self.judge.instance
        if self.waiting:
            self._add(self.waiting.pop())
            return True
        if self.stale >= STALE:
            self._begin()
            return True
        for _ in range(_DRAWS):
            child = offspring(i, self.rng, self.pool)
            k, choices = self._plan(child)
            if not self.judge.known(k, choices):
                break
        else:
            k = int(self.rng.integers(len(i.outers)))
            child = genome_of(i, k, random_plan(self.rng))
        self._add(child)
        if len(self.pool) > POOL:
            self.pool.remove(max(self.pool, key=lambda x: x[0]))
        return True

    def _plan(self, genome: Genome) -> tuple[int, np.ndarray]:
        k = index_of(self.judge.instance, genome)
        return k, self.judge.speaker(k).choices(genome.plan)

    def _add(self, genome: Genome) -> None:
        value = self.judge(*self._plan(genome))
        self.pool.append((value, genome))
        self.stale = 0 if value < self.best else self.stale + 1
        self.best = min(self.best, value)


class Annealing:
    """Simulated annealing from the best plans, in cycles that double in length."""

    def __init__(self, judge: Judge, rng: np.random.Generator) -> None:
        self.judge, self.rng = judge, rng
        self.cycle, self.at = FIRST_CYCLE // 2, 0
        self.k = -1
        self.now = np.zeros(0, np.int64)
        self.value = math.inf

    def step(self) -> bool:
        if not self.judge.plans:
            return False
        if self.k < 0 or self.at >= self.cycle:
            self._begin()
        heat = HOT * (COLD / HOT) ** (self.at / self.cycle)
        self.at += 1
        for _ in range(_DRAWS):
            other = self._changed()
            if not self.judge.known(self.k, other):
                break
        found = self.judge(self.k, other)
        if found <= self.value or self.rng.random() < math.exp((self.value - found) / heat):
            self.now, self.value = other, found
        return True

    def _begin(self) -> None:
        best = self.judge.best()
        self.k = best[min(int(self.rng.geometric(0.6)) - 1, len(best) - 1)]
        plan = self.judge.plans[self.k]
        self.now, self.value = plan.choices, math.log(plan.step_time_s)
        self.cycle, self.at = 2 * self.cycle, 0

    def _changed(self) -> np.ndarray:
        rng = self.rng
        speaker = self.judge.speaker(self.k)
        if rng.random() < 0.3:
            p = speaker.tables.problem
            node = int(rng.choice(np.flatnonzero(p.n_strategies() > 1)))
            picks = cheapest_others(p, self.now, node)
            other = self.now.copy()
            other[node] = picks[min(int(rng.geometric(0.5)), len(picks)) - 1]
            return other
        kind = ("activation", "weight", "state")[int(rng.choice(3, p=(0.4, 0.3, 0.3)))]
        options = ACTIVATION_OPTIONS if kind == "activation" else STATE_OPTIONS
        axis = int(rng.integers(len(speaker.tables.layout.mesh.axis_sizes)))
        fixed = speaker.imposed(self.now, kind, axis, options[int(rng.integers(len(options)))])
        price = MEMORY_PRICES[int(rng.integers(len(MEMORY_PRICES)))]
        start = self.now if rng.random() < 0.7 else None
        return speaker.completer(fixed, price, binding=rng.random() < 0.5, start=start)


class Descent:
    """Single changes of the best plans, until none of those tried helps."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self.moves: list[tuple[int, int]] = []
        self.k = -1
        self.ended: set[tuple[int, bytes]] = set()

    def step(self) -> bool:
        plans = self.judge.plans
        while True:
            while self.moves:
                node, pick = self.moves.pop()
                choices = plans[self.k].choices.copy()
                if choices[node] == pick:
                    continue
                choices[node] = pick
                if not self.judge.known(self.k, choices):
                    self.judge(self.k, choices)
                    return True
            left = [k for k in self.judge.best() if (k, self._name(k)) not in self.ended]
            if not left:
                return False
            self.k = left[0]
            self.ended.add((self.k, self._name(self.k)))
            self.moves = _priced_moves(self._problem(), plans[self.k].choices)[::-1]

    def _problem(self) -> Problem:
        i = self.judge.instance
        return i.tables(i.outers[self.k]).problem

    def _name(self, k: int) -> bytes:
        return self.judge.plans[k].choices.tobytes()


def _priced_moves(p: Problem, choices: np.ndarray) -> list[tuple[int, int]]:
    """(node, choice) of the PICKS cheapest other choices of every node, cheapest change first."""
    found = []
    for node in np.flatnonzero(p.n_strategies() > 1).tolist():
        price = prices(p, choices, node)
        order = np.argsort(price, kind="stable")
        picks = order[order != choices[node]][:PICKS]
        found += [(price[c] - price[choices[node]], node, int(c)) for c in picks]
    return [(node, pick) for _, node, pick in sorted(found)]
