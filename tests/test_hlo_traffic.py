"""Bytes and flops of kernels that the compiler does not time, on lines as XLA:GPU writes them."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from cost_model.cluster import parse_cluster
from cost_model.layout import layout_for
from cost_model.matmul import matmul_time_s
from graphs.errors import MeshwrightError
from placement import hlo
from placement.compile import SCHEDULE, compile_for_cluster
from placement.hlo_flops import library_product, matmul_flops
from placement.hlo_traffic import moved_bytes
from placement.network import chip_of, layout_timer
from placement.schedule import schedule

TEXT = """HloModule m, is_scheduled=true

%stacked (p0: f32[8,256], p1: f32[256], p2: s32[]) -> f32[8,256] {
  %p0 = f32[8,256]{1,0} parameter(0)
  %p1 = f32[256]{0} parameter(1)
  %double = f32[256]{0} add(%p1, %p1)
  %new = f32[1,256]{1,0} bitcast(%double)
  %p2 = s32[] parameter(2)
  ROOT %put = f32[8,256]{1,0} dynamic-update-slice(%p0, %new, %p2, %p2)
}

%layer (q0: f32[8,256], q1: s32[]) -> f32[256] {
  %q0 = f32[8,256]{1,0} parameter(0)
  %q1 = s32[] parameter(1)
  %one = f32[1,256]{1,0} dynamic-slice(%q0, %q1, %q1), dynamic_slice_sizes={1,256}
  ROOT %flat = f32[256]{0} bitcast(%one)
}

%both (r0: f32[8,256], r1: s32[]) -> f32[8,256] {
  %r0 = f32[8,256]{1,0} parameter(0)
  %r1 = s32[] parameter(1)
  %row = f32[1,256]{1,0} dynamic-slice(%r0, %r1, %r1), dynamic_slice_sizes={1,256}
  %wide = f32[8,256]{1,0} broadcast(%row), dimensions={0,1}
  ROOT %sum = f32[8,256]{1,0} add(%r0, %wide)
}

ENTRY %main (x: f32[8,256], y: f32[256], i: s32[]) -> f32[8,256] {
  %x = f32[8,256]{1,0} parameter(0)
  %y = f32[256]{0} parameter(1)
  %i = s32[] parameter(2)
  %a = f32[8,256]{1,0} fusion(%x, %y, %i), kind=kLoop, calls=%stacked
  %b = f32[256]{0} fusion(%a, %i), kind=kLoop, calls=%layer
  %c = f32[8,256]{1,0} fusion(%a, %i), kind=kLoop, calls=%both
  %left = bf16[4,64,32]{2,1,0} parameter(3)
  %right = bf16[4,32,16]{2,1,0} parameter(4)
  %g = (f32[4,64,16]{2,1,0}, s8[33554432]{0}) custom-call(%left, %right), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]}}}
  ROOT %d = f32[8,256]{1,0} copy(%c)
}
"""  # noqa: E501
MODULE = hlo.parse_module(TEXT)
ENTRY = MODULE.entry_computation
ROW, STACK = 4 * 256, 4 * 8 * 256


def moved(name):
    return moved_bytes(MODULE, ENTRY, ENTRY.by_name[name])


def test_a_stack_is_touched_where_a_loop_puts_its_row():
    assert moved("a") == ROW + ROW + 4  # the row read, the row written, the index


def test_a_stack_is_read_where_a_loop_takes_its_row():
    assert moved("b") == ROW + ROW + 4


def test_what_is_also_read_whole_counts_whole():
    assert moved("c") == STACK + STACK + 4
    assert moved("d") == 2 * STACK


def test_a_library_product_has_flops_and_no_work_space():
    call = ENTRY.by_name["g"]
    assert library_product(ENTRY, call) == (4, 64, 32, 16, "bf16", "f32")
    assert matmul_flops(MODULE, ENTRY, call) == 2 * 4 * 64 * 32 * 16
    assert moved("g") == 2 * 4 * (64 * 32 + 32 * 16) + 4 * 4 * 64 * 16
    assert library_product(ENTRY, ENTRY.by_name["a"]) is None


def _step(w, x):
    def layer(h, w):
        return jnp.tanh(h @ w), None

    return jax.value_and_grad(lambda w: jnp.sum(jax.lax.scan(layer, x, w)[0]))(w)


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None, reason="needs meshwright[gpu]"
)
def test_the_schedule_alone_is_that_of_the_whole_compile(tmp_path, monkeypatch):
    monkeypatch.setenv("MESHWRIGHT_CACHE_DIR", str(tmp_path))
    layout = layout_for(parse_cluster("h200:4x1"), {"data": 2, "model": 2})
    args = (
        jax.ShapeDtypeStruct((4, 512, 512), jnp.bfloat16),
        jax.ShapeDtypeStruct((1024, 512), jnp.bfloat16),
    )
    specs = dict(
        in_specs=(P(None, None, "model"), P("data", None)),
        out_specs=(P(), P(None, None, "model")),
        layout=layout,
    )
    whole = compile_for_cluster(_step, args, **specs)
    alone = compile_for_cluster(_step, args, **specs, until=SCHEDULE)
    assert whole.status == alone.status == "ok" and whole.key != alone.key
    assert alone.peak_bytes == pytest.approx(whole.peak_bytes, abs=4096)
    assert alone.argument_bytes == pytest.approx(whole.argument_bytes, abs=4096)
    found = [
        schedule(c.module(), chip=chip_of(layout), timer=layout_timer(layout))
        for c in (whole, alone)
    ]
    assert found[0] == found[1] and found[0].comm_time_s > 0
    product = float(matmul_time_s(layout.cluster.device, 1, 512, 512, 256))
    assert found[0].compute_time_s > 12 * product  # a layer: forward and two of the backward pass


def test_only_gpus_give_a_schedule_alone():
    layout = layout_for(parse_cluster("v5e:2x2"), {"data": 4})
    with pytest.raises(MeshwrightError, match="only GPUs give a schedule alone"):
        compile_for_cluster(_step, (), in_specs=(), out_specs=(), layout=layout, until=SCHEDULE)
