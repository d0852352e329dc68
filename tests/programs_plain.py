"""Train steps written in plain JAX, each for something that planners get wrong."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

B, S, D, H, K, F, V, L = 8, 16, 32, 8, 8, 64, 64, 2
"""batch, sequence, width, heads, head width (heads need not split D), hidden, vocabulary, layers"""


def seeds(seed, n):
    return [1000 * seed + i + 1 for i in range(n)]


def normal(seed, shape, fan_in=None):
    # numpy, because each jax.random call of a new shape is one more compilation
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return jnp.asarray(values / (fan_in or shape[0]) ** 0.5)


def tokens(seed=1, length=S):
    ids = np.random.default_rng(seed).integers(0, V, (B, length + 1), np.int32)
    return {"inputs": jnp.asarray(ids[:, :-1]), "targets": jnp.asarray(ids[:, 1:])}


def zeros(abstract):
    return jax.tree.map(lambda x: jnp.asarray(np.zeros(x.shape, x.dtype)), abstract)


def initial(rule, params):
    """Optimizer state before the first step: zeros, for every rule used here."""
    return zeros(jax.eval_shape(rule.init, params))


def rms(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def attention(params, x, memory=None, causal=True):
    source = x if memory is None else memory
    q = jnp.einsum("bsd,dhk->bshk", x, params["query"])
    k = jnp.einsum("btd,dhk->bthk", source, params["key"])
    v = jnp.einsum("btd,dhk->bthk", source, params["value"])
    scores = jnp.einsum("bshk,bthk->bhst", q, k) / K**0.5
    if causal:
        visible = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        scores = jnp.where(visible, scores, -1e30)
    out = jnp.einsum("bhst,bthk->bshk", jax.nn.softmax(scores, axis=-1), v)
    return jnp.einsum("bshk,hkd->bsd", out, params["output"])


def new_attention(key):
    q, k, v, o = seeds(key, 4)
    return {
        "query": normal(q, (D, H, K)),
        "key": normal(k, (D, H, K)),
        "value": normal(v, (D, H, K)),
        "output": normal(o, (H, K, D), H * K),
    }


def new_layer(key):
    a, u, d = seeds(key, 3)
    return {
        "attention": new_attention(a),
        "up": normal(u, (D, F)),
        "down": normal(d, (F, D)),
        "scale_1": jnp.ones(D),
        "scale_2": jnp.ones(D),
    }


def layer(params, x):
    x = x + attention(params["attention"], rms(x, params["scale_1"]))
    return x + jax.nn.silu(rms(x, params["scale_2"]) @ params["up"]) @ params["down"]


def new_transformer(key, tied=False, stacked=True):
    e, h, *keys = seeds(key, 2 + L)
    layers = [new_layer(k) for k in keys]
    params = {
        "embedding": normal(e, (V, D), D),
        "layers": jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *layers) if stacked else layers,
        "scale": jnp.ones(D),
    }
    return params if tied else {**params, "head": normal(h, (D, V))}


def transformer(params, ids):
    x = params["embedding"][ids]
    if isinstance(params["layers"], list):
        for block in params["layers"]:
            x = layer(block, x)
    else:
        x, _ = jax.lax.scan(lambda x, block: (layer(block, x), None), x, params["layers"])
    x = rms(x, params["scale"])
    head = params["head"] if "head" in params else params["embedding"].T
    return x @ head


def cross_entropy(logits, targets):
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def language_loss(params, batch):
    return cross_entropy(transformer(params, batch["inputs"]), batch["targets"])


def step_with(loss, rule):
    """(params, opt_state, batch) -> (params, opt_state, {"loss"}), optax."""

    def train_step(params, opt_state, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, opt_state = rule.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, {"loss": value}

    return train_step


def program(loss, params, batch, rule=None):
    rule = optax.adam(1e-2) if rule is None else rule
    return step_with(loss, rule), (params, initial(rule, params), batch), (0, 1)


def plain_sgd_without_a_library():
    def train_step(params, batch):
        loss, grads = jax.value_and_grad(language_loss)(params, batch)
        return jax.tree.map(lambda p, g: p - 0.3 * g, params, grads), loss

    return train_step, (new_transformer(0), tokens()), (0,)


def unrolled_layers_tied_embeddings():
    params = new_transformer(0, tied=True, stacked=False)
    return program(language_loss, params, tokens())


def adamw_clipped():
    rule = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    return program(language_loss, new_transformer(0), tokens(), rule)


def adamw_with_schedule():
    schedule = optax.warmup_cosine_decay_schedule(1e-3, 1e-2, 2, 10)
    return program(language_loss, new_transformer(0), tokens(), optax.adamw(schedule))


def adafactor():
    rule = optax.adafactor(1e-1, min_dim_size_to_factor=8)
    return program(language_loss, new_transformer(0), tokens(), rule)


def lion():
    return program(language_loss, new_transformer(0), tokens(), optax.lion(3e-3))


def sgd_with_momentum():
    rule = optax.sgd(0.1, momentum=0.9, nesterov=True)
    return program(language_loss, new_transformer(0), tokens(), rule)


def accumulation_by_scan():
    rule = optax.adam(1e-2)

    def train_step(params, opt_state, batch):
        def body(total, microbatch):
            new = jax.value_and_grad(language_loss)(params, microbatch)
            return jax.tree.map(jnp.add, total, new), None

        parts = jax.tree.map(lambda x: x.reshape(2, B // 2, *x.shape[1:]), batch)
        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        total, _ = jax.lax.scan(body, zero, parts)
        loss, grads = jax.tree.map(lambda x: x / 2, total)
        updates, opt_state = rule.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, {"loss": loss}

    params = new_transformer(0)
    return train_step, (params, initial(rule, params), tokens()), (0, 1)


def _dropout(key):
    rule = optax.adam(1e-2)

    def loss_fn(params, batch, key):
        x = params["embedding"][batch["inputs"]]
        keys = jax.random.split(key, L)

        def body(x, xs):
            block, key = xs
            x = layer(block, x)
            kept = jax.random.bernoulli(key, 0.9, x.shape)
            return jnp.where(kept, x / 0.9, 0.0), None

        x, _ = jax.lax.scan(body, x, (params["layers"], keys))
        return cross_entropy(rms(x, params["scale"]) @ params["head"], batch["targets"])

    def train_step(params, state, batch):
        opt_state, key = state
        key, now = jax.random.split(key)
        loss, grads = jax.value_and_grad(loss_fn)(params, batch, now)
        updates, opt_state = rule.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), (opt_state, key), {"loss": loss}

    params = new_transformer(0)
    return train_step, (params, (initial(rule, params), key), tokens()), (0, 1)


def dropout_with_typed_key():
    return _dropout(jax.random.key(7))


def dropout_with_raw_key():
    return _dropout(jax.random.PRNGKey(7))


def encoder_decoder_attention():
    e, c, d, m, h = seeds(0, 5)
    params = {
        "embedding": normal(e, (V, D), D),
        "encoder": new_layer(c),
        "decoder": new_layer(d),
        "cross": new_attention(m),
        "head": normal(h, (D, V)),
    }

    def loss_fn(params, batch):
        memory = params["embedding"][batch["source"]]
        memory = memory + attention(params["encoder"]["attention"], memory, causal=False)
        x = layer(params["decoder"], params["embedding"][batch["inputs"]])
        x = x + attention(params["cross"], x, memory, causal=False)
        return cross_entropy(x @ params["head"], batch["targets"])

    source = tokens(2, 2 * S)["inputs"]
    return program(loss_fn, params, {**tokens(), "source": source})


def rematerialised_layers_bfloat16():
    def loss_fn(params, batch):
        narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
        x = narrow["embedding"][batch["inputs"]]

        @functools.partial(
            jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        )
        def body(x, block):
            return layer(block, x).astype(jnp.bfloat16), None

        x, _ = jax.lax.scan(body, x, narrow["layers"])
        logits = (rms(x, narrow["scale"]) @ narrow["head"]).astype(jnp.float32)
        return cross_entropy(logits, batch["targets"])

    return program(loss_fn, new_transformer(0), tokens())


def custom_vjp_norm_and_custom_jvp_activation():
    @jax.custom_vjp
    def norm(x, scale):
        return rms(x, scale)

    def forward(x, scale):
        inverse = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
        return x * inverse * scale, (x, scale, inverse)

    def backward(saved, g):
        x, scale, inverse = saved
        h = g * scale
        dx = inverse * (h - x * inverse**2 * jnp.mean(h * x, axis=-1, keepdims=True))
        return dx, jnp.sum(g * x * inverse, axis=tuple(range(g.ndim - 1)))

    norm.defvjp(forward, backward)

    @jax.custom_jvp
    def squared_relu(x):
        return jnp.square(jax.nn.relu(x))

    squared_relu.defjvps(lambda t, _, x: 2 * jax.nn.relu(x) * t)

    def loss_fn(params, batch):
        def body(x, block):
            x = x + attention(block["attention"], norm(x, block["scale_1"]))
            hidden = squared_relu(norm(x, block["scale_2"]) @ block["up"])
            return x + hidden @ block["down"], None

        x, _ = jax.lax.scan(body, params["embedding"][batch["inputs"]], params["layers"])
        return cross_entropy(norm(x, params["scale"]) @ params["head"], batch["targets"])

    return program(loss_fn, new_transformer(0), tokens())


def while_loop_and_cond():
    """Spectral clipping by power iteration, and a step that is skipped where not finite."""

    def spectral_norm(matrix):
        def body(state):
            step, vector, _ = state
            image = matrix @ vector
            back = matrix.T @ image
            return step + 1, back / (jnp.linalg.norm(back) + 1e-9), jnp.linalg.norm(image)

        start = (0, jnp.ones(matrix.shape[1]) / matrix.shape[1] ** 0.5, jnp.zeros(()))
        return jax.lax.while_loop(lambda state: state[0] < 5, body, start)[2]

    def train_step(params, batch):
        loss, grads = jax.value_and_grad(language_loss)(params, batch)
        grads["head"] = grads["head"] / jnp.maximum(spectral_norm(grads["head"]), 1.0)

        def update(grads):
            return jax.tree.map(lambda p, g: p - 0.3 * g, params, grads)

        params = jax.lax.cond(jnp.isfinite(loss), update, lambda grads: params, grads)
        return params, loss

    return train_step, (new_transformer(0), tokens()), (0,)


def orthogonalised_momentum():
    """Muon: Newton-Schulz iterations by fori_loop over stacked matrices."""

    def orthogonalise(m):
        def body(_, x):
            gram = jnp.einsum("ldf,lef->lde", x, x)
            return 1.5 * x - 0.5 * jnp.einsum("lde,lef->ldf", gram, x)

        return jax.lax.fori_loop(
            0, 5, body, m / (jnp.linalg.norm(m, axis=(1, 2))[:, None, None] + 1e-9)
        )

    def train_step(params, momentum, batch):
        loss, grads = jax.value_and_grad(language_loss)(params, batch)
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, grads)
        updates = dict(momentum, layers=dict(momentum["layers"]))
        updates["layers"]["up"] = orthogonalise(momentum["layers"]["up"])
        return jax.tree.map(lambda p, u: p - 0.05 * u, params, updates), momentum, loss

    params = new_transformer(0)
    return train_step, (params, jax.tree.map(jnp.zeros_like, params), tokens()), (0, 1)


def dynamic_loss_scale():
    def train_step(params, scale, batch):
        def scaled(params):
            half = jax.tree.map(lambda x: x.astype(jnp.float16), params)
            return language_loss(half, batch).astype(jnp.float32) * scale

        loss, grads = jax.value_and_grad(scaled)(params)
        finite = jnp.all(jnp.array([jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(grads)]))
        step = jnp.where(finite, 0.3 / scale, 0.0)
        params = jax.tree.map(
            lambda p, g: p - step * jnp.where(finite, g, jnp.zeros_like(g)), params, grads
        )
        return params, jnp.where(finite, scale, scale / 2), {"loss": loss / scale}

    return train_step, (new_transformer(0), jnp.float32(8.0), tokens()), (0, 1)


def low_rank_adapters():
    """Fine-tuning: the base is an argument that no step changes."""
    rule = optax.adam(3e-2)
    base = new_transformer(0)
    keys = seeds(3, 2)
    adapters = {"down": normal(keys[0], (D, 8)), "up": jnp.zeros((8, V))}

    def loss_fn(adapters, base, batch):
        merged = {**base, "head": base["head"] + adapters["down"] @ adapters["up"]}
        return language_loss(merged, batch)

    def train_step(adapters, opt_state, base, batch):
        loss, grads = jax.value_and_grad(loss_fn)(adapters, base, batch)
        updates, opt_state = rule.update(grads, opt_state, adapters)
        return optax.apply_updates(adapters, updates), opt_state, {"loss": loss}

    return train_step, (adapters, initial(rule, adapters), base, tokens()), (0, 1)


def contrastive_towers():
    """Two encoders, a similarity matrix over the whole batch."""
    a, b = seeds(0, 2)
    params = {
        "text": new_transformer(a),
        "image": {"in": normal(b, (F, D)), "out": normal(4, (D, V))},
        "temperature": jnp.zeros(()),
    }

    def loss_fn(params, batch):
        text = transformer(params["text"], batch["inputs"]).mean(axis=1)
        image = jax.nn.relu(batch["image"] @ params["image"]["in"]) @ params["image"]["out"]
        text, image = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (text, image))
        logits = text @ image.T * jnp.exp(params["temperature"]) * 5
        labels = jnp.arange(B)
        return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2

    image = normal(5, (B, F), 1)
    return program(loss_fn, params, {"inputs": tokens()["inputs"], "image": image})


PROGRAMS = {
    f.__name__: f
    for f in (
        plain_sgd_without_a_library,
        unrolled_layers_tied_embeddings,
        adamw_clipped,
        adamw_with_schedule,
        adafactor,
        lion,
        sgd_with_momentum,
        accumulation_by_scan,
        dropout_with_typed_key,
        dropout_with_raw_key,
        encoder_decoder_attention,
        rematerialised_layers_bfloat16,
        custom_vjp_norm_and_custom_jvp_activation,
        while_loop_and_cond,
        orthogonalised_momentum,
        dynamic_loss_scale,
        low_rank_adapters,
        contrastive_towers,
    )
}
