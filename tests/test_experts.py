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
        "llama3-405b-8k-16384 mbr-qwen3_235b_a22b-gb300-64-bf16 mbr-llama3_8b-h100-8-bf16"
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
    assert "mesh check" in by_id["mbr-qwen3_235b_a22b-gb300-64-bf16"]["reason"]
    assert by_id["ax-fuji70b-trn2"]["reason"]
    for case_id in ("mbr-qwen3_235b_a22b-gb300-64-bf16", "ax-fuji70b-trn2"):
        assert not by_id[case_id]["expert_step_time_s"]


def test_what_is_taken_from_defaults_is_said(sample):
    _, lines, _ = sample
    by_id = {line["case_id"]: line for line in lines}
    for case_id, said in (
        ("nemo-longseq-l3-8b-8k", "dp 8, for the printed one"),
        ("mbr-llama3_8b-h100-8-bf16", "seq_len 8192, the default"),
    ):
        assert said in by_id[case_id]["reason"] and by_id[case_id]["plan_step_time_s"]


def test_full_recomputation_of_some_layers_lies_between_none_and_all():
    """One recipe recomputes 20 of 80 layers: it takes more time and less memory than none."""
    import numpy as np

    from cost_model.jobs import constants
    from cost_model.jobs.memory import memory
    from cost_model.jobs.runs import jobs_of
    from cost_model.jobs.step import step_time

    case = next(c for c in read_cases(None) if c.case_id == "nemo-gb200-llama370b-bf16-64-11")
    some = jobs_of([case.run])
    shares = {name: np.unique(getattr(some, name)) for name in vars(some) if "remat_" in name}
    assert all(share == 0.25 for share in shares.values()), shares
    none, every = (some.replace(**dict.fromkeys(shares, x)) for x in (0.0, 1.0))
    loaded = constants.load()
    times = [float(step_time(job, loaded).step_time_s[0]) for job in (none, some, every)]
    peaks = [float(memory(job, loaded).peak_bytes[0]) for job in (none, some, every)]
    assert times == sorted(times) and peaks == sorted(peaks, reverse=True)


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
