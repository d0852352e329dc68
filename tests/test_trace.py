"""Tracing: loops, calls, state, errors."""

import jax
import jax.numpy as jnp
import pytest

from graphs.errors import MeshwrightError
from graphs.groups import group
from graphs.trace import trace

F32 = jnp.float32


def arg(*shape, dtype=F32):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_trip_counts_multiply_through_nested_loops():
    def fn(x, w):
        def outer(c, _):
            def inner(d, _):
                return d @ w, None

            return jax.lax.scan(inner, c, None, length=3)[0], None

        return jax.lax.scan(outer, x, None, length=5)[0]

    graph = trace(fn, arg(8, 8), arg(8, 8))
    dots = [op for op in graph.ops if op.primitive == "dot_general"]
    assert [graph.multiplicity(op.region) for op in dots] == [15.0]


def test_a_counted_while_loop_has_its_trips_and_an_open_one_warns():
    counted = trace(lambda x: jax.lax.fori_loop(0, 7, lambda i, v: v * 2.0, x), arg(4))
    assert max(counted.multiplicities()) == 7.0
    assert not counted.warnings
    open_ended = trace(
        lambda x: jax.lax.while_loop(lambda v: jnp.sum(v) < 9.0, lambda v: v + 1.0, x), arg(4)
    )
    assert any("trip count" in w for w in open_ended.warnings)


def test_branches_of_cond_are_weighed_equally():
    graph = trace(
        lambda p, x: jax.lax.cond(p, lambda v: v @ v, lambda v: v + 1.0, x),
        arg(dtype=bool),
        arg(8, 8),
    )
    dot = next(op for op in graph.ops if op.primitive == "dot_general")
    assert graph.multiplicity(dot.region) == 0.5


def test_donated_arguments_pair_with_the_results_of_the_same_path():
    def step(params, batch):
        return {k: v - batch.mean() for k, v in params.items()}, batch.sum()

    params = {"a": arg(8, 4), "b": arg(8, 4)}
    graph = trace(step, params, arg(2, 2), donate_argnums=(0,))
    pairs = {graph.input_names[i]: graph.output_names[j] for i, j in graph.aliases}
    assert pairs == {"[0]['a']": "[0]['a']", "[0]['b']": "[0]['b']"}


def test_equal_programs_have_equal_fingerprints_and_others_do_not():
    first = trace(lambda x: jnp.tanh(x) @ x, arg(8, 8))
    again = trace(lambda y: jnp.tanh(y) @ y, arg(8, 8))
    other = trace(lambda x: jnp.sin(x) @ x, arg(8, 8))
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_a_function_that_jax_cannot_trace_is_one_sentence():
    def broken(x):
        if x.sum() > 0:
            return x
        return -x

    with pytest.raises(MeshwrightError, match="cannot be traced") as error:
        trace(broken, arg(4))
    assert "\n" not in str(error.value)


def test_donation_of_an_argument_that_does_not_exist_is_refused():
    with pytest.raises(MeshwrightError, match="donate_argnums names argument 3"):
        trace(lambda x: x, arg(4), donate_argnums=(3,))


def test_a_primitive_without_a_rule_is_kept_whole_with_a_warning_or_refused():
    from jax.extend.core import Primitive

    mystery = Primitive("mystery_of_the_test")
    mystery.def_abstract_eval(lambda x: x)

    def fn(x):
        return mystery.bind(x) + 1.0

    graph = trace(fn, arg(8, 8))
    assert any("mystery_of_the_test" in w and "register_rule" in w for w in group(graph).warnings)
    with pytest.raises(MeshwrightError, match="mystery_of_the_test"):
        group(graph, strict=True)


def test_networkx_export_has_every_op():
    graph = trace(lambda x: jnp.tanh(x) @ x, arg(8, 8))
    assert graph.to_networkx().number_of_nodes() == len(graph.ops)


def test_tracing_leaves_the_collector_as_it_was():
    import gc

    x = jax.ShapeDtypeStruct((4,), jnp.float32)
    for enabled in (True, False):
        (gc.enable if enabled else gc.disable)()
        try:
            trace(jnp.sin, x)
            with pytest.raises(MeshwrightError):
                trace(lambda a: a.missing, x)
            assert gc.isenabled() is enabled
        finally:
            gc.enable()
