"""What the learned search is compared with, on the same space and the same judge.

Optimizers that work by scoring plans (random, annealing, evolution, tree search) act on an outer
candidate and a short plan (:mod:`placement.learned.encoding`), completed cheaply; ``random_nodes``
draws an outer candidate and a choice for every node instead, the raw encoding. ``heuristic`` opens
candidates in the product's order and completes each by one greedy sweep. ``engine`` and
``engine_random`` complete every candidate by message passing, at both of the product's shares of
exposed communication, in the product's order and in a random one. ``rules`` are the hand-tuned rules
as experts use them: each rule on every mesh of its kind, every rematerialisation, the fewest
microbatches that fit.

Each takes an instance, a budget and a seed and returns the curve of its best plan. For one seed the
random orders of outer candidates are the same in all optimizers, so that luck with candidates does
not decide between them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from placement.learned.anytime import Curve, Recorder
from placement.learned.encoding import Speaker, random_plan
from placement.learned.genome import (
    Genome,
    changed,
    crossed,
    fully_sharded,
    genome_of,
    genome_of_path,
    index_of,
    n_options,
)
from placement.learned.instance import SOLVER_STEPS, Instance, Outcome, Outer
from placement.mesh_search import EXPOSURES, QUIET_ROUNDS, ROUNDS, WORTH_A_ROUND
from placement.whole import REMAT

Baseline = Callable[..., Curve]
_POPULATION = 16
_EXPLORATION = 0.4
_HOT, _COLD = 0.3, 0.003
_FIRST_CYCLE = 16


class Scorer:
    """Judges genomes of one run; keeps the speaker of each candidate opened."""

    def __init__(self, instance: Instance, recorder: Recorder) -> None:
        self.instance, self.recorder = instance, recorder
        self._speakers: dict[tuple[int, int, int], Speaker] = {}

    def outer(self, g: Genome) -> Outer:
        return self.instance.outers[index_of(self.instance, g)]

    def __call__(self, g: Genome) -> float:
        """Log of the step time, with excess memory charged; lower is better."""
        outer = self.outer(g)
        speaker = self.instance.shared(
            ("speaker", *self.instance.key(outer)),
            lambda: Speaker.of(self.instance.tables(outer)),
            size=lambda s: s.tables.problem.edge_costs.nbytes // 8 + 1,
        )
        found = self.recorder.offer(outer, self.instance.judge(outer, speaker.choices(g.plan)))
        return penalised(found, self.instance.limit_bytes)


def penalised(found: Outcome, limit_bytes: float) -> float:
    """Log of the step time, with excess memory charged."""
    excess = max(0.0, found.memory_bytes / limit_bytes - 1.0)
    return math.log(found.step_time_s) + (1.0 + 2.0 * excess if excess else 0.0)


def outer_order(instance: Instance, seed: int) -> Iterator[int]:
    """Outer candidates in random order, each once."""
    yield from np.random.default_rng([seed, 1]).permutation(len(instance.outers)).tolist()


def random(instance: Instance, *, max_evaluations: int, time_limit_s: float, seed: int) -> Curve:
    """Random candidates with random short plans."""
    recorder = Recorder(instance, max_evaluations=max_evaluations, time_limit_s=time_limit_s)
    score, rng = Scorer(instance, recorder), np.random.default_rng([seed, 2])
    while not recorder.over():
        for index in outer_order(instance, seed):
            if recorder.over():
                break
            score(genome_of(instance, index, random_plan(rng)))
    return recorder.curve()


def random_nodes(
    instance: Instance, *, max_evaluations: int, time_limit_s: float, seed: int
) -> Curve:
    """Random candidates with a random choice for every node."""
    recorder = Recorder(instance, max_evaluations=max_evaluations, time_limit_s=time_limit_s)
    rng = np.random.default_rng([seed, 3])
    while not recorder.over():
        for index in outer_order(instance, seed):
            if recorder.over():
                break
            outer = instance.outers[index]
            sizes = instance.tables(outer).problem.n_strategies()
            recorder.offer(outer, instance.judge(outer, rng.integers(0, sizes)))
    return recorder.curve()


def annealing(instance: Instance, *, max_evaluations: int, time_limit_s: float, seed: int) -> Curve:
    """Simulated annealing over single decisions, in cycles that double in length.

    Starts from fully sharded data parallelism on the most even mesh; each cycle cools geometrically
    and starts from the best plan so far.
    """
    recorder = Recorder(instance, max_evaluations=max_evaluations, time_limit_s=time_limit_s)
    score, rng = Scorer(instance, recorder), np.random.default_rng([seed, 4])
    best = now = fully_sharded(instance)
    best_value = value = score(now)
    cycle = _FIRST_CYCLE
    while not recorder.over():
        now, value = best, best_value
        for n in range(cycle):
            if recorder.over():
                break
            heat = _HOT * (_COLD / _HOT) ** (n / cycle)
            other = changed(instance, rng, now)
            found = score(other)
            if found <= value or rng.random() < math.exp((value - found) / heat):
                now, value = other, found
                if value < best_value:
                    best, best_value = now, value
        cycle *= 2
    return recorder.curve()


def evolution(instance: Instance, *, max_evaluations: int, time_limit_s: float, seed: int) -> Curve:
    """Steady-state evolution: tournaments of two, uniform crossover, one or two mutations.

    The first population is fully sharded data parallelism and random plans.
    """
    recorder = Recorder(instance, max_evaluations=max_evaluations, time_limit_s=time_limit_s)
    score, rng = Scorer(instance, recorder), np.random.default_rng([seed, 5])
    first = fully_sharded(instance)
    pool = [(score(first), first)]
    for index in outer_order(instance, seed):
        if len(pool) == _POPULATION or recorder.over():
            break
        genome = genome_of(instance, index, random_plan(rng))
        pool.append((score(genome), genome))
    while not recorder.over():
        child = offspring(instance, rng, pool)
        pool.append((score(child), child))
        pool.remove(max(pool, key=lambda x: x[0]))
    return recorder.curve()


def offspring(
    instance: Instance, rng: np.random.Generator, pool: Sequence[tuple[float, Genome]]
) -> Genome:
    """A child of two tournaments of two in a pool of (value, genome)."""
    parents = []
    for _ in range(2):
        a, b = rng.choice(len(pool), 2)
        parents.append(min(pool[a], pool[b], key=lambda x: x[0])[1])
    child = crossed(rng, *parents)
    for _ in range(int(rng.integers(1, 3))):
        child = changed(instance, rng, child)
    return child


def tree_search(
    instance: Instance, *, max_evaluations: int, time_limit_s: float, seed: int
) -> Curve:
    """Upper confidence bounds applied to trees (Kocsis and Szepesvari 2006), without a network.

    The path is rematerialisation, microbatches, mesh, then the short plan's decisions, axis by axis;
    below the tree's edge decisions are uniform. The value of a plan is the reference step time (the
    first plan's) over its own, zero where it does not fit.
    """
    recorder = Recorder(instance, max_evaluations=max_evaluations, time_limit_s=time_limit_s)
    score, rng = Scorer(instance, recorder), np.random.default_rng([seed, 6])
    reference = math.exp(min(score(fully_sharded(instance)), 700.0))
    visits: dict[tuple[int, ...], int] = {}
    total: dict[tuple[int, ...], float] = {}
    while not recorder.over():
        path: tuple[int, ...] = ()
        inside = True
        while (options := n_options(instance, path)) is not None:
            if not inside:
                path += (int(rng.integers(options)),)
                continue
            children = [(*path, c) for c in range(options)]
            fresh = [c for c in children if c not in visits]
            if fresh:
                path, inside = fresh[int(rng.integers(len(fresh)))], False
            else:
                spent = math.log(sum(visits[c] for c in children))
                path = max(
                    children,
                    key=lambda c: (
                        total[c] / visits[c] + _EXPLORATION * math.sqrt(spent / visits[c])
                    ),
                )
        value = score(genome_of_path(instance, path))
        fits = recorder.last_fits
        gain = reference / math.exp(value) if fits else 0.0
        gain = gain / (1.0 + gain)
        for n in range(1, len(path) + 1):
            visits[path[:n]] = visits.get(path[:n], 0) + 1
            total[path[:n]] = total.get(path[:n], 0.0) + gain
            if visits[path[:n]] == 1:
                break
    return recorder.curve()


def heuristic(instance: Instance, *, max_evaluations: int, time_limit_s: float, seed: int) -> Curve:
    """Candidates in the product's order, each completed by one greedy sweep."""
    from placement.optimizers import OPTIMIZERS, Budget

    recorder = Recorder(instance, max_evaluations=max_evaluations, time_limit_s=time_limit_s)
    for outer in product_order(instance, recorder):
        if recorder.over():
            break
        tables = instance.tables(outer)
        found = OPTIMIZERS["heuristic"](tables, seed, Budget(time_limit_s=time_limit_s))
        recorder.offer(outer, instance.judge(outer, found.choices))
    return recorder.curve()


def engine(instance: Instance, *, max_evaluations: int, time_limit_s: float, seed: int) -> Curve:
    """Candidates in the product's order, each completed by message passing."""
    recorder = Recorder(instance, max_evaluations=max_evaluations, time_limit_s=time_limit_s)
    for outer in product_order(instance, recorder):
        _complete(instance, recorder, outer)
        if recorder.over():
            break
    return recorder.curve()


def engine_random(
    instance: Instance, *, max_evaluations: int, time_limit_s: float, seed: int
) -> Curve:
    """Candidates in random order, each completed by message passing."""
    recorder = Recorder(instance, max_evaluations=max_evaluations, time_limit_s=time_limit_s)
    for index in outer_order(instance, seed):
        _complete(instance, recorder, instance.outers[index])
        if recorder.over():
            break
    return recorder.curve()


def _complete(instance: Instance, recorder: Recorder, outer: Outer) -> None:
    """By message passing, as the product does: at each exposure, then on the paths of the simulation
    while the bound of the candidate leaves room."""
    plans = []
    for exposure in EXPOSURES:
        if not recorder.over():
            plans.append(recorder.offer(outer, instance.evaluate(outer, exposure=exposure)))
    if recorder.over():
        return
    start = min(plans, key=lambda x: (not x.fits, x.step_time_s))
    bound = quiet = 0
    for _, (own_bound, outcome) in zip(range(ROUNDS), instance.shorten(outer, start.choices)):
        before = recorder.best.step_time_s if recorder.best else math.inf
        recorder.offer(outer, outcome)
        best = recorder.best.step_time_s if recorder.best else math.inf
        gained = best < before or own_bound > bound * (1 + WORTH_A_ROUND)
        bound, quiet = max(bound, own_bound), 0 if gained else quiet + 1
        if recorder.over() or bound >= best * (1 - WORTH_A_ROUND) or quiet >= QUIET_ROUNDS:
            return


def product_order(instance: Instance, recorder: Recorder) -> Iterator[Outer]:
    """As :mod:`placement.whole` goes: full rematerialisation over all meshes, more microbatches
    until something fits, then lighter policies on the two best meshes, then all the rest."""
    from placement.mesh_search import promising_first

    layouts = promising_first(instance.layouts)
    by_key = {(o.remat, o.microbatches, id(o.layout)): o for o in instance.outers}
    seen: set[int] = set()

    def fresh(remat, count, meshes):
        for layout in meshes:
            outer = by_key[remat, count, id(layout)]
            if id(outer) not in seen:
                seen.add(id(outer))
                yield outer

    count = instance.microbatches[-1]
    for count in instance.microbatches:
        yield from fresh(REMAT[0], count, layouts)
        if recorder.best is not None:
            break
    for remat in REMAT[1:]:
        yield from fresh(remat, count, recorder.best_meshes(2))
    for count in instance.microbatches:
        for remat in REMAT:
            yield from fresh(remat, count, layouts)


def rules(instance: Instance, *, max_evaluations: int, time_limit_s: float, seed: int) -> Curve:
    """The hand-tuned rules on every mesh of their kind; budgets do not stop it.

    Rules without a model axis run on one axis over all devices, those with one on every mesh of two
    axes. Microbatches rise until some rule fits under a rematerialisation policy.
    """
    from placement.optimizers import HAND_TUNED, Budget
    from placement.optimizers.rules import RULES

    recorder = Recorder(instance, max_evaluations=1 << 30, time_limit_s=math.inf)
    budget = Budget(time_limit_s=10.0, max_evaluations=SOLVER_STEPS)
    one = [x for x in instance.layouts if len(x.mesh.axis_sizes) == 1][:1]
    two = [x for x in instance.layouts if len(x.mesh.axis_sizes) == 2]
    for remat in REMAT:
        for count in instance.microbatches:
            fitted = False
            for outer in instance.outers:
                kind = one if len(outer.layout.mesh.axis_sizes) == 1 else two
                if (outer.remat, outer.microbatches) != (remat, count) or outer.layout not in kind:
                    continue
                for rule in RULES:
                    if rule.model_axis != (kind is two):
                        continue
                    tables = instance.tables(outer)
                    found = HAND_TUNED[rule.name](tables, seed, budget)
                    judged = recorder.offer(outer, instance.judge(outer, found.choices))
                    fitted = fitted or judged.fits
            if fitted:
                break
    return recorder.curve()


SCORING: dict[str, Baseline] = {
    "random": random,
    "random_nodes": random_nodes,
    "annealing": annealing,
    "evolution": evolution,
    "tree_search": tree_search,
    "heuristic": heuristic,
}
"""Optimizers that work by scoring plans."""
ENGINES: dict[str, Baseline] = {"engine": engine, "engine_random": engine_random}
"""Near-optimal inner solves under enumerated candidates."""
BASELINES: dict[str, Baseline] = {**SCORING, **ENGINES, "rules": rules}
SEEDED = ("random", "random_nodes", "annealing", "evolution", "tree_search", "engine_random")
"""Those whose result depends on the seed."""
UNLIMITED = ("engine", "rules")
"""Those that the suite lets try all they have."""
