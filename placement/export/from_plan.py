"""A plan as a job layout, and the tensors that it shards as no framework's rules would.

Degrees are read off the argument specs: an axis that splits the batch and the weights is fsdp (or
expert, where it splits the experts), one that splits the batch alone is data, the weights alone
tensor, the sequence context. Each parameter is then compared with what the usual rules for those
degrees (placement.export.axis_rules) would give it.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from cost_model.cluster import parse_cluster
from graphs.errors import MeshwrightError
from placement.export import axis_rules
from placement.export.layout import JobLayout
from placement.export.target import named_degrees
from placement.report.from_plan import kind_of, path_words, spec_words

if TYPE_CHECKING:
    from placement.plan import LeafSpec, Plan

_MOST_NOTES = 20
_LOGICAL = (
    (r"(^|/)embedding$", ("vocab", "embed_vocab")),
    (r"(^|/)head$", ("embed_vocab", "vocab")),
    (r"attention/query$", ("embed", "q_heads", "kv")),
    (r"attention/(key|value)$", ("embed", "kv_heads", "kv_head_dim")),
    (r"attention/output$", ("heads", "kv", "embed")),
    (r"attention/query_down$", ("embed", "q_lora_up_proj")),
    (r"attention/query_up$", ("q_lora", "q_heads", "kv")),
    (r"attention/kv_down$", ("embed", "kv_lora_up_proj")),
    (r"attention/(key|value)_up$", ("kv_lora", "kv_heads", "kv_head_dim")),
    (r"experts/(gate|up)$", ("exp", "embed_moe", "mlp_moe")),
    (r"experts/down$", ("exp", "mlp_moe", "embed_moe")),
    (r"(mlp|shared)/(gate|up)$", ("embed", "mlp")),
    (r"(mlp|shared)/down$", ("mlp", "embed")),
)
"""Names of the zoo's parameters and the logical names of their last dimensions."""


def layout_of_plan(
    plan: Plan, *, grad_accum: int = 1, remat: str = "full", precision: str = "bf16"
) -> tuple[JobLayout, tuple[str, ...]]:
    """The layout, and a sentence for each parameter that the usual rules would shard otherwise.

    Raises:
        MeshwrightError: the plan's arguments hold no batch.
    """
    of_kind: dict[str, list[LeafSpec]] = {}
    for leaf in plan.inputs:
        of_kind.setdefault(kind_of(leaf.name, plan.donate_argnums), []).append(leaf)
    batch = of_kind.get("input", [])
    widest = max(batch, key=lambda leaf: len(leaf.shape), default=None)
    if widest is None or not widest.shape:
        raise MeshwrightError(
            "the plan's step takes no batch beside its donated state, so no degrees can be read; "
            "export --to json keeps only the mesh"
        )
    names = {axis: _canonical(axis, of_kind) for axis in plan.mesh_shape}
    sizes = dict.fromkeys(axis_rules.AXES, 1)
    for axis, size in plan.mesh_shape.items():
        sizes[names[axis]] *= size
    cluster = parse_cluster(plan.cluster)
    total = widest.shape[0]
    ranks = sizes["data"] * sizes["fsdp"] * sizes["fsdp_transpose"] * sizes["expert"]
    layout = JobLayout(
        n_devices=cluster.n_devices,
        n_slices=cluster.n_slices,
        **named_degrees(sizes),
        zero_stage=_zero_stage(of_kind, names),
        seq_len=widest.shape[1] if len(widest.shape) > 1 else None,
        global_batch=total,
        micro_batch=total / ranks / grad_accum,
        grad_accum=grad_accum,
        remat=remat,
        precision=precision,
    )
    return layout, tuple(_notes(plan, of_kind.get("parameter", []), names, sizes))


def _canonical(axis: str, of_kind: dict[str, list[LeafSpec]]) -> str:
    """The usual name of what a mesh axis does."""

    def used(kind: str, keep=lambda leaf, d: True) -> bool:
        return any(
            axis in entry and keep(leaf, d)
            for leaf in of_kind.get(kind, [])
            for d, entry in enumerate(leaf.spec)
        )

    splits_batch = used("input", lambda leaf, d: d == 0)
    splits_weights = used("parameter")
    if used("parameter", _is_expert_dimension):
        return "expert"
    if splits_batch:
        return "fsdp" if splits_weights else "data"
    if used("input"):
        return "context"
    return "tensor" if splits_weights else "data"


def _is_expert_dimension(leaf: LeafSpec, d: int) -> bool:
    return bool(re.search(r"experts/(gate|up|down)$", path_words(leaf.name))) and (
        d == len(leaf.shape) - 3
    )


def _zero_stage(of_kind: dict[str, list[LeafSpec]], names: dict[str, str]) -> int:
    if any(name in ("fsdp", "fsdp_transpose", "expert") for name in names.values()):
        return 3
    data = {axis for axis, name in names.items() if name == "data"}
    sharded = any(
        data & set(entry) for leaf in of_kind.get("optimizer state", []) for entry in leaf.spec
    )
    return 1 if sharded else 0


def _notes(plan: Plan, parameters: list[LeafSpec], names: dict[str, str], sizes: dict[str, int]):
    rules = dict(axis_rules.rules(sizes, sequence=False))
    unlike, unknown = [], 0
    for leaf in parameters:
        logical = _logical_names(leaf)
        if logical is None:
            unknown += math.prod(leaf.shape) > 1 and any(leaf.spec)
            continue
        taken: set[str] = set()
        for dimension, entry in zip(logical, leaf.spec):
            usual = [a for a in rules.get(dimension, []) if a not in taken]
            taken |= set(usual)
            if sorted(usual) != sorted(names[a] for a in entry if plan.mesh_shape[a] > 1):
                unlike.append(
                    f"{path_words(leaf.name)} has {spec_words(leaf.spec)}; the usual rule would "
                    f"split {dimension} over {', '.join(usual) or 'nothing'}"
                )
                break
    yield from unlike[:_MOST_NOTES]
    if len(unlike) > _MOST_NOTES:
        yield f"{len(unlike) - _MOST_NOTES} more parameters have specs of their own"
    if unknown:
        yield f"{unknown} sharded parameters have names without a usual rule to compare with"
    constraints = len(plan.results) + len(plan.operands)
    if constraints:
        yield f"{constraints} constraints on activations stay with the plan"


def _logical_names(leaf: LeafSpec) -> tuple[str, ...] | None:
    name = path_words(leaf.name)
    for pattern, last in _LOGICAL:
        if re.search(pattern, name):
            return ("layers",) * (len(leaf.shape) - len(last)) + last
    return None
