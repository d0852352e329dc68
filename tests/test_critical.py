"""Paths through the simulation: bounds of every plan, and the plans they lead to."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from test_groups import arg, mlp_step
from test_tables import tables

from cost_model.critical import Path, Paths
from cost_model.simulate import Simulator
from placement.bound import rounds


def unrolled():
    """Reductions and gathers take turns on the network, and both outlast computation."""
    return tables(*mlp_step(6, scan=False, scale=4), cluster="h100:8x2", mesh={"data": 16})


PROGRAMS = {
    "deep, two nodes": unrolled,
    "scanned, TPU": lambda: tables(*mlp_step(3, scan=True)),
    "scanned, GPU": lambda: tables(*mlp_step(3, scan=True), cluster="h100:8"),
    "unrolled, GPU": lambda: tables(*mlp_step(2, scan=False), cluster="h100:8"),
    "tight, GPU": lambda: tables(*mlp_step(3, scan=True), cluster="h100:8", limit=2.5e7),
}


@pytest.fixture(params=PROGRAMS, scope="module")
def simulator(request):
    return Simulator.of(PROGRAMS[request.param]())


def picks_of(simulator, count, seed=0):
    p = simulator.tables.problem
    return np.random.default_rng(seed).integers(0, p.n_strategies(), size=(count, p.n_nodes))


def test_no_path_and_no_mean_of_paths_is_longer_than_the_step_of_any_assignment(simulator):
    paths = Paths(simulator)
    picks = picks_of(simulator, 30)
    found = [paths.longest(paths.durations(x), certain=True) for x in picks]
    steps = simulator(picks)[:, 0]
    problems = [paths.problem(path, np.inf) for path, _ in found]
    mean = Path(
        computed=np.mean([p.computed for p, _ in found], axis=0),
        hidden=np.mean([p.hidden for p, _ in found], axis=0),
    )
    for k, (x, (_, length)) in enumerate(zip(picks, found)):
        assert length <= steps[k] * (1 + 1e-12)
        assert problems[k].cost(x) == pytest.approx(length, rel=1e-9)
        for other in (*problems, paths.problem(mean, np.inf)):
            assert other.cost(x) <= steps[k] * (1 + 1e-9)


def test_a_path_may_use_the_network_where_that_is_longer():
    """Hidden gathers that outlast the computation are on the path."""
    simulator = Simulator.of(PROGRAMS["scanned, GPU"]())
    paths = Paths(simulator)
    through = [paths.longest(paths.durations(x), certain=True)[0] for x in picks_of(simulator, 30)]
    assert any(p.hidden.any() for p in through)
    assert any(0 < p.computed.sum() < (simulator.kind == 0).sum() for p in through)


def test_any_path_of_an_assignment_is_nearer_to_its_step_than_a_certain_one(simulator):
    paths = Paths(simulator)
    picks = picks_of(simulator, 100)
    seconds = [paths.durations(x) for x in picks]
    steps = simulator(picks)[:, 0]
    certain = np.array([paths.longest(d, certain=True)[1] for d in seconds])
    found = [paths.longest(d, certain=False) for d in seconds]
    lengths = np.array([length for _, length in found])
    assert (lengths >= certain * (1 - 1e-12)).all()
    assert (lengths <= steps * (1 + 1e-12)).all()
    assert lengths.sum() >= 0.97 * steps.sum()
    for x, (path, length) in zip(picks, found):
        assert paths.problem(path, np.inf).cost(x) == pytest.approx(length, rel=1e-9)


def test_charging_everything_gives_the_tables(simulator):
    """One on both lanes is the additive score; what a device cannot hide is always charged."""
    paths, tables = Paths(simulator), simulator.tables.at(1.0)
    ones = np.ones(len(simulator.kind))
    every = paths.problem(Path(computed=ones, hidden=ones), np.inf)
    np.testing.assert_allclose(every.node_costs, tables.problem.node_costs, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(every.edge_costs, tables.problem.edge_costs, rtol=1e-9, atol=1e-15)


def test_rounds_bound_the_best_plan_of_a_small_program_and_find_it():
    t = tables(
        lambda a, b: jnp.tanh(a @ b), (arg(64, 4096), arg(4096, 4096)), {"x": 8},
        cluster="h100:8", donate=(),
    )  # fmt: skip
    simulator = Simulator.of(t)
    every = np.array(list(itertools.product(*(range(n) for n in t.problem.n_strategies()))))
    best = simulator(every)[:, 0].min()
    found = list(
        itertools.islice(rounds(simulator, every[0], limit_bytes=np.inf, time_limit_s=1.0), 20)
    )
    assert max(r.bound_s for r in found) <= best * (1 + 1e-9)
    assert max(r.bound_s for r in found) >= 0.9 * best
    assert min(simulator(r.choices)[0, 0] for r in found) == pytest.approx(best, rel=1e-9)


def test_the_bound_counts_memory():
    step, args = mlp_step(3, scan=True)
    simulator = Simulator.of(tables(step, args, cluster="h100:8"))
    peaks = [simulator.peak_memory_bytes(x) for x in picks_of(simulator, 200)]
    start = picks_of(simulator, 1)[0]

    def bound(limit):
        several = rounds(simulator, start, limit_bytes=limit, time_limit_s=1.0)
        return max(r.bound_s for r in itertools.islice(several, 6))

    roomy, tight = bound(max(peaks)), bound(np.quantile(peaks, 0.02))
    assert bound(0.0) == np.inf
    assert roomy <= tight * (1 + 1e-9)
    for x in picks_of(simulator, 200, seed=1):
        if simulator.peak_memory_bytes(x) <= np.quantile(peaks, 0.02):
            assert simulator(x)[0, 0] >= tight * (1 - 1e-9)
