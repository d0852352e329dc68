"""The experts suite: recipes as plans of the same space."""

from __future__ import annotations

import csv
import json

import pytest

from graphs.errors import MeshwrightError
from placement.jobs import experts
from placement.jobs.cases import HAND_TUNED, read_cases


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    wanted = (
        "v6e-l8b-16 v5p-dsv3-1024 sc21-gpt-18B nemo-h100-gpt3175b-bf16-128-8 "
        "mb-25.11-llama3_8b-b200-8-fp8-cs-70 nemo-longseq-l3-8b-8k ax-fuji70b-trn2 "
        "llama3-405b-8k-16384"
    ).split()
    with HAND_TUNED.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = [r for r in reader if r["case_id"] in wanted]
    path = folder / "cases.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, reader.fieldnames or [])
        writer.writeheader()
        writer.writerows(rows)
    assert experts.evaluate(str(path), str(folder / "out"), 10.0) == 0
    with (folder / "out" / "experts.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    return rows, lines, folder / "out"


def test_every_case_has_a_line_in_order(sample):
    rows, lines, _ = sample
    assert [line["case_id"] for line in lines] == [row["case_id"] for row in rows]
    assert list(lines[0]) == list(experts.COLUMNS)


def test_plans_are_at_least_as_fast_as_experts_and_bounded(sample):
    _, lines, _ = sample
    planned = [line for line in lines if line["plan_step_time_s"]]
    assert len(planned) >= 5
    for line in planned:
        plan = float(line["plan_step_time_s"])
        assert plan <= float(line["expert_step_time_s"]) * (1 + 1e-6), line["case_id"]
        assert float(line["lower_bound_s"]) <= plan * (1 + 1e-6)
        assert float(line["planning_time_s"]) < 30


def test_cases_that_cannot_be_scored_say_why(sample):
    _, lines, _ = sample
    by_id = {line["case_id"]: line for line in lines}
    assert "mesh check" in by_id["nemo-longseq-l3-8b-8k"]["reason"]
    assert by_id["ax-fuji70b-trn2"]["reason"]


def test_plans_keep_the_job(sample):
    rows, _, out = sample
    plans = json.loads((out / "plans.json").read_text())
    by_id = {row["case_id"]: row for row in rows}
    for case_id, plan in plans.items():
        d, row = plan["degrees"], by_id[case_id]
        assert d["dp"] * d["tp"] * d["pp"] * d["cp"] == float(row["n_devices"])
        assert float(row["global_batch_seqs"]) % d["dp"] == 0
        assert plan["memory_gib"] <= plan["capacity_gib"] or plan["remat"] == "as given"


def test_shipped_cases_are_read_whole():
    cases = read_cases(None)
    assert len(cases) > 280
    scored = [c for c in cases if not c.reason]
    assert len(scored) > 180
    for case in cases:
        assert (case.run.record is not None) or case.reason, case.case_id


def test_a_file_without_the_columns_is_refused(tmp_path):
    path = tmp_path / "cases.csv"
    path.write_text("case_id,model\nx,y\n")
    with pytest.raises(MeshwrightError, match="column"):
        read_cases(path)
