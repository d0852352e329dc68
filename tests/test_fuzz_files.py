"""Damaged device files, tables and instances: read as what they say, or refused in one sentence."""

from __future__ import annotations

import copy
import csv
import importlib.resources
import io
import json
import pathlib

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cost_model import energy_runs, iopddl
from cost_model.calibration import fit
from cost_model.device import parse_device
from cost_model.jobs import runs
from graphs.errors import MeshwrightError
from placement import export
from placement.jobs import cases
from placement.solver import suite

DATA = pathlib.Path(__file__).parent / "data" / "iopddl"
PACKAGE = importlib.resources.files("cost_model")
steadily = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
values = st.one_of(
    st.sampled_from([None, "", "x", True, float("nan"), float("inf"), "9" * 400]),
    st.sampled_from(["[]", "{}", "[[]]"]).map(json.loads),
    st.integers(-(10**25), 10**25),
    st.floats(allow_nan=False),
    st.text(max_size=6),
)


def is_sentence(error: MeshwrightError) -> bool:
    text = str(error)
    return bool(text) and "\n" not in text and "Traceback" not in text


def places(node, path=()):
    """Every key and index of a document."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def damaged(document, data):
    """The document with one to three of its values changed or gone."""
    changed = copy.deepcopy(document)
    for _ in range(data.draw(st.integers(1, 3))):
        all_places = sorted(places(changed), key=repr)
        if not all_places:
            return changed
        *path, last = data.draw(st.sampled_from(all_places))
        node = changed
        for key in path:
            node = node[key]
        if data.draw(st.booleans()):
            node[last] = data.draw(values)
        else:
            del node[last]
    return changed


@steadily
@given(name=st.sampled_from(["v5e", "h100", "cpu"]), data=st.data())
def test_device_files(name, data):
    document = yaml.safe_load((PACKAGE / "devices" / f"{name}.yaml").read_text())
    try:
        device = parse_device(yaml.safe_dump(damaged(document, data)), "mine")
    except MeshwrightError as error:
        assert is_sentence(error)
    else:
        device.validate()


@steadily
@given(st.text(max_size=60))
def test_any_text_as_a_device_file(text):
    with pytest.raises(MeshwrightError) as caught:
        parse_device(text, "mine")
    assert is_sentence(caught.value)


@steadily
@given(st.data())
def test_instances(data):
    document = json.loads((DATA / "example.json").read_text())
    try:
        problem = iopddl.parse(damaged(document, data), name="damaged")
    except MeshwrightError as error:
        assert is_sentence(error)
    else:
        assert problem.n_nodes >= 1
        assert not np.isnan(problem.cost(np.zeros(problem.n_nodes, np.int64)))


@steadily
@given(junk=st.binary(max_size=40), share=st.floats(0, 1), suffix=st.sampled_from(["", ".gz"]))
def test_cut_and_scribbled_instances(junk, share, suffix, tmp_path):
    name = "G.json.gz" if suffix else "example.json"
    whole = (DATA / name).read_bytes()
    cut = int(share * len(whole))
    path = tmp_path / f"x.json{suffix}"
    path.write_bytes(whole[:cut] + junk + whole[cut + len(junk) :])
    try:
        iopddl.read(path)
    except MeshwrightError as error:
        assert is_sentence(error)


def table(name: str, rows: int) -> list[list[str]]:
    text = (PACKAGE / "data" / name).read_text(encoding="utf-8")
    return list(csv.reader(io.StringIO(text)))[: rows + 1]


def scribbled(rows: list[list[str]], data) -> bytes:
    """The table with cells overwritten, columns lost, and now and then bytes that are no text."""
    rows = copy.deepcopy(rows)
    for _ in range(data.draw(st.integers(1, 4))):
        row = data.draw(st.integers(0, len(rows) - 1))
        column = data.draw(st.integers(0, len(rows[row]) - 1)) if rows[row] else 0
        if data.draw(st.booleans()) and rows[row]:
            rows[row][column] = str(data.draw(values))
        else:
            del rows[row][column:]
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode("utf-8", "surrogatepass") + data.draw(st.binary(max_size=4))


TABLES = {
    "measured_runs.csv": runs.read,
    "hand_tuned_cases.csv": cases.read_cases,
    "energy.csv": energy_runs.read,
}


@pytest.mark.parametrize("name", TABLES)
@steadily
@given(data=st.data())
def test_tables(name, data, tmp_path):
    path = tmp_path / name
    path.write_bytes(scribbled(table(name, 6), data))
    try:
        TABLES[name](path)
    except MeshwrightError as error:
        assert is_sentence(error)


@steadily
@given(data=st.data())
def test_profiles(data):
    first, *rest = (PACKAGE / "calibration" / "v5e.csv").read_text().splitlines()[:8]
    body = scribbled(list(csv.reader(rest)), data).decode("utf-8", "replace")
    try:
        fit.read_profile(f"{first}\n{body}", 1e9)
    except MeshwrightError as error:
        assert is_sentence(error)


@steadily
@given(data=st.data())
def test_reference_files_of_a_suite(data, tmp_path):
    rows = [
        "instance,timeout_s,contest_winner,contest_best,xla_production,lower_bound".split(","),
        "example,1,340,340,,300".split(","),
    ]
    (tmp_path / "reference.csv").write_bytes(scribbled(rows, data))
    try:
        suite.evaluate(str(tmp_path))
    except MeshwrightError as error:
        assert is_sentence(error)


@steadily
@given(data=st.data())
def test_expert_rows(data):
    header, *rows = table("hand_tuned_cases.csv", 12)
    row = dict(zip(header, data.draw(st.sampled_from(rows))))
    for key in data.draw(st.lists(st.sampled_from(header), max_size=3)):
        row[key] = data.draw(st.one_of(st.text(max_size=6), values.map(str)))
    for key in data.draw(st.lists(st.sampled_from(header), max_size=2)):
        row.pop(key, None)
    try:
        layout = export.layout_of_case(row)
    except MeshwrightError as error:
        assert is_sentence(error)
    else:
        assert layout.product() == layout.n_devices


@steadily
@given(
    name=st.sampled_from(export.target_names()),
    text=st.text(max_size=60),
    cut=st.floats(0, 1),
    data=st.data(),
)
def test_flags_of_other_frameworks(name, text, cut, data):
    """Text written by an exporter, cut and scribbled into, is read or refused."""
    layout = export.JobLayout(n_devices=16, fsdp=4, tensor=4, zero_stage=3, global_batch=32)
    whole = export.target(name).export(layout).text
    at = int(cut * len(whole))
    for given_text in (text, whole[:at] + text + whole[at + len(text) :]):
        try:
            back = export.target(name).read(given_text)
        except MeshwrightError as error:
            assert "Traceback" not in str(error)
        else:
            assert back.product() == back.n_devices
