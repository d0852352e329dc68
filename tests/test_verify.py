"""Compiling in a child process: its results, its failures, and what it says of known programs."""

import importlib.util
import json
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import placement
from cost_model.cluster import parse_cluster
from cost_model.layout import layout_for
from graphs.errors import MeshwrightError
from placement import compile as compiler
from placement.compile import compile_for_cluster
from placement.gpu_targets import gpu_names, target_config
from placement.network import chip_of, layout_timer
from placement.schedule import schedule

LAYOUT = layout_for(parse_cluster("h100:8x1"), {"data": 2, "model": 4})
needs_gpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None, reason="needs meshwright[gpu]"
)
HLO = """\
HloModule m, is_scheduled=true

ENTRY %e (p: f32[8]) -> f32[8] {
  ROOT %p = f32[8]{0} parameter(0)
}
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MESHWRIGHT_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def pretend(tmp_path, monkeypatch):
    """Put a shell script in the place of the child's interpreter."""
    monkeypatch.setattr(compiler, "_versions", lambda platform: {"compiler": "1"})

    def install(body):
        script = tmp_path / "interpreter"
        script.write_text("#!/bin/sh\nfolder=$3\n" + body)
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))

    return install


def double(x):
    return 2 * x


def compile_double(**kwargs):
    return compile_for_cluster(
        double,
        (jax.ShapeDtypeStruct((8, 8), jnp.float32),),
        in_specs=(P("data"),),
        out_specs=P("data"),
        layout=LAYOUT,
        **kwargs,
    )


def test_a_killed_compiler_is_one_sentence(pretend):
    pretend("echo out of luck >&2; kill -9 $$")
    with pytest.raises(MeshwrightError, match=r"SIGKILL.*out of luck.*free memory"):
        compile_double()


def test_a_slow_compiler_is_stopped(pretend):
    pretend("exec sleep 60")
    with pytest.raises(MeshwrightError, match=r"longer than 1 s.*longer timeout_s"):
        compile_double(timeout_s=0.6)


def result(**entry):
    numbers = dict(argument_bytes=100, output_bytes=60, alias_bytes=50, temp_bytes=7, code_bytes=1)
    return json.dumps({"status": "ok", "message": "", "seconds": 1.0, **numbers, **entry})


def test_a_result_is_kept_and_not_compiled_again(pretend, tmp_path):
    (tmp_path / "scheduled.txt").write_text(HLO)
    pretend(
        f"echo run >> {tmp_path}/runs; echo 'Involuntary full rematerialization of t' >&2\n"
        f"cp {tmp_path}/scheduled.txt $folder/scheduled.txt\n"
        f"cat > $folder/result.json <<'END'\n{result()}\nEND\n"
    )
    first, second = compile_double(), compile_double()
    assert (first.cached, second.cached) == (False, True)
    assert (tmp_path / "runs").read_text() == "run\n"
    assert first.peak_bytes == second.peak_bytes == 100 + 60 - 50 + 7
    assert len(second.full_rematerializations) == 1
    assert second.module().entry == "e"
    assert not compile_double(cache=False).cached


def test_out_of_memory_is_a_status_and_a_failure_is_tried_again(pretend, tmp_path):
    for status, kept in (("out_of_memory", True), ("failed", False)):
        entry = result(status=status, message=f"it says {status}")
        pretend(f"cat > $folder/result.json <<'END'\n{entry}\nEND\n")
        seen = compile_double(flags=(f"--{status}",))
        assert (seen.status, seen.message) == (status, f"it says {status}")
        assert compile_double(flags=(f"--{status}",)).cached is kept
        with pytest.raises(MeshwrightError, match=f"it says {status}"):
            seen.module()


def test_a_missing_compiler_names_the_extra(monkeypatch):
    compiler._versions.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MeshwrightError, match=r"pip install 'meshwright\[gpu\]'"):
        compile_double()


def test_a_cluster_without_a_compiler_is_refused():
    layout = layout_for(parse_cluster("cpu:8"), {"data": 8})
    with pytest.raises(MeshwrightError, match="no compile-only compiler"):
        compile_for_cluster(double, (), in_specs=(), out_specs=None, layout=layout)


def test_every_gpu_of_the_device_files_has_a_target():
    assert {"a100", "h100", "h200", "b200", "gb200"} <= set(gpu_names())
    for name in gpu_names():
        text = target_config(name)
        assert text.count("{") == text.count("}")
    with pytest.raises(MeshwrightError, match="h100"):
        target_config("mi300")


TOKENS, WIDTH, HIDDEN = 512, 256, 1024


def mlp(x, up, down):
    return jax.lax.with_sharding_constraint(jax.nn.relu(x @ up) @ down, P("data"))


def mlp_arguments():
    shapes = ((TOKENS, WIDTH), (WIDTH, HIDDEN), (HIDDEN, WIDTH))
    return tuple(jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes)


@needs_gpu_compiler
def test_megatron_mlp_has_one_all_reduce_of_its_output():
    compiled = compile_for_cluster(
        mlp,
        mlp_arguments(),
        in_specs=(P("data"), P(None, "model"), P("model", None)),
        out_specs=P("data"),
        layout=LAYOUT,
    )
    assert compiled.status == "ok"
    # per device: x, up, down, each divided by the axes that shard it
    arguments = 2 * (TOKENS * WIDTH // 2 + 2 * WIDTH * HIDDEN // 4)
    assert compiled.argument_bytes == arguments
    step = schedule(compiled.module(), chip=chip_of(LAYOUT), timer=layout_timer(LAYOUT))
    assert step.collective_counts == {"all-reduce": 1}
    payload = step.collective_bytes["all-reduce"]
    assert payload in (TOKENS // 2 * WIDTH * 2, TOKENS // 2 * WIDTH * 4)  # bf16 or f32 sums


@needs_gpu_compiler
def test_constraints_in_loops_and_donation_reach_the_compiler():
    def step(weights, x):
        def layer(x, w):
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), P("data")), None

        x, _ = jax.lax.scan(layer, x, weights)
        return weights * 0.9, x

    compiled = compile_for_cluster(
        step,
        (
            jax.ShapeDtypeStruct((3, WIDTH, WIDTH), jnp.float32),
            jax.ShapeDtypeStruct((TOKENS, WIDTH), jnp.float32),
        ),
        in_specs=(P(None, "model"), P("data")),
        out_specs=(P(None, "model"), P("data")),
        donate_argnums=(0,),
        layout=LAYOUT,
    )
    assert compiled.alias_bytes >= 3 * WIDTH * WIDTH * 4 // 4
    found = schedule(compiled.module(), chip=chip_of(LAYOUT), timer=layout_timer(LAYOUT))
    assert found.collective_counts["all-reduce"] == 3  # one a layer: the weights' rows are sharded


@needs_gpu_compiler
def test_verification_stands_beside_the_prediction():
    def train_step(weights, x):
        def loss(weights):
            return jnp.mean(jnp.square(jax.nn.relu(x @ weights["up"]) @ weights["down"]))

        value, grads = jax.value_and_grad(loss)(weights)
        return jax.tree.map(lambda w, g: w - 0.1 * g, weights, grads), value

    x, up, down = (jax.ShapeDtypeStruct(a.shape, jnp.float32) for a in mlp_arguments())
    arguments = ({"up": up, "down": down}, x)
    plan = placement.optimize(train_step, *arguments, cluster="h100:8x1", donate_argnums=(0,))
    seen = placement.verify(plan, train_step, *arguments)
    assert seen.fits and seen.status == "ok" and not seen.full_rematerializations
    rows = {row.quantity: row for row in seen.rows()}
    assert rows["peak memory"].compiled == seen.peak_bytes > 0
    assert rows["step time"].predicted == plan.estimate.step_time_s
    assert rows["step time"].compiled >= rows["compute time"].compiled > 0
