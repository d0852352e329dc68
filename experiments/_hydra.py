"""Hydra configurations from the installed package, with errors of one sentence.

``model=llama3_8b`` chooses a file of a group; ``train.global_batch=256`` sets a value. A cluster
is written in its notation, ``cluster=v5p:8x8x16``, or chosen from the files of its group.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

from graphs.errors import MeshwrightError

CONFIGS = "placement.configs"
_HYDRA_ALSO_RAISES = (ValueError, TypeError, KeyError, AttributeError)
"""What malformed overrides make Hydra raise besides its own exceptions."""


def wants_help(argv: list[str]) -> bool:
    return any(a in ("-h", "--help", "help") for a in argv)


@functools.cache
def groups() -> dict[str, list[str]]:
    """Names of the files of every configuration group."""
    found = {}
    for folder in files(CONFIGS).iterdir():
        if folder.is_dir():
            names = sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".yaml"))
            if names:
                found[folder.name] = names
    return dict(sorted(found.items()))


def compose(name: str, overrides: list[str]) -> Any:
    """The configuration ``name`` with command line overrides, as an OmegaConf dictionary.

    Raises:
        MeshwrightError: a malformed override, an unknown key or an unknown choice.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra

    checked = [_checked(text) for text in overrides]
    GlobalHydra.instance().clear()
    with (
        sentences(name),
        initialize_config_module(config_module=CONFIGS, version_base="1.3"),
    ):
        config = hydra_compose(config_name=name, overrides=checked)
        chosen = _chosen(checked)
        if chosen != checked:
            _check_types(config, hydra_compose(config_name=name, overrides=chosen))
        return config


@contextlib.contextmanager
def sentences(name: str) -> Iterator[None]:
    """What Hydra raises inside, as a MeshwrightError about the configuration ``name``."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except MeshwrightError:
        raise
    except (HydraException, OmegaConfBaseException, *_HYDRA_ALSO_RAISES) as error:
        raise MeshwrightError(_sentence(error, name)) from error


def plain(node: Any) -> Any:
    """An OmegaConf node as dicts, lists and scalars, interpolations resolved."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def instantiate(node: Any, **kwargs: Any) -> Any:
    """The object that a node's ``_target_`` makes.

    Raises:
        MeshwrightError: the target refuses its arguments.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate as hydra_instantiate

    try:
        return hydra_instantiate(node, **kwargs)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, MeshwrightError):
            raise cause from error
        raise MeshwrightError(f"the configuration cannot be built: {error}") from error


def help_text(doc: str | None, name: str) -> str:
    """What ``--help`` prints: the verb's words, its keys with defaults, and the choices."""
    from omegaconf import OmegaConf

    config = OmegaConf.to_yaml(compose(name, [])).rstrip()
    chosen = "\n".join(f"  {group}: {', '.join(names)}" for group, names in groups().items())
    return f"{(doc or '').strip()}\n\nkeys and defaults:\n{_indent(config)}\n\nchoices:\n{chosen}"


def sweep_overrides(overrides: list[str]) -> list[str]:
    """Overrides that may name several values, ``optimizer=fsdp,zero1``, each checked on its own;
    those of Hydra itself (``hydra/launcher=slurm``) as they are.

    Raises:
        MeshwrightError: a malformed override or an unknown choice.
    """
    return [t if _of_hydra(t) else _checked(t, several=True) for t in overrides]


def _of_hydra(text: str) -> bool:
    return text.lstrip("+~").startswith(("hydra/", "hydra."))


def _checked(text: str, *, several: bool = False) -> str:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if text.startswith("-"):
        raise MeshwrightError(f"unknown option {text!r}: options are written key=value, or --help")
    if "=" not in text and not text.startswith("~"):
        raise MeshwrightError(f"{text!r} is not an override: write key=value")
    try:
        override = OverridesParser.create().parse_override(text)
        sweeps = override.is_sweep_override()
        values = [] if sweeps else [override.value()]
        if several and override.is_discrete_sweep():
            values = list(override.sweep_string_iterator())
    except HydraException as error:
        raise MeshwrightError(
            f"the override {text!r} cannot be read: quote values with special characters, "
            "as in 'key=\"a b\"'"
        ) from error
    if sweeps and not several:
        raise MeshwrightError(f"{text!r} names several values: give one, or sweep with --multirun")
    key = override.key_or_group
    choices = groups().get(key)
    if choices is None or override.is_delete() or all(value in choices for value in values):
        return text
    if key == "cluster":
        return "cluster.notation=" + ",".join(f'"{value}"' for value in values)
    wrong = next(value for value in values if value not in choices)
    near = difflib.get_close_matches(str(wrong), choices, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise MeshwrightError(f"no {key} named {wrong!r}: {hint}choose one of {', '.join(choices)}")


def _chosen(overrides: list[str]) -> list[str]:
    """The overrides that choose files, without those that set values."""
    return [text for text in overrides if text.split("=")[0] in groups()]


def _check_types(config: Any, defaults: Any, path: str = "") -> None:
    """Words where a number or a switch belongs are refused, by key."""
    config, defaults = plain(config), plain(defaults)
    for key, value in config.items():
        default = defaults.get(key)
        if isinstance(default, dict) and isinstance(value, dict):
            _check_types(value, default, f"{path}{key}.")
        elif isinstance(default, bool) and not isinstance(value, bool):
            raise MeshwrightError(f"{path}{key}={value!r} is not true or false")
        elif isinstance(default, int) and not isinstance(value, int):
            raise MeshwrightError(f"{path}{key}={value!r} is not a whole number such as {default}")
        elif isinstance(default, float) and not isinstance(value, int | float):
            raise MeshwrightError(f"{path}{key}={value!r} is not a number such as {default}")


def _sentence(error: Exception, name: str) -> str:
    key = getattr(error, "full_key", None) or getattr(error.__cause__, "full_key", None)
    first = " ".join(str(error).split("\n\n")[0].split())
    if key and "is not in struct" in f"{error} {error.__cause__}":
        known = _siblings(compose(name, []), str(key))
        near = difflib.get_close_matches(str(key), known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"unknown key {key!r}: {hint}the keys are {', '.join(known)} (+{key}=… adds one)"
    return f"the configuration {name!r} cannot be read: {first}"


def _siblings(config: Any, key: str) -> list[str]:
    """Keys at the place of the unknown one."""
    parent, _, _ = key.rpartition(".")
    node: Any = plain(config)
    for part in filter(None, parent.split(".")):
        node = node.get(part, {}) if isinstance(node, dict) else {}
    prefix = f"{parent}." if parent else ""
    return sorted(f"{prefix}{k}" for k in node if not str(k).startswith("_"))


def _indent(text: str) -> str:
    return "\n".join("  " + line for line in text.splitlines())
