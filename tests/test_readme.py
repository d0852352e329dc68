"""The README says what is so: its commands exist and its code runs."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from run_document import blocks

from placement.experiments import _hydra, cli

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
COMMANDS = [
    line.split("#")[0].strip()
    for block in blocks(README)
    if block.language == "sh"
    for line in block.code.splitlines()
    if line.strip()
]


def test_the_first_screen_says_what_it_is_and_how_to_start():
    first_screen = README.read_text(encoding="utf-8").splitlines()[:30]
    assert first_screen[0] == "# Meshwright"
    assert any(line.startswith("make plan") for line in first_screen)
    assert any(line.startswith("make test") for line in first_screen)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_targets_exist():
    for command in COMMANDS:
        if command.startswith("make "):
            dry = ["make", "-n", *command.split()[1:]]
            done = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr


def test_make_plan_asks_for_what_the_readme_promises():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = makefile.split("plan: $(PLANNING)\n")[1].split("\n\n")[0]
    for part in (
        "model=llama3_8b",
        "cluster=v5e:16x16",
        "train.seq_len=8192",
        "verify=true",
        "baselines=true",
        "out=out/plan.json",
        "report=out/report.html",
    ):
        assert part in recipe


def test_the_table_of_verbs_is_the_programs():
    text = README.read_text(encoding="utf-8")
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", text, re.MULTILINE)
    named = {verb for row in rows for verb in re.findall(r"`(\w+)`", row)}
    assert named == {verb.name for verb in cli.VERBS}


def test_its_code_and_commands_run(tmp_path):
    """All but the make targets, which tests cannot run inside themselves."""
    document = tmp_path / "README.md"
    kept = [b for b in blocks(README) if not b.code.startswith("make ")]
    assert len(kept) >= 2
    document.write_text(
        "\n".join(f"```{b.language}\n{b.code}```\n" for b in kept), encoding="utf-8"
    )
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "run_document.py"), str(document)],
        cwd=tmp_path,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def test_the_results_name_commands_that_exist():
    text = README.read_text(encoding="utf-8")
    results = text.split("## Results")[1].split("\n## ")[0]
    commands = re.findall(r"\| `((?:meshwright|python) [^`]+)` \|", results)
    assert len(commands) >= 5
    for command in commands:
        program, what, *keys = command.split()
        if program == "python":
            assert (ROOT / what).exists(), command
            continue
        assert what in {verb.name for verb in cli.VERBS}, command
        for key in keys:
            name, _, value = key.partition("=")
            assert name != "suite" or value in _hydra.groups()["suite"], command
