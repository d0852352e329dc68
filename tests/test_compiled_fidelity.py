"""The cost model beside compiled steps: ranking, bands, records that cannot be used."""

from __future__ import annotations

import json
import pathlib

import pytest

from cost_model.step_bands import step_band
from graphs.errors import MeshwrightError
from placement.compiled_fidelity import Comparison, calibrate_bands, compare, summarize
from placement.suite_compiled import load_cases

RESULTS = pathlib.Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "compiled"


def comparison(case, optimizer, compiled, predicted, *, status="ok", predicted_bytes=1e9):
    return Comparison(
        case=case,
        optimizer=optimizer,
        status=status,
        compiled_s=compiled,
        compiled_compute_s=compiled,
        compiled_exposed_s=0.0,
        compiled_bytes=1e9,
        predicted_s=predicted,
        predicted_compute_s=predicted,
        predicted_exposed_s=0.0,
        predicted_bytes=predicted_bytes,
        available_bytes=16e9,
        compiled_collectives={"all-gather": 4e6},
        predicted_collectives={"all_gather": 5e6},
    )


@pytest.mark.parametrize("sign", [1, -1])
def test_the_order_of_predictions_decides_rank_correlation_and_regret(sign):
    compiled = [1.0, 2.0, 3.0]
    predicted = [0.5, 0.6, 0.7][::sign]
    rows = [comparison("a", str(k), c, p) for k, (c, p) in enumerate(zip(compiled, predicted))]
    found = summarize(rows)
    assert found["mean_spearman"] == pytest.approx(sign)
    assert found["mean_regret"] == pytest.approx(0.0 if sign > 0 else 2.0)
    assert found["collectives"]["rules"] == {
        "all_gather predicted": pytest.approx(15e6),
        "all_gather compiled": pytest.approx(12e6),
    }


def test_a_refused_plan_counts_only_where_it_was_predicted_to_fit():
    rows = [
        comparison("a", "plan", 1.0, 1.0),
        comparison("a", "zero1", None, 1.0, status="out_of_memory", predicted_bytes=2e9),
        comparison("a", "fsdp", None, 1.0, status="out_of_memory", predicted_bytes=17e9),
    ]
    found = summarize(rows)
    assert found["out_of_memory"] == 2
    assert found["out_of_memory_predicted_to_fit"] == ["a zero1"]
    assert found["rows"] == 1


def test_bands_hold_what_they_were_calibrated_on_and_are_wider_for_rules():
    rows = [comparison(f"case {k}", "plan", 1.0 + 0.01 * (k % 5), 1.0) for k in range(20)] + [
        comparison(f"case {k}", "fsdp", 1.0 + 0.2 * (k % 5), 1.0) for k in range(20)
    ]
    bands, inside = calibrate_bands(rows)
    assert 0.5 <= inside <= 1.0
    planned, left = bands.by_kind["planned"], bands.by_kind["left to XLA"]
    assert planned[1] - planned[0] < left[1] - left[0]


@pytest.mark.parametrize("family", ["tpu", "gpu"])
@pytest.mark.parametrize("pinned", [True, False])
def test_shipped_bands_are_ordered_and_reach_around_the_estimate(family, pinned):
    low, high = step_band(family, pinned)
    assert 0.3 < low < high < 4.0


def test_a_damaged_record_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "a.plan.json").write_text('{"case": "a"}')
    with pytest.raises(MeshwrightError, match="damaged"):
        compare(tmp_path, load_cases())


def test_a_record_predicts_its_row_again_and_a_stale_one_is_said_to_be(tmp_path):
    name = "small_roomy.plan.json"
    for kind in ("rows", "records"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / name).write_text((RESULTS / kind / name).read_text())
    compared, left_out = compare(tmp_path, load_cases())
    assert not left_out
    assert abs(compared[0].error) < 0.3
    record = json.loads((tmp_path / "records" / name).read_text())
    record["choices"] = record["choices"][:-1]
    (tmp_path / "records" / name).write_text(json.dumps(record))
    compared, left_out = compare(tmp_path, load_cases())
    assert not compared
    assert "decisions" in left_out[0]
