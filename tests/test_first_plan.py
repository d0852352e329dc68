"""What makes the first plan quick changes neither the program nor its prices."""

from __future__ import annotations

import gc
import weakref

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from graphs.choices import choices_of
from graphs.collecting import settle
from graphs.groups import group
from graphs.trace import trace
from graphs.zoo import ModelConfig, build_train_step, init_state, train_step
from graphs.zoo.decoder import Decoder
from graphs.zoo.options import RunOptions
from graphs.zoo.update_rules import OPTIMIZERS

SMALL = {
    "name": "small",
    "n_layers": 4,
    "d_model": 32,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 8,
    "d_ff": 64,
    "vocab_size": 64,
    "seq_len": 16,
}
MOE = {"n_experts": 4, "experts_per_token": 2, "moe_d_ff": 32}
PLAIN = {
    "adamw": lambda rate: optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=0.1),
    "adafactor": optax.adafactor,
    "lion": optax.lion,
    "sgd": lambda rate: optax.sgd(rate, momentum=0.9),
}


def plain_rule(name, *, learning_rate, clip_norm, state_dtype):
    """What `update_rule` makes, its functions traced one by one."""
    assert state_dtype == "float32"
    rule = PLAIN[name](learning_rate)
    return rule if clip_norm is None else optax.chain(optax.clip_by_global_norm(clip_norm), rule)


def traced(config, **options):
    step, args, donated = build_train_step(config, global_batch=4, seq_len=16, **options)
    return trace(step, *args, donate_argnums=donated)


def said(graph):
    """All of a graph, with the parameters of its operations in words."""
    ops = [
        (op.primitive, op.inputs, op.outputs, op.region, op.source, str(sorted(op.params.items())))
        for op in graph.ops
    ]
    return (graph.tensors, ops, graph.regions, graph.inputs, graph.input_names, graph.outputs,
            graph.output_names, graph.aliases, graph.fingerprint)  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_an_update_traced_in_line_is_the_same_program(name, clip_norm, monkeypatch):
    config = ModelConfig(**SMALL, **(MOE if clip_norm else {}))
    variants = [dict(remat="full"), dict(remat="dots", microbatches=2)]  # the second from the cache
    ours = [traced(config, optimizer=name, clip_norm=clip_norm, **v) for v in variants]
    monkeypatch.setattr(train_step, "update_rule", plain_rule)
    theirs = [traced(config, optimizer=name, clip_norm=clip_norm, **v) for v in variants]
    for one, other in zip(ours, theirs):
        assert said(one) == said(other)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_applying_a_plan_counts_the_operations_that_tracing_counts(name):
    from placement.apply import Constraints, _Walker

    step, args, _ = build_train_step(
        ModelConfig(**SMALL), global_batch=4, seq_len=16, optimizer=name
    )
    graph = trace(step, *args)
    closed = jax.make_jaxpr(step)(*args)
    walker = _Walker(Constraints(results={}, operands={}), None)

    def walked(*flat):
        inputs = [walker.value(x, pin=False) for x in flat]
        consts = [walker.value(c, pin=False) for c in closed.consts]
        return [x for x, _ in walker.walk(closed.jaxpr, consts, inputs)]

    jax.eval_shape(walked, *jax.tree.leaves(args))
    assert (walker.n_ops, walker.n_tensors) == (len(graph.ops), len(graph.tensors))


@pytest.mark.parametrize("scan", [True, False])
def test_a_model_without_random_streams_has_the_structure_and_shapes_of_one_with(scan):
    config, options = ModelConfig(**SMALL, **MOE), RunOptions(scan=scan)
    definition, params = train_step.abstract_model(config, options)
    drawn = nnx.eval_shape(lambda: Decoder(config, options, rngs=nnx.Rngs(params=0)))
    assert definition == nnx.split(drawn)[0]
    started = jax.eval_shape(lambda k: init_state(config, k, scan=scan)[0], jax.random.key(0))
    assert params == started


def test_drawn_weights_are_still_random():
    params, _ = init_state(ModelConfig(**SMALL), jax.random.key(0))
    assert float(np.std(params["embedding"])) > 0


def test_groups_with_the_same_choices_share_them():
    groups = group(traced(ModelConfig(**SMALL))).groups
    known = {}
    for item in groups:
        shared, own = choices_of(item, (2, 4), known=known), choices_of(item, (2, 4))
        assert np.array_equal(shared.place, own.place)
        assert np.array_equal(shared.scatter, own.scatter)
        for dims in set(item.tensors.values()):
            specs = shared.specs(dims, result=True)
            ways = np.where(specs >= 0, np.array([2.0, 4.0]), 1.0).prod(-1)
            assert np.array_equal(shared.shards(dims, (2, 4), result=True), ways)
            with pytest.raises(ValueError):
                specs[...] = 0
        for classes in ([], [0], range(len(item.sizes))):
            assert np.array_equal(shared.sharding(classes), np.isin(own.place, list(classes)))
            assert np.array_equal(shared.scattering(classes), np.isin(own.scatter, list(classes)))
    assert len(known) < len(groups)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(*[st.integers(-1, 3)] * 3), min_size=1, max_size=40))
def test_distinct_rows_are_those_of_numpy(rows):
    from cost_model.events import _unique
    from cost_model.rows import distinct_rows

    given_rows = np.array(rows)
    expected, index = np.unique(given_rows, axis=0, return_inverse=True)
    found, at = distinct_rows(given_rows)
    assert np.array_equal(found, expected)
    assert np.array_equal(at, index.ravel())
    for wide in (given_rows, np.repeat(given_rows, 2, axis=1)):  # counted, and sorted
        specs, at = _unique(wide.astype(np.int8))
        assert np.array_equal(specs[at], wide)
        assert len(specs) == len(expected)


def test_settling_collects_cycles_and_sets_the_rest_apart():
    class Node:
        pass

    node = Node()
    node.self = node
    gone = weakref.ref(node)
    del node
    try:
        settle()
        assert gone() is None
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
