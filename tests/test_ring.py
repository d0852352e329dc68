"""Ring attention: equal to plain attention, balanced, counted, compiled, chosen where it is faster."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from host_devices import run_on_eight_devices
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, PartitionSpec
from test_kernels import needs_tpu_compiler

import placement
from cost_model.cluster import parse_cluster
from cost_model.jobs import constants as constants_module
from cost_model.jobs.columns import GATHERED, RING
from cost_model.jobs.runs import jobs_of
from cost_model.jobs.step import step_time
from cost_model.layout import layout_for
from graphs.errors import MeshwrightError
from graphs.rules.mapped import map_work
from graphs.trace import trace
from graphs.zoo import build_train_step, load_model_config
from graphs.zoo.options import RunOptions
from graphs.zoo.ring import Ring, ring_attention, sequence_order
from placement.compile import compile_for_cluster
from placement.jobs.cases import read_cases
from placement.jobs.space import groups
from placement.pipeline.choose import choose, staged_plan
from placement.pipeline.compile import compile_stage
from placement.pipeline.plan import pipelined_plan

TINY = dataclasses.replace(load_model_config("tiny"), n_layers=2, vocab_size=64)

RUN = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from graphs.zoo.attention import Mask, attend
from graphs.zoo.options import RunOptions

def differences(ways, mask, softcap=None, sink=False, dtype="float32", zigzag=True, kv=2, s=64):
    shape = {"data": 8 // ways, "context": ways}
    mesh = jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * 2)
    ring = RunOptions(
        attention="ring", mesh_shape=tuple(shape.items()), zigzag=zigzag, query_chunk=4)
    plain = RunOptions(attention="naive")
    order = ring.order(s) if zigzag else np.arange(s)
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    args = [draw(8, s, 4, 8), draw(8, s, kv, 8), draw(8, s, kv, 6), jnp.float32(rng.normal(size=4))]
    weights = draw(8, s, 4, 6)

    def value(options, q, k, v, sink_weights):
        at = order if options is ring else slice(None)
        out = attend(
            q[:, at], k[:, at], v[:, at], mask=Mask(**mask), options=options, scale=0.3,
            softcap=softcap, sink=sink_weights if sink else None)
        out = out[:, np.argsort(order)] if options is ring else out
        return jnp.sum(out.astype(jnp.float32) * weights), out

    def run(options, args):
        grad = jax.value_and_grad(lambda *a: value(options, *a), argnums=(0, 1, 2, 3), has_aux=True)
        (_, out), grads = jax.jit(grad)(*args)
        return [np.asarray(x, np.float64) for x in (out, *grads)]

    split = NamedSharding(mesh, PartitionSpec("data", "context"))
    placed = [jax.device_put(x, split) for x in args[:3]]
    whole = jax.device_put(args[3], NamedSharding(mesh, PartitionSpec()))
    found = zip(run(ring, [*placed, whole]), run(plain, args))
    return [float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-9)) for a, b in found]

print(json.dumps([differences(**case) for case in json.loads(sys.argv[1])]))
"""

CASES = [
    dict(ways=2, mask={}, dtype="bfloat16"),
    dict(ways=4, mask={}, zigzag=False),
    dict(ways=4, mask={"causal": False}, kv=4, zigzag=False),
    dict(ways=4, mask={"window": 10, "alibi": True}, softcap=2.0, sink=True),
    dict(ways=8, mask={}, kv=1),
]


def test_forward_and_gradients_equal_plain_attention():
    differences = run_on_eight_devices(RUN, CASES, timeout_s=600)
    for case, found in zip(CASES, differences, strict=True):
        assert len(found) == 5, "the output and the gradients of q, k, v and the sink"
        # bfloat16 keeps 8 bits of each product's inputs
        assert max(found) < (1e-2 if case.get("dtype") else 2e-6), (case, found)


@settings(max_examples=40, deadline=None)
@given(ways=st.integers(2, 12), block=st.integers(1, 5))
def test_zigzag_gives_every_device_equal_causal_work(ways, block):
    order = sequence_order(2 * ways * block, ways, zigzag=True)
    np.testing.assert_array_equal(np.sort(order), np.arange(2 * ways * block))
    mine = order.reshape(ways, -1)
    seen = mine[:, None, :, None] >= mine[None, :, None, :]
    work = seen.sum(axis=(-1, -2))  # [device, device whose keys it meets]
    assert len(set(work.sum(axis=1))) == 1
    others = work[~np.eye(ways, dtype=bool)]
    assert set(others) == {2 * block * block}, "half of each meeting, at every hop"


def test_what_has_no_ring_is_refused_in_a_sentence():
    with pytest.raises(MeshwrightError, match="goes round a mesh axis 'context'"):
        RunOptions(attention="ring")
    options = dict(global_batch=4, attention="ring", mesh_shape={"context": 4})
    with pytest.raises(MeshwrightError, match="does not divide into 8 blocks"):
        build_train_step(TINY, seq_len=36, **options)
    with pytest.raises(MeshwrightError, match="encoder-decoder"):
        build_train_step(load_model_config("t5_xxl"), seq_len=64, **options)


def test_experts_that_drop_tokens_keep_the_sequence_in_order():
    sparse = dataclasses.replace(TINY, n_experts=4, experts_per_token=2, moe_d_ff=64)
    step, args, _ = build_train_step(
        sparse, global_batch=4, seq_len=64, attention="ring", mesh_shape={"context": 4}
    )
    gathered = [op for op in trace(step, *args).ops if op.primitive == "gather"]
    plain, args, _ = build_train_step(sparse, global_batch=4, seq_len=64)
    assert len(gathered) == sum(op.primitive == "gather" for op in trace(plain, *args).ops)


def ring_step(mesh, **options):
    return build_train_step(
        TINY, global_batch=8, seq_len=256, attention="ring", mesh_shape=mesh, query_chunk=16,
        **options,
    )  # fmt: skip


def test_the_ring_s_work_is_counted_and_shared_by_the_other_axes():
    mesh = {"data": 2, "context": 4}
    step, args, donated = ring_step(mesh)
    graph = trace(step, *args, donate_argnums=donated)
    maps = [op for op in graph.ops if op.primitive == "shard_map"]
    assert len(maps) == 3, "forward, forward again in the backward pass, backward"
    # scores and values of all keys, of which branches (weighed equally) skip half
    whole = 2 * 2 * 8 * 256 * 256 * TINY.n_heads * TINY.head_dim / mesh["context"] / 2
    assert [map_work(op.params).flops / whole for op in maps] == pytest.approx([1.0, 1.0, 2.5])
    hop = 2 * 8 * 256 / 4 * TINY.n_kv_heads * TINY.head_dim  # elements of keys and values
    sent = map_work(maps[2].params).collectives["collective_permute", ("context",)]
    assert sent == pytest.approx(3 * (2 * hop + 256 / 4 * 4) + 5 * 4 * hop)

    wide = dataclasses.replace(TINY, d_model=512, d_ff=2048)  # too much to be done on every device
    step, args, donated = build_train_step(
        wide, global_batch=32, seq_len=1024, attention="ring", mesh_shape=mesh, query_chunk=16
    )
    plan = placement.optimize(
        step, *args, cluster="v5e:2x4", donate_argnums=donated, time_limit_s=10.0
    )
    assert plan.mesh_shape == mesh and not plan.warnings
    assert plan.estimate.collectives["collective_permute"] > 0
    batch = next(leaf for leaf in plan.inputs if leaf.name == "[2]['inputs']")
    assert batch.spec[0] == ("data",), "the batch is not gathered for the ring"


def test_a_user_s_map_is_counted_too():
    mesh = jax.sharding.AbstractMesh((8,), ("rows",))
    spec = jax.sharding.PartitionSpec("rows")

    def local(x, w):
        return jax.lax.fori_loop(0, 5, lambda _, y: y @ w, x)

    def fn(w, x):
        return jax.shard_map(
            local, mesh=mesh, in_specs=(spec, jax.sharding.PartitionSpec()), out_specs=spec
        )(x, w).sum()

    args = [jax.ShapeDtypeStruct((4096, 4096), "bfloat16")] * 2
    (op,) = [op for op in trace(fn, *args).ops if op.primitive == "shard_map"]
    assert map_work(op.params).flops == 5 * 2 * 4096**3 / 8
    plan = placement.optimize(fn, *args, cluster="v5e:2x4", donate_argnums=())
    assert plan.estimate.compute_time_s > 5 * 2 * 4096**3 / 8 / 197e12


def test_the_search_takes_the_ring_where_it_is_faster():
    config = load_model_config("llama3_8b")
    long = choose(config, cluster="v5p:4x4x4", global_batch=4, seq_len=262144).staged
    short = choose(config, cluster="h100:8x8", global_batch=2, seq_len=8192).staged
    assert long.context == "ring" and short.context == "gathered"
    constants = constants_module.load()
    for found, other in ((long, GATHERED), (short, RING)):
        changed = found.job.replace(context_form=other)
        assert step_time(changed, constants).step_time_s[0] > found.step_time_s


def test_a_published_run_s_framework_decides_for_it():
    row = next(c.run for c in read_cases(None) if c.run.record and c.run.record["cp"] > 1)
    forms = groups(jobs_of([row])).context_form
    assert not np.isin(forms, (RING, GATHERED)).any()


def test_the_plan_s_program_has_the_form_that_was_chosen():
    config = load_model_config("llama3_8b")
    wanted = dict(cluster="v5p:4x4x4", global_batch=4, seq_len=131072)
    for attention in (None, "ring", "chunked"):
        choice = choose(config, attention=attention, **wanted)
        context = choice.staged.context
        assert (context == "ring") == (attention != "chunked"), "free, the ring is the faster here"
        fixed = {} if attention is None else {"attention": attention}
        plan = staged_plan(config, choice, cluster=wanted["cluster"], **fixed, **{
            k: wanted[k] for k in ("global_batch", "seq_len")})  # fmt: skip
        assert (plan.program.get("attention") == "ring") == (context == "ring")
        assert any("keys and values" in reason for reason in plan.reasons) == bool(context)


@needs_tpu_compiler
def test_a_compiled_ring_gathers_no_keys():
    config = dataclasses.replace(
        TINY, d_model=256, n_heads=4, n_kv_heads=2, attention="gqa", head_dim=128, d_ff=512
    )
    plan = pipelined_plan(
        config, cluster="v5e:2x4", mesh_shape={"stage": 2, "context": 4}, global_batch=2,
        seq_len=32768, microbatches=2, attention="ring",
    )  # fmt: skip
    found = compile_stage(plan, config)
    assert found.status == "ok", found.message
    keys = 2 * 2 * 32768 * config.n_kv_heads * config.head_dim  # and values, of one layer
    # forward, forward again, backward: three hops each, and float32 gradients
    assert found.collectives["collective-permute"] > 9 * keys / 4
    assert found.collectives["all-gather"] < keys / 4, "not even one device's share of them"


@needs_tpu_compiler
def test_a_ring_s_backward_pass_holds_one_block_s_sums_beside_those_that_travel():
    layout = layout_for(parse_cluster("v5e:2x2"), {"context": 4})
    mesh = AbstractMesh((4,), ("context",))
    ring = Ring(
        mesh=mesh, zigzag=True, query_block=512, causal=True, window=None, scale=0.1,
        softcap=None, slopes=None,
    )  # fmt: skip

    def gradients(q, k, v, d_out):
        return jax.vjp(lambda *qkv: ring_attention(ring, *qkv)[0], q, k, v)[1](d_out)

    queries, keys = (
        jax.ShapeDtypeStruct((1, 32768, *heads, 128), jnp.bfloat16) for heads in ((2, 2), (2,))
    )
    along = PartitionSpec(None, "context")
    found = compile_for_cluster(
        gradients, (queries, keys, keys, queries), in_specs=(along,) * 4, out_specs=(along,) * 3,
        layout=layout,
    )  # fmt: skip
    assert found.status == "ok", found.message
    print(f"temporaries of a device: {found.temp_bytes / 1e6:.1f} MB")
    assert found.temp_bytes < 100e6
