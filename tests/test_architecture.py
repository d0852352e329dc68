"""The shape of the project: who imports whom, what ships, how fast it starts."""

from __future__ import annotations

import ast
import importlib
import inspect
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest
import yaml

from placement.experiments import _hydra

ROOT = pathlib.Path(__file__).resolve().parent.parent
ORDER = ("graphs", "cost_model", "placement", "placement.experiments")
FOLDERS = {
    "graphs": "graphs",
    "cost_model": "cost_model",
    "placement": "placement",
    "placement.experiments": "experiments",
    "placement.configs": "configs",
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def imports_of(path: pathlib.Path) -> set[str]:
    """Absolute module names that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def sources(folder: str) -> list[pathlib.Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def layer(module: str) -> str | None:
    if module == "placement.experiments" or module.startswith("placement.experiments."):
        return "placement.experiments"
    top = module.split(".")[0]
    return top if top in ORDER else None


@pytest.mark.parametrize("mine", ORDER)
def test_imports_go_one_way(mine):
    for path in sources(FOLDERS[mine]):
        for module in imports_of(path):
            theirs = layer(module)
            if theirs is not None:
                assert ORDER.index(theirs) <= ORDER.index(mine), f"{path}: {module}"


def test_only_experiments_knows_hydra():
    for folder in ("graphs", "cost_model", "placement"):
        for path in sources(folder):
            named = {m.split(".")[0] for m in imports_of(path)}
            assert not named & {"hydra", "omegaconf"}, path


def test_private_jax_is_used_in_one_file_of_graphs():
    users = {
        path.relative_to(ROOT).as_posix()
        for folder in FOLDERS.values()
        for path in sources(folder)
        if any(m.startswith("jax._src") for m in imports_of(path))
    }
    assert len(users) <= 1 and all(u.startswith("graphs/") for u in users), users


def test_nothing_is_pickled():
    for folder in FOLDERS.values():
        for path in sources(folder):
            named = {m.split(".")[0] for m in imports_of(path)}
            assert not named & {"pickle", "cloudpickle", "dill", "marshal", "joblib"}, path


def test_every_package_is_listed_and_every_listed_package_exists():
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    found = set()
    for package, folder in FOLDERS.items():
        for marker in (ROOT / folder).rglob("__init__.py"):
            inner = marker.parent.relative_to(ROOT / folder).parts
            found.add(".".join((package, *inner)))
    assert listed == found


def test_no_module_is_called_after_nothing():
    for folder in FOLDERS.values():
        for path in sources(folder):
            assert path.stem not in ("utils", "helpers", "misc", "common"), path


def test_no_file_is_past_reading():
    """Past 400 lines a file takes a hard look; past 600 it is two files."""
    for folder in FOLDERS.values():
        for path in sources(folder):
            assert len(path.read_text(encoding="utf-8").splitlines()) <= 600, path


def test_every_module_says_what_it_is():
    for folder in FOLDERS.values():
        for path in sources(folder):
            text = path.read_text(encoding="utf-8")
            assert not text.strip() or ast.get_docstring(ast.parse(text)), path


def test_third_party_imports_are_dependencies():
    """What the packages import is declared, so that the wheel runs where nothing else is."""
    known = {"yaml": "pyyaml", "hydra": "hydra-core", "omegaconf": "hydra-core", "jaxlib": "jax"}
    project = PROJECT["project"]
    declared = list(project["dependencies"])
    for extra, requirements in project["optional-dependencies"].items():
        declared += requirements if extra != "dev" else []
    names = {re.split(r"[<>=\[! ;]", d)[0].lower().replace("_", "-") for d in declared}
    own = {"graphs", "cost_model", "placement"}
    for folder in FOLDERS.values():
        for path in sources(folder):
            for module in imports_of(path):
                top = module.split(".")[0]
                if top in sys.stdlib_module_names or top in own:
                    continue
                package = known.get(top, top).replace("_", "-")
                if package == "orbax":
                    package = "orbax-checkpoint"
                assert package in names, f"{path} imports {module}"


CONFIGS = [(group, name) for group, names in _hydra.groups().items() for name in names]
COMPOSED = dict.fromkeys(("model", "train", "cluster", "optimizer", "region"), "plan")
COMPOSED |= {"suite": "evaluate", "policy": "train_policy"}
"""The top-level configuration that takes each group."""


def composed(group: str, name: str) -> dict:
    if group in COMPOSED:
        config = _hydra.compose(COMPOSED[group], [f"{group}={name}"])
        return _hydra.plain(config[group])
    return yaml.safe_load((ROOT / "configs" / group / f"{name}.yaml").read_text(encoding="utf-8"))


def target_of(config: dict):
    """What ``_target_`` names."""
    module, _, attribute = config["_target_"].rpartition(".")
    return getattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize(("group", "name"), CONFIGS, ids=str)
def test_every_configuration_instantiates(group, name):
    """Its target exists and takes its keys; what is cheap to make is made."""
    config = composed(group, name)
    arguments = {k: v for k, v in config.items() if not k.startswith("_")}
    inspect.signature(target_of(config)).bind_partial(**arguments)
    if group in ("model", "cluster", "optimizer"):
        assert _hydra.instantiate(config) is not None


def test_the_groups_are_those_of_the_design():
    assert {"model", "cluster", "optimizer", "train", "suite"} <= set(_hydra.groups())


def test_public_names_are_not_hidden_by_the_modules_that_hold_them():
    """``placement.optimizers`` is a function although a package of that name is imported."""
    import placement

    for name in ("placement.optimizers", "placement.verify", "placement.report"):
        importlib.import_module(name)
    assert "search" in placement.optimizers()
    assert callable(placement.verify)
    assert all(hasattr(placement, name) for name in placement.__all__)


def seconds_to_import(module: str) -> float:
    """Cumulative time of the import in a fresh process, as -X importtime reports it."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", f"import {module}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    total = 0
    for line in done.stderr.splitlines():
        match = re.match(r"import time:\s+(\d+) \|\s+(\d+) \| (\s*)(\S+)", line)
        # Lines without indentation are the imports that nothing else asked for.
        if match and len(match[3]) == 0:
            total += int(match[2])
    return total / 1e6


def test_placement_imports_quickly():
    assert min(seconds_to_import("placement") for _ in range(2)) < 2.0


def test_the_command_line_starts_without_jax():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from placement.experiments import cli; cli.main(['--help']);"
            "assert 'jax' not in sys.modules and 'hydra' not in sys.modules, 'eager'",
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
