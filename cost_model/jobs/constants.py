"""The fitted constants: few, each with a physical name, a family and a prior.

`constants.yaml` holds them; `fit` writes it. A constant is looked up for a job by the family of its
device (ampere, hopper, blackwell, tpu), then by the vendor (nvidia), then for all.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import typing

import numpy as np
import yaml

from cost_model.jobs.hardware import FAMILIES

FILE = pathlib.Path(__file__).with_name("constants.yaml")

_CHAIN = {
    "volta": ("volta", "ampere", "nvidia", "all"),
    "ampere": ("ampere", "nvidia", "all"),
    "hopper": ("hopper", "nvidia", "all"),
    "blackwell": ("blackwell", "nvidia", "all"),
    "tpu": ("tpu", "all"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant:
    """One number of the model."""

    name: str
    family: str
    """ampere, hopper, blackwell, tpu, nvidia or all."""
    value: float
    prior: float
    """what the literature or the datasheet says before any fit."""
    prior_log_std: float
    """trust in the prior: the standard deviation of the logarithm; 0 keeps it fixed."""
    meaning: str
    source: str

    @property
    def key(self) -> str:
        return f"{self.name}.{self.family}"

    @property
    def fitted(self) -> bool:
        return self.prior_log_std > 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constants:
    """All constants, ready to be looked up for columns of jobs."""

    entries: tuple[Constant, ...]

    def __post_init__(self) -> None:
        table: dict[str, np.ndarray] = {}
        for name in {entry.name for entry in self.entries}:
            by_family = {e.family: e.value for e in self.entries if e.name == name}
            table[name] = np.array(
                [
                    next((by_family[link] for link in _CHAIN[f] if link in by_family), np.nan)
                    for f in FAMILIES
                ]
            )
        object.__setattr__(self, "_table", table)

    def of(self, name: str, family: np.ndarray) -> np.ndarray:
        """[J] the constant for devices of these families."""
        table: dict[str, np.ndarray] = getattr(self, "_table")  # noqa: B009
        return table[name][family]

    @property
    def n_fitted(self) -> int:
        return sum(entry.fitted for entry in self.entries)

    def with_values(self, values: dict[str, float]) -> Constants:
        """With the values of some keys (name.family) replaced."""
        return Constants(
            entries=tuple(
                dataclasses.replace(e, value=values.get(e.key, e.value)) for e in self.entries
            )
        )


@functools.cache
def load(path: pathlib.Path = FILE) -> Constants:
    """The shipped constants."""
    data: list[dict[str, typing.Any]] = yaml.safe_load(path.read_text())["constants"]
    return Constants(entries=tuple(Constant(**entry) for entry in data))
