"""A pipelined train step: shard_map over the stage axis, ppermute between stages.

Inside the map the stage and data axes are manual, so that gradients are reduced over data once a step
rather than once a microbatch; every other axis (model, context, expert) is left to XLA's partitioner:
a stage is itself a sharded program. At every tick (`schedule`, `ticks`) a stage

1. runs one chunk of layers forward on what it received, or on embedded tokens (first stage),
2. where a microbatch leaves the last stage, spreads its positions over all stages, each of which
   computes the loss of its share: the head is not one stage's burden (arXiv:2411.05288 spreads the
   vocabulary instead),
3. runs one chunk backward, each layer again from its kept input, and sends on; with zero
   bubble the gradients of weights of some microbatches are left for the last ticks.

Gradients are summed over microbatches in float32; the update is the unpipelined program's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, PartitionSpec

from graphs.errors import MeshwrightError
from graphs.zoo.config import ModelConfig
from graphs.zoo.options import RunOptions
from graphs.zoo.train_step import abstract_batch, abstract_model, check_ring, in_order
from graphs.zoo.update_rules import learning_rates, update_rule
from placement.pipeline.reduction import reduce_gradients, reduced_specs, wide
from placement.pipeline.schedule import Schedule
from placement.pipeline.shardings import DATA, STAGE, update_shardings
from placement.pipeline.stages import (
    Layout,
    StageFunctions,
    map_layers,
    pipelined_segment,
    stage_functions,
    uneven,
)
from placement.pipeline.ticks import StageWorker


def build_pipelined_step(
    config: ModelConfig,
    *,
    mesh_shape: Mapping[str, int],
    global_batch: int,
    microbatches: int,
    schedule: str = "1f1b",
    chunks: int = 1,
    layers: Sequence[int] | None = None,
    activation_spec: Sequence[Any] = (),
    zero_stage: int = 0,
    seq_len: int | None = None,
    optimizer: str = "adamw",
    optimizer_state_dtype: str = "float32",
    learning_rate: float = 3e-4,
    warmup_steps: int = 0,
    decay_steps: int | None = None,
    clip_norm: float | None = 1.0,
    **options: Any,
) -> tuple[Callable, tuple[Any, Any, Any], tuple[int, ...]]:
    """(train_step, abstract arguments, donate_argnums) of a model in stages.

    Args:
      mesh_shape: axis name -> size of the whole mesh; ``stage`` is how many stages there are,
        ``data`` splits every microbatch.
      microbatches: forward passes of a step; divides global_batch.
      schedule: one of `schedule.SCHEDULES`.
      chunks: model chunks on each stage, interleaved.
      layers: repeated layers of each virtual stage, first to last; as even as can be where None.
      activation_spec: PartitionSpec entries, of the other axes, of a replica's activations
        [B, S, D].
      zero_stage: 1 updates each parameter where its optimizer state lies (ZeRO, arXiv:1910.02054).
      options: of `graphs.zoo.options.RunOptions`.
      The rest as `graphs.zoo.build_train_step`.

    Raises:
      MeshwrightError: what the model or the numbers do not allow, in one sentence.
    """
    seq_len = config.seq_len if seq_len is None else seq_len
    stages = int(mesh_shape.get(STAGE, 1))
    plan = Schedule(kind=schedule, stages=stages, microbatches=microbatches, chunks=chunks)
    replicas = int(mesh_shape.get(DATA, 1))
    if global_batch % (microbatches * replicas):
        raise MeshwrightError(
            f"{microbatches} microbatches on {replicas} replicas do not divide a batch of "
            f"{global_batch} sequences; give divisors"
        )
    run = check_ring(config, RunOptions(**options, mesh_shape=tuple(mesh_shape.items())), seq_len)
    main = pipelined_segment(config)
    layout = uneven(main.repeats, stages, chunks, layers)
    parts = stage_functions(config, run, seq_len)
    rule = update_rule(
        optimizer,
        learning_rate=learning_rates(
            learning_rate, warmup_steps=warmup_steps, decay_steps=decay_steps
        ),
        clip_norm=clip_norm,
        state_dtype=optimizer_state_dtype,
    )
    mesh = AbstractMesh(tuple(mesh_shape.values()), tuple(mesh_shape))
    _, params = abstract_model(config, run)
    params = map_layers(layout.arrange, params, parts.segment)
    gradients = _pipelined(
        parts,
        plan,
        layout,
        mesh,
        params,
        shape=(global_batch // microbatches // replicas, seq_len, parts.width),
        dtype=jnp.dtype(run.compute_dtype),
        spec=PartitionSpec(*activation_spec),
        zero_stage=zero_stage,
    )

    def train_step(params, opt_state, batch):
        loss, grads = gradients(params, in_order(run, batch))
        if zero_stage >= 1:
            own = update_shardings(params, mesh, parts.segment)
            grads, params = jax.lax.with_sharding_constraint((grads, params), (own, own))
        updates, opt_state = rule.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, {"loss": loss}

    opt_state = jax.eval_shape(rule.init, params)
    return train_step, (params, opt_state, abstract_batch(config, global_batch, seq_len)), (0, 1)


def _pipelined(
    parts: StageFunctions,
    plan: Schedule,
    layout: Layout,
    mesh: AbstractMesh,
    shapes: Any,
    *,
    shape: tuple[int, int, int],
    dtype: Any,
    spec: PartitionSpec,
    zero_stage: int,
) -> Callable[[Any, Any], tuple[jax.Array, Any]]:
    """(params, batch) -> (mean loss, mean gradients)."""
    _, s, _ = shape
    spread = plan.stages if s % plan.stages == 0 else 1
    manual = tuple(axis for axis in (STAGE, DATA) if axis in mesh.axis_names)
    data = tuple(axis for axis in manual if axis == DATA)
    where = {"segment": parts.segment, "zero_stage": zero_stage}
    reduced = reduced_specs(shapes, mesh.shape, manual, **where)
    n_means = plan.microbatches * mesh.shape.get(DATA, 1)

    def body(stage_id, mask, weights, outer, tokens, targets):
        worker = StageWorker(
            parts=parts,
            plan=plan,
            stage=stage_id[0],
            mask=mask[0],
            weights=jax.tree.map(
                lambda w: w.reshape(layout.chunks, layout.slots, *w.shape[1:]), weights
            ),
            outer=outer,
            tokens=tokens,
            targets=targets,
            spread=spread,
            spec=spec,
        )
        state = worker.start(shape, dtype)
        for phase in plan.phases():
            tick = functools.partial(worker.tick, phase)
            state, _ = jax.lax.scan(tick, state, jnp.arange(phase.start, phase.stop))
        loss = jax.lax.psum(state["loss"], wide(mesh.shape, manual)) / n_means
        stacked = jax.tree.map(
            lambda g: g.reshape(layout.chunks * layout.slots, *g.shape[2:]), state["weights"]
        )
        # in the order of params, so that the trees are equal
        sums = {k: stacked if k == parts.segment else state["outer"][k] for k in shapes}
        sums = reduce_gradients(sums, shapes, mesh.shape, manual, shared=(STAGE,), **where)
        return loss, jax.tree.map(lambda g: g / n_means, sums)

    on_stage, tokens = PartitionSpec(STAGE), PartitionSpec(None, data or None)
    mapped = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(on_stage, on_stage, on_stage, PartitionSpec(), tokens, tokens),
        out_specs=(PartitionSpec(), reduced),
        axis_names=set(manual),
        check_vma=False,
    )
    mask = layout.mask()

    def gradients(params, batch):
        outer = {k: v for k, v in params.items() if k != parts.segment}

        def split(x):
            # neighbours go to different microbatches, so that a sharded batch stays where it is
            return jnp.moveaxis(x.reshape(-1, plan.microbatches, s), 1, 0)

        return mapped(
            jnp.arange(plan.stages),
            jnp.asarray(mask),
            params[parts.segment],
            outer,
            {k: split(v) for k, v in batch.items() if k != "targets"},
            split(batch["targets"]),
        )

    return gradients
