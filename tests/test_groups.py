"""Decision groups, folding of repeated blocks, and choices."""

import jax
import jax.numpy as jnp
import numpy as np

from graphs.choices import choices_of
from graphs.fold import fold
from graphs.groups import HEAVY, LEAF, group
from graphs.names import BATCH, HIDDEN, PARALLEL, name_classes
from graphs.trace import trace


def arg(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def mlp_step(n_layers, scan=False, scale=1, batch=32):
    """A residual MLP trained by SGD with momentum, layers unrolled or scanned."""

    def layer(x, w):
        return x + jax.nn.relu(x @ w["up"]) @ w["down"]

    def loss(params, batch):
        x = batch
        if scan:
            x, _ = jax.lax.scan(lambda c, w: (layer(c, w), None), x, params)
        else:
            for w in params:
                x = layer(x, w)
        return (x**2).mean()

    def step(params, momentum, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, grads)
        return jax.tree.map(lambda p, m: p - 0.1 * m, params, momentum), momentum, value

    lead = (n_layers,) if scan else ()
    d, f = 16 * scale, 64 * scale
    one = {"up": arg(*lead, d, f), "down": arg(*lead, f, d)}
    params = one if scan else [one] * n_layers
    return step, (params, params, arg(batch * scale, d))


def grouped(n_layers, scan=False):
    step, args = mlp_step(n_layers, scan)
    return group(trace(step, *args, donate_argnums=(0, 1)))


def test_every_tensor_has_one_group_with_a_class_or_none_for_each_dimension():
    grouping = grouped(2)
    for t, tensor in enumerate(grouping.graph.tensors):
        dims = grouping.groups[grouping.group_of[t]].tensors[t]
        assert len(dims) == len(tensor.shape)
        used = [c for c in dims if c >= 0]
        assert len(used) == len(set(used)), "no tensor has one class on two dimensions"


def test_weights_are_groups_of_their_own_and_momentum_joins_the_update():
    grouping = grouped(1)
    graph = grouping.graph
    by_name = dict(zip(graph.input_names, graph.inputs))
    weight = grouping.group_of[by_name["[0][0]['up']"]]
    momentum = grouping.group_of[by_name["[1][0]['up']"]]
    assert grouping.groups[weight].kind == LEAF
    assert grouping.groups[momentum].kind != LEAF
    assert weight != momentum


def test_names_follow_the_data_flow():
    grouping = grouped(1)
    names = name_classes(grouping)
    graph = grouping.graph
    by_name = dict(zip(graph.input_names, graph.inputs))

    def of(name):
        t = by_name[name]
        g = grouping.group_of[t]
        return [names.of[g][c] for c in grouping.groups[g].tensors[t]]

    assert of("[2]") == [BATCH, HIDDEN]
    assert of("[0][0]['up']") == [HIDDEN, PARALLEL]
    assert of("[0][0]['down']") == [PARALLEL, HIDDEN]


def test_deeper_unrolled_programs_fold_to_the_same_number_of_decisions():
    counts = {n: len(set(fold(grouped(n)))) for n in (6, 12)}
    assert counts[6] == counts[12]
    assert len(grouped(12).groups) > len(grouped(6).groups)


def test_choices_divide_evenly_and_cover_every_class():
    grouping = grouped(1)
    for item in grouping.groups:
        menu = choices_of(item, (2, 4))
        assert len({tuple(r) for r in np.concatenate([menu.place, menu.scatter], 1)}) == len(menu)
        for row in menu.place:
            for c, n in enumerate(item.sizes):
                assert n % np.prod([s for s, p in zip((2, 4), row) if p == c]) == 0
        if item.kind == HEAVY:
            scattered = menu.scatter >= 0
            assert not (scattered & (menu.place < 0)).any()


def test_partial_sums_can_be_scattered_and_then_shard_the_result():
    grouping = group(trace(lambda a, b: a @ b, arg(8, 16), arg(16, 32)))
    g, item = next((g, x) for g, x in enumerate(grouping.groups) if x.kind == HEAVY)
    menu = choices_of(item, (4,))
    t, dims = next(iter(item.tensors.items()))
    specs = menu.specs(dims, result=True)
    rows = [tuple(r) for r in np.concatenate([menu.place, menu.scatter, specs], 1)]
    reduced = {r.cls for r in item.reductions}
    scattered = [r for r in rows if r[0] in reduced and r[1] >= 0]
    assert len(scattered) == 2 and all(r[2] >= 0 for r in scattered)
    all_reduced = [r for r in rows if r[0] in reduced and r[1] < 0]
    assert len(all_reduced) == 1 and all_reduced[0][2] < 0
    assert grouping.group_of[t] == g
