"""Steps that leave their checkpoint policy to the plan."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import placement
from graphs.errors import MeshwrightError
from placement.checkpointing import POLICIES, takes_policy, with_policy
from placement.experiments.cli import main

LAYERS = 8
shape = jax.ShapeDtypeStruct


def train_step(params, tokens, checkpoint_policy=None):
    def loss(params):
        def layer(x, w):
            return x + jnp.tanh(x @ w["up"]) @ w["down"], None

        layer = jax.checkpoint(layer, policy=checkpoint_policy)
        x, _ = jax.lax.scan(layer, params["embedding"][tokens], params["layers"])
        return jnp.mean((x @ params["embedding"].T) ** 2)

    value, gradients = jax.value_and_grad(loss)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), value


def abstract(batch, width, length=128, vocabulary=256):
    params = {
        "embedding": shape((vocabulary, width), jnp.float32),
        "layers": {
            "up": shape((LAYERS, width, 4 * width), jnp.float32),
            "down": shape((LAYERS, 4 * width, width), jnp.float32),
        },
    }
    return params, shape((batch, length), jnp.int32)


def plan_for(batch, cluster="v5e:2x2", step=train_step, width=2048, **options):
    return placement.optimize(
        step,
        *abstract(batch, width),
        cluster=cluster,
        donate_argnums=(0,),
        time_limit_s=20.0,
        **options,
    )


def test_a_policy_is_looked_for_by_its_name():
    assert takes_policy(train_step)
    assert not takes_policy(lambda params, tokens: params)
    assert not takes_policy(lambda *args, **kwargs: args)
    assert takes_policy(functools.partial(lambda a, *, checkpoint_policy: a, 1))


def test_the_fastest_policy_that_fits_is_planned():
    roomy = plan_for(32)
    others = {p: plan_for(32, checkpoint_policy=p) for p in POLICIES}
    assert roomy.status == "feasible" and roomy.checkpoint_policy in POLICIES
    assert all(other.checkpoint_policy == p for p, other in others.items())
    fastest = min(p.estimate.step_time_s for p in others.values())
    assert roomy.estimate.step_time_s <= fastest * (1 + 1e-9)
    nothing, dots = (
        others["nothing_saveable"].estimate,
        others["dots_saveable"].estimate,
    )
    assert dots.step_time_s < nothing.step_time_s
    assert dots.peak_memory_bytes > nothing.peak_memory_bytes
    assert roomy.lower_bound_s <= roomy.estimate.step_time_s
    assert f"checkpoint policy {roomy.checkpoint_policy}, of 4 tried" in roomy.explain()
    tried = {a["optimizer"] for a in roomy.alternatives}
    assert {f"search, {p}" for p in POLICIES} <= tried


def test_where_memory_is_short_more_is_computed_again():
    whole, least = (
        plan_for(64, checkpoint_policy=p).estimate.peak_memory_bytes
        for p in (POLICIES[-1], POLICIES[0])
    )
    room = 16e9  # of v5e
    batch = 64 * int(1.5 * room / whole)
    assert batch / 64 * least < room
    tight = plan_for(batch)
    assert tight.status == "feasible"
    assert tight.checkpoint_policy != "everything_saveable"


def test_the_objective_chooses_among_policies():
    leanest = plan_for(32, objective="memory")
    assert leanest.checkpoint_policy == "nothing_saveable"
    assert leanest.estimate.peak_memory_bytes < plan_for(32).estimate.peak_memory_bytes


def test_the_command_line_says_the_policy(tmp_path, monkeypatch, capsys):
    (tmp_path / "leaves_it.py").write_text(
        "import jax\n"
        "import jax.numpy as jnp\n\n\n"
        "def step(w, x, checkpoint_policy=None):\n"
        "    layer = jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None), policy=checkpoint_policy)\n"
        "    return w - jax.grad(lambda w: jnp.sum(jax.lax.scan(layer, x, w)[0]))(w)\n\n\n"
        "def build():\n"
        "    shape = jax.ShapeDtypeStruct\n"
        "    return step, (shape((4, 256, 256), jnp.float32), shape((64, 256), jnp.float32)), (0,)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "module=leaves_it:build", "cluster=v5e:2x2", "out=plan.json"]) == 0
    policy = placement.Plan.load("plan.json").checkpoint_policy
    assert policy in POLICIES and f"jax.checkpoint_policies.{policy}" in capsys.readouterr().out


def test_an_applied_plan_computes_the_same(tmp_path):
    plan = placement.Plan.load(plan_for(8, cluster="cpu:8", width=64).save(tmp_path / "plan.json"))
    assert plan.checkpoint_policy in POLICIES
    rng = np.random.default_rng(0)
    params, tokens = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.02, x.dtype), abstract(8, 64)
    )
    tokens = jnp.asarray(rng.integers(0, 256, tokens.shape), jnp.int32)
    bound = plan.bind(train_step, params, tokens)
    mesh = bound.mesh()
    step = jax.jit(
        bound.apply(train_step, mesh),
        in_shardings=bound.in_shardings(mesh),
        out_shardings=bound.out_shardings(mesh),
    )
    new, value = step(params, tokens)
    plain, expected = jax.jit(train_step)(params, tokens)
    assert value == pytest.approx(float(expected), rel=1e-4)
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(plain), strict=True):
        assert np.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: plan_for(8, checkpoint_policy="some"), "unknown checkpoint policy 'some'"),
        (
            lambda: plan_for(8, step=lambda p, t: p, checkpoint_policy=POLICIES[0]),
            "has no argument checkpoint_policy",
        ),
        (lambda: with_policy(lambda p, t: p, POLICIES[0]), "pass the function that was planned"),
    ],
)
def test_what_cannot_be_is_one_sentence(call, says):
    with pytest.raises(MeshwrightError, match=says):
        call()
