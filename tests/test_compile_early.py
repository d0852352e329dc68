"""A compiler that is stopped once it has decided what is asked for."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

import placement
from graphs.errors import MeshwrightError
from placement import compile_early
from placement.compile import MEMORY
from placement.verify import compile_plan

needs_tpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs meshwright[tpu]"
)
BUFFERS = """\
BufferAssignment:
allocation 0: size 1048576, page 0, thread-local:
allocation 1: size 4096, page 0, parameter 0, shape |f32[32,32]| at ShapeIndex {}, maybe-live-out:
allocation 2: size 512, color 5, page 0, parameter 1, shape |f32[128]| at ShapeIndex {}:
allocation 3: size 8192, page 0, preallocated-temp:
allocation 4: size 65536, color 1, page 0, preallocated-temp:
allocation 5: size 1024, page 0, maybe-live-out:
"""


def test_memory_is_known_once_the_buffers_are_dumped(tmp_path):
    place = tmp_path / "m.after_optimizations-buffer-assignment.txt"
    place.write_text("BufferAssignment:\n")
    assert compile_early.early(tmp_path, "memory") is None
    (tmp_path / "m.after_optimizations_after_buffer_assignment.txt").write_text("HloModule m")
    assert compile_early.early(tmp_path, "memory") is None, "nothing is assigned yet"
    place.write_text(BUFFERS)
    entry, text = compile_early.early(tmp_path, "memory")
    assert [entry[k] for k in ("argument_bytes", "output_bytes", "temp_bytes")] == [
        4096,
        1024,
        8192,
    ]
    assert entry["status"] == "ok" and not text


def step(weights, batch):
    def loss(w):
        return (jax.nn.relu(batch @ w["up"]) @ w["down"]).astype(jnp.float32).mean()

    return jax.tree.map(lambda w, g: w - 0.1 * g, weights, jax.grad(loss)(weights))


@needs_tpu_compiler
def test_the_memory_alone_is_that_of_the_whole_compile(tmp_path, monkeypatch):
    monkeypatch.setenv("MESHWRIGHT_CACHE_DIR", str(tmp_path))
    weights = {
        "up": jax.ShapeDtypeStruct((1024, 4096), jnp.float32),
        "down": jax.ShapeDtypeStruct((4096, 1024), jnp.float32),
    }
    args = (weights, jax.ShapeDtypeStruct((4096, 1024), jnp.float32))
    plan = placement.optimize(step, *args, cluster="v5e:2x2", donate_argnums=(0,))
    whole = placement.verify(plan, step, *args)
    alone = placement.verify(plan, step, *args, memory_only=True)
    assert alone.fits and alone.status == "ok"
    assert alone.peak_bytes == pytest.approx(whole.peak_bytes, rel=0.01)
    assert [r.quantity for r in alone.rows()] == ["peak memory"]
    assert alone.compile_time_s < whole.compile_time_s
    again, schedule = compile_plan(plan, step, *args, until=MEMORY)
    assert again.cached and schedule is None
    with pytest.raises(MeshwrightError, match="only memory was asked for"):
        again.module()
