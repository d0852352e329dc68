"""Train steps around layers other than plain attention: state spaces, recurrences, convolutions,
experts, blocks of queries, and the zoo's own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from programs_plain import (
    B,
    D,
    F,
    L,
    S,
    V,
    attention,
    cross_entropy,
    new_attention,
    normal,
    program,
    seeds,
    tokens,
    zeros,
)

from graphs.zoo import ModelConfig, build_train_step

E, N = 8, 8
"""experts, state width"""


def _selective_state_space(associative):
    """Mamba (arXiv:2312.00752): depthwise convolution, then h = a h + b x, y = c h."""
    e, i, w, p, o, h = seeds(0, 6)
    params = {
        "embedding": normal(e, (V, D), D),
        "layers": {
            "in": normal(i, (L, D, 2 * F), D),
            "conv": normal(w, (L, 4, 1, F), 4),
            "project": normal(p, (L, F, 1 + 2 * N), F),
            "log_a": jnp.log(jnp.broadcast_to(jnp.arange(1.0, N + 1), (L, F, N))),
            "out": normal(o, (L, F, D), F),
        },
        "head": normal(h, (D, V)),
    }

    def recurrence(decay, drive):
        if associative:

            def combine(left, right):
                return left[0] * right[0], right[0] * left[1] + right[1]

            return jax.lax.associative_scan(combine, (decay, drive), axis=1)[1]

        def body(h, step):
            h = step[0] * h + step[1]
            return h, h

        steps = (jnp.moveaxis(decay, 1, 0), jnp.moveaxis(drive, 1, 0))
        return jnp.moveaxis(jax.lax.scan(body, jnp.zeros_like(drive[:, 0]), steps)[1], 0, 1)

    def block(x, p):
        u, gate = jnp.split(x @ p["in"], 2, axis=-1)
        u = jax.lax.conv_general_dilated(
            u,
            p["conv"],
            (1,),
            [(3, 0)],
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=F,
        )
        u = jax.nn.silu(u)
        delta, b, c = jnp.split(u @ p["project"], [1, 1 + N], axis=-1)
        delta = jax.nn.softplus(delta)
        decay = jnp.exp(-delta[..., None] * jnp.exp(p["log_a"]))
        drive = (delta * u)[..., None] * b[:, :, None, :]
        y = jnp.einsum("bsfn,bsn->bsf", recurrence(decay, drive), c)
        return x + (y * jax.nn.silu(gate)) @ p["out"], None

    def loss_fn(params, batch):
        x, _ = jax.lax.scan(block, params["embedding"][batch["inputs"]], params["layers"])
        return cross_entropy(x @ params["head"], batch["targets"])

    return program(loss_fn, params, tokens())


def state_space_scan():
    return _selective_state_space(associative=False)


def state_space_associative_scan():
    return _selective_state_space(associative=True)


def lstm_scan():
    e, i, r, h = seeds(0, 4)
    params = {
        "embedding": normal(e, (V, D), D),
        "input": normal(i, (D, 4 * D)),
        "recurrent": normal(r, (D, 4 * D)),
        "bias": jnp.zeros(4 * D),
        "head": normal(h, (D, V)),
    }

    def loss_fn(params, batch):
        x = params["embedding"][batch["inputs"]] @ params["input"] + params["bias"]

        def body(carry, drive):
            h, c = carry
            i, f, g, o = jnp.split(drive + h @ params["recurrent"], 4, axis=-1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        zero = jnp.zeros((B, D))
        _, hidden = jax.lax.scan(body, (zero, zero), jnp.swapaxes(x, 0, 1))
        return cross_entropy(jnp.swapaxes(hidden, 0, 1) @ params["head"], batch["targets"])

    return program(loss_fn, params, tokens())


def vision_transformer():
    """Patches by a strided convolution, bidirectional attention, mean pooling."""
    c, p, a, u, h = seeds(0, 5)
    params = {
        "patch": normal(c, (4, 4, 3, D), 48),
        "position": normal(p, (16, D), D),
        "attention": new_attention(a),
        "up": normal(u, (D, F)),
        "down": jnp.zeros((F, D)),
        "head": normal(h, (D, 8)),
    }

    def loss_fn(params, batch):
        x = jax.lax.conv_general_dilated(
            batch["image"],
            params["patch"],
            (4, 4),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = x.reshape(B, 16, D) + params["position"]
        x = x + attention(params["attention"], x, causal=False)
        x = x + jax.nn.gelu(x @ params["up"]) @ params["down"]
        return cross_entropy(x.mean(axis=1) @ params["head"], batch["label"])

    image = normal(1, (B, 16, 16, 3), 1)
    return program(loss_fn, params, {"image": image, "label": jnp.arange(B) % 8})


def convolutional_network():
    a, b, h = seeds(0, 3)
    params = {
        "conv_1": normal(a, (3, 3, 8, D), 72),
        "conv_2": normal(b, (3, 3, D, D), 9 * D),
        "head": normal(h, (D, 8)),
    }

    def loss_fn(params, batch):
        numbers = ("NHWC", "HWIO", "NHWC")
        x = batch["image"]
        for name in ("conv_1", "conv_2"):
            x = jax.lax.conv_general_dilated(
                x, params[name], (1, 1), "SAME", dimension_numbers=numbers
            )
            x = jax.nn.relu(x)
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return cross_entropy(x.mean(axis=(1, 2)) @ params["head"], batch["label"])

    image = normal(1, (B, 16, 16, 8), 1)
    batch = {"image": image, "label": jnp.arange(B) % 8}
    return program(loss_fn, params, batch, optax.adam(1e-3))


def experts_by_einsum():
    """GShard's one-hot dispatch (arXiv:2006.16668), with its load-balancing loss."""
    e, r, u, d, h = seeds(0, 5)
    capacity = 2 * S // E * 2
    params = {
        "embedding": normal(e, (V, D), D),
        "router": normal(r, (D, E)),
        "up": normal(u, (E, D, F), D),
        "down": normal(d, (E, F, D), F),
        "head": normal(h, (D, V)),
    }

    def loss_fn(params, batch):
        x = params["embedding"][batch["inputs"]]
        probability = jax.nn.softmax(x @ params["router"], axis=-1)
        dispatch = jnp.zeros((B, S, E, capacity))
        remaining, taken = probability, jnp.zeros((B, 1, E))
        for _ in range(2):
            chosen = jax.nn.one_hot(jnp.argmax(remaining, axis=-1), E)
            rank = (jnp.cumsum(chosen, axis=1) - 1 + taken) * chosen
            slot = jax.nn.one_hot(rank.sum(-1).astype(jnp.int32), capacity)
            dispatch = dispatch + jnp.einsum("bse,bsc->bsec", chosen, slot)
            taken = taken + chosen.sum(axis=1, keepdims=True)
            remaining = remaining * (1 - chosen)
        dispatch = jax.lax.stop_gradient(dispatch)
        inputs = jnp.einsum("bsec,bsd->ebcd", dispatch, x)
        hidden = jax.nn.relu(jnp.einsum("ebcd,edf->ebcf", inputs, params["up"]))
        out = jnp.einsum("ebcf,efd->ebcd", hidden, params["down"])
        out = jnp.einsum("bsec,bse,ebcd->bsd", dispatch, probability, out)
        balance = E * jnp.mean(dispatch.sum(-1).mean((0, 1)) * probability.mean((0, 1)))
        logits = (x + out) @ params["head"]
        return cross_entropy(logits, batch["targets"]) + 0.01 * balance

    return program(loss_fn, params, tokens())


def _zoo(dims, **options):
    base = {
        "name": "small",
        "n_layers": 2,
        "d_model": D,
        "n_heads": 8,
        "n_kv_heads": 8,
        "head_dim": 8,
        "d_ff": F,
        "vocab_size": V,
        "seq_len": S,
    }
    config = ModelConfig(**{**base, **dims})
    options = {"learning_rate": 1e-2, "compute_dtype": "float32", **options}
    step, (params, opt_state, _), donate = build_train_step(config, global_batch=B, **options)
    leaves, structure = jax.tree.flatten(params)
    leaves = [normal(i, x.shape, D) for i, x in enumerate(leaves)]
    batch = tokens()
    if config.encoder_layers:
        batch["encoder_inputs"] = tokens(2)["inputs"]
    return step, (jax.tree.unflatten(structure, leaves), zeros(opt_state), batch), donate


MOE = {"n_experts": E, "experts_per_token": 2, "moe_d_ff": F, "shared_experts": 1}


def zoo_llama():
    return _zoo({"n_kv_heads": 4}, remat="full")


def zoo_llama_unrolled():
    return _zoo({"n_kv_heads": 4, "n_layers": 3}, remat="dots", scan=False)


def zoo_llama_accumulated():
    return _zoo({"n_kv_heads": 4}, microbatches=2, remat="attention", optimizer="adafactor")


def zoo_chunked_attention_and_loss():
    dims = {"sliding_window": 4, "local_per_global": 1}
    return _zoo(dims, attention="chunked", query_chunk=4, loss_chunks=2)


def zoo_gemma():
    dims = {
        "n_layers": 4,
        "sliding_window": 8,
        "local_per_global": 2,
        "norm_placement": "both",
        "qk_norm": "head",
        "tied_embeddings": True,
        "logit_softcap": 30.0,
        "attention_softcap": 50.0,
        "scale_embeddings": True,
        "activation": "gelu",
    }
    return _zoo(dims)


def zoo_gpt():
    dims = {
        "gated": False,
        "norm": "layernorm",
        "position": "learned",
        "tied_embeddings": True,
        "attention_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "activation": "gelu",
    }
    return _zoo(dims, remat="none", optimizer="lion", learning_rate=3e-3)


def zoo_latent_attention():
    dims = {
        "attention": "mla",
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_dim": 8,
        "qk_rope_dim": 8,
        "v_head_dim": 8,
    }
    return _zoo({**dims, **MOE, "first_dense_layers": 1})


def zoo_moe_capacity():
    return _zoo({**MOE, "n_kv_heads": 4}, moe="capacity")


def zoo_moe_dropless():
    return _zoo({**MOE, "n_kv_heads": 4}, moe="dropless")


def zoo_encoder_decoder():
    return _zoo({"position": "relative", "encoder_layers": 2, "attention": "mha"})


def constants_closed_over():
    """A table that is an array constant of the program, not an argument."""
    table = np.sin(np.arange(S * D).reshape(S, D)).astype(np.float32)
    e, h = seeds(0, 2)
    params = {"embedding": normal(e, (V, D), D), "head": normal(h, (D, V))}

    def loss_fn(params, batch):
        x = params["embedding"][batch["inputs"]] + table
        return cross_entropy(jnp.cumsum(x, axis=1) @ params["head"], batch["targets"])

    return program(loss_fn, params, tokens())


PROGRAMS = {
    f.__name__: f
    for f in (
        state_space_scan,
        state_space_associative_scan,
        lstm_scan,
        vision_transformer,
        convolutional_network,
        experts_by_einsum,
        constants_closed_over,
        zoo_llama,
        zoo_llama_unrolled,
        zoo_llama_accumulated,
        zoo_chunked_attention_and_loss,
        zoo_gemma,
        zoo_gpt,
        zoo_latent_attention,
        zoo_moe_capacity,
        zoo_moe_dropless,
        zoo_encoder_decoder,
    )
}
