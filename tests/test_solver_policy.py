"""The learned start: its messages are the tables' own sums, and units and order do not matter."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import pytest

from cost_model import iopddl
from cost_model.problem import Problem
from placement import solver
from placement.solver import contest, policy
from placement.solver.core import reduce

DATA = Path(__file__).parent / "data" / "iopddl"


def chain(seed: int, n: int = 9, k: int = 4, limit: float = 60.0) -> Problem:
    """A ring with dense random tables, so that nothing reduces away."""
    rng = np.random.default_rng(seed)
    ends = np.array([[i, (i + 1) % n] for i in range(n)], np.int32)
    return Problem(
        name="ring",
        strategy_offsets=np.arange(0, k * n + 1, k),
        node_costs=rng.random(k * n) * 10,
        edge_nodes=ends,
        edge_offsets=np.arange(0, k * k * n + 1, k * k),
        edge_costs=rng.random(k * k * n) * 20,
        usage_nodes=np.arange(n, dtype=np.int32),
        usage_intervals=np.stack([np.arange(n), np.arange(n) + 4], axis=1),
        usage_offsets=np.arange(0, k * n + 1, k),
        usages=rng.random(k * n) * 30,
        usage_limit=limit,
    )


def beliefs(problem: Problem) -> np.ndarray:
    """[P, K] by problem node; what the reduction decides has none."""
    reduced = reduce(problem)
    p = policy.forward(policy.load(), policy.CoreMessages(reduced), np)[-1]
    out = np.full((problem.n_nodes, 4), np.nan)
    for i, g in enumerate(reduced.group):
        if g >= 0:
            at = reduced.map_at[i]
            for a in range(reduced.map_at[i + 1] - at):
                out[i, reduced.maps[at + a]] = p[reduced.core.offsets[g] + a]
    return out


def test_messages_are_the_sums_over_the_tables():
    problem = chain(0)
    reduced = reduce(problem)
    core, seen = reduced.core, policy.CoreMessages(reduced)
    rng = np.random.default_rng(1)
    p = seen.softmax(rng.normal(size=len(core.unary)).astype(np.float32))
    energy = float((p * (core.unary + 0.5 * seen.expected(p))).sum()) + reduced.constant
    draws = np.stack(
        [
            rng.choice(core.offsets[i + 1] - core.offsets[i], 4000, p=q / q.sum())
            for i, q in enumerate(
                p[a:b].astype(float) for a, b in zip(core.offsets[:-1], core.offsets[1:])
            )
        ],
        axis=1,
    )
    costs = [problem.cost(reduced.lift(x.astype(np.int32))) for x in draws]
    assert energy == pytest.approx(np.mean(costs), abs=5 * np.std(costs) / np.sqrt(len(costs)))


def test_beliefs_are_distributions_that_do_not_depend_on_units():
    problem = chain(2)
    other = dataclasses.replace(
        problem,
        node_costs=problem.node_costs * 1e-7,
        edge_costs=problem.edge_costs * 1e-7,
        usages=problem.usages * 1e9,
        usage_limit=problem.usage_limit * 1e9,
    )
    ours = beliefs(problem)
    known = ours[~np.isnan(ours).any(axis=1)]
    assert len(known) and np.allclose(known.sum(axis=1), 1.0, atol=1e-5)
    np.testing.assert_allclose(ours, beliefs(other), atol=1e-3)


def test_another_order_of_nodes_gives_the_same_beliefs():
    problem = chain(3)
    order = np.random.default_rng(0).permutation(problem.n_nodes)  # new place -> old node
    new = np.argsort(order)
    rows = (4 * order[:, None] + np.arange(4)).ravel()
    moved = dataclasses.replace(
        problem,
        node_costs=problem.node_costs[rows],
        edge_nodes=new[problem.edge_nodes].astype(np.int32),
        usage_nodes=new[problem.usage_nodes].astype(np.int32),
    )
    np.testing.assert_allclose(beliefs(moved), beliefs(problem)[order], atol=1e-4)


def test_proposals_go_most_of_the_way_from_chance_to_the_best_where_memory_is_ample():
    rng = np.random.default_rng(4)
    gained = []
    for seed in range(12):
        problem = chain(seed, n=30, limit=1e9)
        reduced = reduce(problem)
        proposed = problem.cost(reduced.lift(policy.propose(reduced)))
        best = solver.solve(problem, time_limit_s=1.0).cost
        random = np.mean([problem.cost(rng.integers(0, 4, 30)) for _ in range(50)])
        gained.append((random - proposed) / (random - best))
    assert np.mean(gained) > 0.7


def test_the_engine_keeps_what_it_can_use_and_answers_all_the_same():
    for seed in range(5):
        problem = chain(seed)
        plain = solver.solve(problem, time_limit_s=2.0)
        found = solver.solve(problem, time_limit_s=2.0, propose=policy.propose)
        assert found.feasible == plain.feasible
        if found.status == plain.status == "optimal":
            assert found.cost == pytest.approx(plain.cost)


def test_solve_takes_the_policy_by_name():
    lines: list[str] = []
    path = str(DATA / "G.json.gz")
    status = contest.solve_file(
        path, timeout_s=15.0, started=time.monotonic(), optimizer="learned", say=lines.append
    )
    problem = iopddl.read(path)
    answer = np.array(json.loads(lines[-1]))
    assert status == 0 and problem.is_feasible(answer)
    assert problem.cost(answer) <= 1.01 * 217039


def test_the_weights_are_small_and_say_where_they_are_from():
    from safetensors import safe_open

    path = Path(policy.__file__).with_name(policy.WEIGHTS)
    assert path.stat().st_size < 2_000_000
    with safe_open(path, framework="np") as file:
        assert int(file.metadata()["steps"]) > 0
