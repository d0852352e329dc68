"""One stage of a pipelined plan, compiled by XLA for the part of the cluster that it runs on.

All stages of a pipelined step run one program in lock step, so that one compilation speaks for every
stage. What is compiled is in :mod:`placement.pipeline.stage_program`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

from cost_model.cluster import Cluster, parse_cluster
from cost_model.layout import MeshLayout, layout_for
from graphs.errors import MeshwrightError
from graphs.zoo.config import ModelConfig
from placement.plan import Plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageCompiled:
    """What the compiler says of one stage. Per device."""

    cluster: str
    """The sub-topology, in the cluster notation."""
    mesh_shape: dict[str, int]
    """The plan's mesh without its stage axis."""
    fits: bool
    status: str
    """``ok``, ``out_of_memory`` or ``failed``."""
    message: str
    peak_bytes: float
    held_bytes: float
    """Of it the arguments: weights, optimizer state, kept inputs, and sums of gradients where other
    axes than data shard the stage."""
    capacity_bytes: float
    tick_time_s: float
    """One steady tick and one update, by the compiler's schedule; NaN if it did not compile."""
    compute_time_s: float
    collectives: dict[str, float]
    """Payload bytes by kind."""
    compile_time_s: float


def compile_stage(
    plan: Plan, model: ModelConfig | str, *, timeout_s: float = 900.0, cache: bool = True
) -> StageCompiled:
    """Compile the stage of a pipelined plan for its sub-topology.

    Raises MeshwrightError for a plan without stages, where no part of the cluster has a stage's
    shape, or where the compiler is missing or takes longer than ``timeout_s``.
    """
    from graphs.zoo import load_model_config
    from placement.compile import compile_for_cluster
    from placement.network import chip_of, layout_timer
    from placement.pipeline.stage_program import stage_program
    from placement.schedule import schedule

    config = load_model_config(model) if isinstance(model, str) else model
    layout = stage_layout(plan)
    fn, args, in_specs, out_specs, donated = stage_program(plan, config)
    compiled = compile_for_cluster(
        fn,
        args,
        in_specs=in_specs,
        out_specs=out_specs,
        donate_argnums=donated,
        layout=layout,
        timeout_s=timeout_s,
        cache=cache,
    )
    step = None
    if compiled.status == "ok":
        step = schedule(compiled.module(), chip=chip_of(layout), timer=layout_timer(layout))
    capacity = float(layout.cluster.device.hbm_available_bytes)
    return StageCompiled(
        cluster=layout.cluster.notation,
        mesh_shape=layout.mesh.shape,
        fits=compiled.status == "ok" and compiled.peak_bytes <= capacity,
        status=compiled.status,
        message=compiled.message,
        peak_bytes=float(compiled.peak_bytes),
        held_bytes=float(compiled.argument_bytes),
        capacity_bytes=capacity,
        tick_time_s=step.step_time_s if step else math.nan,
        compute_time_s=step.compute_time_s if step else math.nan,
        collectives=dict(step.logical_collective_bytes) if step else {},
        compile_time_s=compiled.seconds,
    )


def stage_layout(plan: Plan) -> MeshLayout:
    """A stage's devices, and the plan's other axes laid on them."""
    if "stage" not in plan.mesh_shape:
        raise MeshwrightError(
            f"the plan's mesh {plan.mesh_shape} has no stages; use placement.verify for it"
        )
    cluster = parse_cluster(plan.cluster)
    index = list(plan.mesh_shape).index("stage")
    inner = {k: v for k, v in plan.mesh_shape.items() if k != "stage"} or {"data": 1}
    taken: dict[int, int] = {}
    for factor in plan.placement[index]:
        taken[factor.axis] = taken.get(factor.axis, 1) * factor.size
    left = [a.size // taken.get(i, 1) for i, a in enumerate(cluster.physical_axes)]
    for notation in _notations(cluster, left):
        try:
            return layout_for(parse_cluster(notation), inner)
        except MeshwrightError:
            continue
    raise MeshwrightError(
        f"no part of {plan.cluster} of {math.prod(left)} devices is a topology of its own that "
        f"composes {inner}; compile the whole plan with placement.verify"
    )


def _notations(cluster: Cluster, left: list[int]) -> list[str]:
    """Shapes of a stage: its own where it is no line, then all of as many chips, squarest first."""
    device = cluster.device.name
    if cluster.device.family == "gpu":
        nodes, gpus = left[-2:]
        return [f"{device}:{gpus}x{nodes}"]
    if cluster.device.family == "cpu":
        return [f"{device}:{math.prod(left)}"]
    dims = len(cluster.slice_shape)
    chips = [n for n, a in zip(left, cluster.physical_axes) if a.kind == "ici"][:dims]
    slices = math.prod(n for n, a in zip(left, cluster.physical_axes) if a.kind == "dcn")
    total = math.prod(chips)
    sides = [n for n in range(1, total + 1) if total % n == 0]
    shapes = [s for s in itertools.product(sides, repeat=dims) if math.prod(s) == total]
    shapes.sort(key=max)
    if sum(n > 1 for n in chips) > 1:
        shapes.insert(0, tuple(chips))
    prefix = f"{slices}*" if slices > 1 else ""
    return [f"{prefix}{device}:{'x'.join(map(str, s))}" for s in dict.fromkeys(shapes)]
