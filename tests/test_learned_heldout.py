"""The held-out suite: short plans, completion, baselines on one budget, and what is made of runs."""

from __future__ import annotations

import csv
import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_problem import small_problem

from graphs.errors import MeshwrightError
from placement.learned import heldout
from placement.learned.anytime import Curve, Recorder, curve_of
from placement.learned.baselines import BASELINES, SEEDED
from placement.learned.encoding import FSDP, ShortPlan, Speaker, random_plan
from placement.learned.heldout_summary import TEN, Runs, mean_against, mean_ratio
from placement.learned.heldout_targets import targets
from placement.learned.instance import Instance
from placement.learned.problems import PlanningProblem


@pytest.fixture(scope="module")
def problem() -> PlanningProblem:
    return small_problem(name="validation_999", width=256, cluster="v5e:2x4", global_batch=8)


@pytest.fixture(scope="module")
def instance(problem) -> Instance:
    return Instance(problem, max_axes=2)


@pytest.fixture(scope="module")
def speaker(instance) -> Speaker:
    outer = next(o for o in instance.outers if o.layout.mesh.axis_sizes == (2, 4))
    return Speaker.of(instance.tables(outer))


def test_binding_decisions_stay_and_free_ones_only_lower_the_cost(speaker):
    p = speaker.tables.problem
    rng = np.random.default_rng(0)
    for _ in range(10):
        plan = dataclasses.replace(random_plan(rng), binding=1, memory_price=0)
        fixed = speaker.fixed(plan)
        bound = speaker.choices(plan)
        decided = fixed >= 0
        assert np.array_equal(bound[decided], fixed[decided])
        assert (bound >= 0).all() and (bound < p.n_strategies()).all()
        improved = speaker.choices(dataclasses.replace(plan, binding=0))
        assert p.cost(improved) <= p.cost(bound) * (1 + 1e-12)


def test_no_single_change_of_a_free_completion_is_cheaper(speaker):
    p = speaker.tables.problem
    x = speaker.completer(np.full(p.n_nodes, -1))
    base = p.cost(x)
    sizes = p.n_strategies()
    for node in np.random.default_rng(1).permutation(p.n_nodes)[:40]:
        for pick in range(sizes[node]):
            y = x.copy()
            y[node] = pick
            assert p.cost(y) >= base * (1 - 1e-12)


def test_a_price_of_memory_buys_smaller_holdings(speaker):
    p, completer = speaker.tables.problem, speaker.completer
    free = np.full(p.n_nodes, -1)
    held = [
        completer.held_bytes[p.strategy_offsets[:-1] + completer(free, price)].sum()
        for price in (0.0, 1e6)
    ]
    assert held[1] < 0.97 * held[0]


def test_short_plan_says_what_the_fsdp_rule_says(speaker):
    from placement.optimizers.rules import RULES, _fixed

    rule = next(r for r in RULES if r.name == "fsdp")
    wanted = _fixed(rule, speaker.tables)
    fixed = speaker.fixed(FSDP)
    kinds = {node: kind for node, kind, *_ in speaker.nodes}
    shared = [n for n in wanted if n in kinds and fixed[n] >= 0 and kinds[n] == "activation"]
    assert len(shared) > 10
    same = [fixed[n] == wanted[n] for n in shared]
    assert np.mean(same) > 0.9


@pytest.mark.parametrize("name", [n for n in BASELINES if n != "rules"])
def test_optimizers_keep_their_budget_and_only_improve(instance, name):
    curve = BASELINES[name](instance.fork(), max_evaluations=12, time_limit_s=60.0, seed=3)
    assert curve.total_evaluations <= 12
    assert list(curve.step_time_s) == sorted(curve.step_time_s, reverse=True)
    assert list(curve.evaluations) == sorted(curve.evaluations)
    assert list(curve.seconds) == sorted(curve.seconds)
    if name != "random_nodes":
        assert curve.step_time_s


@pytest.mark.parametrize("name", SEEDED)
def test_a_seed_gives_one_result(instance, name):
    first, second = (
        BASELINES[name](instance.fork(), max_evaluations=10, time_limit_s=60.0, seed=1)
        for _ in range(2)
    )
    assert first.step_time_s == second.step_time_s
    assert first.evaluations == second.evaluations


@pytest.fixture(scope="module")
def whole(instance):
    """What the engine finds that opens all there is."""
    return BASELINES["engine"](instance.fork(), max_evaluations=1 << 30, time_limit_s=1e9, seed=0)


def test_engine_opens_everything_and_scoring_finds_nothing_much_better(instance, whole):
    assert whole.total_evaluations >= 3 * len(instance.outers)
    found = BASELINES["evolution"](instance.fork(), max_evaluations=60, time_limit_s=60.0, seed=0)
    assert whole.step_time_s[-1] < 1.05 * found.step_time_s[-1]


def test_rules_are_no_better_than_the_engine(instance, whole):
    rules = BASELINES["rules"](instance.fork(), max_evaluations=1, time_limit_s=1.0, seed=0)
    assert whole.step_time_s[-1] <= rules.step_time_s[-1] * 1.01


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.floats(0.1, 9.0)), max_size=12))
def test_curves_are_steps(points):
    clock = [(n + 1, 0.5 * (n + 1), t) for n, (_, t) in enumerate(points)]
    curve = curve_of(clock, len(points), 0.5 * len(points))
    for n in range(len(points) + 1):
        seen = [t for e, _, t in clock if e <= n]
        assert curve.at_evaluations(n) == (min(seen) if seen else math.inf)
        assert curve.at_seconds(0.5 * n) == curve.at_evaluations(n)
    for goal in (0.5, 3.0):
        reached = [e for e, _, t in clock if t <= goal]
        assert curve.evaluations_to(goal) == (reached[0] if reached else math.inf)


def test_recorder_takes_only_plans_that_fit(instance):
    recorder = Recorder(instance.fork(), max_evaluations=3, time_limit_s=60.0)
    outer = instance.outers[0]
    good = instance.evaluate(outer)
    recorder.offer(outer, dataclasses.replace(good, step_time_s=0.5 * good.step_time_s, fits=False))
    assert recorder.best is None and not recorder.over()
    recorder.offer(outer, good)
    recorder.offer(outer, dataclasses.replace(good, step_time_s=2.0 * good.step_time_s))
    assert recorder.over() and recorder.best is good
    assert recorder.best_meshes(1) == [outer.layout]
    assert recorder.curve().evaluations == (2,)


def test_suite_goes_on_where_it_was(problem, tmp_path, monkeypatch):
    monkeypatch.setattr(heldout, "load_split", lambda name: [problem])
    wanted = dict(
        out=str(tmp_path), splits=["validation"], optimizers=["engine", "random", "rules"],
        seeds=2, evaluations=6,
    )  # fmt: skip
    assert heldout.evaluate(**wanted) == 0
    rows = sorted((tmp_path / "rows").iterdir())
    assert len(rows) == 4
    before = [r.stat().st_mtime_ns for r in rows]
    rows[1].unlink()
    assert heldout.evaluate(**wanted) == 0
    after = [r.stat().st_mtime_ns for r in rows]
    assert [a == b for a, b in zip(before, after)] == [True, False, True, True]
    with open(tmp_path / "summary.csv", encoding="utf-8") as file:
        summary = list(csv.DictReader(file))
    known = [r for r in summary if r["optimizer"] == "engine" and r["limit"] == "4096"]
    assert known and all(float(r["ratio"]) < 1.05 for r in known)
    assert (tmp_path / "evaluations.png").stat().st_size > 1000
    said = (tmp_path / heldout.COMMAND).read_text()
    assert "splits='[validation]'" in said and said.endswith("seeds=2 evaluations=6\n")
    deeper = dict(wanted, deep=1, deep_evaluations=9, deep_seeds=1)
    assert heldout.evaluate(**deeper) == 0
    curves = {(r["optimizer"], r["seed"]): r["curve"] for r in heldout.load_rows(tmp_path)}
    assert curves["random", 0].total_evaluations == 9
    assert curves["random", 1].total_evaluations == 6


def test_the_page_adds_what_was_measured_again(rows, tmp_path):
    def write(folder, found):
        (folder / "rows").mkdir(parents=True)
        for n, row in enumerate(found):
            row = row | {"curve": row["curve"].to_dict(), "judge": heldout.judge_id()}
            (folder / "rows" / f"{n}.json").write_text(json.dumps(row))

    first, later = tmp_path / "first", tmp_path / "later"
    write(first, rows)
    deep = [
        _row("heldout_family_1", "heldout_family", name, 0, [(1, 1.0, time)], budget=4096)
        for name, time in (("learned", 3.0), ("annealing", 2.0))
    ]
    write(later, deep)
    wanted = dict(out=str(first), problems=0, document=str(tmp_path / "page.md"))
    with pytest.raises(MeshwrightError, match="how its runs were made"):
        heldout.evaluate(**wanted, again=[str(later)])
    (later / heldout.COMMAND).write_text("meshwright evaluate suite=heldout deep=1")
    assert heldout.evaluate(**wanted, again=[str(later)]) == 0
    page = (tmp_path / "page.md").read_text()
    assert f"problems=0 document={tmp_path / 'page.md'} again='[{later}]'" in page
    section = page[page.index(f"## Measured again: {later}") :]
    section = section[: section.index("## Where")]
    assert "deep=1" in section and "worst ratio 1.5000" in section and "**missed**" in section
    assert "100.0% of 1 problems | met" in section
    assert "| problem | annealing | learned |" in section and "| 2 | 3 |" in section


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(MeshwrightError, match="heldout_scale"):
        heldout.evaluate(out=str(tmp_path), splits=["train"])
    with pytest.raises(MeshwrightError, match="annealing"):
        heldout.evaluate(out=str(tmp_path), optimizers=["luck"])


def _row(problem: str, split: str, optimizer: str, seed: int, points, budget=64) -> dict:
    curve = Curve(
        evaluations=tuple(e for e, _, _ in points),
        seconds=tuple(s for _, s, _ in points),
        step_time_s=tuple(t for _, _, t in points),
        total_evaluations=budget,
        total_seconds=20.0,
    )
    return dict(
        problem=problem, split=split, family="dense", cluster="v5e:16x16", n_devices=2048,
        model="m", candidates=100, max_axes=2, optimizer=optimizer, seed=seed,
        max_evaluations=budget, curve=curve,
    )  # fmt: skip


@pytest.fixture
def rows() -> list[dict]:
    """Learned finds the best at once; evolution twice that late; rules three times it."""
    found = []
    for n, split in enumerate(["validation", "heldout_family", "heldout_family", "heldout_scale"]):
        name, best = f"{split}_{n}", 1.0 + n
        for seed in range(3):
            found.append(_row(name, split, "learned", seed, [(1, 0.5, best)]))
            slow = [(2, 2.0, 4 * best), (60, 9.0, 2 * best)]
            found.append(_row(name, split, "evolution", seed, slow))
        found.append(_row(name, split, "learned_1s", 0, [(1, 0.4, best)]))
        found.append(_row(name, split, "rules", 0, [(9, 3.0, 3 * best)]))
        found.append(_row(name, split, "engine", 0, [(5, 5.0, 1.5 * best)]))
    return found


def test_ratios_are_to_the_best_known_plan(rows):
    runs = Runs(rows)
    problems = runs.of_split(None)
    learned = mean_ratio(runs, "learned", lambda c: c.at_evaluations(1), problems)
    assert learned is not None and learned.value == learned.low == learned.high == 1.0
    late = mean_ratio(runs, "evolution", lambda c: c.at_evaluations(16), problems)
    assert late is not None and late.value == pytest.approx(4.0)
    none = mean_ratio(runs, "evolution", lambda c: c.at_evaluations(1), problems)
    assert none is not None and none.value == pytest.approx(TEN) and none.found == 0.0
    against = mean_against(
        runs, "learned", lambda c: c.at_evaluations(64), lambda p: math.log(2.0), problems
    )
    assert against is not None and against.value == pytest.approx(0.5)


def test_intervals_hold_the_mean_and_widen_with_the_spread(rows):
    rng = np.random.default_rng(0)
    for row in rows:
        if row["optimizer"] == "evolution":
            late = 2 * float(rng.uniform(1.0, 3.0))
            points = [(60, 9.0, late * (1 + int(row["problem"][-1])))]
            row["curve"] = _row("", "", "", 0, points)["curve"]
    runs = Runs(rows)
    mean = mean_ratio(runs, "evolution", lambda c: c.at_evaluations(64), runs.of_split(None))
    assert mean is not None and mean.low < mean.value < mean.high


def test_a_run_cut_by_the_clock_was_not_given_all_its_evaluations(rows):
    ended = _row("p", "validation", "evolution", 0, [(5, 3.0, 1.0)]) | {"max_evaluations": 4096}
    cut = ended | {"time_limit_s": ended["curve"].total_seconds}
    for row, deep in ((ended, 1), (cut, 0)):
        assert len(Runs([row]).deep_enough("p", "evolution", 4096)) == deep


def test_one_second_is_judged_by_the_run_that_knows_of_it(rows):
    text = "1 s of processor time: no worse than the best other (engine)"
    mine = [dict(r, optimizer="seed1") for r in rows if r["optimizer"] == "learned"]
    late = [
        dict(r, curve=_row("", "", "", 0, [(1, 5.0, r["curve"].step_time_s[0])])["curve"])
        for r in mine
    ]
    hurried = [dict(r, optimizer="seed1_1s") for r in rows if r["optimizer"] == "learned_1s"]
    others = [
        dict(r, curve=_row("", "", "", 0, [(1, 0.9, 2 * r["curve"].step_time_s[0])])["curve"])
        if r["optimizer"] == "engine"
        else r
        for r in rows
    ]
    for more, met in (([], False), (hurried, True)):
        runs = Runs([*others, *late, *more])
        assert {t.text: t.met for t in targets(runs, "seed1")}[text] is met


def test_targets_follow_the_numbers(rows):
    found = {t.text: t for t in targets(Runs(rows))}
    text = next(t for t in found if t.startswith("64 evaluations: at most 0.90"))
    assert found[text].met and found[text].measured.startswith("0.500")
    assert next(t for k, t in found.items() if "0.82" in k).measured.startswith("0.333")
    assert next(t for k, t in found.items() if "gap" in k).met is None
    for row in rows:  # the same runs with evolution and learned exchanged
        swap = {"learned": "evolution", "evolution": "learned"}
        row["optimizer"] = swap.get(row["optimizer"], row["optimizer"])
    worse = {t.text: t for t in targets(Runs(rows))}
    assert worse[text].met is False


def test_short_plans_are_drawn_over_all_options():
    rng = np.random.default_rng(0)
    plans = [random_plan(rng) for _ in range(400)]
    for field in dataclasses.fields(ShortPlan):
        values = [getattr(p, field.name) for p in plans]
        assert len(set(values)) > 1
