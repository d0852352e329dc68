"""Scheduled HLO text is read as XLA writes it."""
# ruff: noqa: E501

import numpy as np
import pytest

from graphs.errors import MeshwrightError
from placement import hlo
from placement.hlo_collectives import collective_of, parse_groups
from placement.hlo_loops import trip_count

MODULE = """\
HloModule jit_step, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%body (p: (s32[], bf16[4,1024])) -> (s32[], bf16[4,1024]) {
  %two = s32[]{:T(128)} constant(2)
  %p = (s32[]{:T(128)}, bf16[4,1024]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = bf16[4,1024]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p), index=1
  %y = bf16[4,1024]{1,0:T(8,128)(2,1)S(1)} all-reduce(%x), channel_id=3, replica_groups=[2,4]<=[4,2]T(1,0), use_global_device_ids=true, to_apply=%add
  %next = s32[]{:T(128)} add(%i, %two)
  ROOT %out = (s32[]{:T(128)}, bf16[4,1024]{1,0:T(8,128)(2,1)S(1)}) tuple(%next, %y)
}

%condition (p.1: (s32[], bf16[4,1024])) -> pred[] {
  %limit = s32[]{:T(128)} constant(9)
  %p.1 = (s32[]{:T(128)}, bf16[4,1024]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

%all-reduce-scatter.1 (input.1: bf16[16,64]) -> bf16[4,64] {
  %input.1 = bf16[16,64]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.9 = bf16[16,64]{1,0:T(8,128)(2,1)} all-reduce(%input.1), channel_id=5, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %zero = u32[] constant(0)
  ROOT %slice.9 = bf16[4,64]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.9, %zero, %zero), dynamic_slice_sizes={4,64}
}

ENTRY %main (arg: bf16[4,1024], weights: bf16[16,64]) -> bf16[4,64] {
  %arg = bf16[4,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %weights = bf16[16,64]{1,0:T(8,128)(2,1)} parameter(1)
  %one = s32[]{:T(128)} constant(1)
  %start = s32[]{:T(128)} copy(%one)
  %init = (s32[]{:T(128)}, /*index=1*/bf16[4,1024]{1,0:T(8,128)(2,1)}) tuple(%start, %arg)
  %loop = (s32[]{:T(128)}, bf16[4,1024]{1,0:T(8,128)(2,1)}) while(%init), condition=%condition, body=%body, metadata={op_name="jit(step)/while"}
  %kernel = f32[8,128]{1,0:T(8,128)} fusion(%weights), kind=kLoop, calls=%add, metadata={op_name="jit(step)/exp"}, backend_config={"window_config":{"estimated_cycles":"1234"}}
  %unknown = f32[8,128]{1,0:T(8,128)} fusion(%weights), kind=kCustom, calls=%add, backend_config={"window_config":{"estimated_cycles":"9223372036854775807"}}
  %permute-start.2 = (bf16[16,64]{1,0}, bf16[16,64]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%weights), channel_id=7, source_target_pairs={{0,1},{1,2},{2,0}}
  %permute-done.2 = bf16[16,64]{1,0} collective-permute-done(%permute-start.2)
  ROOT %scattered = bf16[4,64]{1,0:T(8,128)(2,1)} fusion(%weights), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


@pytest.fixture(scope="module")
def module():
    return hlo.parse_module(MODULE)


def find(module, name):
    return module.entry_computation.by_name[name]


def test_structure(module):
    assert module.name == "jit_step"
    assert module.n_partitions == 8
    assert module.entry == "main"
    assert set(module.computations) == {
        "add",
        "body",
        "condition",
        "all-reduce-scatter.1",
        "main",
    }
    assert module.entry_computation.root.name == "scattered"
    assert find(module, "init").operands == ("start", "arg")
    assert find(module, "loop").called == {"condition": "condition", "body": "body"}
    assert find(module, "kernel").op_name == "jit(step)/exp"


def test_types_give_bytes_and_memory_space(module):
    scalar, block = hlo.parse_type(module.computations["body"].root.type_text)
    assert (scalar.shape, scalar.size_bytes) == ((), 4)
    assert (block.shape, block.size_bytes, block.memory_space) == ((4, 1024), 8192, 1)
    assert find(module, "arg").arrays[0].memory_space == 0


def test_cycles_and_the_unknown(module):
    assert find(module, "kernel").estimated_cycles == 1234
    assert find(module, "unknown").estimated_cycles is None
    assert find(module, "arg").estimated_cycles is None


def test_trip_count_uses_start_limit_and_step(module):
    # 1, 3, 5, 7: the counter starts at 1, steps by 2 and stays below 9.
    loop = find(module, "loop")
    assert trip_count(module, module.entry_computation, loop) == 4


def test_trip_count_of_known_loops():
    text = MODULE.replace(
        'metadata={op_name="jit(step)/while"}',
        'backend_config={"known_trip_count":{"n":"7"}}',
    )
    module = hlo.parse_module(text)
    assert trip_count(module, module.entry_computation, find(module, "loop")) == 7


def test_trip_count_is_none_where_the_limit_is_data():
    text = MODULE.replace("%limit = s32[]{:T(128)} constant(9)", "%limit = s32[] parameter(1)")
    module = hlo.parse_module(text)
    assert trip_count(module, module.entry_computation, find(module, "loop")) is None


def test_reduce_scatter_of_tpu_is_recognised(module):
    found = collective_of(module, find(module, "scattered"))
    assert found is not None
    assert found.kind == "reduce-scatter"
    assert (found.operand_bytes, found.result_bytes) == (16 * 64 * 2, 4 * 64 * 2)
    assert found.payload_bytes == 16 * 64 * 2
    assert found.groups is not None
    assert found.groups.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_permute_start_has_one_payload_and_done_none(module):
    found = collective_of(module, find(module, "permute-start.2"))
    assert found is not None
    assert (found.kind, found.operand_bytes, found.result_bytes) == (
        "collective-permute",
        2048,
        2048,
    )
    assert found.pairs == ((0, 1), (1, 2), (2, 0))
    assert collective_of(module, find(module, "permute-done.2")) is None
    assert collective_of(module, find(module, "kernel")) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
        ("mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        ("mesh[a=2,b=2], device_ids=([2,2]T(1,0)) {b}", [[0, 2], [1, 3]]),
        ("mesh[a=2,b=2], device_ids=([3,2,1,0]) {b}", [[0, 1], [2, 3]]),
        ("mesh[a=2,b=2], device_ids=([2,2]<=[2,2]T(1,0)) {b}", [[0, 2], [1, 3]]),
    ],
)
def test_groups_in_every_notation(text, expected):
    groups = parse_groups(text)
    assert groups is not None
    assert sorted(map(sorted, groups.tolist())) == expected


def test_mesh_groups_with_device_ids_are_read_whole():
    text = MODULE.replace(
        "replica_groups=[2,4]<=[4,2]T(1,0)",
        "replica_groups=mesh['a'=2,'b'=4], device_ids=([2,4]<=[4,2]T(1,0)) {'b'}",
    )
    module = hlo.parse_module(text)
    found = collective_of(module, module.computations["body"].by_name["y"])
    assert found is not None and found.groups is not None
    assert found.groups.tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_no_groups_means_everyone():
    assert parse_groups("{}") is None


def test_iota_groups_partition_the_devices():
    groups = parse_groups("[8,4]<=[2,4,4]T(0,2,1)")
    assert groups is not None
    assert np.array_equal(np.sort(groups.reshape(-1)), np.arange(32))


def test_truncated_text_is_one_sentence():
    with pytest.raises(MeshwrightError, match=r"not a whole HLO module.*compile again"):
        hlo.parse_module(MODULE[: MODULE.index("ENTRY")])
    with pytest.raises(MeshwrightError, match="%main is not closed"):
        hlo.parse_module(MODULE.rstrip()[:-1])
