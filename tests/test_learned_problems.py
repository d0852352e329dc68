"""Planning problems, their space, their judge, and what is recorded of them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from small_problem import small_problem

from cost_model.cluster import parse_cluster
from graphs.errors import MeshwrightError
from placement.learned import outcomes
from placement.learned.instance import Instance
from placement.learned.problems import (
    COUNTS,
    HELD_OUT_DEVICES,
    HELD_OUT_FAMILIES,
    LARGEST_TRAINED,
    SPLITS,
    PlanningProblem,
    family_of,
    generate,
    load_split,
)


@pytest.fixture(scope="module")
def small() -> PlanningProblem:
    return small_problem(name="train_999", n_layers=6)


@pytest.fixture(scope="module")
def instance(small) -> Instance:
    return Instance(small)


def test_splits_are_what_their_seed_gives():
    made = generate(counts={"train": 4, "heldout_family": 3})
    assert made == load_split("train")[:4] + load_split("heldout_family")[:3]


def test_names_are_unique_and_counts_kept():
    problems = [p for s in SPLITS for p in load_split(s)]
    assert len({p.name for p in problems}) == len(problems)
    assert {s: len(load_split(s)) for s in SPLITS} == COUNTS


def test_nothing_held_out_is_trained_on():
    for split in ("train", "validation"):
        for p in load_split(split):
            cluster = parse_cluster(p.cluster)
            assert family_of(p.config()) not in HELD_OUT_FAMILIES
            assert cluster.device.name not in HELD_OUT_DEVICES
            assert cluster.n_devices <= LARGEST_TRAINED
    shapes = {(str(sorted(p.model.items())), p.cluster) for p in load_split("train")}
    other = [p for s in SPLITS if s != "train" for p in load_split(s)]
    assert not shapes & {(str(sorted(p.model.items())), p.cluster) for p in other}


def test_each_held_out_split_differs_in_its_own_way_only():
    for p in load_split("heldout_family"):
        assert family_of(p.config()) == p.family and p.family in HELD_OUT_FAMILIES
    for p in load_split("heldout_device"):
        assert parse_cluster(p.cluster).device.name in HELD_OUT_DEVICES
    for p in load_split("heldout_scale"):
        assert parse_cluster(p.cluster).n_devices > LARGEST_TRAINED
        assert p.family not in HELD_OUT_FAMILIES


def test_problems_range_from_few_to_many_devices_and_batches_limit_many():
    problems = load_split("train")
    sizes = [parse_cluster(p.cluster).n_devices for p in problems]
    assert min(sizes) == 4 and max(sizes) == LARGEST_TRAINED
    limited = [p.global_batch < n for p, n in zip(problems, sizes)]
    assert 0.2 < np.mean(limited) < 0.8


def test_unknown_split_says_which_exist():
    with pytest.raises(MeshwrightError, match="validation"):
        load_split("test")


def test_candidates_are_all_combinations_in_fixed_order(small, instance):
    keys = [instance.key(o) for o in instance.outers]
    assert len(set(keys)) == len(keys) == 4 * 5 * len(instance.layouts)
    assert keys == [instance.key(o) for o in Instance(small).outers]
    assert all(o.layout.mesh.n_devices == 16 for o in instance.outers)


def test_engine_beats_random_plans_and_a_zero_prior_changes_nothing(instance):
    outer = next(o for o in instance.outers if len(o.layout.mesh.axis_sizes) == 2)
    found = instance.evaluate(outer)
    assert found.fits and found.evaluations == 1
    sizes = instance.tables(outer).problem.n_strategies()
    rng = np.random.default_rng(0)
    for _ in range(20):
        assert found.step_time_s < instance.judge(outer, rng.integers(0, sizes)).step_time_s
    prior = np.zeros(len(instance.tables(outer).problem.node_costs))
    again = instance.evaluate(outer, prior=prior)
    assert again.step_time_s == found.step_time_s


def test_prior_steers_the_engine_and_not_the_judge(instance):
    outer = next(o for o in instance.outers if len(o.layout.mesh.axis_sizes) == 2)
    p = instance.tables(outer).problem
    rng = np.random.default_rng(1)
    target = rng.integers(0, p.n_strategies())
    prior = np.full(len(p.node_costs), 1e6)
    prior[p.strategy_offsets[:-1] + target] = 0.0
    found = instance.evaluate(outer, prior=prior)
    free = p.node_costs[p.strategy_offsets[:-1] + target] < 1e18
    assert (found.choices == target)[free].mean() > 0.95
    assert found.step_time_s == instance.judge(outer, found.choices).step_time_s < 1e6


def test_a_fork_is_charged_for_what_another_run_made(instance):
    outer = instance.outers[0]
    instance.evaluate(outer)
    fork = instance.fork()
    assert fork.seconds() < 0.05
    fork.evaluate(outer)
    once = fork.seconds()
    assert once > 0.02, "program and tables have to be paid"
    fork.evaluate(outer)
    assert fork.seconds() - once < 0.5 * once


def test_dropped_tables_are_made_again_without_a_second_charge(small):
    whole = Instance(small)
    outer = whole.outers[0]
    whole.tables(outer)
    key = ("tables", *whole.key(outer))
    before = whole.seconds()
    del whole._store.items[key]
    whole.tables(outer)
    assert whole.seconds() - before < 0.3 * whole._store.cost_s[key] + 0.02


def test_outcomes_survive_the_file(small, tmp_path, monkeypatch):
    monkeypatch.setenv("MESHWRIGHT_CACHE_DIR", str(tmp_path))
    with pytest.raises(MeshwrightError, match="split=train"):
        outcomes.load(small)
    tiny = dataclasses.replace(small, cluster="v5e:2x2", global_batch=4)
    made = outcomes.record(tiny)
    outcomes.store(tiny, made)
    read = outcomes.load(tiny)
    for field in dataclasses.fields(made):
        a, b = getattr(made, field.name), getattr(read, field.name)
        if field.name == "choices":
            assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
        else:
            assert np.array_equal(a, b)
    judged = Instance(tiny)
    for place, choices in zip(read.best, read.choices):
        again = judged.judge(judged.outers[read.index[place]], choices)
        assert again.fits and again.step_time_s == read.step_time_s[place]
    assert len(set(read.index)) == len(read.index)
    variants = {(judged.outers[i].remat, judged.outers[i].microbatches) for i in read.index}
    assert 1 < len(variants) <= outcomes.N_VARIANTS
