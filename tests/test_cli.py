"""The command line: every verb explains itself, every mistake gets one sentence."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphs.errors import MeshwrightError
from placement.experiments import _hydra, cli


def run(*argv: str, env: dict[str, str] | None = None, cwd=None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "placement.experiments.cli", *argv],
        capture_output=True,
        text=True,
        timeout=120,
        env=env,
        cwd=cwd,
        check=False,
    )


def only_sentence(text: str) -> str:
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    assert lines[0].startswith("error: ")
    return lines[0]


def test_version_and_usage(capsys):
    assert cli.main(["--version"]) == 0
    assert re.fullmatch(r"meshwright \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)
    assert cli.main(["--help"]) == 0
    usage = capsys.readouterr().out
    assert all(f"  {verb.name} " in usage for verb in cli.VERBS)
    assert cli.main([]) == 2


@pytest.mark.parametrize("verb", [v.name for v in cli.VERBS])
def test_every_verb_explains_itself(verb, capsys):
    assert cli.main([verb, "--help"]) == 0
    assert f"meshwright {verb}" in capsys.readouterr().out


def test_unknown_verb_suggests_the_nearest(capsys):
    assert cli.main(["pln", "cluster=v5e:16x16"]) == 1
    assert "did you mean 'plan'?" in only_sentence(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["plan", "model=llama3_8x"], "did you mean 'llama3_8b'?"),
        (["plan", "cluster=v5f:16x16"], "v5e"),
        (["plan", "cluster=v5e:3x7"], "v5e"),
        (["plan", "cluster=v5e"], "v5e:16x16"),
        (["plan", "trian.global_batch=8"], "did you mean 'train'?"),
        (["plan", "train.globl_batch=8"], "did you mean 'train.global_batch'?"),
        (["plan", "train.global_batch=many"], "train.global_batch"),
        (["plan", "optimizer=serach"], "did you mean 'search'?"),
        (["plan", "--report"], "key=value"),
        (["plan", "report"], "key=value"),
        (["plan", "model=[llama"], "cannot be read"),
        (["plan", "module=nowhere.at.all:build"], "cannot be imported"),
        (["plan", "module=json"], "module=package.module:function"),
        (["plan", "module=json:nothing"], "no function 'nothing'"),
        (["plan", "module=json:dumps"], "json:dumps"),
        (["verify"], "plan"),
        (["verify", "no_such_plan.json"], "no_such_plan.json"),
        (["report", "no_such_plan.json"], "no_such_plan.json"),
        (["evaluate"], "suite="),
        (["evaluate", "suite=nonsense"], "nonsense"),
        (["devices", "v99"], "v5e"),
        (["export", "--to", "maxtext"], "plan file or --case"),
    ],
)
def test_mistakes_get_one_sentence(argv, says, capsys):
    assert cli.main(argv) == 1
    captured = capsys.readouterr()
    assert says in only_sentence(captured.err)
    assert "Traceback" not in captured.err


def test_traceback_only_when_asked_for(capsys):
    with pytest.raises(MeshwrightError):
        cli.main(["plan", "model=nothing", "--traceback"])
    assert cli.main(["plan", "model=nothing"]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_the_environment_can_ask_for_the_traceback(monkeypatch):
    monkeypatch.setenv("MESHWRIGHT_TRACEBACK", "1")
    with pytest.raises(MeshwrightError):
        cli.main(["plan", "model=nothing"])


def test_a_mistake_leaves_the_process_with_status_one():
    done = run("plan", "model=nothing")
    assert done.returncode == 1
    only_sentence(done.stderr)
    assert done.stdout == ""


def test_a_closed_pipe_is_no_crash():
    done = subprocess.run(
        f"{sys.executable} -m placement.experiments.cli --help | head -n 1",
        shell=True,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "notation", ["v5e:16x16", "4*v5e:16x16", "v5p:8x8x16", "h100:8x64", "cpu:8"]
)
def test_a_cluster_is_written_in_its_notation(notation):
    config = _hydra.compose("plan", [f"cluster={notation}"])
    assert _hydra.instantiate(config.cluster).notation == notation


def test_values_reach_the_configuration():
    config = _hydra.compose(
        "plan", ["mesh_shape={data:16,model:4}", "train.global_batch=64", "verify=true"]
    )
    assert _hydra.plain(config.mesh_shape) == {"data": 16, "model": 4}
    assert config.train.global_batch == 64
    assert config.verify is True


@settings(max_examples=80, deadline=None)
@given(st.text(max_size=30), st.sampled_from(["", "model=", "train.", "cluster=", "seed="]))
def test_no_override_crashes(text, prefix):
    """Any text is either an override or a mistake with a sentence."""
    try:
        _hydra.compose("plan", [prefix + text])
    except MeshwrightError as error:
        assert str(error)
