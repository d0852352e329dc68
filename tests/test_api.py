"""The Python API: properties of plans, and one sentence for bad input."""

import json
import math

import jax
import jax.numpy as jnp
import pytest
from test_groups import arg, mlp_step

import placement
from graphs.errors import InfeasibleError, MeshwrightError


def plan_mlp(n_layers=2, scale=16, **kwargs):
    step, args = mlp_step(n_layers, scan=True, scale=scale)
    defaults = dict(cluster="v5e:2x4", donate_argnums=(0, 1))
    return placement.optimize(step, *args, **(defaults | kwargs))


def test_the_same_seed_gives_the_same_plan():
    # a search that its time limit cuts short depends on the machine
    one, two = plan_mlp(seed=3, time_limit_s=120), plan_mlp(seed=3, time_limit_s=120)
    assert one.inputs == two.inputs and one.results == two.results


def test_no_optimizer_beats_the_bound_and_search_beats_the_rules():
    search = plan_mlp(mesh_shape={"data": 2, "model": 4})
    assert 0 < search.lower_bound_s <= search.estimate.step_time_s
    for name in ("fsdp", "megatron", "data_parallel", "random", "annealing", "heuristic", "exact"):
        other = plan_mlp(optimizer=name, mesh_shape={"data": 2, "model": 4})
        assert other.estimate.step_time_s >= search.lower_bound_s * (1 - 1e-9)
        assert search.estimate.step_time_s <= other.estimate.step_time_s * (1 + 1e-6)


def test_ample_memory_and_much_computation_give_pure_data_parallelism_of_the_batch():
    step, args = mlp_step(2, scan=True, scale=64, batch=2048)
    plan = placement.optimize(step, *args, cluster="v5e:2x4", donate_argnums=(0, 1))
    batch = next(leaf for leaf in plan.inputs if leaf.name == "[2]")
    assert batch.spec[0], "the batch is sharded"


def test_specs_have_the_structure_of_arguments_and_results():
    step, args = mlp_step(2, scan=True, scale=16)
    plan = placement.optimize(step, *args, cluster="v5e:2x4", donate_argnums=(0, 1))
    is_spec = lambda x: isinstance(x, jax.sharding.PartitionSpec)  # noqa: E731
    assert jax.tree.structure(plan.in_specs, is_leaf=is_spec) == jax.tree.structure(args)
    results = jax.eval_shape(step, *args)
    assert jax.tree.structure(plan.out_specs, is_leaf=is_spec) == jax.tree.structure(results)
    assert plan.in_specs[0] == plan.out_specs[0], "the state keeps its sharding"


def test_partition_specs_is_the_first_argument():
    step, args = mlp_step(2, scan=True, scale=16)
    specs = placement.partition_specs(step, *args, cluster="v5e:2x4")
    assert set(specs) == {"up", "down"}


def test_an_evaluation_limit_is_kept():
    plan = plan_mlp(optimizer="random", max_evaluations=10)
    assert plan.evaluations <= 10


def test_a_short_time_limit_returns_a_plan_with_a_status():
    plan = plan_mlp(time_limit_s=1e-6)
    assert plan.status == "time_limit"
    assert plan.estimate.step_time_s > 0


def indivisible_step(w, x):
    """Its dimensions divide by 2 and 4 but not by 8, and one copy of w passes the memory of v5e."""
    return w - 0.1 * jax.grad(lambda w: jnp.mean((x @ w) ** 2))(w)


INDIVISIBLE = (
    jax.ShapeDtypeStruct((4 * 16383, 4 * 16383), jnp.float32),
    jax.ShapeDtypeStruct((4 * 3, 4 * 16383), jnp.float32),
)


def test_a_mesh_that_fits_is_looked_for_beyond_a_short_time_limit():
    plan = placement.optimize(
        indivisible_step, *INDIVISIBLE, cluster="v5e:2x4", donate_argnums=(0,), time_limit_s=1e-6
    )
    assert len(plan.mesh_shape) == 2
    assert plan.estimate.peak_memory_bytes < 15.75 * 2**30


def test_without_time_to_try_the_meshes_it_does_not_say_that_nothing_fits(monkeypatch):
    monkeypatch.setattr("placement.mesh_search.GRACE_S", 0.0)
    with pytest.raises(InfeasibleError, match=r"meshes not tried.*longer time_limit_s"):
        placement.optimize(
            indivisible_step,
            *INDIVISIBLE,
            cluster="v5e:2x4",
            donate_argnums=(0,),
            time_limit_s=1e-6,
        )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"cluster": "v9:2x2"}, "unknown device"),
        ({"cluster": "v5e:5x7"}, "v5e"),
        ({"cluster": "v5e"}, "cluster"),
        ({"optimizer": "magic"}, "unknown optimizer"),
        ({"objective": "beauty"}, "unknown objective"),
        ({"mesh_shape": {"data": 3}}, "8"),
        ({"time_limit_s": -1.0}, "time_limit_s"),
        ({"donate_argnums": (0, -7)}, "donate_argnums"),
    ],
)
def test_bad_input_gets_one_sentence(change, sentence):
    with pytest.raises(MeshwrightError, match=sentence) as error:
        plan_mlp(**change)
    assert "\n" not in str(error.value)


def test_a_model_that_cannot_fit_says_the_least_memory_and_the_smallest_cluster(tmp_path):
    step, args = mlp_step(8, scan=True, scale=512)
    with pytest.raises(InfeasibleError, match="GiB per device") as error:
        placement.optimize(step, *args, cluster="v5e:2x2", donate_argnums=(0, 1))
    assert "v5e:" in str(error.value)
    plan = placement.optimize(step, *args, cluster="v5e:2x2", donate_argnums=(0, 1), throw=False)
    assert plan.status != "feasible"
    assert plan.lower_bound_s == math.inf  # proven, not only not found
    path = plan.save(tmp_path / "plan.json")
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["lower_bound_s"] is None
    assert placement.Plan.load(path).lower_bound_s == math.inf


def test_a_rule_that_does_not_fit_is_not_replaced_by_another_plan():
    step, args = mlp_step(8, scan=True, scale=400)
    shared = dict(cluster="v5e:2x4", donate_argnums=(0, 1))
    with pytest.raises(InfeasibleError, match="fixed rule"):
        placement.optimize(step, *args, optimizer="data_parallel", **shared)
    assert placement.optimize(step, *args, **shared).status == "feasible"


def test_a_dimension_that_no_axis_divides_stays_whole():
    plan = placement.optimize(
        lambda w, x: (w - 0.1 * (x.T @ (x @ w)), (x @ w).sum()),
        arg(7, 11),
        arg(13, 7),
        cluster="v5e:2x4",
        donate_argnums=(0,),
    )
    assert all(not any(leaf.spec) for leaf in plan.inputs)
    assert any("divides" in w for w in plan.warnings)


def test_a_plan_is_refused_for_another_function_or_other_arguments(tmp_path):
    step, args = mlp_step(2, scan=True, scale=16)
    plan = placement.optimize(step, *args, cluster="cpu:8", donate_argnums=(0, 1))
    loaded = placement.Plan.load(plan.save(tmp_path / "plan.json"))
    assert loaded.bind(step, *args).in_specs == plan.in_specs
    other, other_args = mlp_step(3, scan=True, scale=16)
    with pytest.raises(MeshwrightError, match=r"argument \[0\]\['down'\] is float32\[3"):
        loaded.bind(other, *other_args)
    with pytest.raises(MeshwrightError, match="another program"):
        loaded.bind(lambda p, m, b: (p, m, b.sum()), *args)
    with pytest.raises(MeshwrightError, match="argument arrays"):
        loaded.bind(lambda p: p, args[0])
    with pytest.raises(MeshwrightError, match="bind"):
        _ = loaded.in_specs
    with pytest.raises(MeshwrightError, match="another program"):
        jax.eval_shape(loaded.apply(lambda p, m, b: (p, m, jnp.sum(b))), *args)


def test_a_mesh_of_another_size_is_refused():
    plan = plan_mlp()
    with pytest.raises(MeshwrightError, match="8 devices"):
        plan.mesh(jax.devices()[:4])
