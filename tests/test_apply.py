"""Planned train steps on eight devices give the unsharded program's results.

Each program takes three steps unplanned and three planned; losses must agree, and parameters as
closely as the program itself allows: a third run, unplanned, starts from parameters changed by one
rounding, and its deviation is the yardstick (Adam turns a gradient that is only rounding noise, such
as an attention key's bias, into a full step). Rules that shard everything are used as well as the
search, which on this machine's slow links may leave much unsharded.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import PROGRAMS, loss_of, next_args
from test_groups import arg

import placement
from cost_model.analysis import Analysis
from cost_model.cluster import parse_cluster
from cost_model.layout import layout_for
from cost_model.tables import build_tables
from graphs.groups import group
from graphs.trace import trace
from placement.apply import Constraints, constrained, steps
from placement.decode import decode, major_first

CASES = [
    ("plain_sgd_without_a_library", "fsdp"),
    ("unrolled_layers_tied_embeddings", "fsdp_tp_sp"),
    ("adamw_clipped", "search"),
    ("adafactor", "fsdp"),
    ("lion", "fsdp_tp"),
    ("accumulation_by_scan", "fsdp"),
    ("dropout_with_typed_key", "fsdp"),
    ("encoder_decoder_attention", "fsdp_tp_sp"),
    ("rematerialised_layers_bfloat16", "megatron_sp"),
    ("while_loop_and_cond", "fsdp"),
    ("state_space_scan", "fsdp_tp"),
    ("zoo_llama", "megatron_sp"),
    ("zoo_moe_capacity", "search"),
    ("nnx_split_and_merge", "fsdp"),
    ("linen_train_state", "zero1"),
    ("equinox_partitioned", "fsdp_tp"),
    ("haiku_transformed", "fsdp"),
]


def nudged(args, donated, relative):
    """The arguments with the donated state's numbers changed by a relative rounding."""
    rng = np.random.default_rng(0)

    def nudge(x):
        if not jnp.issubdtype(getattr(x, "dtype", np.int32), jnp.floating):
            return x
        return x * (1 + relative * rng.uniform(-1, 1, np.shape(x))).astype(x.dtype)

    return tuple(jax.tree.map(nudge, a) if i in donated else a for i, a in enumerate(args))


def numbers(tree):
    """Arrays of a pytree as float64; typed keys as their words."""
    out = []
    for x in jax.tree.leaves(tree):
        if jax.dtypes.issubdtype(getattr(x, "dtype", None), jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        out.append(np.asarray(x).astype(np.float64))
    return out


@pytest.mark.parametrize(("name", "optimizer"), CASES)
def test_three_planned_steps_equal_three_unplanned_ones(name, optimizer):
    step, args, donated = PROGRAMS[name]()
    mesh_shape = {"data": 2, "model": 4} if "tp" in optimizer or "megatron" in optimizer else None
    plan = placement.optimize(
        step,
        *args,
        cluster="cpu:8",
        donate_argnums=donated,
        optimizer=optimizer,
        mesh_shape=mesh_shape or ({"data": 8} if optimizer != "search" else None),
        time_limit_s=5.0,
    )
    mesh = plan.mesh()
    shardings = plan.in_shardings(mesh)
    planned = jax.jit(
        plan.apply(step), in_shardings=shardings, out_shardings=plan.out_shardings(mesh)
    )
    unplanned = jax.jit(step)
    rounding = 4e-3 if "bfloat16" in name else 1e-6
    ours, theirs, near = args, args, nudged(args, donated, rounding)
    for _ in range(3):
        expected, close = unplanned(*theirs), unplanned(*near)
        got = planned(*jax.device_put(ours, shardings))
        np.testing.assert_allclose(loss_of(got), loss_of(expected), rtol=max(1e-4, rounding))
        theirs, near, ours = (next_args(args, donated, x) for x in (expected, close, got))
    for a, b, c in zip(numbers(expected), numbers(got), numbers(close), strict=True):
        yardstick = np.abs(c - a).max(initial=0.0)
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-4 + 3 * yardstick)
    if optimizer == "fsdp":
        sharded = [leaf for leaf in plan.inputs if any(leaf.spec)]
        assert sharded, "fsdp shards something, so the comparison is of sharded computation"


D, M = "data", "model"


@pytest.mark.parametrize(
    ("have", "want", "expected"),
    [
        # cut before gathering, so that less is gathered
        (((D,), (), ()), ((), (M,), ()), [((D,), (M,), None), (None, (M,), None)]),
        # gather the minor axis, then move the major one
        (((), (), (D, M)), ((D,), (), ()), [(None, None, (D,)), ((D,), None, None)]),
        # the minor axis moves off, the major one is gathered afterwards
        (((D, M), (), ()), ((), (M,), ()), [((D,), (M,), None), (None, (M,), None)]),
        # what lies on the dimension that an axis moves onto is gathered first
        (((M,), (), (D,)), ((), (), (M,)), [((M,), None, None), (None, None, (M,))]),
        # the axis that stays becomes the major one
        (((D, M), ()), ((M,), ()), [((M, D), None), ((M,), None)]),
        # an axis that lies under another comes after it
        (((D,), ()), ((), (D, M)), [(None, (D,)), (None, (D, M))]),
        ((None, "model"), ((), (M,)), [(None, (M,))]),
        # one pair of dimensions after the other, the minor axis first, and back
        (((), (), (D, M)), ((D,), (M,), ()), [(None, (M,), (D,)), ((D,), (M,), None)]),
        (((D,), (M,), ()), ((), (), (D, M)), [(None, (M,), (D,)), (None, None, (D, M))]),
        # between two dimensions the axes go together
        (((D, M), ()), ((), (D, M)), [(None, (D, M))]),
        # an exchange cannot go one by one
        (((D,), (M,)), ((M,), (D,)), [((M,), (D,))]),
    ],
)
def test_an_operand_changes_its_sharding_in_steps(have, want, expected):
    assert steps(have, want) == expected


def test_an_operand_is_made_of_the_copy_that_others_read():
    def program(x):
        y = jnp.sin(x)  # tensor 1
        return jnp.cos(y), jnp.exp(y)  # ops 1 and 2

    mesh = jax.sharding.AbstractMesh((2, 4), (D, M))
    rows, whole = (D, None), (None, None)
    constraints = Constraints(
        results={1: (M, None)}, operands={(1, 1): rows, (2, 1): whole}, copies={(1, 1): whole}
    )
    closed = jax.make_jaxpr(program)(jnp.ones((8, 8)))
    pinned = jax.make_jaxpr(lambda x: constrained(closed, constraints, mesh, [x]))(jnp.ones((8, 8)))
    made = {v: eqn for eqn in pinned.eqns for v in eqn.outvars}

    def chain(op):
        """The specs on the way from the value to what an op reads."""
        (eqn,) = [e for e in pinned.eqns if e.primitive.name == op]
        eqn, found = made[eqn.invars[0]], []
        while eqn.primitive.name == "sharding_constraint":
            found.append(tuple(eqn.params["sharding"].spec))
            eqn = made[eqn.invars[0]]
        return found[::-1]

    assert chain("cos") == [(M, None), whole, rows]
    assert chain("exp") == [(M, None), whole]
    assert len([e for e in pinned.eqns if e.primitive.name == "sharding_constraint"]) == 3


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (0, 1, 2)),
        ({((1,), (0, 1)): 5.0}, (1, 0, 2)),
        ({((1,), (0, 1)): 5.0, ((0,), (0, 1)): 6.0}, (0, 1, 2)),
        ({((2,), (0, 1, 2)): 1.0, ((1, 2), (0, 1, 2)): 1.0}, (2, 1, 0)),
        ({((0, 2), (0, 1, 2)): 1.0}, (0, 2, 1)),
    ],
)
def test_the_axes_of_a_dimension_are_ordered_so_that_readers_gather_neighbours(changes, expected):
    sets = {(frozenset(few), frozenset(many)): w for (few, many), w in changes.items()}
    assert major_first(sets, 3) == expected


def test_scattered_sums_lie_first_on_the_axes_that_shard_the_rows_of_the_contraction():
    """A sum over the major axis whose rows lie on the minor one: XLA scatters it behind that axis,
    and would gather the whole operand to scatter it before."""
    shapes = (arg(64, 128), arg(128, 256))
    grouping = group(trace(lambda x, w: jnp.tanh(x @ w), *shapes))
    layout = layout_for(parse_cluster("v5e:2x4"), {"a": 2, "b": 4})
    analysis = Analysis.of(grouping, layout.cluster.device)
    tables = build_tables(analysis, layout, usage_limit_bytes=np.inf)
    (product,) = [o for o, op in enumerate(grouping.graph.ops) if op.primitive == "dot_general"]
    t = grouping.graph.ops[product].outputs[0]
    g = grouping.group_of[t]
    node = tables.node_of[g]
    menu, rows = tables.choices[node], grouping.groups[g].tensors[t][0]
    (summed,) = {r.cls for r in grouping.groups[g].reductions}
    wanted = (menu.place == [summed, rows]).all(1) & (menu.scatter == [rows, -1]).all(1)
    choices = np.zeros(len(tables.choices), np.int64)
    choices[node] = np.flatnonzero(wanted)[0]
    assert decode(tables, choices)[2][t] == (("b", "a"), ())
    before = (menu.place == [rows, summed]).all(1) & (menu.scatter == [-1, rows]).all(1)
    choices[node] = np.flatnonzero(before)[0]
    assert decode(tables, choices)[2][t] == (("a", "b"), ())
