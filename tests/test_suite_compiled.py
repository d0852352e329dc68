"""The compiled suite: its cases exist, it resumes, and its ratios are what they say."""

import csv
import dataclasses
import json

import pytest

from cost_model.cluster import parse_cluster
from graphs.errors import MeshwrightError
from graphs.zoo import ModelConfig, build_train_step
from placement import suite_compiled as suite
from placement.suite_rows import Row, summarize

TIMES = {"plan": 0.8, "autosharding": 1.6, "fsdp": 1.0, "megatron": 2.0}


def row(case, optimizer, *, status="ok", step_time_s=None):
    blank = {f.name: None for f in dataclasses.fields(Row)}
    blank |= dict(case=case, cluster="v5e:4x4", optimizer=optimizer, status=status, message="")
    blank |= dict(mesh_shape="data=16", kernels=1, unknown_kernels=0, full_rematerializations=0)
    blank |= dict(versions="jax==1", step_time_s=step_time_s)
    return Row(**blank)


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    """No planning and no compiling; what was asked for is recorded."""
    monkeypatch.setenv("MESHWRIGHT_CACHE_DIR", str(tmp_path / "cache"))
    asked = []

    def prepare(name, case, which, **kwargs):
        def compile_it():
            asked.append((name, which))
            return row(name, which, step_time_s=TIMES[which])

        return compile_it

    monkeypatch.setattr(suite, "_prepare", prepare)
    return asked


def test_the_cases_are_what_the_suite_promises():
    cases = suite.load_cases()
    assert len(cases) >= 14
    devices = {parse_cluster(c["cluster"]).device.name for c in cases.values()}
    assert devices == {"v5e", "v6e", "v5p"}
    sizes = [parse_cluster(c["cluster"]).n_devices for c in cases.values()]
    assert (min(sizes), max(sizes)) == (4, 256)
    configs = {n: ModelConfig(name=n, **c["model"]) for n, c in cases.items()}
    assert any(c.n_experts for c in configs.values())
    assert any(c.tied_embeddings for c in configs.values())
    assert any(1 < c.n_kv_heads < c.n_heads for c in configs.values())
    scanned = {c["step"].get("scan", True) for c in cases.values()}
    assert scanned == {True, False}


def test_it_goes_on_where_it_stopped(pretend, tmp_path):
    out = str(tmp_path / "out")
    arguments = dict(out=out, cases=["public_dense"], optimizers=list(TIMES))
    suite.evaluate(**{**arguments, "optimizers": ["plan", "fsdp"]})
    assert pretend == [("public_dense", "plan"), ("public_dense", "fsdp")]
    assert suite.evaluate(**arguments) == 0
    assert pretend[2:] == [("public_dense", "autosharding"), ("public_dense", "megatron")]
    suite.evaluate(**arguments, redo=["plan"])
    assert pretend[4:] == [("public_dense", "plan")]


def test_results_are_written_where_asked(pretend, tmp_path):
    results = tmp_path / "results"
    suite.evaluate(
        out=str(tmp_path / "out"),
        cases=["public_dense"],
        optimizers=list(TIMES),
        results=str(results),
    )
    with (results / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [r["optimizer"] for r in rows] == ["plan", "autosharding", "fsdp", "megatron"]
    summary = json.loads((results / "summary.json").read_text())
    assert summary["cases"]["public_dense"]["best_rule"] == "fsdp"
    assert summary["geometric_mean_against_rules"] == pytest.approx(0.8)
    assert summary["geometric_mean_against_peer"] == pytest.approx(0.5)


def test_means_are_geometric_over_the_cases_that_have_both():
    rows = [
        row("a", "plan", step_time_s=1.0),
        row("a", "fsdp", step_time_s=2.0),
        row("b", "plan", step_time_s=4.0),
        row("b", "megatron", step_time_s=2.0),
        row("c", "plan", step_time_s=1.0),
        row("c", "fsdp", status="out_of_memory"),
        row("c", "autosharding", status="error"),
    ]
    summary = summarize(rows)
    assert summary["geometric_mean_against_rules"] == pytest.approx(1.0)
    assert summary["worst_against_rules"] == pytest.approx(2.0)
    assert summary["geometric_mean_against_peer"] is None
    assert summary["cases"]["c"]["best_rule"] is None
    assert summary["cases"]["c"]["peer_status"] == "error"


def test_rules_leave_operands_to_the_compiler_unless_their_row_pins_them():
    model = dict(n_layers=1, d_model=256, n_heads=4, n_kv_heads=4, head_dim=64, d_ff=512)
    config = ModelConfig(name="small", **model, vocab_size=1024, attention="mha")
    program = build_train_step(config, global_batch=16, seq_len=64)
    rule, _ = suite._plan("v5e:2x2", program, "fsdp", None, 5.0)
    pinned, _ = suite._plan("v5e:2x2", program, "fsdp@pinned", None, 5.0)
    assert rule.optimizer == pinned.optimizer == "fsdp"
    assert not rule.operands
    assert pinned.operands
    assert pinned.assignment == rule.assignment


def test_bad_requests_are_one_sentence(pretend, tmp_path):
    with pytest.raises(MeshwrightError, match="no case 'nothing'; use one of public_dense"):
        suite.evaluate(out=str(tmp_path), cases=["nothing"])
    with pytest.raises(MeshwrightError, match="cannot be read"):
        suite.load_cases(str(tmp_path / "none.yaml"))
    (tmp_path / "list.yaml").write_text("[1, 2]")
    with pytest.raises(MeshwrightError, match="must map names"):
        suite.load_cases(str(tmp_path / "list.yaml"))
