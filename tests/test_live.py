"""What is in memory, and when: the rules read off compiled programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_groups import arg, mlp_step

from cost_model import live
from cost_model.analysis import Analysis
from cost_model.cluster import parse_cluster
from cost_model.kept import Kept, itemsizes
from cost_model.layout import layout_for
from cost_model.state_copies import GATHERED_SHARE
from cost_model.tables import build_tables
from graphs.groups import group
from graphs.trace import trace


def bf16(*shape):
    return arg(*shape, dtype=jnp.bfloat16)


def analysed(step, args, cluster="v5e:2x4", donate=()):
    grouping = group(trace(step, *args, donate_argnums=donate))
    return Analysis.of(grouping, parse_cluster(cluster).device)


def kept(step, args, cluster="v5e:2x4"):
    analysis = analysed(step, args, cluster)
    found = Kept.of(analysis.grouping, analysis.fusion, analysis.device)
    return analysis.grouping.graph, found


def results(graph, primitive):
    return [op.outputs[0] for op in graph.ops if op.primitive == primitive]


def gated(up, gate, down, x):
    hidden = jax.nn.silu(x @ gate) * (x @ up)
    return ((hidden @ down).astype(jnp.float32) ** 2).mean()


GATED = jax.grad(gated, argnums=(0, 1, 2)), (
    bf16(64, 256), bf16(64, 256), bf16(256, 64), bf16(512, 64)
)  # fmt: skip


def attend(q, k, v):
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores, -1).astype(jnp.bfloat16)
    return (jnp.einsum("bhqk,bkhd->bqhd", weights, v).astype(jnp.float32) ** 2).mean()


ATTEND = jax.grad(attend, argnums=(0, 1, 2)), (bf16(8, 128, 4, 64),) * 3


def test_a_tpu_keeps_the_products_of_a_gated_layer_and_no_activation_of_them():
    graph, found = kept(*GATED)
    wide = [t for t, x in enumerate(graph.tensors) if x.shape == (512, 256) and t in found.held]
    assert {graph.ops[graph.tensors[t].producer].primitive for t in wide} == {"dot_general"}
    (gate,) = results(graph, "logistic")
    assert gate not in found.held
    _, on_gpu = kept(*GATED, cluster="h100:8x1")
    assert gate in on_gpu.held, "XLA:GPU does not compute it again in a library's product"


def test_products_stay_until_the_last_chain_that_starts_at_them():
    graph, found = kept(*GATED)
    dots = [o for o, op in enumerate(graph.ops) if op.primitive == "dot_general"]
    first = graph.ops[dots[0]].outputs[0]
    assert found.until[first] > dots[3], "the backward products make activations from it"


def test_weights_of_a_softmax_are_kept_and_their_quotients_on_v5p_only():
    graph, found = kept(*ATTEND)
    (exponential,) = results(graph, "exp")
    assert exponential in found.across and exponential in found.held
    quotients = [t for t in found.made if graph.tensors[t].shape == (8, 4, 128, 128)]
    assert quotients
    _, other = kept(*ATTEND, cluster="v5p:2x2x1")
    stored = set(quotients) & other.held
    assert stored and all(graph.tensors[t].dtype == "bfloat16" for t in stored)


def test_what_one_reader_casts_is_stored_as_it_is_cast():
    def step(x):
        wide = x.astype(jnp.float32)
        both = jnp.concatenate([wide * 2.0, wide + 1.0], -1)
        return both.astype(jnp.bfloat16), (wide * 3.0)

    graph = trace(step, bf16(64, 128))
    (joined,) = results(graph, "concatenate")
    sizes = itemsizes(graph)
    parts = graph.ops[graph.tensors[joined].producer].inputs
    assert [sizes[t] for t in parts] == [2, 2] and sizes[joined] == 2
    assert graph.tensors[parts[0]].itemsize == 4
    assert sizes[graph.outputs[1]] == 4


def test_what_only_reductions_read_is_stored_nowhere():
    graph, found = kept(lambda x, y: ((x * 2.0 + 1.0).sum(), x @ y), (arg(512, 512), arg(512, 512)))
    (added,) = results(graph, "add")
    assert added not in found.held


def test_what_a_loop_stacks_is_stacked_when_it_is_made():
    def step(w, x):
        def layer(c, w):
            y = c @ w
            return jnp.tanh(y) + c, y

        return jax.lax.scan(layer, x, w)

    graph, found = kept(step, (arg(4, 64, 64), arg(512, 64)))
    (stack,) = [op for op in graph.ops if op.primitive == "scan_stack"]
    (product,) = results(graph, "dot_general")
    assert stack.inputs[0] == product
    assert found.until[product] <= next(o for o, op in enumerate(graph.ops) if op is stack)


def lifetimes_where(analysis, where):
    return [x for x in analysis.lifetimes if x.where == where]


def test_a_contraction_in_a_loop_of_permutes_stores_the_operand_it_would_make():
    analysis = analysed(*GATED)
    layout = layout_for(parse_cluster("v5e:2x4"), {"x": 8})
    tables = build_tables(analysis, layout, usage_limit_bytes=np.inf)
    windowed = lifetimes_where(analysis, live.WINDOWED)
    assert windowed
    seen = set()
    for x in windowed:
        menu = tables.choices[tables.node_of[x.group]]
        passes = live.passes_sums_on(analysis.grouping, x.group, menu, (8,))
        entries = live.usage_entries([x], analysis.grouping, tables.node_of, tables.choices, (8,))
        held = entries[0].n_bytes if entries else np.zeros(len(menu))
        assert ((held > 0) == passes).all()
        seen |= set(passes)
    assert seen == {True, False}


@pytest.mark.parametrize("cluster,expected", [("v5e:2x4", True), ("v6e:2x4", False)])
def test_scores_of_grouped_queries_lie_beside_their_exponentials(cluster, expected):
    def grouped(q, k, v):
        scores = jnp.einsum("bqhgd,bkhd->bhgqk", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores, -1).astype(jnp.bfloat16)
        return (jnp.einsum("bhgqk,bkhd->bqhgd", weights, v).astype(jnp.float32) ** 2).mean()

    step = jax.grad(grouped, argnums=(0, 1, 2))
    analysis = analysed(step, (bf16(8, 128, 4, 2, 64), *((bf16(8, 128, 4, 64),) * 2)), cluster)
    found = lifetimes_where(analysis, live.GROUPED)
    assert bool(found) == expected
    if expected:
        layout = layout_for(parse_cluster(cluster), {"x": 8})
        tables = build_tables(analysis, layout, usage_limit_bytes=np.inf)
        menu = tables.choices[tables.node_of[found[0].group]]
        several = live.in_groups(analysis.grouping, found[0].group, menu, (8,))
        assert several.any(), "replicated, it has several batches and groups"
        one_batch = menu.shards((analysis.grouping.groups[found[0].group].tensors[
            found[0].tensor][0],), (8,)) == 8  # fmt: skip
        assert one_batch.any() and not several[one_batch].any(), "one sequence, one batch"


def train(weights, moments, batch):
    def loss(weights):
        return ((batch @ weights).astype(jnp.float32) ** 2).mean()

    gradients = jax.grad(loss)(weights)
    moments = 0.9 * moments + gradients
    return weights - 0.1 * moments, moments


def test_weights_whose_update_is_gathered_are_copied_until_the_update():
    analysis = analysed(train, (arg(4096, 4096), arg(4096, 4096), arg(512, 4096)), donate=(0, 1))
    graph, grouping = analysis.grouping.graph, analysis.grouping
    layout = layout_for(parse_cluster("v5e:2x4"), {"x": 8})
    tables = build_tables(analysis, layout, usage_limit_bytes=np.inf)
    weights = grouping.group_of[graph.inputs[0]]
    node = tables.node_of[weights]
    (copy,) = [o for o in tables.operands if o.node == node and o.interval[0] == 0]
    assert copy.interval[1] <= next(o for o, op in enumerate(graph.ops) if op.primitive == "sub")
    ways = tables.choices[node].shards(grouping.groups[weights].tensors[graph.inputs[0]], (8,))
    held = copy.held_bytes.max(axis=0)[copy.columns]
    array = 4 * 4096**2
    assert held[ways == 1] == pytest.approx(GATHERED_SHARE * array)
    assert copy.held_bytes.min() == 0, "an update in slices of its own needs none"


def test_state_is_laid_out_anew_ahead_where_it_is_sharded_over_all_devices():
    analysis = analysed(train, (arg(4096, 4096), arg(4096, 4096), arg(512, 4096)), donate=(0, 1))
    ahead = lifetimes_where(analysis, live.SHARDED)
    assert {x.tensor for x in ahead} == set(analysis.grouping.graph.inputs[:2])
    step, args = mlp_step(4, scan=True)
    assert not lifetimes_where(analysed(step, args, donate=(0, 1)), live.SHARDED)


def test_a_gradient_waits_in_the_slices_that_its_reader_takes():
    analysis = analysed(train, (arg(4096, 4096), arg(4096, 4096), arg(512, 4096)), donate=(0, 1))
    (x,) = lifetimes_where(analysis, live.SLICED)
    assert analysis.waiting == {x.group: x.interval}
    layout = layout_for(parse_cluster("v5e:2x4"), {"x": 8})
    tables = build_tables(analysis, layout, usage_limit_bytes=np.inf)
    kinds = [o for o in tables.operands if o.interval == x.interval]
    sizes = {round(v) for o in kinds for v in o.held_bytes.ravel()}
    array = analysis.grouping.graph.tensors[x.tensor].n_bytes
    assert {array, array // 8} <= sizes
