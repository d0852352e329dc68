"""Hydra configurations from the installed package, with errors of one sentence.

``model=llama3_8b`` chooses a file of a group; ``train.global_batch=256`` sets a value. A cluster
is written in its notation, ``cluster=v5p:8x8x16``, or chosen from the files of its group.
"""

from __future__ import annotations

import difflib
from importlib.resources import files
from typing import Any

from graphs.errors import MeshwrightError

_CONFIGS = "placement.configs"


def wants_help(argv: list[str]) -> bool:
    return any(a in ("-h", "--help", "help") for a in argv)


def groups() -> dict[str, list[str]]:
    """Names of the files of every configuration group."""
    found = {}
    for folder in files(_CONFIGS).iterdir():
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
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    checked = [_checked(text) for text in overrides]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module(config_module=_CONFIGS, version_base="1.3"):
            return hydra_compose(config_name=name, overrides=checked)
    except (HydraException, OmegaConfBaseException) as error:
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


def _checked(text: str) -> str:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if text.startswith("-"):
        raise MeshwrightError(f"unknown option {text!r}: options are written key=value, or --help")
    if "=" not in text and not text.startswith("~"):
        raise MeshwrightError(f"{text!r} is not an override: write key=value")
    try:
        override = OverridesParser.create().parse_override(text)
        value = override.value()
    except HydraException as error:
        raise MeshwrightError(
            f"the override {text!r} cannot be read: quote values with special characters, "
            "as in 'key=\"a b\"'"
        ) from error
    key = override.key_or_group
    choices = groups().get(key)
    if choices is None or not isinstance(value, str) or value in choices:
        return text
    if key == "cluster":
        return f'cluster.notation="{value}"'
    near = difflib.get_close_matches(value, choices, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise MeshwrightError(f"no {key} named {value!r}: {hint}choose one of {', '.join(choices)}")


def _sentence(error: Exception, name: str) -> str:
    key = getattr(error, "full_key", None) or getattr(error.__cause__, "full_key", None)
    first = " ".join(str(error).split("\n\n")[0].split())
    if key and "is not in struct" in f"{error} {error.__cause__}":
        known = sorted(_keys(compose(name, [])))
        near = difflib.get_close_matches(str(key), known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"unknown key {key!r}: {hint}the keys are {', '.join(known)}"
    return f"the configuration {name!r} cannot be read: {first}"


def _keys(config: Any, prefix: str = "") -> list[str]:
    found = []
    for key, value in plain(config).items():
        found.append(f"{prefix}{key}")
        if isinstance(value, dict) and not prefix:
            found += [f"{key}.{inner}" for inner in value if not inner.startswith("_")]
    return found


def _indent(text: str) -> str:
    return "\n".join("  " + line for line in text.splitlines())
