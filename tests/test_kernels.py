"""Pallas kernels: which grid axes devices share, and calls on each device's part."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

import placement
from graphs.errors import MeshwrightError
from graphs.groups import group
from graphs.rules import WHOLE, FactorBuilder, OpRule, register_rule, rule_of
from graphs.rules.rule import _RULES
from graphs.trace import trace

needs_tpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs meshwright[tpu]"
)


def arg(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def rules_of(fn, *args):
    graph = trace(fn, *args)
    return [
        rule_of(
            op.primitive,
            op.params,
            tuple(graph.tensors[t].shape for t in op.inputs),
            tuple(graph.tensors[t].shape for t in op.outputs),
        )
        for op in graph.ops
        if op.primitive == "pallas_call"
    ]


def scaled(x, kernel, *, rows=8, index=lambda i, j: (i, j), out_index=None, interpret=True):
    """A kernel over blocks of [rows, 128]."""
    return pl.pallas_call(
        kernel,
        grid=(x.shape[0] // rows, x.shape[1] // 128),
        in_specs=[pl.BlockSpec((rows, 128), index)],
        out_specs=pl.BlockSpec((rows, 128), out_index or index),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        interpret=interpret,
    )(x)


def double(x_ref, o_ref):
    o_ref[...] = 2.0 * x_ref[...]


def by_row_block(x_ref, o_ref):
    o_ref[...] = x_ref[...] + pl.program_id(0).astype(jnp.float32)


def test_grid_axes_that_walk_along_one_dimension_are_factors():
    (rule,) = rules_of(lambda x: scaled(x, double), arg(64, 512))
    assert rule.operands == rule.results == ((0, 1),)
    assert rule.sizes == (8, 4)


def test_an_axis_whose_place_the_kernel_reads_is_whole():
    (rule,) = rules_of(lambda x: scaled(x, by_row_block), arg(64, 512))
    assert rule.results == ((WHOLE, 0),)
    assert rule.sizes == (4,)


def test_places_are_counted_without_the_axes_that_vmap_adds():
    fn = jax.vmap(lambda x: scaled(x, by_row_block))
    (rule,) = rules_of(fn, arg(16, 64, 512))
    assert rule.results == ((0, WHOLE, 1),)
    assert rule.sizes == (16, 4)


@pytest.mark.parametrize(
    "index, out_index",
    [
        (lambda i, j: (7 - i, j), None),  # backwards: a part reads another part's blocks
        (lambda i, j: ((i + 1) % 8, j), lambda i, j: (i, j)),  # shifted
        (lambda i, j: ((i + j) % 8, j), lambda i, j: (i, j)),  # on two axes
        (lambda i, j: (i // 2, j), None),  # results are written twice, half of them never
    ],
)
def test_other_walks_are_not_cut(index, out_index):
    (rule,) = rules_of(lambda x: scaled(x, double, index=index, out_index=out_index), arg(64, 512))
    assert all(dims[0] == WHOLE for dims in (*rule.operands, *rule.results))


def grouped(q, k, interpret=True):
    """Every two rows of blocks of q read one row of blocks of k, and all of its columns."""

    def kernel(q_ref, k_ref, o_ref):
        product = jnp.dot(q_ref[0], k_ref[0].T, preferred_element_type=jnp.float32)
        o_ref[0] = product.astype(o_ref.dtype)

    heads, rows, depth = q.shape
    group = heads // k.shape[0]
    return pl.pallas_call(
        kernel,
        grid=(heads, rows // 128),
        in_specs=[
            pl.BlockSpec((1, 128, depth), lambda h, i: (h, i, 0)),
            pl.BlockSpec((1, k.shape[1], depth), lambda h, i: (h // group, 0, 0)),
        ],
        out_specs=pl.BlockSpec((1, 128, k.shape[1]), lambda h, i: (h, i, 0)),
        out_shape=jax.ShapeDtypeStruct((heads, rows, k.shape[1]), q.dtype),
        interpret=interpret,
    )(q, k)


def test_grouped_heads_are_cut_in_whole_groups():
    (rule,) = rules_of(grouped, arg(16, 256, 128), arg(8, 128, 128))
    assert rule.operands == ((0, 1, WHOLE), (0, WHOLE, WHOLE))
    assert rule.results == ((0, 1, WHOLE),)
    assert rule.sizes == (8, 2)
    assert rule.flops == 2 * 16 * 256 * 128 * 128


def test_kernels_run_on_parts_and_give_the_same_result():
    def fn(w, q, k):
        h = grouped(jnp.einsum("hsd,de->hse", q, w), k)
        return h, scaled(h.reshape(-1, 128), by_row_block).sum()

    rng = np.random.default_rng(0)
    args = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in
            ((128, 128), (16, 256, 128), (8, 128, 128))]  # fmt: skip
    plan = placement.optimize(fn, *args, cluster="cpu:8", donate_argnums=())
    assert [("by_row_block" in w) for w in plan.warnings] == [True]
    assert any(plan.outputs[0].spec), "the kernel's result is expected to be shared"
    shardings = plan.in_shardings(plan.mesh())
    got = jax.jit(plan.apply(fn), in_shardings=shardings)(*jax.device_put(tuple(args), shardings))
    for a, b in zip(got, fn(*args)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


def test_a_rule_of_the_kernels_own_says_more_than_its_grid():
    def own(params, ins, outs):
        build = FactorBuilder()
        rows = build.new(ins[0][0] // 8)
        return OpRule(operands=((rows, WHOLE),), results=((rows, WHOLE),), sizes=tuple(build.sizes))

    register_rule("pallas_call:by_row_block")(own)
    try:
        (rule,) = rules_of(lambda x: scaled(x, by_row_block), arg(64, 512))
    finally:
        del _RULES["pallas_call:by_row_block"]
    assert rule.results == ((0, WHOLE),)
    assert rule.sizes == (8,)


def test_a_rule_that_cuts_a_block_is_one_sentence():
    def own(params, ins, outs):
        return OpRule(operands=((0, WHOLE),), results=((0, WHOLE),), sizes=(64,))

    def fn(w, x):
        return scaled(jnp.tanh(x @ w), double, rows=64).sum()

    register_rule("pallas_call:double")(own)
    try:
        plan = placement.optimize(
            fn, arg(128, 128), arg(64, 128), cluster="cpu:8", donate_argnums=(),
            mesh_shape={"rows": 8},
        )  # fmt: skip
        with pytest.raises(MeshwrightError, match=r"kernel 'double' cannot run on 1/8 of dim"):
            jax.eval_shape(plan.apply(fn), arg(128, 128), arg(64, 128))
    finally:
        del _RULES["pallas_call:double"]


def test_a_kernel_without_a_shared_axis_is_whole_and_said_so():
    def all_rows(x_ref, o_ref):
        o_ref[...] = x_ref[...] / x_ref[...].sum()

    def fn(x):
        return pl.pallas_call(all_rows, out_shape=x, interpret=True)(x)

    graph = trace(fn, arg(64, 512))
    (warning,) = group(graph).warnings
    assert "all_rows" in warning and "register_rule('pallas_call:all_rows')" in warning
    with pytest.raises(MeshwrightError, match="all_rows"):
        group(graph, strict=True)


def attention_step(w, x):
    from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention

    def loss(w):
        q, k, v = (jnp.einsum("bsd,dhk->bhsk", x, w[i]) for i in range(3))
        y = jnp.einsum("bhsk,dhk->bsd", flash_attention(q, k, v, causal=True), w[3])
        return jnp.mean(y.astype(jnp.float32) ** 2)

    value, grads = jax.value_and_grad(loss)(w)
    return jax.tree.map(lambda a, b: a - 0.1 * b, w, grads), value


@needs_tpu_compiler
@pytest.mark.parametrize("mesh", [{"batch": 8}, {"batch": 2, "heads": 4}])
def test_jax_flash_attention_is_planned_and_compiles_for_tpus(mesh):
    w = [jax.ShapeDtypeStruct((512, 8, 128), jnp.bfloat16)] * 4
    x = jax.ShapeDtypeStruct((mesh["batch"], 1024, 512), jnp.bfloat16)
    plan = placement.optimize(
        attention_step, w, x, cluster="v5e:2x4", donate_argnums=(0,), mesh_shape=mesh
    )
    assert not plan.warnings
    seen = placement.verify(plan, attention_step, w, x)
    assert (seen.status, seen.fits, seen.full_rematerializations) == ("ok", True, ())
    assert seen.collectives_as_emitted.get("all_gather", 0) < 2 * 4 * 512 * 1024 * 2


def splash_step(w, x):
    """Splash attention as decoders call it: vmapped over the batch, in a scan over remat layers."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    mask = splash_attention_mask.MultiHeadMask(
        [splash_attention_mask.CausalMask((512, 512)) for _ in range(w[0].shape[2])]
    )

    def layer(x, w):
        q, k, v = (jnp.einsum("bsd,dhk->bhsk", x, w[i]) for i in range(3))
        kernel = splash_attention_kernel.make_splash_mha(mask, head_shards=1, q_seq_shards=1)
        return x + jnp.einsum("bhsk,dhk->bsd", jax.vmap(kernel)(q, k, v), w[3]), None

    def loss(w):
        y, _ = jax.lax.scan(jax.checkpoint(layer), x, w)
        return jnp.mean(y.astype(jnp.float32) ** 2)

    value, grads = jax.value_and_grad(loss)(w)
    return jax.tree.map(lambda a, b: a - 0.1 * b, w, grads), value


@needs_tpu_compiler
def test_jax_splash_attention_is_planned_and_compiles_for_tpus():
    w = [jax.ShapeDtypeStruct((3, 256, 4, 128), jnp.bfloat16)] * 4
    x = jax.ShapeDtypeStruct((16, 512, 256), jnp.bfloat16)
    plan = placement.optimize(splash_step, w, x, cluster="v5e:2x4", donate_argnums=(0,))
    assert not plan.warnings
    assert plan.inputs[-1].spec[0]
    seen = placement.verify(plan, splash_step, w, x)
    assert (seen.status, seen.fits, seen.full_rematerializations) == ("ok", True, ())
