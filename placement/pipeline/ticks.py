"""What a stage does at a tick: a forward chunk, the loss of its share, a backward chunk, sends.

Every stage runs the same program at every tick; what differs are its weights, its tokens and which
item of the schedule it works on. Nothing branches by stage: a stage without a valid item computes and
does not add up. So a tick lasts as long as what its phase computes (`schedule.Phase`).

Where layers come before the first stage (leading layers of another kind, an encoder), stages take
turns at them, each a whole microbatch every p ticks: a share of 1/p on every stage and no bubble. What
a stage has computed travels to the first one, one stage a tick, and its gradient back the same way.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from placement.pipeline.chunk_backward import split_backward, whole_backward
from placement.pipeline.schedule import ZERO_BUBBLE, Phase, Schedule
from placement.pipeline.shardings import STAGE, pinned_weights


class StageWorker:
    """One stage inside the map: its weights, its tokens, and what it does at a tick."""

    def __init__(
        self, *, parts, plan, stage, mask, weights, outer, tokens, targets, spread, spec
    ) -> None:
        self.parts, self.plan, self.stage, self.mask = parts, plan, stage, mask
        self.weights, self.outer = weights, outer
        self.shared = {name: outer[name] for name in parts.shared}
        self.tokens, self.targets = tokens, targets
        self.spread, self.spec = spread, spec
        self.first = stage == 0
        self.last = stage == plan.stages - 1

    def start(self, shape, dtype) -> dict[str, Any]:
        """The state before the first tick; shape [B, S, width] of what is sent."""
        plan, (b, s, _) = self.plan, shape
        zeros = functools.partial(jax.tree.map, lambda w: jnp.zeros(w.shape, jnp.float32))
        share = (plan.loss_slots, b, s // self.spread, self.parts.d_model)
        state = {
            "forward": self.pin(jnp.zeros(shape, dtype)),
            "backward": self.pin(jnp.zeros(shape, dtype)),
            "kept": jnp.zeros((plan.chunks, plan.slots, self.mask.shape[-1], *shape), dtype),
            "loss_grads": jnp.zeros(share, dtype),
            "weights": zeros(self.weights),
            "outer": zeros(self.outer),
            "loss": jnp.float32(0.0),
        }
        if self.parts.takes_turns:
            state["entering"] = state["leaving"] = state["forward"]
        if plan.kind == ZERO_BUBBLE:
            x, chunk = state["forward"], _chunk(self.weights, 0)
            one = jax.tree.map(lambda w: w[0], chunk)
            self.split = split_backward(self.parts.plain_layer, one, self.shared, x)
            *_, crossing = jax.eval_shape(
                self.split.inputs, chunk, self.shared, self.mask[0], state["kept"][0, 0], x
            )
            state["put_off"] = [jnp.zeros((plan.put_off, *c.shape), c.dtype) for c in crossing]
        return state

    def pin(self, x: jax.Array) -> jax.Array:
        """[..., B, S, W] laid out as between layers."""
        if not len(self.spec):
            return x
        mesh = jax.sharding.get_abstract_mesh()
        spec = jax.sharding.PartitionSpec(*[None] * (x.ndim - 3), *self.spec)
        return jax.lax.with_sharding_constraint(x, jax.sharding.NamedSharding(mesh, spec))

    def tick(self, phase: Phase, state: dict[str, Any], t: jax.Array):
        state = dict(state)
        if phase.forward:
            state = self.forward(state, t)
        if phase.backward and phase.weights:
            state = self.backward(state, t)
        elif phase.backward:
            state = self.backward_of_inputs(state, t)
        elif phase.weights:
            state = self.backward_of_weights(state, t)
        return state, None

    def forward(self, state: dict[str, Any], t: jax.Array) -> dict[str, Any]:
        plan = self.plan
        valid, chunk, j = plan.forward(t, self.stage)
        state, embedded = self.embedded(state, t, j)
        x = self.pin(jnp.where(self.first & (chunk == 0), embedded, state["forward"]))
        y, entered = self.parts.layers(
            _chunk(self.weights, chunk), self.mask[chunk], x, self.shared
        )
        y, at = self.pin(y), (chunk, j % plan.slots)
        state["kept"] = _put(state["kept"], self.pin(entered), at, valid)
        state = self.losses(state, y[..., : self.parts.d_model], t)
        state["forward"] = self.send(y, +1)
        return state

    def embedded(self, state: dict[str, Any], t: jax.Array, j: jax.Array):
        """What the first stage's first chunk reads of microbatch j."""
        plan = self.plan
        if not self.parts.takes_turns:
            return state, self.parts.embed(self.outer, _microbatch(self.tokens, j))
        turn, within = t // (plan.stages * plan.chunks), t % (plan.stages * plan.chunks)
        mine = jnp.minimum(turn * plan.stages + self.stage, plan.microbatches - 1)
        entering = jax.lax.cond(
            (within == 0) & (t < plan.items),
            lambda _: self.pin(self.parts.embed(self.outer, _microbatch(self.tokens, mine))),
            lambda entering: entering,
            state["entering"],
        )
        return {**state, "entering": self.send(entering, -1)}, entering

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
        """A chunk's whole backward pass."""
        valid, chunk, entered, dy = self.arrived(state, t)
        d_weights, d_shared, dx = whole_backward(
            self.parts.layer,
            _chunk(self.weights, chunk),
            self.shared,
            self.mask[chunk],
            entered,
            dy,
        )
        state["weights"] = jax.tree.map(
            lambda total, d: total.at[chunk].add(jnp.where(valid, d, 0.0)),
            state["weights"],
            d_weights,
        )
        return self.passed_on(state, t, dx, d_shared)

    def backward_of_inputs(self, state: dict[str, Any], t: jax.Array) -> dict[str, Any]:
        """Only the gradient of a chunk's input; what the weights' gradients need is kept."""
        valid, chunk, entered, dy = self.arrived(state, t)
        weights = _chunk(self.weights, chunk)
        dx, d_shared, small, crossing = self.split.inputs(
            weights, self.shared, self.mask[chunk], entered, dy
        )
        _, place = self.plan.weights_put_off(t, self.stage)
        place = jnp.clip(place, 0, self.plan.put_off - 1)
        state["put_off"] = [
            _put(kept[None], new, (0, place), valid)[0]
            for kept, new in zip(state["put_off"], crossing)
        ]
        small = {i: jnp.where(valid, d, 0.0) for i, d in small.items()}
        state["weights"] = _add_leaves(state["weights"], small)
        return self.passed_on(state, t, self.pin(dx), d_shared)

    def backward_of_weights(self, state: dict[str, Any], t: jax.Array) -> dict[str, Any]:
        """The gradients of weights of a microbatch whose input's gradient is long sent."""
        place = self.plan.weights_done(t)
        crossing = [kept[place] for kept in state["put_off"]]
        found = self.split.weights(_chunk(self.weights, 0), crossing)
        state["weights"] = _add_leaves(state["weights"], found)
        return state

    def arrived(self, state: dict[str, Any], t: jax.Array):
        """(valid, chunk, what entered its layers, the gradient of its output) of a backward chunk."""
        plan = self.plan
        valid, chunk, j = plan.backward(t, self.stage)
        entered = self.pin(state["kept"][chunk, j % plan.slots])
        from_loss = self.whole(state["loss_grads"][_last_index(plan, t)])
        beside = entered.shape[-1] - from_loss.shape[-1]
        from_loss = jnp.pad(from_loss, ((0, 0), (0, 0), (0, beside)))
        at_end = self.last & (chunk == plan.chunks - 1)
        return valid, chunk, entered, self.pin(jnp.where(at_end, from_loss, state["backward"]))

    def passed_on(self, state, t: jax.Array, dx: jax.Array, d_shared: Any) -> dict[str, Any]:
        """The gradient of a chunk's input, sent or pulled back through the embedding."""
        valid, chunk, j = self.plan.backward(t, self.stage)
        outer = dict(state["outer"])
        for name, d in d_shared.items():
            d = jax.tree.map(lambda d: jnp.where(valid, d, 0.0), d)
            outer[name] = jax.tree.map(jnp.add, outer[name], d)
        state["outer"] = outer
        at_start = valid & self.first & (chunk == 0)
        if self.parts.takes_turns:
            state = self.left(state, t, dx, at_start)
        else:
            d_embedded = jnp.where(at_start, dx, jnp.zeros((), dx.dtype))
            state["outer"] = self.embedding_gradient(state["outer"], d_embedded, j)
        state["backward"] = self.send(self.pin(dx), -1)
        return state

    def left(self, state, t: jax.Array, dx: jax.Array, at_start: jax.Array) -> dict[str, Any]:
        """Gradients of what entered, on their way to the stages that pull them back in turn."""
        plan = self.plan
        leaving = jnp.where(at_start, dx, self.send(state["leaving"], +1))
        valid, chunk, j = plan.backward(t, 0)  # the same on every stage
        within = j % plan.stages
        ends = (within == plan.stages - 1) | (j == plan.microbatches - 1)
        mine = j - self.stage

        def some(outer):
            has = self.stage <= within
            d = jnp.where(has, leaving, jnp.zeros((), leaving.dtype))
            return self.embedding_gradient(outer, d, jnp.maximum(mine, 0))

        outer = jax.lax.cond(valid & (chunk == 0) & ends, some, lambda o: o, state["outer"])
        return {**state, "outer": outer, "leaving": leaving}

    def embedding_gradient(self, outer: Any, dx: jax.Array, j: jax.Array) -> Any:
        """Sums of gradients `outer` with those of microbatch j's embedding."""
        tokens = _microbatch(self.tokens, j)

        def embed(outer):  # the gradient of outer is laid out as outer is
            return self.parts.embed(pinned_weights(outer, self.parts.segment), tokens)

        _, pull = jax.vjp(embed, self.outer)
        (d_outer,) = pull(dx)
        return jax.tree.map(jnp.add, outer, d_outer)

    def send(self, x: jax.Array, step: int) -> jax.Array:
        """To the next stage (+1) or the one before (-1), around."""
        p = self.plan.stages
        if p == 1:
            return self.pin(x)
        return self.pin(jax.lax.ppermute(x, STAGE, [(i, (i + step) % p) for i in range(p)]))

    def share(self, y: jax.Array) -> jax.Array:
        """The last stage's y [B, S, D] -> [B, S / stages, D]: every stage its positions."""
        if self.plan.stages == 1:
            return y
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


def _chunk(tree: Any, chunk: Any) -> Any:
    return jax.tree.map(lambda w: w[0] if w.shape[0] == 1 else w[chunk], tree)


def _put(kept: jax.Array, x: jax.Array, at: tuple[Any, Any], valid: jax.Array) -> jax.Array:
    chunk, slot = at
    old = kept[chunk, slot]
    return kept.at[chunk, slot].set(jnp.where(valid, x, old))


def _microbatch(tokens: Any, j: jax.Array) -> Any:
    return jax.tree.map(lambda x: x[j], tokens)


def _add_leaves(sums: Any, gradients: dict[int, jax.Array]) -> Any:
    """Sums [chunks = 1, slots, ...] with gradients [slots, ...] of some of their leaves."""
    leaves, tree = jax.tree.flatten(sums)
    for i, d in gradients.items():
        leaves[i] = leaves[i] + d[None]
    return jax.tree.unflatten(tree, leaves)
