"""Train steps written with flax nnx, flax linen, equinox and haiku."""

from __future__ import annotations

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import optax
from flax import linen, nnx
from flax.training.train_state import TrainState
from programs_plain import B, D, F, L, S, V, cross_entropy, initial, normal, program, tokens


class NnxBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, rate: float):
        self.norm_1, self.norm_2 = nnx.LayerNorm(D, rngs=rngs), nnx.RMSNorm(D, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(8, D, qkv_features=64, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(D, F, rngs=rngs), nnx.Linear(F, D, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x):
        mask = nnx.make_causal_mask(jnp.ones(x.shape[:2]))
        x = x + self.attention(self.norm_1(x), mask=mask)
        return x + self.dropout(self.down(nnx.gelu(self.up(self.norm_2(x)))))


class NnxModel(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, rate: float = 0.0):
        self.embedding = nnx.Embed(V, D, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(rngs, rate) for _ in range(L)])

    def __call__(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.embedding.attend(x)


def nnx_split_and_merge():
    graphdef, params = nnx.split(NnxModel(nnx.Rngs(0)), nnx.Param, ...)[:2]
    rest = nnx.split(NnxModel(nnx.Rngs(0)), nnx.Param, ...)[2]

    def loss_fn(params, batch):
        model = nnx.merge(graphdef, params, rest)
        return cross_entropy(model(batch["inputs"]), batch["targets"])

    return program(loss_fn, params, tokens())


def nnx_optimizer_with_dropout():
    """The stateful style: model, optimizer and dropout counters are one state."""
    model = NnxModel(nnx.Rngs(0), rate=0.1)
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)
    graphdef, state = nnx.split((model, optimizer))

    def train_step(state, batch):
        model, optimizer = nnx.merge(graphdef, state)

        def loss_fn(model):
            return cross_entropy(model(batch["inputs"]), batch["targets"])

        loss, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer)), loss

    return train_step, (state, tokens()), (0,)


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x, _=None):
        mask = linen.make_causal_mask(jnp.ones(x.shape[:2]))
        y = linen.LayerNorm()(x)
        x = x + linen.MultiHeadDotProductAttention(8, qkv_features=64)(y, mask=mask)
        y = linen.RMSNorm()(x)
        return x + linen.Dense(D)(linen.silu(linen.Dense(F)(y))), None


class LinenModel(linen.Module):
    scan: bool

    @linen.compact
    def __call__(self, ids):
        x = linen.Embed(V, D)(ids)
        if self.scan:
            stacked = linen.scan(
                linen.remat(LinenBlock, prevent_cse=False),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=L,
            )
            x, _ = stacked()(x, None)
        else:
            for _ in range(L):
                x, _ = LinenBlock()(x)
        return linen.Dense(V)(linen.LayerNorm()(x))


def linen_train_state():
    model = LinenModel(scan=False)
    batch = tokens()
    params = model.init(jax.random.key(0), batch["inputs"])["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adamw(1e-2))

    def train_step(state, batch):
        def loss_fn(params):
            logits = state.apply_fn({"params": params}, batch["inputs"])
            return cross_entropy(logits, batch["targets"])

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads), {"loss": loss}

    return train_step, (state, batch), (0,)


def linen_scanned_and_rematerialised():
    model = LinenModel(scan=True)
    batch = tokens()
    variables = model.init(jax.random.key(0), batch["inputs"])

    def loss_fn(variables, batch):
        return cross_entropy(model.apply(variables, batch["inputs"]), batch["targets"])

    return program(loss_fn, variables, batch)


class EquinoxBlock(eqx.Module):
    norm_1: eqx.nn.LayerNorm
    norm_2: eqx.nn.RMSNorm
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP

    def __init__(self, key):
        a, m = jax.random.split(key)
        self.norm_1, self.norm_2 = eqx.nn.LayerNorm(D), eqx.nn.RMSNorm(D)
        self.attention = eqx.nn.MultiheadAttention(8, D, qk_size=8, vo_size=8, key=a)
        self.mlp = eqx.nn.MLP(D, D, F, 1, activation=jax.nn.gelu, key=m)

    def __call__(self, x):
        y = jax.vmap(self.norm_1)(x)
        x = x + self.attention(y, y, y, mask=jnp.tril(jnp.ones((S, S), bool)))
        return x + jax.vmap(lambda row: self.mlp(self.norm_2(row)))(x)


class EquinoxModel(eqx.Module):
    embedding: eqx.nn.Embedding
    blocks: list[EquinoxBlock]
    head: eqx.nn.Linear

    def __init__(self, key):
        e, h, *keys = jax.random.split(key, 2 + L)
        self.embedding = eqx.nn.Embedding(V, D, key=e)
        self.blocks = [EquinoxBlock(k) for k in keys]
        self.head = eqx.nn.Linear(D, V, use_bias=False, key=h)

    def __call__(self, ids):
        x = jax.vmap(self.embedding)(ids)
        for block in self.blocks:
            x = block(x)
        return jax.vmap(self.head)(x)


def equinox_partitioned():
    params, static = eqx.partition(EquinoxModel(jax.random.key(0)), eqx.is_array)

    def loss_fn(params, batch):
        model = eqx.combine(params, static)
        return cross_entropy(jax.vmap(model)(batch["inputs"]), batch["targets"])

    return program(loss_fn, params, tokens())


def haiku_transformed():
    def forward(ids):
        x = hk.Embed(V, D)(ids)
        mask = jnp.tril(jnp.ones((1, 1, S, S)))
        for _ in range(L):
            y = hk.LayerNorm(-1, True, True)(x)
            x = x + hk.MultiHeadAttention(
                8, 8, model_size=D, w_init=hk.initializers.VarianceScaling(1.0)
            )(y, y, y, mask)
            y = hk.RMSNorm(-1)(x)
            x = x + hk.Sequential([hk.Linear(F), jax.nn.gelu, hk.Linear(D)])(y)
        return hk.Linear(V)(x)

    model = hk.without_apply_rng(hk.transform(forward))
    batch = tokens()
    params = model.init(jax.random.key(0), batch["inputs"])

    def loss_fn(params, batch):
        return cross_entropy(model.apply(params, batch["inputs"]), batch["targets"])

    return program(loss_fn, params, batch)


def haiku_batch_norm_state():
    """A state that is neither parameter nor gradient: moving averages."""

    def forward(x):
        x = hk.Linear(F)(x)
        x = hk.BatchNorm(True, True, 0.9)(x, is_training=True)
        return hk.Linear(8)(jax.nn.relu(x))

    model = hk.without_apply_rng(hk.transform_with_state(forward))
    x = normal(1, (B, D), 1)
    batch = {"x": x, "label": jnp.arange(B) % 8}
    params, averages = model.init(jax.random.key(0), x)
    rule = optax.adam(1e-2)

    def train_step(params, state, batch):
        opt_state, averages = state

        def loss_fn(params):
            logits, new = model.apply(params, averages, batch["x"])
            return cross_entropy(logits, batch["label"]), new

        (loss, averages), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = rule.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), (opt_state, averages), {"loss": loss}

    return train_step, (params, (initial(rule, params), averages), batch), (0, 1)


PROGRAMS = {
    f.__name__: f
    for f in (
        nnx_split_and_merge,
        nnx_optimizer_with_dropout,
        linen_train_state,
        linen_scanned_and_rematerialised,
        equinox_partitioned,
        haiku_transformed,
        haiku_batch_norm_state,
    )
}
