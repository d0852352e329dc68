"""What the planning API asks the policy: in which order to try meshes and program variants."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from graphs.errors import MeshwrightError
from placement.learned.candidates import Candidate
from placement.learned.policy import Policy, load_policy

if TYPE_CHECKING:
    from cost_model.layout import MeshLayout
    from graphs.groups import Grouping


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """A program variant and what the policy expects of its best mesh."""

    remat: str
    microbatches: int
    mesh_shape: dict[str, int]
    """The mesh it thinks best for it."""
    log_time: float
    """Log of the step time over the ideal one there."""


def shipped_policy() -> tuple[Policy | None, str]:
    """The shipped policy, or None and a sentence that says why not."""
    try:
        return load_policy("learned"), ""
    except MeshwrightError as error:
        return None, f"no trained policy: optimizer=learned planned with search ({error})"


def order_layouts(
    policy: Policy, grouping: Grouping, layouts: Sequence[MeshLayout], tied: tuple[int, ...]
) -> list[MeshLayout]:
    """Meshes for a program that is given, most promising first."""
    outers = [Candidate(remat=None, microbatches=1, layout=x) for x in layouts]
    said = policy.propose(grouping, layouts[0].cluster, outers, tied=tied)
    return [layouts[k] for k in np.argsort(-said.score, kind="stable")]


def advised_variants(
    program: tuple[Any, Any, Any],
    cluster: str,
    variants: Sequence[tuple[str, int]],
    mesh_shape: Any,
    max_axes: int,
) -> list[Variant]:
    """:func:`order_variants` of a train step (function, arguments, donated positions); none
    without weights."""
    from cost_model.cluster import parse_cluster
    from cost_model.layout import enumerate_layouts, layout_for
    from graphs.groups import group
    from graphs.trace import trace

    policy, _ = shipped_policy()
    if policy is None:
        return []
    step, args, donated = program
    parsed = parse_cluster(cluster)
    layouts = (
        [layout_for(parsed, mesh_shape)]
        if mesh_shape
        else enumerate_layouts(parsed, max_axes=max_axes)
    )
    grouping = group(trace(step, *args, donate_argnums=donated))
    return order_variants(policy, grouping, layouts, variants)


def order_variants(
    policy: Policy,
    grouping: Grouping,
    layouts: Sequence[MeshLayout],
    variants: Sequence[tuple[str, int]],
) -> list[Variant]:
    """Program variants by the score of the best mesh of each, most promising first.

    grouping: the program with full rematerialisation and one microbatch.
    """
    outers = [
        Candidate(remat=remat, microbatches=count, layout=x)
        for remat, count in variants
        for x in layouts
    ]
    said = policy.propose(grouping, layouts[0].cluster, outers)
    score = said.score.reshape(len(variants), len(layouts))
    value = said.value.reshape(score.shape)
    found: list[Variant] = []
    for v in np.argsort(-score.max(1), kind="stable"):
        remat, count = variants[v]
        best = int(score[v].argmax())
        found.append(
            Variant(
                remat=remat,
                microbatches=count,
                mesh_shape=layouts[best].mesh.shape,
                log_time=float(value[v, best]),
            )
        )
    return found
