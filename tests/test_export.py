"""Exports: what an engineer would paste, read back; what a target cannot say is listed."""

from __future__ import annotations

import csv
import json
import pathlib
from importlib.resources import files

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphs.errors import MeshwrightError
from placement import export
from placement.experiments import cli
from placement.export import axis_rules
from placement.export.layout import changed

GOLDEN = json.loads((pathlib.Path(__file__).parent / "data" / "maxtext_axes.json").read_text())
HOME = {
    "maxtext": "maxtext",
    "Megatron": "megatron",
    "NeMo 2": "nemo",
    "torchtitan": "torchtitan",
    "axlearn": "axlearn",
}
"""A source's first words, and the exporter of that framework."""


def _cases() -> dict[str, tuple[str, export.JobLayout]]:
    text = (files("cost_model") / "data" / "hand_tuned_cases.csv").read_text(encoding="utf-8")
    found = {}
    for row in csv.DictReader(text.splitlines()):
        try:
            found[row["case_id"]] = (row["family"], export.layout_of_case(row))
        except MeshwrightError:
            continue
    return found


CASES = _cases()


def test_nearly_every_expert_row_is_a_layout():
    assert len(CASES) >= 260


@pytest.mark.parametrize("name", export.target_names())
def test_every_expert_layout_round_trips_but_for_what_is_listed(name):
    target = export.target(name)
    for case_id, (_, layout) in CASES.items():
        made = target.export(layout)
        back = target.read(made.text)
        lost = {x.field for x in made.lost}
        assert set(changed(layout, back)) == lost, case_id
        assert all(x.why and "\n" not in x.why for x in made.lost)
        # What the text says is itself expressible: a second trip changes nothing.
        again = target.export(back)
        assert again.lost == (), (case_id, again.lost)


@pytest.mark.parametrize(("family", "name"), HOME.items())
def test_a_framework_expresses_its_own_degrees_and_batch_whole(family, name):
    target, seen = export.target(name), 0
    for case_id, (source, layout) in CASES.items():
        if source.startswith(family):
            seen += 1
            lost = {x.field for x in target.export(layout).lost}
            assert lost <= {"remat", "remat_detail", "precision"}, (case_id, lost)
    assert seen >= 15


@pytest.mark.parametrize("name", [n for n in export.target_names() if n != "logical_axis_rules"])
def test_at_least_twelve_expert_layouts_lose_nothing(name):
    target = export.target(name)
    whole = [c for c, (_, layout) in CASES.items() if not target.export(layout).lost]
    assert len(whole) >= 12


def test_twenty_expert_layouts_of_every_large_source_lose_nothing():
    for name, least in (("maxtext", 20), ("megatron", 20), ("nemo", 20), ("json", 260)):
        target = export.target(name)
        whole = [c for c, (_, layout) in CASES.items() if not target.export(layout).lost]
        assert len(whole) >= least, name


degrees = st.sampled_from([1, 2, 4, 8])


@st.composite
def layouts(draw) -> export.JobLayout:
    axes = {
        name: draw(degrees) for name in ("data", "fsdp", "tensor", "context", "pipeline", "expert")
    }
    total = 1
    for size in axes.values():
        total *= size
    carved = draw(st.booleans())
    if carved:
        total //= axes["expert"]
        ranks = axes["data"] * axes["fsdp"] * axes["context"] * axes["tensor"]
        if ranks % axes["expert"]:
            total, axes["expert"], carved = total, 1, False
    micro, accumulation = draw(degrees), draw(degrees)
    own = 1 if carved else axes["expert"]
    return export.JobLayout(
        n_devices=total,
        **axes,
        expert_carved=carved,
        sequence_parallel=draw(st.booleans()),
        zero_stage=draw(st.integers(0, 3)),
        virtual_pipeline=draw(degrees),
        seq_len=draw(st.sampled_from([None, 2048, 8192])),
        global_batch=micro * accumulation * axes["data"] * axes["fsdp"] * own,
        micro_batch=micro,
        grad_accum=accumulation,
        remat=draw(st.sampled_from(["none", "dots", "attention", "full"])),
        precision=draw(st.sampled_from(["bf16", "fp16", "fp8", "mxfp8"])),
    )


@settings(max_examples=60, deadline=None)
@given(layouts(), st.sampled_from(export.target_names()))
def test_any_layout_can_be_written_and_the_text_stands_for_itself(layout, name):
    target = export.target(name)
    made = target.export(layout)
    back = target.read(made.text)
    assert back.product() == back.n_devices
    assert target.export(back).lost == ()
    for x in made.lost:
        assert getattr(layout, x.field) == x.wanted
        assert getattr(back, x.field) == x.written


@pytest.mark.parametrize("model", GOLDEN["models"], ids=lambda m: m["name"])
def test_axis_rules_shard_as_maxtexts_own_golden_files(model):
    """The rules for MaxText's mesh give, tensor by tensor, the specs that MaxText recorded."""
    mesh = dict.fromkeys(axis_rules.AXES, 1) | model["mesh"]
    rules = dict(axis_rules.rules(mesh, sequence=False))
    for tensor in model["tensors"]:
        taken: set[str] = set()
        for name, axes in zip(tensor["logical"], tensor["axes"]):
            # A rule gives its axes to the first dimension that asks, as flax resolves them.
            free = [a for a in rules.get(name, []) if a not in taken]
            taken |= set(free)
            assert free == axes, (tensor["logical"], name)


def test_maxtext_file_has_the_degrees_of_its_golden_meshes():
    for model in GOLDEN["models"]:
        sizes = model["mesh"]
        total = 1
        for size in sizes.values():
            total *= size
        text = export.target("maxtext").write(
            export.JobLayout(n_devices=total, **sizes, zero_stage=3)
        )
        for axis, size in sizes.items():
            assert f"ici_{axis}_parallelism: {size}\n" in text


def test_bad_texts_get_one_sentence():
    for name, text in (
        ("maxtext", "ici_fsdp_parallelism: -1"),
        ("maxtext", "["),
        ("megatron", "python pretrain_gpt.py"),
        ("megatron", "torchrun --nnodes=1 --nproc_per_node=8 --tensor-model-parallel-size 3"),
        ("nemo", ""),
        ("torchtitan", "[training]"),
        ("torchtitan", "[parallelism]\ndata_parallel_shard_degree = -1"),
        ("axlearn", "mesh_shape_from_axes(data=-1)"),
        ("axlearn", "x"),
        ("levanter", "trainer: {}"),
        ("logical_axis_rules", "{}"),
        ("json", '{"schema": 99}'),
        ("json", "{"),
    ):
        with pytest.raises(MeshwrightError) as caught:
            export.target(name).read(text)
        assert "\n\n" not in str(caught.value)


def test_degrees_that_do_not_multiply_are_refused():
    with pytest.raises(MeshwrightError, match="multiply to 8 and the job has 16"):
        export.JobLayout(n_devices=16, data=8)


def test_command_line_writes_and_reads_back(tmp_path, capsys):
    script, layout = tmp_path / "job.sh", tmp_path / "layout.json"
    case = "iron-dsv3-128"
    assert cli.main(["export", "--case", case, "--to", "megatron", "--out", str(script)]) == 0
    assert "not expressed: remat" in capsys.readouterr().err
    assert cli.main(["import", str(script), "--from", "megatron", "--out", str(layout)]) == 0
    assert export.target("json").read(layout.read_text()).fsdp == CASES[case][1].fsdp
    assert cli.main(["export", "--case", "nonsense", "--to", "megatron"]) == 1
    assert cli.main(["export", "--case", case, "--to", "nonsense"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and all(e.startswith("error: ") for e in errors)
