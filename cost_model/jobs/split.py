"""The stated half of the sources that the constants are fitted on: `split.yaml`."""

from __future__ import annotations

import functools
import pathlib
import re

import yaml

_FILE = pathlib.Path(__file__).with_name("split.yaml")


@functools.lru_cache(maxsize=1)
def _patterns() -> tuple[str, ...]:
    return tuple(yaml.safe_load(_FILE.read_text())["fitted"])


def is_fitted(source: str, notes: str) -> bool:
    """True where constants may be fitted on rows of this source (and software release)."""
    release = re.search(r"([\d.]+) NeMo Container", notes)
    named = f"{source} release:{release[1]}" if release else source
    return any(re.search(pattern, named) for pattern in _patterns())
