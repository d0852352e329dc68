"""One stage of a pipelined plan, compiled by XLA for the part of the cluster that it runs on.

All stages of a pipelined step run one program in lock step, so that one compilation speaks for every
stage. The stage's program is what it does at a tick in the steady state, and the update of its weights
once: embed tokens, run a chunk of layers forward and keep the input, compute the loss of its share of
positions, run a chunk backward from a kept input, add up gradients. It holds what a stage holds:
weights, optimizer state, kept inputs, sums of gradients. So the compiler's memory is the stage's.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

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


def stage_program(
    plan: Plan, config: ModelConfig
) -> tuple[Callable, tuple[Any, ...], Any, Any, tuple[int, ...]]:
    """(function, abstract arguments, in_specs, out_specs, donated) of a stage over its own mesh."""
    import jax
    import jax.numpy as jnp
    import optax
    from jax.sharding import AbstractMesh, PartitionSpec

    from graphs.zoo.options import RunOptions
    from graphs.zoo.train_step import abstract_model
    from graphs.zoo.update_rules import update_rule
    from placement.pipeline.schedule import Schedule
    from placement.pipeline.shardings import (
        DATA,
        state_spec,
        update_shardings,
        weight_spec,
    )
    from placement.pipeline.stages import pipelined_segment, stage_functions, uneven

    program = plan.program
    options = {f.name for f in dataclasses.fields(RunOptions)}
    run = RunOptions(**{k: v for k, v in program.items() if k in options})
    seq_len = program["seq_len"]
    stages = plan.mesh_shape["stage"]
    mesh = {k: v for k, v in plan.mesh_shape.items() if k != "stage"} or {"data": 1}
    order = Schedule(
        kind=program["schedule"],
        stages=stages,
        microbatches=program["microbatches"],
        chunks=program["chunks"],
    )
    main = pipelined_segment(config)
    layers = uneven(main.repeats, stages, program["chunks"], program["layers"])
    parts = stage_functions(config, run, seq_len)
    rule = update_rule(
        program.get("optimizer", "adamw"),
        learning_rate=program.get("learning_rate", 3e-4),
        clip_norm=program.get("clip_norm", 1.0),
        state_dtype=program.get("optimizer_state_dtype", "float32"),
    )
    _, params = abstract_model(config, run)
    held = layers.chunks * layers.slots
    weights = jax.tree.map(
        lambda w: jax.ShapeDtypeStruct((held, *w.shape[1:]), w.dtype), params[main.name]
    )
    mine = {**params, main.name: weights}
    batch = program["global_batch"] // program["microbatches"]
    dtype = jnp.dtype(run.compute_dtype)
    x = jax.ShapeDtypeStruct((batch, seq_len, config.d_model), dtype)
    kept = jax.ShapeDtypeStruct((layers.chunks, order.slots, *x.shape), dtype)
    tokens = jax.ShapeDtypeStruct((batch, seq_len), jnp.int32)
    share = seq_len // stages if seq_len % stages == 0 else seq_len
    opt_state = jax.eval_shape(rule.init, mine)
    mask = jnp.ones((layers.slots,), bool)
    abstract = AbstractMesh(tuple(mesh.values()), tuple(mesh))
    inner = PartitionSpec(
        *[tuple(e) if isinstance(e, list) else e for e in program["activation_spec"]]
    )

    def pin(x):
        if not len(inner):
            return x
        here = jax.sharding.get_abstract_mesh() if DATA in mesh else abstract
        return jax.lax.with_sharding_constraint(x, jax.sharding.NamedSharding(here, inner))

    # The sums of gradients of the ticks before. Made inside, their memory is free for the reduction,
    # as in the step's loop; but XLA then keeps them whole on axes that are left to it, so that there
    # they are an argument (and their reduction counts beside them).
    inside = set(mesh) <= {DATA}
    replicas = mesh.get(DATA, 1)
    sums_of = jax.tree.map(lambda w: jax.ShapeDtypeStruct((replicas, *w.shape), jnp.float32), mine)

    def tick(params, sums, kept, arrived, cotangent, tokens, targets, at):
        """A steady tick of one replica; its sums of gradients, added up over replicas at the end."""
        if inside:
            zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), params)
            sums = jax.lax.optimization_barrier(zeros)
        else:
            sums = jax.tree.map(lambda g: g[0], sums)
        outer = {k: v for k, v in params.items() if k != main.name}
        stacked = jax.tree.map(
            lambda w: w.reshape(layers.chunks, layers.slots, *w.shape[1:]), params[main.name]
        )
        chunk = jax.tree.map(lambda w: w[at[0]], stacked)
        x = pin(jnp.where(at[2] == 0, parts.embed(outer, tokens), arrived))
        kept = kept.at[at[0], at[1]].set(x)
        y = pin(parts.layers(chunk, mask, x))
        hidden = y.reshape(*y.shape[:1], -1, seq_len // share, y.shape[-1])[:, :, 0]
        loss, (d_outer, d_hidden) = jax.value_and_grad(parts.loss, argnums=(0, 1))(
            outer, hidden, targets
        )
        _, pull = jax.vjp(lambda w, x: parts.layers(w, mask, x), chunk, pin(kept[at[0], at[3]]))
        d_chunk, dx = pull(pin(cotangent))
        summed = jax.tree.map(
            lambda total, d: (
                total.reshape(layers.chunks, layers.slots, *total.shape[1:])
                .at[at[0]]
                .add(d)
                .reshape(total.shape)
            ),
            sums[main.name],
            d_chunk,
        )
        _, pull = jax.vjp(lambda o: parts.embed(o, tokens), outer)
        (d_embed,) = pull(dx)
        rest = {k: v for k, v in sums.items() if k != main.name}
        rest = jax.tree.map(lambda a, b, c: a + b + c, rest, d_outer, d_embed)
        found = {k: summed if k == main.name else rest[k] for k in sums}
        if DATA in mesh:
            found, loss = jax.lax.psum((found, loss), DATA)
        return found, kept, y, pin(dx), loss, d_hidden

    rows, stack = PartitionSpec(DATA), PartitionSpec(None, None, DATA)
    mapped = tick
    if DATA in mesh:
        mapped = jax.shard_map(
            tick,
            mesh=abstract,
            in_specs=(
                PartitionSpec(),
                None if inside else rows,
                stack,
                rows,
                rows,
                rows,
                rows,
                PartitionSpec(),
            ),
            out_specs=(PartitionSpec(), stack, rows, rows, PartitionSpec(), rows),
            axis_names={DATA},
            check_vma=False,
        )

    def stage(params, opt_state, sums, kept, *arrived):
        grads, kept, y, dx, loss, d_hidden = mapped(params, sums, kept, *arrived)
        if program["zero_stage"] >= 1:
            own = update_shardings(params, abstract, main.name)
            grads, params = jax.lax.with_sharding_constraint((grads, params), (own, own))
        updates, opt_state = rule.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return params, opt_state, kept, y, dx, loss, d_hidden

    def spec_of(tree: Any, state: bool = False) -> Any:
        def one(path, leaf):
            spec = weight_spec(path, leaf.shape, mesh, main.name)
            if state and program["zero_stage"] >= 1:
                spec = state_spec(spec, leaf.shape, mesh)
            return PartitionSpec(*[axes or None for axes in spec])

        return jax.tree_util.tree_map_with_path(one, tree)

    along = inner[1] if len(inner) > 1 else None
    batch_axes = tuple(a for a in (DATA, "expert") if mesh.get(a, 1) > 1) or None
    on = PartitionSpec(batch_axes, along)
    tokens_on = PartitionSpec(batch_axes)
    args = (
        mine, opt_state, None if inside else sums_of, kept, x, x, tokens,
        jax.ShapeDtypeStruct((batch, share), jnp.int32),
        jax.ShapeDtypeStruct((4,), jnp.int32),
    )  # fmt: skip
    states = (spec_of(mine), spec_of(opt_state, True))
    sums_on = jax.tree.map(
        lambda spec: PartitionSpec(DATA if DATA in mesh else None, *spec),
        spec_of(mine),
        is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
    )
    kept_on = PartitionSpec(None, None, batch_axes, along)
    in_specs = (
        *states,
        None if inside else sums_on,
        kept_on,
        on,
        on,
        tokens_on,
        tokens_on,
        PartitionSpec(),
    )
    out_specs = (*states, kept_on, on, on, PartitionSpec(), on)
    return stage, args, in_specs, out_specs, (0, 1, 2, 3)
