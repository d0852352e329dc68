"""The model zoo: sizes against published ones, and options that must not change the function."""

from __future__ import annotations

import csv
import dataclasses
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from graphs.errors import MeshwrightError
from graphs.zoo import (
    ModelConfig,
    active_parameter_count,
    build_train_step,
    init_state,
    load_model_config,
    model_names,
    parameter_count,
)
from graphs.zoo.attention import Mask, attend
from graphs.zoo.loss import cross_entropy
from graphs.zoo.moe import ExpertFeedForward
from graphs.zoo.options import RunOptions
from graphs.zoo.train_step import abstract_model, loss_of

with open(pathlib.Path(__file__).parent / "data" / "model_zoo_params.csv", newline="") as file:
    PUBLISHED = list(csv.DictReader(file))

SMALL = {
    "name": "small",
    "n_layers": 2,
    "d_model": 32,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 8,
    "d_ff": 64,
    "vocab_size": 64,
    "seq_len": 16,
}
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""The models run for milliseconds and compile for seconds."""
MOE = {"n_experts": 4, "experts_per_token": 2, "moe_d_ff": 32}


def small(**changes) -> ModelConfig:
    return ModelConfig(**{**SMALL, **changes})


def values_like(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32) * 0.2), tree)


def loss_and_grads(config, params, *, seq_len=16, **options):
    options = RunOptions(compute_dtype="float32", **options)
    graphdef, _ = abstract_model(config, options)
    rng = np.random.default_rng(3)
    ids = jnp.asarray(rng.integers(0, config.vocab_size, (2, seq_len + 1), np.int32))
    batch = {"inputs": ids[:, :-1], "targets": ids[:, 1:], "encoder_inputs": ids[:, 1:]}

    def loss(params):
        return loss_of(nnx.merge(graphdef, params), batch)

    return jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)(params)


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right)):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


@pytest.fixture(scope="module")
def windowed():
    """A model with two kinds of layers, its parameters, its loss and gradients."""
    config = small(n_layers=4, sliding_window=6, local_per_global=1)
    params = values_like(abstract_model(config, RunOptions())[1])
    return config, params, loss_and_grads(config, params)


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row["config"])
def test_parameters_agree_with_published_dimensions(row):
    config = load_model_config(row["config"])
    assert config.name == row["model"]
    assert config.source == row["source"]
    count, active = parameter_count(config), active_parameter_count(config)
    assert count / 1e9 == pytest.approx(float(row["computed_params_b"]), rel=0.01)
    assert active / 1e9 == pytest.approx(float(row["active_params_computed_b"]), rel=0.01)
    assert (active == count) == (config.n_experts == 0)


def test_every_config_has_a_source_and_loads():
    names = model_names()
    assert {row["config"] for row in PUBLISHED} <= set(names)
    for name in names:
        assert load_model_config(name).source


def test_gpt2_small_has_the_released_124_million_parameters():
    assert parameter_count(load_model_config("gpt2_small")) == pytest.approx(124.4e6, rel=0.001)


@pytest.mark.parametrize("name", ["llama3_8b", "deepseek_v3_671b"])
def test_large_models_build_and_trace_in_seconds_without_memory(name):
    config = load_model_config(name)
    start = time.process_time()
    train_step, args, donate = build_train_step(config, global_batch=64)
    built = time.process_time()
    results = jax.eval_shape(train_step, *args)
    traced = time.process_time()
    assert built - start < 2.0
    assert traced - built < 4.0
    assert donate == (0, 1)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(args))
    assert jax.tree.structure(results[:2]) == jax.tree.structure(args[:2])
    for new, old in zip(jax.tree.leaves(results[:2]), jax.tree.leaves(args[:2])):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)


def test_layer_kinds_follow_the_published_patterns():
    gemma = load_model_config("gemma3_27b").layer_kinds()
    assert [kind.window for kind in gemma[:6]] == [1024] * 5 + [None]
    assert sum(kind.window is None for kind in gemma) == 62 // 6
    deepseek = load_model_config("deepseek_v3_671b").layer_kinds()
    assert [kind.moe for kind in deepseek[:4]] == [False, False, False, True]
    maverick = load_model_config("llama4_maverick").layer_kinds()
    assert [kind.moe for kind in maverick[:4]] == [False, True, False, True]


@pytest.mark.parametrize("name", model_names())
def test_segments_spell_out_the_layers(name):
    config = load_model_config(name)
    spelled = [kind for s in config.segments() for _ in range(s.repeats) for kind in s.kinds]
    assert tuple(spelled) == config.layer_kinds()
    assert len({s.name for s in config.segments()}) == len(config.segments())


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"n_layers": 0}, "n_layers=0"),
        ({"n_kv_heads": 3}, "n_kv_heads=3"),
        ({"attention": "mha"}, "attention=mha"),
        ({"attention": "mla"}, "q_lora_rank"),
        ({"norm": "batch"}, "norm='batch'"),
        ({"n_experts": 4, "experts_per_token": 5, "moe_d_ff": 8}, "experts_per_token=5"),
        ({**MOE, "first_dense_layers": 2}, "first_dense_layers=2"),
        ({"local_per_global": 1}, "sliding_window"),
        ({"head_dim": 7}, "head_dim=7"),
        ({"d_ff": 0}, "d_ff=0"),
    ],
)
def test_impossible_models_are_refused_in_one_sentence(changes, word):
    with pytest.raises(MeshwrightError) as error:
        small(**changes)
    assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options, word",
    [
        ({"remat": "some"}, "remat='some'"),
        ({"optimizer": "adam2"}, "adam2"),
        ({"global_batch": 6, "microbatches": 4}, "microbatches=4"),
        ({"loss_chunks": 3}, "loss_chunks=3"),
        ({"global_batch": 0}, "global_batch=0"),
    ],
)
def test_impossible_options_are_refused_in_one_sentence(options, word):
    with pytest.raises(MeshwrightError, match=word):
        build_train_step(small(), **{"global_batch": 8, **options})


def test_unknown_model_names_the_nearest():
    with pytest.raises(MeshwrightError, match="llama3_8b"):
        load_model_config("lama3_8b")


@pytest.mark.parametrize(
    "options",
    [
        {"remat": "none"},
        {"remat": "dots"},
        {"remat": "attention"},
        {"attention": "chunked", "query_chunk": 4},
        {"loss_chunks": 4},
    ],
    ids=str,
)
def test_options_keep_loss_and_gradients(options, windowed):
    config, params, expected = windowed
    assert_same(loss_and_grads(config, params, **options), expected)


def test_scanned_and_unrolled_layers_are_one_function(windowed):
    config, params, (loss, grads) = windowed
    layers = params["layers"]["layer"]
    unrolled = {
        f"layer_{i:03d}": jax.tree.map(lambda x, i=i: x[i], layers)
        for i in range(config.n_layers // 2)
    }
    other_loss, other_grads = loss_and_grads(config, {**params, "layers": unrolled}, scan=False)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *other_grads["layers"].values())
    assert_same((loss, grads["layers"]["layer"]), (other_loss, stacked))
    assert_same(grads["embedding"], other_grads["embedding"])


def test_capacity_that_holds_every_token_equals_dropless():
    config = small(**MOE, capacity_factor=4.0, shared_experts=1, mlp_bias=True)
    params = values_like(abstract_model(config, RunOptions())[1])
    assert_same(
        loss_and_grads(config, params, moe="capacity"),
        loss_and_grads(config, params, moe="dropless"),
    )


def test_experts_equal_a_loop_over_tokens():
    config = small(**MOE, capacity_factor=4.0)
    options = RunOptions(compute_dtype="float32")
    module = ExpertFeedForward(config, options, rngs=nnx.Rngs(0))
    x = values_like(jax.ShapeDtypeStruct((1, 8, 32), jnp.float32))
    gate, up, down, router = (
        np.asarray(p[...]) for p in (module.gate, module.up, module.down, module.router)
    )
    expected = np.zeros((8, 32))
    for i, token in enumerate(np.asarray(x[0])):
        logits = token @ router
        best = np.argsort(-logits)[:2]
        mixture = np.exp(logits[best]) / np.exp(logits[best]).sum()
        for e, m in zip(best, mixture):
            h = token @ gate[e]
            expected[i] += m * ((h / (1 + np.exp(-h)) * (token @ up[e])) @ down[e])
    np.testing.assert_allclose(module(x)[0], expected, rtol=1e-4, atol=1e-5)


def test_tokens_beyond_the_capacity_skip_the_expert():
    config = small(**{**MOE, "n_experts": 2}, capacity_factor=0.5)
    options = RunOptions(compute_dtype="float32")
    module = ExpertFeedForward(config, options, rngs=nnx.Rngs(0))
    x = values_like(jax.ShapeDtypeStruct((1, 16, 32), jnp.float32))
    out = module(x)[0]
    # both experts are chosen by every token and hold half of them, the first ones
    assert bool(jnp.all(jnp.any(out[:8] != 0, axis=-1)))
    assert bool(jnp.all(out[8:] == 0))


def test_attention_equals_a_loop_over_queries():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 12, h, 4)).astype(np.float32) for h in (4, 2, 2))
    sink = rng.standard_normal(4).astype(np.float32)
    for chunked in (False, True):
        out = attend(
            *(jnp.asarray(x) for x in (q, k, v)),
            mask=Mask(window=5),
            options=RunOptions(attention="chunked" if chunked else "naive", query_chunk=4),
            scale=0.5,
            softcap=2.0,
            sink=jnp.asarray(sink),
        )
        for head in range(4):
            for i in range(12):
                first = max(0, i - 4)
                keys, values = (x[0, first : i + 1, head // 2] for x in (k, v))
                scores = 2.0 * np.tanh(keys @ q[0, i, head] * 0.5 / 2.0)
                weights = np.exp(scores)
                weights /= weights.sum() + np.exp(sink[head])
                np.testing.assert_allclose(out[0, i, head], weights @ values, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"position": "alibi", "norm": "layernorm"},
        {"position": "learned", "gated": False},
        {**MOE, "capacity_factor": 8.0},
        {
            "attention": "mla", "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_dim": 8,
            "qk_rope_dim": 4, "v_head_dim": 8,
        },
        {"norm_placement": "post", "qk_norm": "full"},
    ],
    ids=str,
)  # fmt: skip
def test_no_token_sees_the_future(changes):
    config = small(**changes)
    graphdef, abstract = abstract_model(config, RunOptions(compute_dtype="float32"))
    model = nnx.merge(graphdef, values_like(abstract))
    ids = jnp.arange(16, dtype=jnp.int32)[None] % 7
    hidden = model.hidden(ids)
    changed = model.hidden(ids.at[0, 10].set(63))
    np.testing.assert_allclose(hidden[0, :10], changed[0, :10], atol=1e-5)
    assert not np.allclose(hidden[0, 10:], changed[0, 10:], atol=1e-3)


def test_loss_of_uniform_logits_is_the_log_of_the_vocabulary():
    hidden, head = jnp.ones((2, 4, 8)), jnp.zeros((8, 50))
    loss = cross_entropy(hidden, head, jnp.zeros((2, 4), jnp.int32))
    assert float(loss) == pytest.approx(np.log(50), rel=1e-6)


def test_accumulated_gradients_are_those_of_the_whole_batch():
    config = small()
    params, opt_state = init_state(config, jax.random.key(0), optimizer="sgd", clip_norm=None)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 64, (8, 16), np.int32))
    results = []
    for microbatches in (1, 4):
        step, _, _ = build_train_step(
            config, global_batch=8, microbatches=microbatches, optimizer="sgd", clip_norm=None,
            compute_dtype="float32", learning_rate=0.1,
        )  # fmt: skip
        results.append(
            jax.jit(step, compiler_options=QUICK)(
                params, opt_state, {"inputs": ids, "targets": ids}
            )
        )
    assert_same(*results)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "lion", "sgd"])
def test_initial_state_has_the_abstract_shapes(optimizer):
    config = small(**MOE)
    options = {"optimizer": optimizer, "optimizer_state_dtype": "bfloat16"}
    _, args, _ = build_train_step(config, global_batch=8, **options)
    state = jax.eval_shape(lambda key: init_state(config, key, **options), jax.random.key(0))
    assert jax.tree.structure(state) == jax.tree.structure(args[:2])
    for real, abstract in zip(jax.tree.leaves(state), jax.tree.leaves(args[:2])):
        assert (real.shape, real.dtype) == (abstract.shape, abstract.dtype)
    floats = [x.dtype for x in jax.tree.leaves(args[1]) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert set(floats) == {jnp.dtype("bfloat16")}


def test_configs_are_frozen_and_hashable():
    config = small()
    assert hash(config) == hash(small())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.n_layers = 3  # type: ignore[misc]
