"""The engine against enumeration, the exact solver, and the properties of bounds and limits."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cost_model.problem import FORBIDDEN, Problem
from graphs.errors import InfeasibleError
from placement import solver
from placement.solver import _dual
from placement.solver.ascent import Ascent
from placement.solver.core import reduce
from placement.solver.incumbent import Incumbent
from placement.solver.polish import Polish, Style


@pytest.fixture(scope="module", autouse=True)
def _compiled_loops():
    solver.prepare()


def random_problem(
    seed: int, n_nodes: int, most: int, density: float, tightness: float | None, forbid: float = 0.0
) -> Problem:
    """Integer costs; tightness 0 puts the limit at the least possible peak, 1 at the greatest."""
    rng = np.random.default_rng(seed)
    k = rng.integers(1, most + 1, n_nodes)
    pairs = [(i, j) for i, j in itertools.combinations(range(n_nodes), 2) if rng.random() < density]
    tables = []
    for i, j in pairs:
        table = rng.integers(0, 50, (k[i], k[j])).astype(float)
        table[rng.random(table.shape) < forbid] = FORBIDDEN
        tables.append(table.ravel())
    usage_nodes = np.concatenate([np.arange(n_nodes), rng.integers(0, n_nodes, 2)])
    starts = rng.integers(0, 2 * n_nodes, len(usage_nodes))
    ends = starts + rng.integers(0, n_nodes, len(usage_nodes))
    usages = [rng.integers(0, 100, k[i]).astype(float) for i in usage_nodes]
    limit = np.inf
    if tightness is not None:
        low, high = 0.0, 0.0
        for t in range(4 * n_nodes):
            live = [u for u in range(len(usages)) if starts[u] <= t < ends[u]]
            low = max(low, sum(usages[u].min() for u in live))
            high = max(high, sum(usages[u].max() for u in live))
        limit = low + tightness * (high - low)
    return Problem(
        name=f"random{seed}",
        strategy_offsets=np.concatenate([[0], np.cumsum(k)]).astype(np.int64),
        node_costs=rng.integers(0, 50, k.sum()).astype(float),
        edge_nodes=np.array(pairs, dtype=np.int32).reshape(-1, 2),
        edge_offsets=np.concatenate([[0], np.cumsum([len(t) for t in tables])]).astype(np.int64),
        edge_costs=np.concatenate([*tables, np.zeros(0)]),
        usage_nodes=usage_nodes.astype(np.int32),
        usage_intervals=np.stack([starts, ends], axis=1).astype(np.int64),
        usage_offsets=np.concatenate([[0], np.cumsum([len(u) for u in usages])]).astype(np.int64),
        usages=np.concatenate(usages),
        usage_limit=limit,
    )


def enumerate_optimum(problem: Problem) -> float:
    """inf if nothing is feasible; usage recomputed here time point by time point."""
    best = np.inf
    last = int(problem.usage_intervals.max(initial=0))
    for x in itertools.product(*(range(n) for n in problem.n_strategies())):
        cost = problem.cost(np.array(x))
        if cost >= min(best, FORBIDDEN):
            continue
        usage = np.zeros(last + 1)
        for u, i in enumerate(problem.usage_nodes):
            start, end = problem.usage_intervals[u]
            usage[start:end] += problem.usages[problem.usage_offsets[u] + x[i]]
        if usage.max() <= problem.usage_limit:
            best = cost
    return best


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n_nodes=st.integers(1, 7),
    density=st.sampled_from([0.2, 0.5, 1.0]),
    tightness=st.sampled_from([None, 0.0, 0.2, 0.5]),
    forbid=st.sampled_from([0.0, 0.3]),
)
def test_small_problems_match_enumeration(seed, n_nodes, density, tightness, forbid):
    problem = random_problem(seed, n_nodes, 4, density, tightness, forbid)
    optimum = enumerate_optimum(problem)
    found = solver.solve(problem, time_limit_s=20.0, seed=seed, patient=True)
    if np.isinf(optimum):
        assert not found.feasible
        assert found.status in ("infeasible", "unknown")
        return
    assert found.feasible
    assert problem.is_feasible(found.assignment)
    assert found.cost == problem.cost(found.assignment)
    assert found.lower_bound <= optimum + 1e-6
    assert optimum <= found.cost <= optimum + 1e-9


@pytest.mark.parametrize("seed", range(6))
def test_exact_matches_enumeration(seed):
    problem = random_problem(seed, 6, 3, 0.6, 0.2, 0.2)
    optimum = enumerate_optimum(problem)
    found = solver.exact(problem, time_limit_s=20.0)
    assert found.feasible == np.isfinite(optimum)
    if found.feasible:
        assert found.cost == optimum
        assert found.status == "optimal"


@pytest.mark.parametrize("seed", range(4))
def test_engine_is_close_to_exact_and_bound_holds(seed):
    problem = random_problem(seed, 40, 6, 0.06, 0.25)
    exact = solver.exact(problem, time_limit_s=20.0)
    found = solver.solve(problem, time_limit_s=5.0, seed=seed)
    assert exact.status == "optimal"
    assert found.lower_bound <= exact.cost * (1 + 1e-9)
    assert exact.cost <= found.cost <= exact.cost * 1.02


def test_a_solve_may_end_at_a_bound():
    problem = random_problem(3, 40, 6, 0.2, 0.4)
    whole = solver.solve(problem, time_limit_s=2.0)
    early = solver.solve(problem, time_limit_s=2.0, enough=0.5 * whole.lower_bound)
    assert 0.5 * whole.lower_bound <= early.lower_bound <= whole.cost * (1 + 1e-9)
    assert early.evaluations < whole.evaluations


def test_trees_without_limit_are_closed_exactly():
    rng = np.random.default_rng(0)
    problem = random_problem(3, 30, 8, 0.0, None)
    pairs = [(int(rng.integers(0, i)), i) for i in range(1, 30)]
    k = problem.n_strategies()
    tables = [rng.integers(0, 50, k[i] * k[j]).astype(float) for i, j in pairs]
    problem = Problem(
        **{
            **{f: getattr(problem, f) for f in problem.__dataclass_fields__},
            "edge_nodes": np.array(pairs, np.int32),
            "edge_offsets": np.concatenate([[0], np.cumsum([len(t) for t in tables])]),
            "edge_costs": np.concatenate(tables),
        }
    )
    found = solver.solve(problem, time_limit_s=2.0)
    assert found.status == "optimal"
    assert found.gap < 1e-6


def test_same_seed_and_evaluations_give_the_same_answer():
    problem = random_problem(11, 60, 6, 0.08, 0.15)
    runs = [
        solver.solve(problem, time_limit_s=30.0, seed=5, max_evaluations=5000) for _ in range(2)
    ]
    np.testing.assert_array_equal(runs[0].assignment, runs[1].assignment)
    assert runs[0].evaluations <= 5000


def test_initial_is_never_made_worse():
    problem = random_problem(12, 60, 6, 0.08, 0.15)
    good = solver.solve(problem, time_limit_s=1.0, seed=1)
    again = solver.solve(problem, time_limit_s=0.2, seed=2, initial=good.assignment)
    assert again.feasible
    assert again.cost <= good.cost


def test_a_looser_limit_never_raises_the_bound_above_a_feasible_cost():
    costs = []
    for tightness in (0.05, 0.3, 1.0):
        problem = random_problem(13, 40, 5, 0.08, tightness)
        costs.append(solver.solve(problem, time_limit_s=1.0))
    assert costs[1].lower_bound <= costs[0].cost + 1e-9
    assert costs[2].lower_bound <= costs[1].cost + 1e-9


def test_impossible_limit_is_infeasible():
    problem = random_problem(14, 10, 3, 0.3, 0.0)
    fields = {f: getattr(problem, f) for f in problem.__dataclass_fields__}
    found = solver.solve(Problem(**{**fields, "usage_limit": 1.0}), time_limit_s=1.0)
    assert not found.feasible
    assert found.status == "infeasible"


def tied_problem(seed: int, n_nodes: int, most: int) -> Problem:
    """A random problem whose nodes partly copy each other's strategy through forbidden pairs."""
    rng = np.random.default_rng(seed)
    base = random_problem(seed, n_nodes, most, 0.5, 0.3, 0.15)
    k = base.n_strategies()
    fields = {f: getattr(base, f) for f in base.__dataclass_fields__}
    pairs, tables = base.edge_nodes.tolist(), []
    for e in range(base.n_edges):
        tables.append(base.edge_costs[base.edge_offsets[e] : base.edge_offsets[e + 1]])
    for e, (i, j) in enumerate(pairs):
        if k[i] == k[j] and rng.random() < 0.7:
            tie = np.full((k[i], k[i]), FORBIDDEN)
            tie[np.arange(int(k[i])), rng.permutation(k[i])] = rng.integers(0, 9, k[i])
            tables[e] = tie.ravel()
    return Problem(**{**fields, "edge_costs": np.concatenate([*tables, np.zeros(0)])})


@pytest.mark.parametrize("seed", range(30))
def test_reduction_is_exact(seed):
    """Core assignments and allowed assignments correspond one to one, with cost and memory."""
    problem = tied_problem(seed, 6, 3)
    allowed = {
        x
        for x in itertools.product(*(range(n) for n in problem.n_strategies()))
        if problem.cost(np.array(x)) < FORBIDDEN
    }
    try:
        reduced = reduce(problem)
    except InfeasibleError:
        assert not any(problem.is_feasible(np.array(x)) for x in allowed)
        return
    core, lifted = reduced.core, set()
    use = np.empty(len(core.fixed))
    for states in itertools.product(*(range(n) for n in np.diff(core.offsets))):
        x = np.array(states, dtype=np.int32)
        answer = reduced.lift(x)
        cost = _dual.cost_of(core, x)
        if cost >= reduced.forbidden:
            assert tuple(answer.tolist()) not in allowed
            continue
        lifted.add(tuple(answer.tolist()))
        assert cost + reduced.constant == pytest.approx(problem.cost(answer), rel=1e-12)
        _dual.usage_of(core, x, use)
        fits = not len(use) or use.max() <= core.limit * (1 + 1e-12)
        assert fits == problem.is_feasible(answer)
        np.testing.assert_array_equal(reduced.project(answer), x)
    assert lifted == allowed


@pytest.mark.parametrize("seed", range(12))
def test_tied_problems_match_enumeration(seed):
    problem = tied_problem(seed, 7, 3)
    optimum = enumerate_optimum(problem)
    for found in (
        solver.solve(problem, time_limit_s=20.0, patient=True),
        solver.exact(problem, time_limit_s=20.0),
    ):
        assert found.feasible == np.isfinite(optimum)
        if found.feasible:
            assert found.cost == optimum
            assert found.lower_bound <= optimum + 1e-6


@pytest.mark.parametrize("seed", range(5))
def test_ruled_out_strategies_are_in_no_better_assignment(seed):
    problem = random_problem(seed, 6, 4, 0.6, 0.3)
    reduced = reduce(problem)
    best = Incumbent(reduced, start=0.0, deadline=np.inf, max_evaluations=None, on_progress=None)
    ascent = Ascent(best)
    ascent.step(30)
    rng = np.random.default_rng(seed)
    found = solver.solve(problem, time_limit_s=20.0, seed=int(rng.integers(100)), patient=True)
    best.offer_assignment(found.assignment)
    left = best.reduced.restrict(problem, ascent.useful())
    optimum = enumerate_optimum(problem)
    assert enumerate_optimum(left) == optimum == found.cost


def test_a_large_instance_is_feasible_in_little_memory_and_time():
    """Three thousand nodes, long and short live ranges, a limit 10 % above the least possible."""
    problem = layered_problem(0, 3000)
    began = time.monotonic()
    found = solver.solve(problem, time_limit_s=4.0)
    assert time.monotonic() - began < 12.0
    assert found.feasible
    assert found.gap < 0.1
    costs = [found.cost, solver.solve(problem, time_limit_s=4.0, seed=1).cost]
    assert max(costs) <= 1.02 * min(costs)


def layered_problem(seed: int, n_nodes: int) -> Problem:
    rng = np.random.default_rng(seed)
    k = rng.choice([1, 4, 8, 12], n_nodes)
    ends = rng.integers(1, n_nodes, 2 * n_nodes)
    starts = np.maximum(ends - 1 - rng.exponential(50, len(ends)).astype(int), 0)
    pairs = sorted(set(zip(starts.tolist(), ends.tolist())))
    kinds = [rng.integers(0, 3, n) for n in k]
    tables = [
        ((kinds[i][:, None] != kinds[j]) * 10 ** rng.uniform(2, 6)).round().ravel()
        for i, j in pairs
    ]
    length = np.where(rng.random(n_nodes) < 0.1, n_nodes, rng.integers(1, 10, n_nodes))
    begin = np.arange(n_nodes)
    end = np.minimum(begin + length, n_nodes)
    size = 10 ** rng.uniform(3, 7, n_nodes)
    usages = [np.floor(size[i] / 2.0 ** rng.integers(0, 6, k[i])) for i in range(n_nodes)]
    least = np.array([u.min() for u in usages])
    peak = max(least[(begin <= t) & (t < end)].sum() for t in range(n_nodes))
    offsets = np.concatenate([[0], np.cumsum(k)]).astype(np.int64)
    return Problem(
        name=f"layered{seed}",
        strategy_offsets=offsets,
        node_costs=rng.integers(0, 10**5, k.sum()).astype(float),
        edge_nodes=np.array(pairs, dtype=np.int32),
        edge_offsets=np.concatenate([[0], np.cumsum([len(t) for t in tables])]).astype(np.int64),
        edge_costs=np.concatenate(tables),
        usage_nodes=begin.astype(np.int32),
        usage_intervals=np.stack([begin, end], axis=1).astype(np.int64),
        usage_offsets=offsets,
        usages=np.concatenate(usages),
        usage_limit=float(np.floor(1.1 * peak)),
    )


def fan(seed: int, length: int) -> Problem:
    """A hub joined to every node of a path, no limit: cycles everywhere, all through the hub."""
    rng = np.random.default_rng(seed)
    k = np.array([4, *[3] * length])
    pairs = [(0, i) for i in range(1, length + 1)] + [(i, i + 1) for i in range(1, length)]
    tables = [rng.integers(0, 50, k[i] * k[j]).astype(float) for i, j in pairs]
    return Problem(
        name=f"fan{seed}",
        strategy_offsets=np.concatenate([[0], np.cumsum(k)]).astype(np.int64),
        node_costs=rng.integers(0, 50, k.sum()).astype(float),
        edge_nodes=np.array(pairs, dtype=np.int32),
        edge_offsets=np.concatenate([[0], np.cumsum([len(t) for t in tables])]).astype(np.int64),
        edge_costs=np.concatenate(tables),
        usage_nodes=np.zeros(0, dtype=np.int32),
        usage_intervals=np.zeros((0, 2), dtype=np.int64),
        usage_offsets=np.zeros(1, dtype=np.int64),
        usages=np.zeros(0),
        usage_limit=np.inf,
    )


@pytest.mark.parametrize("seed", range(8))
def test_one_move_around_a_hub_sets_all_that_hangs_on_it(seed):
    problem = fan(seed, 7)
    reduced = reduce(problem)
    best = Incumbent(
        reduced, start=time.monotonic(), deadline=np.inf, max_evaluations=None, on_progress=None
    )
    polish = Polish(best, seed)
    rng = np.random.default_rng(seed)
    x = rng.integers(0, np.diff(reduced.core.offsets)).astype(np.int32)
    walk = polish.walk(x)
    prices = np.zeros(len(reduced.core.fixed))
    for _ in range(200):  # moves that reach fewer nodes only help
        polish.moves(walk, prices, 1, block_size=50, noise=0.0, hubs=1.0)
    assert walk.state[0] + reduced.constant == pytest.approx(enumerate_optimum(problem))


@pytest.mark.parametrize("beyond", [0.0, 0.05])
def test_annealing_beyond_the_limit_ends_within_it(beyond):
    problem = random_problem(5, 30, 4, 0.15, tightness=0.3)
    found = solver.solve(problem, time_limit_s=1.0, seed=0, max_evaluations=2000)
    reduced = reduce(problem)
    best = Incumbent(
        reduced, start=time.monotonic(), deadline=np.inf, max_evaluations=None, on_progress=None
    )
    best.offer_assignment(found.assignment)
    before = best.cost
    style = Style(heat=0.3, block_size=20, hubs=0.5, beyond=beyond)
    prices = np.full(len(reduced.core.fixed), 1e-3)
    walk = Polish(best, 1).anneal(best.x, lambda: prices, style, 0.3)
    assert best.feasible and best.cost <= before
    assert problem.is_feasible(reduced.lift(best.x))
    cost, excess, _ = best.measure(walk.x)
    assert walk.state[:2] == pytest.approx([cost, excess])
