"""Plan files: read without JAX, refused in one sentence when damaged, exported and drawn."""

from __future__ import annotations

import copy
import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import placement
from graphs.errors import MeshwrightError
from placement import export
from placement.experiments import cli
from placement.export.from_plan import layout_of_plan
from placement.report import render, report_data


def train_step(params, batch):
    def loss(params):
        hidden = jax.nn.relu(batch @ params["mlp"]["up"])
        return jnp.mean((hidden @ params["mlp"]["down"]) ** 2)

    return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params))


ARGUMENTS = (
    {
        "mlp": {
            "up": jax.ShapeDtypeStruct((1024, 4096), jnp.float32),
            "down": jax.ShapeDtypeStruct((4096, 1024), jnp.float32),
        }
    },
    jax.ShapeDtypeStruct((256, 1024), jnp.float32),
)


@pytest.fixture(scope="module")
def plan():
    return placement.optimize(
        train_step,
        *ARGUMENTS,
        cluster="v5e:2x2",
        optimizer="fsdp",
        donate_argnums=(0,),
        time_limit_s=2.0,
    )


@pytest.fixture(scope="module")
def content(plan, tmp_path_factory) -> dict:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    plan.save(path)
    return json.loads(path.read_text())


def test_it_loads_where_there_is_no_jax(content, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(content))
    script = (
        "import sys; sys.modules['jax'] = None\n"
        "import placement\n"
        f"plan = placement.Plan.load({str(path)!r})\n"
        "print(plan.explain()); print(plan.estimate.step_time_s)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) > 0


def test_saving_and_loading_keep_everything(plan, tmp_path):
    path = tmp_path / "plan.json"
    plan.save(path)
    again = placement.Plan.load(path)
    assert again == plan
    assert again.bind(train_step, *ARGUMENTS).in_specs == plan.in_specs


def test_copies_are_kept_and_older_files_have_none(plan, content, tmp_path):
    shared = {(2, 5): (("data",), ()), (7, 5): ((), ("data", "model"))}
    path = dataclasses.replace(plan, copies=shared).save(tmp_path / "plan.json")
    assert placement.Plan.load(path).copies == shared
    older = {k: v for k, v in content.items() if k != "copies"}
    path.write_text(json.dumps(older))
    assert placement.Plan.load(path).copies == {}


def _places(node, path=()):
    """Every key and index of a JSON document."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from _places(value, (*path, key))


damage = st.sampled_from([None, "x", -1, 1.5, [], {}, True, "delete", [[[]]], "v5e:16x16"])


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_damaged_file_loads_or_gets_one_sentence(content, tmp_path, data):
    changed = copy.deepcopy(content)
    changed["timeline"], changed["alternatives"] = changed["timeline"][:2], []
    place = data.draw(st.sampled_from(sorted(_places(changed), key=repr)))
    node = changed
    for key in place[:-1]:
        node = node[key]
    value = data.draw(damage)
    if value == "delete":
        del node[place[-1]]
    else:
        node[place[-1]] = value
    path = tmp_path / "damaged.json"
    path.write_text(json.dumps(changed))
    try:
        placement.Plan.load(path)
    except MeshwrightError as error:
        assert str(error) and "Traceback" not in str(error)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(share=st.floats(0, 0.999), junk=st.binary(max_size=8))
def test_a_truncated_file_is_refused(content, tmp_path, share, junk):
    whole = json.dumps(content).encode()
    path = tmp_path / "short.json"
    path.write_bytes(whole[: int(share * len(whole))] + junk)
    with pytest.raises(MeshwrightError):
        placement.Plan.load(path)


def test_a_newer_schema_is_refused(content, tmp_path):
    path = tmp_path / "newer.json"
    path.write_text(json.dumps(content | {"schema_version": content["schema_version"] + 1}))
    with pytest.raises(MeshwrightError, match="schema version"):
        placement.Plan.load(path)


def test_the_layout_of_a_fully_sharded_plan(plan):
    layout, notes = layout_of_plan(plan)
    assert (layout.n_devices, layout.fsdp, layout.zero_stage) == (4, 4, 3)
    assert layout.global_batch == 256
    for name in ("maxtext", "torchtitan", "axlearn", "levanter"):
        made = export.target(name).export(layout)
        assert export.target(name).read(made.text).fsdp == 4
    assert all("\n" not in note for note in notes)


def test_every_leaf_is_on_the_page(plan):
    data = report_data(plan)
    assert len(data.tensors) == len(plan.inputs)
    assert sum(t.bytes_total for t in data.tensors) == 2 * 1024 * 4096 * 4 + 256 * 1024 * 4
    up = next(t for t in data.tensors if t.name.endswith("mlp/up"))
    assert up.kind == "parameter" and up.bytes_per_device == up.bytes_total // 4
    page = render(data)
    assert all(t.name in page for t in data.tensors)


def test_a_plan_writes_its_own_page(plan, tmp_path):
    path = plan.report(tmp_path / "report.html")
    assert pathlib.Path(path).read_text(encoding="utf-8").startswith("<!doctype html>")


def test_verify_needs_to_know_how_the_step_is_built(content, tmp_path, capsys):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(content))
    assert cli.main(["verify", str(path)]) == 1
    assert "does not say how its step is built" in capsys.readouterr().err


def test_a_read_only_folder_gets_one_sentence(plan, tmp_path, capsys):
    blocked = pathlib.Path(tmp_path / "file")
    blocked.write_text("")
    with pytest.raises((MeshwrightError, OSError)):
        plan.save(blocked / "plan.json")
