"""`meshwright validate`: published runs in, predictions and their errors out."""

from __future__ import annotations

import csv
import json

import pytest

from cost_model.jobs import bands, constants, predict, runs, score
from graphs.errors import MeshwrightError
from placement.experiments import validate


@pytest.fixture(scope="module")
def shipped():
    return runs.read(runs.MEASURED_RUNS)


@pytest.fixture(scope="module")
def predictions(shipped):
    return predict.predict_runs(shipped.rows)


def _table(tmp_path, change=None, keep=lambda row: True, drop=()):
    with runs.MEASURED_RUNS.open(newline="") as file:
        reader = csv.DictReader(file)
        names = [n for n in reader.fieldnames or [] if n not in drop]
        rows = [row for row in reader if keep(row)]
    for row in rows:
        if change:
            change(row)
    path = tmp_path / "runs.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path, rows


def _lines(folder):
    with (folder / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_row_has_a_prediction_or_a_reason(shipped, predictions):
    assert len(predictions) == len(shipped.rows)
    for p in predictions:
        if p.step_time_s is None:
            assert p.run.reason, p.run.id
        else:
            assert 0 < p.p10_s < p.step_time_s < p.p90_s, p.run.id
            assert p.memory_gb > 0


def test_predictions_do_not_read_what_was_measured(tmp_path, predictions):
    outcome = (
        "step_time_s tokens_per_s_per_device tflops_per_device mfu_reported memory_gb_reported "
        "derived_step_time_s derived_tokens_per_s_per_device derived_tflops_6nd_per_device check"
    ).split()

    def blank(row):
        row.update(dict.fromkeys(outcome, ""))

    path, _ = _table(tmp_path, blank)
    blind = predict.predict_runs(runs.read(path).rows)
    assert [p.step_time_s for p in blind] == [p.step_time_s for p in predictions]
    assert [p.run.measured_step_time_s for p in blind] == [None] * len(blind)


def test_a_row_is_predicted_alone_as_in_its_table(tmp_path, predictions):
    path, _ = _table(tmp_path, keep=lambda row: row["id"] == "sc21-t1-145B")
    (alone,) = predict.predict_runs(runs.read(path).rows)
    together = next(p for p in predictions if p.run.id == "sc21-t1-145B")
    assert alone.step_time_s == pytest.approx(together.step_time_s, rel=1e-12)


def test_held_out_errors_meet_their_targets(predictions):
    summary = score.summary(predictions, constants.load().n_fitted, bands.load().tail)
    times = summary["step_time"]
    assert times["target_held_out"]["rows"] >= 30
    assert times["target_held_out"]["mean_abs_error"] <= 0.08
    assert times["megatron_papers"]["mean_abs_error"] <= 0.04
    assert summary["ranking"]["all"]["mean_regret"] <= 0.03
    assert 0.72 <= summary["bands"]["held_out"]["inside_band_of_other_sources"] <= 0.92
    assert len(summary["memory"]["out_of_memory"]["found"]) >= 3


def test_halves_share_no_source(shipped):
    def named(run):
        release = run.source if "Megatron-Bridge" not in run.source else None
        return release

    fitted = {named(r) for r in shipped.rows if r.fitted} - {None}
    held = {named(r) for r in shipped.rows if not r.fitted} - {None}
    assert fitted and held and not fitted & held
    share = sum(r.fitted for r in shipped.rows) / len(shipped.rows)
    assert 0.4 < share < 0.6


def test_command_writes_one_line_for_every_row(tmp_path, capsys):
    path, rows = _table(tmp_path, keep=lambda row: row["id"].startswith(("sc21", "titan", "nemo")))
    assert validate.main([str(path), f"out={tmp_path / 'out'}"]) == 0
    lines = _lines(tmp_path / "out")
    assert [line["id"] for line in lines] == [row["id"] for row in rows]
    assert list(lines[0]) == list(validate.COLUMNS)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["fitted_constants"] == constants.load().n_fitted
    assert (tmp_path / "out" / "step_time.png").stat().st_size > 1000
    assert "fitted constants" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("column", "text"),
    [
        ("n_layers", "eighty"),
        ("dp", "7"),
        ("tp", "0"),
        ("pp", "2.5"),
        ("hardware", "h9000"),
        ("dtype", "fp3"),
        ("seq_len", "-1"),
        ("recompute", "sometimes"),
        ("global_batch_seqs", "nan"),
    ],
)
def test_bad_cells_are_named_and_the_rest_is_done(tmp_path, capsys, column, text):
    def spoil(row):
        if row["id"] == "sc21-t1-18B":
            row[column] = text

    path, rows = _table(tmp_path, spoil, keep=lambda row: row["id"].startswith("sc21"))
    assert validate.main([str(path), f"out={tmp_path / 'out'}"]) == 1
    said = capsys.readouterr().err
    assert "sc21-t1-18B" in said and "line " in said
    by_id = {line["id"]: line for line in _lines(tmp_path / "out")}
    assert len(by_id) == len(rows)
    assert by_id["sc21-t1-18B"]["predicted_step_time_s"] == ""
    assert by_id["sc21-t1-18B"]["reason"]
    assert all(v["predicted_step_time_s"] for k, v in by_id.items() if k != "sc21-t1-18B")


def test_a_missing_column_is_named(tmp_path, capsys):
    path, rows = _table(tmp_path, keep=lambda row: row["id"].startswith("sc21"), drop=("vocab",))
    assert validate.main([str(path), f"out={tmp_path / 'out'}"]) == 1
    assert "vocab" in capsys.readouterr().err
    assert len(_lines(tmp_path / "out")) == len(rows)


def test_files_that_are_no_tables_of_runs_are_refused(tmp_path):
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    for path in (other, tmp_path / "absent.csv"):
        with pytest.raises(MeshwrightError):
            validate.main([str(path), f"out={tmp_path / 'out'}"])


def test_bands_cover_sources_that_did_not_calibrate_them():
    import numpy as np

    rng = np.random.default_rng(0)
    source = [f"s{i % 80}" for i in range(400)]
    shift = {s: rng.normal(0, 0.05) for s in sorted(set(source))}
    residual = np.array([shift[s] + rng.normal(0, 0.05) for s in source])
    found = bands.calibrate(residual, ["k"] * 400, source)
    low, high = found.by_kind["k"]
    fresh = rng.normal(0, 0.05, 4000) + rng.normal(0, 0.05, 4000)
    assert 0.75 < np.mean((fresh >= low) & (fresh <= high)) < 0.9
