"""A trained policy: weights from a file, and what it proposes for a program on a cluster.

A policy is a few members, networks trained alike from different first weights; what they say is
averaged, because one alone is surer of its first choice than it should be.

The shipped weights are ``weights/policy.safetensors``; nothing in them is code. Inference is numpy
on sparse matrices: no compilation, no accelerator.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cost_model.cluster import Cluster
from graphs.errors import MeshwrightError
from placement.learned import forward
from placement.learned.scoring import cautious, ranking

if TYPE_CHECKING:
    from graphs.groups import Grouping

SHIPPED = "policy.safetensors"
HIDDEN = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proposal:
    """What a policy says of K candidates."""

    score: np.ndarray
    """[K] best highest; candidates that a member doubts to fit count as it says."""
    fit: np.ndarray
    """[K] logit of keeping the memory limit."""
    value: np.ndarray
    """[K] log of step time over the ideal one."""
    features: np.ndarray
    """[K, F] candidate features, by which the search tells how alike candidates are."""
    ideal_s: float
    """Seconds of the step's flops at peak on all devices."""
    n_nodes: int
    """Nodes of the program."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """Parameters of the network and what it is blind to."""

    name: str
    members: tuple[dict[str, np.ndarray], ...]
    """Parameters of each network; none for the uniform policy."""
    edges: bool = True
    mesh: bool = True
    facts: dict[str, str] = dataclasses.field(default_factory=dict)
    """Provenance, as written at training."""

    @property
    def n_parameters(self) -> int:
        """Of all members."""
        return sum(v.size for m in self.members for v in m.values())

    def propose(
        self,
        grouping: Grouping,
        cluster: Cluster,
        outers: Sequence[Any],
        *,
        tied: tuple[int, ...] | None = None,
    ) -> Proposal:
        """Scores of candidates (each with ``remat``, ``microbatches``, ``layout``).

        grouping: the program with full rematerialisation and one microbatch, or the function given.
        """
        from scipy import sparse

        from placement.learned.blinding import blinded
        from placement.learned.candidates import candidates_of
        from placement.learned.dataset import arrays_of
        from placement.learned.features import observe
        from placement.learned.program import program_of

        seen = observe(grouping, cluster, program=program_of(grouping, tied))
        found = candidates_of(seen, outers)
        if not self.members:
            zero = np.zeros(len(outers))
            said, features = [forward.Heads(preference=zero, fit=zero, value=zero)], found.rows
        else:
            arrays = blinded(arrays_of(seen, found), edges=self.edges, mesh=self.mesh)
            features = arrays.rows
            sparse_ = [sparse.csr_matrix(a) for a in arrays.relations]
            said = self.said(dataclasses.replace(arrays, relations=sparse_))
        heads = _mean(said)
        return Proposal(
            score=ranking(heads.preference, cautious([h.fit for h in said]), heads.value),
            fit=heads.fit,
            value=heads.value,
            features=features,
            ideal_s=seen.ideal_s,
            n_nodes=len(seen.nodes),
        )

    def heads(self, arrays: Any) -> forward.Heads:
        """Mean of the members' heads, for arrays that are blinded already."""
        return _mean(self.said(arrays))

    def said(self, arrays: Any) -> list[forward.Heads]:
        """The heads of each member."""
        return [
            forward.outer(params, forward.encode(params, arrays, arrays, np), arrays, np)
            for params in self.members
        ]


def _mean(said: Sequence[forward.Heads]) -> forward.Heads:
    return forward.Heads(
        preference=np.mean([h.preference for h in said], axis=0),
        fit=np.mean([h.fit for h in said], axis=0),
        value=np.mean([h.value for h in said], axis=0),
    )


def load_policy(name: str = "learned", *, seed: int = 0) -> Policy:
    """``learned`` (shipped), ``untrained``, ``uniform``, or the path of a weights file.

    Raises MeshwrightError where the file is missing or does not fit this version's network.
    """
    if name == "uniform":
        return Policy(name=name, members=())
    if name == "untrained":
        return Policy(name=name, members=(forward.initial(HIDDEN, seed),))
    if name == "learned":
        folder = importlib.resources.files("placement.learned") / "weights"
        return _read(str(folder / SHIPPED))
    return _read(name)


def _read(path: str) -> Policy:
    file = pathlib.Path(path)
    if not file.is_file():
        raise MeshwrightError(
            f"there are no policy weights at {path}; train some with meshwright train_policy"
        )
    return _cached(str(file), file.stat().st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _cached(path: str, stamp: int) -> Policy:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            facts = dict(file.metadata() or {})
            tensors = {k: file.get_tensor(k) for k in file.keys()}
        members = _members(tensors)
        wanted = [forward.shapes(forward.hidden_of(m)) for m in members]
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise MeshwrightError(
            f"{path} is no file of policy weights ({' '.join(str(error).split())[:100]}); "
            "train some with meshwright train_policy"
        ) from error
    if [{k: tuple(v.shape) for k, v in m.items()} for m in members] != wanted:
        raise MeshwrightError(
            f"the weights in {path} are of another version of the network; "
            "train again with meshwright train_policy"
        )
    config = json.loads(facts.get("config", "{}"))
    return Policy(
        name=pathlib.Path(path).stem,
        members=members,
        edges=config.get("edges", True),
        mesh=config.get("mesh", True),
        facts=facts,
    )


def _members(tensors: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], ...]:
    """Tensors named ``MEMBER.NAME`` by member."""
    found: dict[int, dict[str, np.ndarray]] = {}
    for key, value in tensors.items():
        member, _, name = key.partition(".")
        found.setdefault(int(member), {})[name] = value
    return tuple(found[m] for m in sorted(found))


def save_weights(
    path: pathlib.Path, members: Sequence[dict[str, np.ndarray]], facts: dict[str, str]
) -> None:
    """Write a weights file, whole or not at all."""
    from safetensors.numpy import save

    from placement.compile_cache import write_atomically

    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{m}.{name}": np.ascontiguousarray(params[name], np.float32)
        for m, params in enumerate(members)
        for name in sorted(params)
    }
    write_atomically(path, save(tensors, metadata=facts))
