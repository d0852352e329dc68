"""A pipelined train step: shard_map over the stage axis, ppermute between stages.

Inside the map the stage and data axes are manual, so that gradients are reduced over data once a step
rather than once a microbatch; every other axis (model, context, expert) is left to XLA's partitioner:
a stage is itself a sharded program. At every tick (`schedule`) a stage

1. runs one chunk of layers forward on what it received, or on embedded tokens (first stage),
2. where a microbatch leaves the last stage, spreads its positions over all stages, each of which
   computes the loss of its share: the head is not one stage's burden (arXiv:2411.05288 spreads the
   vocabulary instead),
3. runs one chunk backward from its kept input, which it computes again, and sends on.

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
from placement.pipeline.schedule import Phase, Schedule
from placement.pipeline.shardings import DATA, STAGE, pinned_weights, update_shardings
from placement.pipeline.stages import (
    Layout,
    StageFunctions,
    map_layers,
    pipelined_segment,
    stage_functions,
    uneven,
)


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
    gradients = _pipelined(
        parts,
        plan,
        layout,
        mesh,
        shape=(global_batch // microbatches // replicas, seq_len, config.d_model),
        dtype=jnp.dtype(run.compute_dtype),
        spec=PartitionSpec(*activation_spec),
    )

    def train_step(params, opt_state, batch):
        loss, grads = gradients(params, in_order(run, batch))
        if zero_stage >= 1:
            own = update_shardings(params, mesh, parts.segment)
            grads, params = jax.lax.with_sharding_constraint((grads, params), (own, own))
        updates, opt_state = rule.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, {"loss": loss}

    _, params = abstract_model(config, run)
    params = map_layers(layout.arrange, params, parts.segment)
    opt_state = jax.eval_shape(rule.init, params)
    return train_step, (params, opt_state, abstract_batch(config, global_batch, seq_len)), (0, 1)


def _pipelined(
    parts: StageFunctions,
    plan: Schedule,
    layout: Layout,
    mesh: AbstractMesh,
    *,
    shape: tuple[int, int, int],
    dtype: Any,
    spec: PartitionSpec,
) -> Callable[[Any, Any], tuple[jax.Array, Any]]:
    """(params, batch) -> (mean loss, mean gradients)."""
    _, s, _ = shape
    spread = plan.stages if s % plan.stages == 0 else 1
    manual = tuple(axis for axis in (STAGE, DATA) if axis in mesh.axis_names)
    data = tuple(axis for axis in manual if axis == DATA)
    n_means = plan.microbatches * mesh.shape.get(DATA, 1)

    def body(stage_id, mask, weights, outer, inputs, targets):
        worker = _Worker(
            parts=parts,
            plan=plan,
            stage=stage_id[0],
            mask=mask[0],
            weights=jax.tree.map(
                lambda w: w.reshape(layout.chunks, layout.slots, *w.shape[1:]), weights
            ),
            outer=outer,
            inputs=inputs,
            targets=targets,
            spread=spread,
            spec=spec,
        )
        state = worker.start(shape, dtype)
        for phase in plan.phases():
            tick = functools.partial(worker.tick, phase)
            state, _ = jax.lax.scan(tick, state, jnp.arange(phase.start, phase.stop))
        loss = jax.lax.psum(state["loss"], manual) / n_means
        outer_grads = jax.tree.map(lambda g: jax.lax.psum(g, manual) / n_means, state["outer"])

        def mean(g):
            g = jax.lax.psum(g, data) if data else g
            return g.reshape(layout.chunks * layout.slots, *g.shape[2:]) / n_means

        return loss, jax.tree.map(mean, state["weights"]), outer_grads

    on_stage, tokens = PartitionSpec(STAGE), PartitionSpec(None, data or None)
    mapped = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(on_stage, on_stage, on_stage, PartitionSpec(), tokens, tokens),
        out_specs=(PartitionSpec(), on_stage, PartitionSpec()),
        axis_names=set(manual),
        check_vma=False,
    )
    mask = layout.mask()

    def gradients(params, batch):
        outer = {k: v for k, v in params.items() if k != parts.segment}

        def split(x):
            # neighbours go to different microbatches, so that a sharded batch stays where it is
            return jnp.moveaxis(x.reshape(-1, plan.microbatches, s), 1, 0)

        loss, grads, outer_grads = mapped(
            jnp.arange(plan.stages),
            jnp.asarray(mask),
            params[parts.segment],
            outer,
            split(batch["inputs"]),
            split(batch["targets"]),
        )
        # in the order of params, so that the trees are equal
        return loss, {k: grads if k == parts.segment else outer_grads[k] for k in params}

    return gradients


class _Worker:
    """One stage inside the map: its weights, its tokens, and what it does at a tick."""

    def __init__(
        self, *, parts, plan, stage, mask, weights, outer, inputs, targets, spread, spec
    ) -> None:
        self.parts, self.plan, self.stage, self.mask = parts, plan, stage, mask
        self.weights, self.outer = weights, outer
        self.inputs, self.targets = inputs, targets
        self.spread, self.spec = spread, spec
        self.first = stage == 0
        self.last = stage == plan.stages - 1

    def start(self, shape, dtype) -> dict[str, Any]:
        plan, (b, s, d) = self.plan, shape
        zeros = functools.partial(jax.tree.map, lambda w: jnp.zeros(w.shape, jnp.float32))
        return {
            "forward": self.pin(jnp.zeros(shape, dtype)),
            "backward": self.pin(jnp.zeros(shape, dtype)),
            "kept": jnp.zeros((plan.chunks, plan.slots, *shape), dtype),
            "loss_grads": jnp.zeros((plan.loss_slots, b, s // self.spread, d), dtype),
            "weights": zeros(self.weights),
            "outer": zeros(self.outer),
            "loss": jnp.float32(0.0),
        }

    def pin(self, x: jax.Array) -> jax.Array:
        if not len(self.spec):
            return x
        mesh = jax.sharding.get_abstract_mesh()
        return jax.lax.with_sharding_constraint(x, jax.sharding.NamedSharding(mesh, self.spec))

    def embed(self, j: jax.Array) -> Callable[[Any], jax.Array]:
        """outer -> microbatch j embedded, the gradient of outer laid out as outer is."""
        return lambda outer: self.parts.embed(
            pinned_weights(outer, self.parts.segment), self.inputs[j]
        )

    def tick(self, phase: Phase, state: dict[str, Any], t: jax.Array):
        state = dict(state)
        if phase.forward:
            state = self.forward(state, t)
        if phase.backward:
            state = self.backward(state, t)
        return state, None

    def forward(self, state: dict[str, Any], t: jax.Array) -> dict[str, Any]:
        plan = self.plan
        valid, chunk, j = plan.forward(t, self.stage)
        embedded = self.parts.embed(self.outer, self.inputs[j])
        x = self.pin(jnp.where(self.first & (chunk == 0), embedded, state["forward"]))
        at = (chunk, j % plan.slots)
        state["kept"] = _put(state["kept"], x, at, valid)
        y = self.pin(self.parts.layers(_chunk(self.weights, chunk), self.mask[chunk], x))
        state = self.losses(state, y, t)
        state["forward"] = self.send(y, +1)
        return state

    def losses(self, state: dict[str, Any], y: jax.Array, t: jax.Array) -> dict[str, Any]:
        """The loss of the microbatch that leaves the last stage, if one does at this tick."""
        plan = self.plan
        valid, chunk, j = plan.forward(t, plan.stages - 1)  # the same on every stage
        leaves = valid & (chunk == plan.chunks - 1)

        def some(loss, outer, loss_grads):
            mine = self.share(y)
            targets = self.positions(self.targets[j])

            def of(outer, mine):
                return self.parts.loss(outer, mine, targets) / plan.stages

            value, (d_outer, d_mine) = jax.value_and_grad(of, argnums=(0, 1))(self.outer, mine)
            outer = jax.tree.map(jnp.add, outer, d_outer)
            slot = j % plan.loss_slots
            loss_grads = jax.lax.dynamic_update_index_in_dim(loss_grads, d_mine, slot, 0)
            return loss + value, outer, loss_grads

        def none(*same):
            return same

        names = ("loss", "outer", "loss_grads")
        found = jax.lax.cond(leaves, some, none, *(state[name] for name in names))
        return {**state, **dict(zip(names, found))}

    def backward(self, state: dict[str, Any], t: jax.Array) -> dict[str, Any]:
        plan = self.plan
        valid, chunk, j = plan.backward(t, self.stage)
        x = self.pin(state["kept"][chunk, j % plan.slots])
        from_loss = self.whole(state["loss_grads"][_last_index(plan, t)])
        at_end = self.last & (chunk == plan.chunks - 1)
        dy = self.pin(jnp.where(at_end, from_loss, state["backward"]))
        mask = self.mask[chunk]
        weights = _chunk(self.weights, chunk)
        _, pull = jax.vjp(lambda w, x: self.parts.layers(w, mask, x), weights, x)
        d_weights, dx = pull(dy)
        state["weights"] = jax.tree.map(
            lambda total, d: total.at[chunk].add(jnp.where(valid, d, 0.0)),
            state["weights"],
            d_weights,
        )
        at_start = valid & self.first & (chunk == 0)
        _, pull = jax.vjp(self.embed(j), self.outer)
        (d_outer,) = pull(jnp.where(at_start, dx, jnp.zeros((), dx.dtype)))
        state["outer"] = jax.tree.map(jnp.add, state["outer"], d_outer)
        state["backward"] = self.send(self.pin(dx), -1)
        return state

    def send(self, x: jax.Array, step: int) -> jax.Array:
        """To the next stage (+1) or the one before (-1), around."""
        p = self.plan.stages
        return self.pin(jax.lax.ppermute(x, STAGE, [(i, (i + step) % p) for i in range(p)]))

    def share(self, y: jax.Array) -> jax.Array:
        """The last stage's y [B, S, D] -> [B, S / stages, D]: every stage its positions."""
        if self.spread == 1:
            found = jnp.where(self.last, y, jnp.zeros((), y.dtype))
            return jax.lax.psum(found.astype(jnp.float32), STAGE).astype(y.dtype)
        b, s, d = y.shape
        y = y.reshape(b, s // self.spread, self.spread, d)
        # an exchange rather than a reduction of zeros: nothing is added up
        return jax.lax.all_to_all(y, STAGE, split_axis=2, concat_axis=2)[:, :, -1]

    def positions(self, targets: jax.Array) -> jax.Array:
        if self.spread == 1:
            return targets
        b, s = targets.shape
        return targets.reshape(b, s // self.spread, self.spread)[:, :, self.stage]

    def whole(self, shared: jax.Array) -> jax.Array:
        """The inverse of :meth:`share`, on every stage."""
        if self.spread == 1:
            return shared
        found = jax.lax.all_gather(shared, STAGE, axis=2)
        return found.reshape(shared.shape[0], -1, shared.shape[-1])


def _last_index(plan: Schedule, t: jax.Array) -> jax.Array:
    _, _, j = plan.backward(t, plan.stages - 1)
    return j % plan.loss_slots


def _chunk(tree: Any, chunk: jax.Array) -> Any:
    return jax.tree.map(lambda w: w[0] if w.shape[0] == 1 else w[chunk], tree)


def _put(kept: jax.Array, x: jax.Array, at: tuple[Any, Any], valid: jax.Array) -> jax.Array:
    chunk, slot = at
    old = kept[chunk, slot]
    return kept.at[chunk, slot].set(jnp.where(valid, x, old))
