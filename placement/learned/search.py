"""The learned search: the policy says which candidates to open, the engine completes them, the
simulation judges.

1. The policy scores every outer candidate at once. The best one is opened first; where time is
   short, the best that can still be opened, and the cheapest among near-equals.
2. Each result corrects what is believed of candidates alike (:mod:`placement.learned.surrogate`);
   the next one is that with the greatest expected improvement. Those without any are left for when
   nothing else is: the value head prunes them.
3. On the best candidates the engine is asked again under other prices of hideable communication,
   then for what makes the longest paths through the simulation short (:mod:`placement.bound`), as
   long as their bound leaves room.
4. Then single decisions of the best plan are changed, judged by the simulation, while it improves.
5. What is left of a budget of more than SHALLOW evaluations is spent on local search
   (:mod:`placement.learned.deepen`).

Deterministic for a seed; whenever it stops it holds the best plan so far.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping

import numpy as np

from placement.learned import deepen
from placement.learned.anytime import Curve, Recorder
from placement.learned.completion import cheapest_others
from placement.learned.instance import Instance, Outcome, Outer
from placement.learned.policy import Policy, Proposal, load_policy
from placement.learned.scoring import fit_score
from placement.learned.surrogate import Surrogate
from placement.mesh_search import WORTH_A_ROUND
from placement.whole import REMAT

NEAR = 0.5
"""Scores this much below the best count as near-equal when time is short."""
SHORT_S = 5.0
"""Budgets of seconds up to which time is short: gains are weighed by the seconds they cost."""
OPENING_S = (0.1, 0.13, 0.42)
"""Processor seconds to open a candidate of one, two and three axes, for a program of 200 nodes
(medians over the recorded outcomes of the training split)."""
CAUTION = 1.15
"""Times the expected seconds that have to be left."""
EXPOSURES = (1.0, 0.1)
"""Other shares of hideable communication charged, besides the instance's own."""
ROUNDS = 12
"""Most rounds on the paths of one candidate."""
WORTH = 2e-4
"""Expected relative improvement below which no candidate is opened while others can be refined."""
OPENED = 24
"""Candidates that are opened whatever the expected improvement, where time is not short: beliefs
about a problem can be wrong at first."""
REFINED = 3
"""Best candidates whose plans are refined."""
SHALLOW = 64
"""Evaluations up to which nothing but that is done; larger budgets go on with local search."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """What a search found."""

    curve: Curve
    outcome: Outcome | None
    """The best plan that fits."""
    outer: Outer | None
    opened: Mapping[int, Outcome]
    """Candidates opened, in order, with what their first completion turned out to be."""

    @property
    def trace(self) -> list[tuple[int, float, float]]:
        """(evaluations, seconds, best step time) at each improvement."""
        c = self.curve
        return list(zip(c.evaluations, c.seconds, c.step_time_s))


def plan_instance(
    instance: Instance,
    *,
    max_evaluations: int,
    time_limit_s: float,
    seed: int = 0,
    policy: str | Policy = "learned",
) -> Found:
    """Plan an instance within a budget.

    policy: a Policy, or what :func:`placement.learned.policy.load_policy` takes. Raises
    MeshwrightError where there are no such weights.
    """
    chosen = load_policy(policy, seed=seed) if isinstance(policy, str) else policy
    began = instance.seconds()
    base, tied = instance.base, instance.tied(REMAT[0], 1)
    tracing_s = instance.seconds() - began
    proposal = chosen.propose(base, instance.cluster, instance.outers, tied=tied)
    search = _Search(instance, proposal, max_evaluations, time_limit_s, seed, tracing_s)
    search.run()
    recorder = search.recorder
    return Found(
        curve=recorder.curve(),
        outcome=recorder.best,
        outer=recorder.best_outer,
        opened=search.opened,
    )


class _Search:
    def __init__(
        self,
        instance: Instance,
        proposal: Proposal,
        max_evaluations: int,
        time_limit_s: float,
        seed: int,
        tracing_s: float,
    ) -> None:
        self.hurried = time_limit_s <= SHORT_S
        self.tracing_s = tracing_s
        outers = instance.outers
        axes = np.array([len(o.layout.mesh.axis_sizes) for o in outers])
        scale = proposal.n_nodes / 200
        self.opening_s = scale * np.array(OPENING_S)[np.minimum(axes, len(OPENING_S)) - 1]
        names = [(o.remat, o.microbatches) for o in outers]
        number = {v: n for n, v in enumerate(dict.fromkeys(names))}
        self.variant = np.array([number[v] for v in names])
        self.traced = {number[REMAT[0], 1]}
        self.instance, self.proposal = instance, proposal
        self.recorder = Recorder(
            instance, max_evaluations=max_evaluations, time_limit_s=time_limit_s
        )
        self.rng = np.random.default_rng(seed)
        self.deep_rngs = [np.random.default_rng([seed, n]) for n in (1, 2)]
        # ties, as all are under the uniform policy, are broken by the seed
        self.score = proposal.score + 1e-9 * self.rng.random(len(proposal.score))
        self.surrogate = Surrogate(proposal.value, proposal.fit, proposal.features)
        self.opened: dict[int, Outcome] = {}
        self.closed = np.zeros(len(proposal.score), bool)
        self.plans: dict[int, Outcome] = {}
        self.tried: set[tuple[int, float]] = set()
        self.paths: dict[int, Iterator[tuple[float, Outcome]]] = {}
        self.rounds: dict[int, int] = {}
        self.bound: dict[int, float] = {}

    def run(self) -> None:
        recorder = self.recorder
        while not recorder.over():
            k = self._next()
            if k is None and not (self._again() or self._shorten()):
                break
            if k is not None:
                self._open(k)
                if len(self.opened) % 4 == 0:  # now and then another price for the best
                    self._again()
        self._refine()
        shallow = min(SHALLOW, recorder.max_evaluations)
        while not recorder.over() and recorder.evaluations < shallow and not self.closed.all():
            left = np.where(self.closed, -np.inf, self.score)  # nothing else is left to try
            self._open(int(left.argmax()))
        if recorder.max_evaluations > SHALLOW and not recorder.over():
            self._deepen()

    def _open_another(self) -> bool:
        """Open a candidate however little is expected of it; whether anything was left."""
        k = self._next(least=-1.0)
        if k is None:
            return self._again()
        self._open(k)
        return True

    def _deepen(self) -> None:
        """Spend what is left on local search (:mod:`placement.learned.deepen`)."""
        judge = deepen.Judge(self.instance, self.recorder, self.plans)
        arms = (
            deepen.Evolution(judge, self.deep_rngs[0], self._promising),
            deepen.Annealing(judge, self.deep_rngs[1]),
            deepen.Descent(judge),
            deepen.Opening(self._open_another),
        )
        deepen.in_turns(self.recorder, arms)

    def _promising(self) -> list[int]:
        """Candidates by the step time believed or known, those believed not to fit last."""
        mean, _, fit = self.surrogate.beliefs()
        mean = mean.copy()
        for k, plan in self.plans.items():
            mean[k] = math.log(plan.step_time_s / self.proposal.ideal_s)
        return np.lexsort((mean, fit < 0)).tolist()

    def _next(self, least: float = WORTH) -> int | None:
        """The candidate to open; None where none promises more than ``least``."""
        if self.closed.all():
            return None
        allowed = ~self.closed
        cost = self._costs()
        if self.hurried:
            left = self.recorder.time_limit_s - self.instance.seconds()
            affordable = allowed & (CAUTION * cost <= left)
            if not affordable.any() and self.opened:
                return None
            allowed = affordable if affordable.any() else cost == cost[allowed].min()
        if self.recorder.best is None:
            fit = self.surrogate.beliefs()[2]
            score = self.score + fit_score(fit) - fit_score(self.proposal.fit)
            score = np.where(allowed, score, -np.inf)
            if self.hurried:
                near = allowed & (score >= score.max() - NEAR)
                score = np.where(near, -cost, -np.inf) + 1e-9 * self.score
            return int(score.argmax())
        best = math.log(self.recorder.best.step_time_s / self.proposal.ideal_s)
        gain = np.where(allowed, self.surrogate.improvement(best), -np.inf) + 1e-12 * self.score
        if gain.max() <= least and (self.hurried or len(self.opened) >= OPENED):
            return None
        return int((gain / cost).argmax() if self.hurried else gain.argmax())

    def _costs(self) -> np.ndarray:
        """[K] processor seconds that opening each candidate is expected to take."""
        new = ~np.isin(self.variant, list(self.traced))
        return self.opening_s + self.tracing_s * new

    def _open(self, k: int) -> None:
        outer = self.instance.outers[k]
        outcome = self.recorder.offer(outer, self.instance.evaluate(outer))
        self.opened[k] = outcome
        self.closed[k] = True
        self.traced.add(int(self.variant[k]))
        log_time = math.log(max(outcome.step_time_s, 1e-12) / self.proposal.ideal_s)
        self.surrogate.add(k, log_time, outcome.fits)
        if outcome.fits:
            self.plans[k] = outcome

    def _best(self) -> list[int]:
        """Candidates by the step time of their best plan."""
        return sorted(self.plans, key=lambda k: (self.plans[k].step_time_s, k))[:REFINED]

    def _again(self) -> bool:
        """One more completion of a best candidate at another exposure; whether there was one."""
        for k in self._best():
            for exposure in EXPOSURES:
                if (k, exposure) in self.tried or self.recorder.over():
                    continue
                self.tried.add((k, exposure))
                outer = self.instance.outers[k]
                self._take(k, self.instance.evaluate(outer, exposure=exposure))
                return True
        return False

    def _shorten(self) -> bool:
        """One more plan for a best candidate, from the paths of its plans; whether there was one."""
        best = self._best()
        for k in best:
            room = self.bound.get(k, 0.0) < self.plans[best[0]].step_time_s * (1 - WORTH_A_ROUND)
            if self.recorder.over() or not room or self.rounds.get(k, 0) >= ROUNDS:
                continue
            if k not in self.paths:
                outer = self.instance.outers[k]
                self.paths[k] = self.instance.shorten(outer, self.plans[k].choices)
            bound, outcome = next(self.paths[k])
            self.rounds[k] = self.rounds.get(k, 0) + 1
            self.bound[k] = max(bound, self.bound.get(k, 0.0))
            self._take(k, outcome)
            return True
        return False

    def _take(self, k: int, outcome: Outcome) -> bool:
        """Judge a plan of candidate k; whether it is its best."""
        self.recorder.offer(self.instance.outers[k], outcome)
        better = outcome.fits and outcome.step_time_s < self.plans[k].step_time_s * (1 - 1e-9)
        if better:
            self.plans[k] = outcome
        return better

    def _refine(self) -> None:
        """Change single decisions of the best plans, nodes in random order, while it helps."""
        recorder = self.recorder
        for k in self._best():
            outer = self.instance.outers[k]
            sizes = self.instance.tables(outer).problem.n_strategies()
            improved = True
            while improved and not recorder.over():
                improved = False
                for node in self.rng.permutation(np.flatnonzero(sizes > 1)):
                    if recorder.over() or recorder.evaluations >= SHALLOW:
                        return
                    improved |= self._move(k, outer, int(node), int(sizes[node]))

    def _move(self, k: int, outer: Outer, node: int, size: int) -> bool:
        """A few other choices of one node, those next in price first."""
        choices = self.plans[k].choices
        problem = self.instance.tables(outer).problem
        for pick in cheapest_others(problem, choices, node)[:4]:
            if self.recorder.over():
                return False
            changed = choices.copy()
            changed[node] = pick
            if self._take(k, self.instance.judge(outer, changed)):
                return True
        return False
