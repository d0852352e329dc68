"""What one stage of a pipelined plan runs, as a program of its own over the stage's mesh.

It is what a stage does at a tick in the steady state, and the update of its weights once: embed
tokens, run a chunk of layers forward and keep the input, compute the loss of its share of positions,
run a chunk backward from kept inputs, add up gradients. It holds what a stage holds: weights,
optimizer state, kept inputs, sums of gradients. So the memory that the compiler says is the stage's.

Where stages take turns at the layers before the first one, it is a tick in which they do. With zero
bubble the tick does B alone and W of another microbatch, and holds what is kept between them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from graphs.zoo.config import ModelConfig
from graphs.zoo.options import RunOptions
from graphs.zoo.train_step import abstract_batch, abstract_model, check_ring
from graphs.zoo.update_rules import update_rule
from placement.pipeline.chunk_backward import split_backward, whole_backward
from placement.pipeline.reduction import reduce_gradients, reduced_specs
from placement.pipeline.schedule import ZERO_BUBBLE, Schedule
from placement.pipeline.shardings import (
    DATA,
    EXPERT,
    STAGE,
    state_spec,
    update_shardings,
    weight_spec,
)
from placement.pipeline.stages import pipelined_segment, stage_functions, uneven
from placement.plan import Plan


def stage_program(
    plan: Plan, config: ModelConfig
) -> tuple[Callable, tuple[Any, ...], Any, Any, tuple[int, ...]]:
    """(function, abstract arguments, in_specs, out_specs, donated) of a stage over its own mesh."""
    stage = _Stage(plan, config)
    in_specs, out_specs = stage.specs()
    return stage.step, stage.arguments(), in_specs, out_specs, (0, 1, 2, 3)


class _Stage:
    """A stage's model, schedule and mesh, and what it runs."""

    def __init__(self, plan: Plan, config: ModelConfig) -> None:
        program = plan.program
        self.mesh = {k: v for k, v in plan.mesh_shape.items() if k != STAGE} or {DATA: 1}
        options = {f.name for f in dataclasses.fields(RunOptions)}
        given = {k: v for k, v in program.items() if k in options}
        run = RunOptions(**{**given, "mesh_shape": tuple(self.mesh.items())})
        run = check_ring(config, run, program["seq_len"])
        self.segment = pipelined_segment(config)
        self.schedule = Schedule(
            kind=program["schedule"],
            stages=plan.mesh_shape[STAGE],
            microbatches=program["microbatches"],
            chunks=program["chunks"],
        )
        self.layers = uneven(
            self.segment.repeats, self.schedule.stages, program["chunks"], program["layers"]
        )
        self.mask = jnp.ones((self.layers.slots,), bool)
        self.seq_len: int = program["seq_len"]
        self.parts = stage_functions(config, run, self.seq_len)
        self.zero_stage: int = program["zero_stage"]
        self.rule = update_rule(
            program.get("optimizer", "adamw"),
            learning_rate=program.get("learning_rate", 3e-4),
            clip_norm=program.get("clip_norm", 1.0),
            state_dtype=program.get("optimizer_state_dtype", "float32"),
        )
        self.abstract_mesh = AbstractMesh(tuple(self.mesh.values()), tuple(self.mesh))
        self.activations = PartitionSpec(
            *[tuple(e) if isinstance(e, list) else e for e in program["activation_spec"]]
        )
        # The sums of gradients of the ticks before. Made inside, their memory is free for the
        # reduction, as in the step's loop; but XLA then keeps them whole on axes that are left to it,
        # so that there they are an argument (and their reduction counts beside them).
        self.sums_inside = set(self.mesh) <= {DATA}
        _, params = abstract_model(config, run)
        held = self.layers.chunks * self.layers.slots
        self.params = {
            **params,
            self.segment.name: jax.tree.map(
                lambda w: jax.ShapeDtypeStruct((held, *w.shape[1:]), w.dtype),
                params[self.segment.name],
            ),
        }
        batch = program["global_batch"] // program["microbatches"]
        self.hidden = jax.ShapeDtypeStruct(
            (batch, self.seq_len, self.parts.width), jnp.dtype(run.compute_dtype)
        )
        stages = self.schedule.stages
        self.inputs = tuple(k for k in abstract_batch(config, 1, 1) if k != "targets")
        self.share = self.seq_len // stages if self.seq_len % stages == 0 else self.seq_len
        """Positions of a sequence whose loss the stage computes."""

    def arguments(self) -> tuple[Any, ...]:
        """(params, opt_state, sums of gradients, kept inputs, arrived activation, its cotangent,
        tokens, targets, (chunk, slot, virtual stage, slot of the backward pass))."""
        replicas = self.mesh.get(DATA, 1)
        sums = jax.tree.map(
            lambda w: jax.ShapeDtypeStruct((replicas, *w.shape), jnp.float32), self.params
        )
        batch, x = self.hidden.shape[0], self.hidden
        places = (self.layers.chunks, self.schedule.slots, self.layers.slots)
        kept = jax.ShapeDtypeStruct((*places, *x.shape), x.dtype)
        return (
            self.params,
            jax.eval_shape(self.rule.init, self.params),
            None if self.sums_inside else sums,
            kept,
            x,
            x,
            {k: jax.ShapeDtypeStruct((batch, self.seq_len), jnp.int32) for k in self.inputs},
            jax.ShapeDtypeStruct((batch, self.share), jnp.int32),
            jax.ShapeDtypeStruct((4,), jnp.int32),
        )

    def specs(self) -> tuple[Any, Any]:
        """PartitionSpecs of the arguments and of what :meth:`step` returns."""
        along = self.activations[1] if len(self.activations) > 1 else None
        split = tuple(a for a in (DATA, EXPERT) if self.mesh.get(a, 1) > 1) or None
        weights = self._weight_specs(self.params, zero_stage=0)
        state = self._weight_specs(
            jax.eval_shape(self.rule.init, self.params), zero_stage=self.zero_stage
        )
        sums = jax.tree.map(
            lambda spec: PartitionSpec(DATA if DATA in self.mesh else None, *spec),
            weights,
            is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
        )
        hidden = PartitionSpec(split, along)
        kept = PartitionSpec(None, None, None, *hidden)
        tokens, whole = PartitionSpec(split), PartitionSpec()
        return (
            (
                weights,
                state,
                None if self.sums_inside else sums,
                kept,
                hidden,
                hidden,
                {k: tokens for k in self.inputs},
                tokens,
                whole,
            ),
            (weights, state, kept, hidden, hidden, whole, hidden),
        )

    def _weight_specs(self, tree: Any, *, zero_stage: int) -> Any:
        def one(path, leaf):
            spec = weight_spec(path, leaf.shape, self.mesh, self.segment.name)
            if zero_stage >= 1:
                spec = state_spec(spec, leaf.shape, self.mesh)
            return PartitionSpec(*[axes or None for axes in spec])

        return jax.tree_util.tree_map_with_path(one, tree)

    def step(self, params, opt_state, sums, kept, *arrived):
        """One tick, and the update of the weights by the gradients summed."""
        grads, kept, y, dx, loss, d_hidden = self._mapped()(params, sums, kept, *arrived)
        if self.zero_stage >= 1:
            own = update_shardings(params, self.abstract_mesh, self.segment.name)
            grads, params = jax.lax.with_sharding_constraint((grads, params), (own, own))
        updates, opt_state = self.rule.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return params, opt_state, kept, y, dx, loss, d_hidden

    def _mapped(self) -> Callable:
        """:meth:`tick`, on every replica of the data axis if there is one."""
        if DATA not in self.mesh:
            return self.tick
        rows, whole = PartitionSpec(DATA), PartitionSpec()
        stack = PartitionSpec(None, None, None, DATA)
        sums = None if self.sums_inside else rows
        reduced = reduced_specs(self.params, self.mesh, (DATA,), **self._reduction())
        return jax.shard_map(
            self.tick,
            mesh=self.abstract_mesh,
            in_specs=(whole, sums, stack, rows, rows, rows, rows, whole),
            out_specs=(reduced, stack, rows, rows, whole, rows),
            axis_names={DATA},
            check_vma=False,
        )

    def tick(self, params, sums, kept, arrived, cotangent, tokens, targets, at):
        """A steady tick of one replica; its sums of gradients, added up over replicas at the end."""
        name, parts = self.segment.name, self.parts
        if self.sums_inside:
            zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), params)
            sums = jax.lax.optimization_barrier(zeros)
        else:
            sums = jax.tree.map(lambda g: g[0], sums)
        outer = {k: v for k, v in params.items() if k != name}
        shared = {k: outer[k] for k in parts.shared}
        chunk = jax.tree.map(lambda w: w[at[0]], self._by_chunk(params[name]))
        x = self._pin(jnp.where(at[2] == 0, parts.embed(outer, tokens), arrived))
        y, entered = parts.layers(chunk, self.mask, x, shared)
        kept = kept.at[at[0], at[1]].set(self._pin(entered))
        y = self._pin(y)
        some = y.reshape(*y.shape[:1], -1, self.seq_len // self.share, y.shape[-1])[:, :, 0]
        some = some[..., : parts.d_model]
        loss, (d_outer, d_hidden) = jax.value_and_grad(parts.loss, argnums=(0, 1))(
            outer, some, targets
        )
        d_chunk, d_shared, dx = self._backward(
            chunk, shared, self._pin(kept[at[0], at[3]]), self._pin(cotangent), at
        )
        summed = jax.tree.map(
            lambda total, by_chunk, d: by_chunk.at[at[0]].add(d).reshape(total.shape),
            sums[name],
            self._by_chunk(sums[name]),
            d_chunk,
        )
        _, pull = jax.vjp(lambda o: parts.embed(o, tokens), outer)
        (d_embed,) = pull(dx)
        rest = {k: v for k, v in sums.items() if k != name}
        rest = jax.tree.map(lambda a, b, c: a + b + c, rest, d_outer, d_embed)
        for k, d in d_shared.items():
            rest[k] = rest[k] + d
        found = {k: summed if k == name else rest[k] for k in sums}
        if DATA in self.mesh:
            found = reduce_gradients(found, params, self.mesh, (DATA,), **self._reduction())
            loss = jax.lax.psum(loss, DATA)
        return found, kept, y, self._pin(dx), loss, d_hidden

    def _reduction(self) -> dict[str, Any]:
        return {"segment": self.segment.name, "zero_stage": self.zero_stage}

    def _backward(self, chunk, shared, entered, dy, at):
        """(gradients of a chunk's weights, of what layers share, of its input)."""
        if self.schedule.kind != ZERO_BUBBLE or not self.schedule.put_off:
            return whole_backward(self.parts.layer, chunk, shared, self.mask, entered, dy)
        one = jax.tree.map(lambda w: w[0], chunk)
        split = split_backward(self.parts.plain_layer, one, shared, dy)
        dx, d_shared, small, crossing = split.inputs(chunk, shared, self.mask, entered, dy)
        places = self.schedule.put_off
        held = jax.lax.optimization_barrier(
            [jnp.zeros((places, *c.shape), c.dtype) for c in crossing]
        )
        held = [h.at[at[1] % places].set(c) for h, c in zip(held, crossing)]
        found = split.weights(chunk, [h[at[3] % places] for h in held])
        leaves = [{**small, **found}[i] for i in range(len(small) + len(found))]
        return jax.tree.unflatten(jax.tree.structure(chunk), leaves), d_shared, dx

    def _by_chunk(self, stacked: Any) -> Any:
        """Leaves [chunks * slots, ...] as [chunks, slots, ...]."""
        layers = self.layers
        return jax.tree.map(lambda w: w.reshape(layers.chunks, layers.slots, *w.shape[1:]), stacked)

    def _pin(self, x: jax.Array) -> jax.Array:
        if not len(self.activations):
            return x
        inside = jax.sharding.get_abstract_mesh() if DATA in self.mesh else self.abstract_mesh
        spec = PartitionSpec(*[None] * (x.ndim - 3), *self.activations)
        return jax.lax.with_sharding_constraint(x, NamedSharding(inside, spec))
