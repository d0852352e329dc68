"""Learning from the compiler: what is compiled, what is learned from it, and when it is kept."""

from __future__ import annotations

import dataclasses
import json
import types

import numpy as np
import pytest
from small_problem import small_problem
from test_learned_train import SMALL, example

from cost_model.cluster import parse_cluster
from graphs.errors import MeshwrightError
from placement.learned import compiled_outcomes, compiled_report, forward
from placement.learned.compiled_outcomes import CompiledOutcome, chosen, load_examples, path_of
from placement.learned.policy import load_policy, save_weights
from placement.learned.problems import COMPILED, SPLITS, load_split
from placement.learned.run import WEIGHTS, run
from placement.learned.train import TrainConfig

PROBLEM = small_problem(name="compiled_train_999", n_layers=6)


def opened(*rows):
    return {k: types.SimpleNamespace(step_time_s=t, fits=fits) for k, (t, fits) in enumerate(rows)}


def outcome(index: int, simulated: float, compiled: float | None, status="ok") -> CompiledOutcome:
    return CompiledOutcome(
        index=index,
        remat="full",
        microbatches=1,
        mesh_shape={"data": 4},
        simulated_s=simulated,
        simulated_bytes=1e9,
        status=status,
        compiled_s=compiled,
        compiled_bytes=None if compiled is None else 1.1e9,
        message="",
    )


def keep(folder, *rows: CompiledOutcome) -> None:
    path = path_of(folder, PROBLEM)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([dataclasses.asdict(r) for r in rows]))


@pytest.fixture
def one_problem(monkeypatch):
    for module in (compiled_outcomes, compiled_report):
        monkeypatch.setattr(module, "load_split", lambda split: [PROBLEM])


def test_the_splits_are_of_their_own_programs_on_few_gpus():
    compiled = [p for s in COMPILED for p in load_split(s)]
    assert {s: len(load_split(s)) for s in COMPILED} == COMPILED
    for p in compiled:
        cluster = parse_cluster(p.cluster)
        assert cluster.device.family == "gpu" and cluster.n_devices <= 32
    programs = [(str(sorted(p.model.items())), p.cluster, p.global_batch, p.seq_len)
                for p in compiled]  # fmt: skip
    assert len(set(programs)) == len(programs)
    others = {(str(sorted(p.model.items())), p.cluster, p.global_batch, p.seq_len)
              for s in SPLITS for p in load_split(s)}  # fmt: skip
    assert not others & set(programs)


def test_the_fastest_that_fit_are_compiled_and_of_equals_one():
    rows = opened((3.0, True), (1.0, False), (2.0, True), (2.0, True), (5.0, True), (4.0, True))
    assert chosen(rows, (0, 1, 3)) == [2, 0, 4]
    assert chosen(rows, (0, 9)) == [2]
    assert chosen(opened((1.0, False))) == []


def test_times_and_fits_to_learn_from_are_the_compilers(tmp_path, one_problem):
    keep(
        tmp_path,
        outcome(3, 1.0, 1.5),
        outcome(0, 0.5, None, "failed"),
        outcome(1, 0.7, None, "out_of_memory"),
    )
    (found,) = load_examples(tmp_path, "compiled_train")
    assert found.index.tolist() == [3, 1] and found.fits.tolist() == [True, False]
    assert found.step_time_s[0] == 1.5
    assert found.memory_ratio[0] == pytest.approx(1.1 * found.memory_ratio[1])


def test_nothing_recorded_is_one_sentence(tmp_path, one_problem):
    with pytest.raises(MeshwrightError, match="no compiled outcomes of split"):
        load_examples(tmp_path, "compiled_train")
    keep(tmp_path)
    path_of(tmp_path, PROBLEM).write_text("[{}]")
    with pytest.raises(MeshwrightError, match="compiled_outcomes split=compiled_train"):
        load_examples(tmp_path, "compiled_train")


def test_a_second_stage_goes_on_from_the_weights_it_is_given(tmp_path):
    problems = [example(s) for s in range(8)], [example(s) for s in range(100, 104)]
    start = str(tmp_path / "first" / WEIGHTS)
    save_weights(tmp_path / "first" / WEIGHTS, [forward.initial(SMALL.hidden, 3)], {})
    still = dataclasses.replace(
        SMALL, start=start, imitation_epochs=0, reinforcement_epochs=1, reinforcement_rate=0.0
    )
    run(still, *problems, tmp_path / "still")
    (given,), (kept,) = (
        load_policy(str(tmp_path / n / WEIGHTS)).members for n in ("first", "still")
    )
    assert all(np.allclose(given[k], kept[k], rtol=1e-6) for k in given)
    run(dataclasses.replace(still, reinforcement_rate=1e-2), *problems, tmp_path / "on")
    (moved,) = load_policy(str(tmp_path / "on" / WEIGHTS)).members
    assert any(not np.allclose(given[k], moved[k]) for k in given)


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"members": 9}, "holds 2 networks"),
        ({"hidden": 8}, "networks of width 64"),
        ({"start": "", "imitation_epochs": 0}, "imitation_epochs=0"),
    ],
)
def test_weights_that_do_not_fit_are_one_sentence(tmp_path, wrong, says):
    problems = [example(s) for s in range(8)], [example(s) for s in range(100, 104)]
    settings = dict(start="learned", imitation_epochs=0, reinforcement_epochs=1, hidden=64)
    with pytest.raises(MeshwrightError, match=says):
        config = TrainConfig(**(settings | dict(members=1) | wrong))
        run(config, *problems, tmp_path)


def test_choices_are_compared_with_the_fastest_compiled(tmp_path, one_problem):
    keep(tmp_path, outcome(0, 1.0, 2.0), outcome(1, 1.1, 1.6), outcome(2, 1.5, 3.2))
    policy = load_policy("learned")
    found = compiled_report.choices(tmp_path, "x", {"before": policy, "after": policy})
    assert found["simulation"] == [2.0 / 1.6]
    assert found["corrected"] == found["simulation"]  # nothing was learned
    assert found["before"] == found["after"]
    assert found["before"][0] in (2.0 / 1.6, 1.0, 3.2 / 1.6)


def test_the_stage_is_kept_only_where_validation_plans_got_faster(
    tmp_path, one_problem, monkeypatch
):
    keep(tmp_path, outcome(0, 1.0, 2.0), outcome(1, 1.1, 1.6))
    policy = load_policy("learned")
    for ratio, kept in ((0.9, True), (1.1, False)):
        made = {b: [(1.0, ratio)] for b in compiled_report.BUDGETS}
        monkeypatch.setattr(compiled_report, "plans", lambda *_, made=made: made)
        summary = compiled_report.write(tmp_path, {"before": policy, "after": policy})
        assert summary["kept"] is kept
        text = compiled_report.section(str(tmp_path), tmp_path)
        assert ("not kept" in text) is not kept and f"{ratio:.3f}" in text
        assert (tmp_path / "compiler.png").stat().st_size > 0
        assert any(f"{ratio:.3f}" in line for line in compiled_report.lines(summary))


def test_an_interval_holds_its_mean():
    mean, low, high = compiled_report.interval([0.5, 1.0, 2.0])
    assert mean == pytest.approx(1.0) and low < mean < high
