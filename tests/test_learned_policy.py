"""The policy: what it sees, what it does not depend on, how fast it is, and the search it steers."""

from __future__ import annotations

import dataclasses
import itertools
import time

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import sparse
from small_problem import small_problem

import placement
from cost_model.cluster import parse_cluster
from cost_model.layout import MeshLayout, enumerate_layouts
from graphs.errors import MeshwrightError
from graphs.mesh import LogicalMesh
from placement.learned import advice, forward, policy
from placement.learned.blinding import blinded
from placement.learned.candidates import Candidate, candidates_of
from placement.learned.closed_form import WholeAxes, terms
from placement.learned.dataset import Arrays, arrays_of
from placement.learned.features import observe
from placement.learned.instance import Instance
from placement.learned.policy import load_policy, save_weights
from placement.learned.problems import PlanningProblem
from placement.learned.scoring import cautious, ranking
from placement.learned.search import plan_instance
from placement.learned.surrogate import Surrogate
from placement.learned.wires import axes_of


@pytest.fixture(scope="module")
def problem() -> PlanningProblem:
    return small_problem(name="train_998")


@pytest.fixture(scope="module")
def instance(problem) -> Instance:
    return Instance(problem)


@pytest.fixture(scope="module")
def arrays(instance) -> Arrays:
    seen = observe(instance.base, instance.cluster)
    return arrays_of(seen, candidates_of(seen, instance.outers))


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    made = forward.initial(64, 0)  # heads and biases away from zero, so that every part is heard
    return {k: v + 0.1 * rng.standard_normal(v.shape).astype(np.float32) for k, v in made.items()}


def heads(params, arrays, xp=np):
    states = forward.encode(params, arrays, arrays, xp)
    found = forward.outer(params, states, arrays, xp)
    return np.stack([np.asarray(x) for x in (found.preference, found.fit, found.value)])


def permuted(a: Arrays, nodes, classes, axes) -> Arrays:
    """The same problem with nodes, classes and distinct axes in another order."""
    back = np.empty_like(axes)
    back[axes] = np.arange(len(axes))
    return dataclasses.replace(
        a,
        nodes=a.nodes[nodes],
        relations=[r[np.ix_(nodes, nodes)] for r in a.relations],
        classes=a.classes[classes],
        classes_of_nodes=a.classes_of_nodes[np.ix_(nodes, classes)],
        nodes_of_classes=a.nodes_of_classes[np.ix_(classes, nodes)],
        region_of_nodes=a.region_of_nodes[nodes],
        nodes_of_regions=a.nodes_of_regions[:, nodes],
        axes=a.axes[axes],
        pairs=a.pairs[np.ix_(classes, axes)],
        of=np.where(a.of >= 0, back[a.of], -1),
    )


def test_the_order_of_nodes_classes_and_axes_does_not_matter(params, arrays):
    rng = np.random.default_rng(1)
    other = permuted(
        arrays, *(rng.permutation(len(x)) for x in (arrays.nodes, arrays.classes, arrays.axes))
    )
    assert np.allclose(heads(params, arrays), heads(params, other), rtol=1e-4, atol=1e-4)


def test_the_order_of_a_meshs_axes_does_not_matter(params, arrays):
    other = dataclasses.replace(arrays, of=arrays.of[:, ::-1])
    assert np.allclose(heads(params, arrays), heads(params, other), rtol=1e-4, atol=1e-4)


def test_swapping_equal_mesh_axes_changes_nothing(params, instance):
    """The layout whose two axes trade places has the same features and the same scores."""
    even = next(x for x in instance.layouts if x.mesh.axis_sizes == (4, 4))
    swapped = MeshLayout(
        mesh=LogicalMesh(axis_names=even.mesh.axis_names, axis_sizes=(4, 4)),
        cluster=even.cluster,
        placement=even.placement[::-1],
    )
    seen = observe(instance.base, instance.cluster)
    outers = [Candidate(remat="full", microbatches=2, layout=x) for x in (even, swapped)]
    found = candidates_of(seen, outers)
    assert np.allclose(found.rows[0], found.rows[1])
    both = heads(params, arrays_of(seen, found))
    assert np.allclose(both[:, 0], both[:, 1], rtol=1e-5, atol=1e-5)


def test_a_devices_name_does_not_matter(instance, arrays):
    device = dataclasses.replace(instance.cluster.device, name="unheard_of")
    renamed = dataclasses.replace(instance.cluster, device=device, notation="unheard_of:4x4")
    layouts = enumerate_layouts(renamed, max_axes=3)
    outers = [
        dataclasses.replace(o, layout=layouts[instance.layouts.index(o.layout)])
        for o in instance.outers
    ]
    seen = observe(instance.base, renamed)
    again = arrays_of(seen, candidates_of(seen, outers))
    assert np.array_equal(arrays.rows, again.rows)
    assert np.array_equal(arrays.overall, again.overall)


def test_numpy_and_jax_say_the_same(params, arrays):
    jax_params = {k: jnp.asarray(v) for k, v in params.items()}
    assert np.allclose(heads(params, arrays), heads(jax_params, arrays, jnp), rtol=2e-3, atol=2e-3)


def test_padding_changes_nothing(params, arrays, instance):
    from placement.learned.dataset import Example, batches
    from placement.learned.train import heads as batched

    k = np.arange(0, len(instance.outers), 7)
    example = Example(
        name="x", arrays=arrays, ideal_s=1.0, index=k, step_time_s=np.ones(len(k)),
        memory_ratio=np.ones(len(k)), fits=np.ones(len(k), bool),
    )  # fmt: skip
    (batch,) = batches([example], 2)
    found = batched({k: jnp.asarray(v) for k, v in params.items()}, batch)
    there = np.asarray(batch.recorded[0]) > 0
    assert there.sum() == len(k) and batch.recorded[1].sum() == 0
    for said, alone in zip((found.preference, found.fit, found.value), heads(params, arrays)):
        assert np.allclose(np.asarray(said)[0][there], alone[k], rtol=2e-3, atol=2e-3)


def test_features_are_finite_and_bounded(arrays):
    for x in (arrays.nodes, arrays.classes, arrays.regions, arrays.overall, arrays.axes,
              arrays.pairs, arrays.rows):  # fmt: skip
        assert np.isfinite(x).all() and np.abs(x).max() < 10


def test_blinding_hides_what_it_says(params, arrays):
    no_edges = blinded(arrays, edges=False)
    rng = np.random.default_rng(2)
    shuffled = dataclasses.replace(
        arrays, relations=[r[rng.permutation(len(r))] for r in arrays.relations]
    )
    assert not np.allclose(heads(params, arrays), heads(params, shuffled))
    blind = blinded(shuffled, edges=False)
    assert np.allclose(heads(params, no_edges), heads(params, blind))
    wires = arrays.axes.copy()
    wires[:, 1:] *= 2  # all but the size
    faster = dataclasses.replace(arrays, axes=wires)
    assert not np.allclose(heads(params, arrays), heads(params, faster), atol=1e-4)
    slow, fast = (heads(params, blinded(a, mesh=False)) for a in (arrays, faster))
    assert np.allclose(slow, fast, rtol=1e-4, atol=1e-4)


def test_a_proposal_for_700_nodes_takes_at_most_50_ms(params, arrays):
    copies = -(-700 // len(arrays.nodes))
    blocks = {
        "nodes": np.tile(arrays.nodes, (copies, 1)),
        "relations": [sparse.block_diag([r] * copies, format="csr") for r in arrays.relations],
        "classes_of_nodes": np.tile(arrays.classes_of_nodes, (copies, 1)),
        "nodes_of_classes": np.tile(arrays.nodes_of_classes, (1, copies)) / copies,
        "region_of_nodes": np.tile(arrays.region_of_nodes, (copies, 1)),
        "nodes_of_regions": np.tile(arrays.nodes_of_regions, (1, copies)) / copies,
    }
    large = dataclasses.replace(arrays, **blocks)
    assert len(large.nodes) >= 700
    seconds = []
    for _ in range(15):
        began = time.perf_counter()
        heads(params, large)
        seconds.append(time.perf_counter() - began)
    assert min(seconds) <= 0.05


def test_a_faster_network_never_lengthens_the_closed_form(instance):
    seen = observe(instance.base, instance.cluster)
    axes = axes_of(list(instance.layouts))
    slow = terms(seen.program, axes, instance.cluster.device)
    wide = dataclasses.replace(axes, bandwidth_bytes_per_s=2 * axes.bandwidth_bytes_per_s)
    fast = terms(seen.program, wide, instance.cluster.device)
    for name in ("gradient_s", "gather_s", "activation_s", "attention_s", "update_s"):
        assert (getattr(fast, name) <= getattr(slow, name)).all()
    assert np.array_equal(fast.compute_s, slow.compute_s)


def test_devices_that_share_classes_are_those_of_whole_axes():
    """Against every way of giving axes to two classes."""
    sizes = np.array([[4, 6, 8]])
    first, second = np.array([24, 12, 7, 32]), np.array([8, 1, 64, 48])
    found = WholeAxes(sizes).share(first, second)[0, -1]
    for p in range(len(first)):
        best = 1
        for owner in itertools.product(range(3), repeat=3):
            a, b = (
                np.prod([s for s, o in zip(sizes[0], owner) if o == k], dtype=int) for k in (1, 2)
            )
            if first[p] % a == 0 and second[p] % b == 0:
                best = max(best, a * b)
        assert found[p] == best


def test_the_ranking_puts_what_cannot_fit_last():
    score = ranking(np.array([3.0, 1.0]), np.array([-9.0, 9.0]), np.zeros(2))
    assert score.argmax() == 1


def test_the_surrogate_learns_from_its_neighbours():
    x = np.array([[0.0, 0.0], [0.05, 0.0], [5.0, 5.0], [9.0, 1.0]])
    beliefs = Surrogate(np.zeros(4), np.full(4, 3.0), x)
    far = beliefs.improvement(0.0)[1]
    beliefs.add(0, -0.5, True)
    beliefs.add(3, 0.0, True)
    mean, deviation, _ = beliefs.beliefs()
    assert mean[1] < mean[2] and deviation[1] < deviation[2]
    assert beliefs.improvement(0.0)[1] > far
    beliefs.add(2, 0.0, False)
    assert beliefs.beliefs()[2][2] < 0.0


def test_uniform_and_untrained_need_no_file():
    assert load_policy("uniform").members == ()
    assert load_policy("untrained").n_parameters > 0


def test_the_shipped_weights_are_small_and_say_where_they_come_from():
    shipped = load_policy("learned")
    assert 0 < 4 * shipped.n_parameters < 20e6
    assert {"config", "splits", "problems"} <= set(shipped.facts)


def test_a_candidate_that_one_member_doubts_counts_as_doubtful():
    fits = [np.array([5.0, -3.0, 4.0, -1.0]), np.array([3.0, 9.0, 0.5, -2.0])]
    assert np.array_equal(cautious(fits), [4.0, -3.0, 2.25, -2.0])
    assert np.array_equal(cautious(fits[:1]), fits[0])


@pytest.mark.parametrize("kind", ["missing", "garbage", "other"])
def test_unusable_weights_are_one_sentence(tmp_path, kind):
    path = tmp_path / "weights.safetensors"
    if kind == "garbage":
        path.write_bytes(b"not tensors")
    if kind == "other":
        save_weights(path, [forward.initial(64, 0) | {"more": np.zeros(1)}], {})
    with pytest.raises(MeshwrightError, match="train"):
        load_policy(str(path))


@pytest.mark.parametrize("name", ["untrained", "uniform"])
def test_the_search_is_anytime_deterministic_and_within_budget(instance, name):
    runs = [
        plan_instance(instance.fork(), max_evaluations=7, time_limit_s=1e9, seed=3, policy=name)
        for _ in range(2)
    ]
    first, second = (r.curve for r in runs)
    assert first.total_evaluations <= 7
    assert list(first.step_time_s) == sorted(first.step_time_s, reverse=True)
    assert first.step_time_s == second.step_time_s and first.evaluations == second.evaluations
    assert runs[0].outcome is not None and runs[0].outcome.fits
    assert list(runs[0].opened) == list(runs[1].opened)


def test_more_evaluations_are_never_worse(instance):
    few, many = (
        plan_instance(instance.fork(), max_evaluations=n, time_limit_s=1e9, policy="untrained")
        for n in (2, 20)
    )
    assert many.curve.step_time_s[-1] <= few.curve.step_time_s[-1]
    assert many.curve.at_evaluations(2) == few.curve.step_time_s[-1]


def mlp():
    import jax

    def step(params, batch):
        def loss(p):
            return jnp.square(jnp.tanh(batch @ p["up"]) @ p["down"]).mean()

        return jax.tree.map(lambda w, g: w - 0.1 * g, params, jax.grad(loss)(params))

    shape = jax.ShapeDtypeStruct
    weights = {"up": shape((256, 1024), "float32"), "down": shape((1024, 256), "float32")}
    return step, weights, shape((512, 256), "float32")


def test_optimize_with_the_policy_plans_a_function():
    plan = placement.optimize(
        *mlp(), cluster="v5e:2x4", optimizer="learned", donate_argnums=(0,), time_limit_s=5
    )
    assert plan.optimizer == "learned" and plan.status in ("feasible", "time_limit")
    assert not any("no trained policy" in w for w in plan.warnings)


def test_without_weights_the_search_plans_and_says_so(monkeypatch):
    monkeypatch.setattr(policy, "SHIPPED", "absent.safetensors")
    plan = placement.optimize(
        *mlp(), cluster="v5e:2x4", optimizer="learned", donate_argnums=(0,), time_limit_s=5
    )
    assert plan.optimizer == "search"
    assert any("no trained policy" in w for w in plan.warnings)


def test_optimize_model_takes_the_policys_advice():
    plan = placement.optimize_model(
        "tiny", cluster="v5e:2x2", global_batch=16, optimizer="learned", time_limit_s=8
    )
    assert plan.optimizer == "learned" and plan.status in ("feasible", "time_limit")
    assert plan.estimate.step_time_s == min(a["step_time_s"] for a in plan.alternatives)


def test_layouts_are_only_reordered(instance):
    chosen = load_policy("untrained")
    layouts = enumerate_layouts(parse_cluster("v5e:4x4"), max_axes=2)
    tied = instance.tied("full", 1)
    ordered = advice.order_layouts(chosen, instance.base, layouts, tied)
    assert sorted(map(id, ordered)) == sorted(map(id, layouts))


def test_variants_come_best_first(instance):
    chosen = load_policy("untrained")
    variants = [("full", 1), ("none", 1), ("full", 8)]
    found = advice.order_variants(chosen, instance.base, instance.layouts, variants)
    assert sorted((v.remat, v.microbatches) for v in found) == sorted(variants)
    assert len({(v.remat, v.microbatches) for v in found}) == 3
