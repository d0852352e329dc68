"""Local search with what is left of a large budget: it only improves, and judges no plan twice."""

from __future__ import annotations

import numpy as np
import pytest
from small_problem import small_problem

from placement.learned import deepen
from placement.learned.anytime import Recorder
from placement.learned.baselines import BASELINES
from placement.learned.encoding import STATE_OPTIONS, Speaker
from placement.learned.instance import Instance
from placement.learned.search import SHALLOW, plan_instance


@pytest.fixture(scope="module")
def instance() -> Instance:
    problem = small_problem(name="validation_998", width=256, cluster="v5e:2x4", global_batch=8)
    return Instance(problem, max_axes=2)


def _plan(instance, evaluations: int, seed: int = 0):
    return plan_instance(
        instance.fork(), max_evaluations=evaluations, time_limit_s=1e9, seed=seed, policy="uniform"
    )


def test_a_large_budget_begins_as_a_small_one_does(instance):
    small, large = (_plan(instance, n).curve for n in (SHALLOW, 600))
    for n in range(1, SHALLOW + 1):
        assert large.at_evaluations(n) == small.at_evaluations(n)
    assert large.total_evaluations == 600
    assert large.step_time_s[-1] <= small.step_time_s[-1]


def test_a_seed_gives_one_result_at_a_large_budget(instance):
    first, second = (_plan(instance, 400, seed=5).curve for _ in range(2))
    assert (first.evaluations, first.step_time_s) == (second.evaluations, second.step_time_s)


def test_a_large_budget_ends_no_worse_than_optimizers_that_score_plans(instance):
    mine = _plan(instance, 600).curve.step_time_s[-1]
    for name in ("annealing", "evolution"):
        other = BASELINES[name](instance.fork(), max_evaluations=600, time_limit_s=1e9, seed=0)
        assert mine <= other.step_time_s[-1] * 1.005


def test_no_plan_is_judged_twice(instance, monkeypatch):
    seen: list[tuple] = []
    judged = Instance.judge

    def counted(self, outer, choices, **more):
        seen.append((*self.key(outer), np.asarray(choices).tobytes()))
        return judged(self, outer, choices, **more)

    recorder = Recorder(instance, max_evaluations=300, time_limit_s=1e9)
    judge = deepen.Judge(instance, recorder, {})
    monkeypatch.setattr(Instance, "judge", counted)
    rngs = [np.random.default_rng(n) for n in range(2)]
    arms = (
        deepen.Evolution(judge, rngs[0], lambda: range(len(instance.outers))),
        deepen.Annealing(judge, rngs[1]),
        deepen.Descent(judge),
    )
    deepen.in_turns(recorder, arms)
    assert recorder.evaluations == len(seen) == len(set(seen)) == 300
    assert recorder.best is not None
    assert recorder.best.step_time_s == min(p.step_time_s for p in judge.plans.values())


def test_descent_ends_where_none_of_its_moves_helps(instance):
    recorder = Recorder(instance, max_evaluations=5000, time_limit_s=1e9)
    k = 0
    first = recorder.offer(instance.outers[k], instance.evaluate(instance.outers[k]))
    judge = deepen.Judge(instance, recorder, {k: first})
    descent = deepen.Descent(judge)
    while descent.step():
        pass
    assert not recorder.over()
    best = judge.plans[k]
    assert best.step_time_s <= first.step_time_s
    problem = instance.tables(instance.outers[k]).problem
    for node, pick in deepen._priced_moves(problem, best.choices):
        choices = best.choices.copy()
        choices[node] = pick
        other = instance.judge(instance.outers[k], choices)
        assert not other.fits or other.step_time_s >= best.step_time_s


def test_an_imposed_decision_changes_one_axis_only(instance):
    outer = next(o for o in instance.outers if o.layout.mesh.axis_sizes == (2, 4))
    speaker = Speaker.of(instance.tables(outer))
    choices = instance.evaluate(outer).choices
    changed = 0
    for wanted in STATE_OPTIONS:
        fixed = speaker.imposed(choices, "state", 1, wanted)
        for node, kind, _, names in speaker.nodes:
            if fixed[node] < 0:
                continue
            assert kind == "state"
            before, after = (
                speaker.tables.choices[node].place[c] for c in (choices[node], fixed[node])
            )
            assert before[0] == after[0]
            assert after[1] < 0 or set(names[after[1]]) & set(wanted)
            changed += int(before[1] != after[1])
    assert changed
