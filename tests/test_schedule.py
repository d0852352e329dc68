"""Step time from a schedule, on programs small enough to add up by hand.

One cycle is 1 ns, the memory moves 1 GB/s, and a collective takes what the test says.
"""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cost_model.cluster import parse_cluster
from cost_model.collectives import collective_time_s
from cost_model.layout import layout_for
from placement import hlo
from placement.hlo_collectives import Collective, parse_groups
from placement.network import axes_of_group, layout_timer
from placement.schedule import Chip, Timed, schedule

CHIP = Chip(clock_hz=1e9, memory_bandwidth_bytes_per_s=1e9, peak_flops_per_s=1e12)
US = 1e-6


def kernel(name, cycles, operand="x"):
    return (
        f"  %{name} = f32[256]{{0:S(1)}} fusion(%{operand}), kind=kLoop, calls=%f, backend_config="
        f'{{"window_config":{{"estimated_cycles":"{cycles}"}}}}'
    )


def entry(*lines, head=""):
    text = "HloModule m, is_scheduled=true\n\n%f (p: f32[256]) -> f32[256] {\n"
    text += "  ROOT %p = f32[256]{0} parameter(0)\n}\n\n" + head
    text += "ENTRY %main (x: f32[256]) -> f32[256] {\n  %x = f32[256]{0} parameter(0)\n"
    return hlo.parse_module(text + "\n".join(lines) + "\n}\n")


def fixed(seconds, lanes=("link",)):
    return lambda collective: Timed(time_s=seconds, lanes=frozenset(lanes))


def run(module, seconds=100 * US, **kwargs):
    return schedule(module, chip=CHIP, timer=kwargs.pop("timer", fixed(seconds)))


REDUCE = "  %r = f32[256]{0} all-reduce(%a), replica_groups={{0,1}}, to_apply=%f"
START = (
    "  %s = (f32[256]{0}, f32[256]{0}) collective-permute-start(%a), "
    "source_target_pairs={{0,1},{1,0}}"
)
DONE = "  %d = f32[256]{0} collective-permute-done(%s)"


def test_kernels_add_up():
    step = run(entry(kernel("a", 10_000), kernel("b", 5_000, "a")))
    assert step.step_time_s == pytest.approx(15 * US)
    assert step.compute_time_s == pytest.approx(15 * US)
    assert (step.exposed_comm_time_s, step.kernels, step.unknown_kernels) == (0, 2, 0)


def test_synchronous_collective_blocks():
    step = run(entry(kernel("a", 10_000), REDUCE, kernel("b", 5_000)))
    assert step.step_time_s == pytest.approx(115 * US)
    assert step.exposed_comm_time_s == pytest.approx(100 * US)
    assert step.collective_bytes == {"all-reduce": 1024}
    assert step.collective_counts == {"all-reduce": 1}


@pytest.mark.parametrize(("between_us", "exposed_us"), [(0, 100), (30, 70), (100, 0), (250, 0)])
def test_asynchronous_collective_hides_behind_what_runs_between(between_us, exposed_us):
    step = run(entry(kernel("a", 10_000), START, kernel("b", between_us * 1000), DONE))
    assert step.exposed_comm_time_s == pytest.approx(exposed_us * US, abs=1e-12)
    assert step.step_time_s == pytest.approx((10 + between_us + exposed_us) * US)


def test_an_update_hands_what_is_in_flight_to_its_done():
    update = "  %u = (f32[256]{0}, f32[256]{0}) async-update(%s)"
    done = "  %d = f32[256]{0} async-done(%u)"
    step = run(entry(kernel("a", 10_000), START, update, done, kernel("b", 50_000)))
    assert step.exposed_comm_time_s == pytest.approx(100 * US)


def test_one_lane_is_taken_in_turn_and_two_lanes_at_once():
    second = START.replace("%s =", "%s2 =")
    lines = (kernel("a", 0), START, second, DONE, DONE.replace("%d", "%d2").replace("%s", "%s2"))
    assert run(entry(*lines)).step_time_s == pytest.approx(200 * US)
    lanes = iter((("east",), ("west",)))

    def timer(collective):
        return Timed(time_s=100 * US, lanes=frozenset(next(lanes)))

    assert run(entry(*lines), timer=timer).step_time_s == pytest.approx(100 * US)


def test_what_is_in_flight_at_the_end_is_waited_for():
    assert run(entry(kernel("a", 1_000), START)).step_time_s == pytest.approx(101 * US)


def test_prefetch_runs_beside_compute_at_memory_bandwidth():
    # 1024 bytes at 1 GB/s: 1.024 us.
    start = "  %s = (f32[256]{0:S(1)}, f32[256]{0}, u32[]{:S(2)}) copy-start(%x)"
    done = "  %d = f32[256]{0:S(1)} copy-done(%s)"
    step = run(entry(start, done, kernel("a", 10_000)))
    assert step.exposed_memory_time_s == pytest.approx(1.024 * US)
    assert step.exposed_comm_time_s == 0
    assert run(entry(start, kernel("a", 10_000), done)).exposed_memory_time_s == 0


def loop(trips, *body):
    lines = "\n".join(body)
    head = (
        "%body (p: (s32[], f32[256])) -> (s32[], f32[256]) {\n"
        "  %x = (s32[], f32[256]{0}) parameter(0)\n" + lines + "\n"
        "  ROOT %t = (s32[], f32[256]{0}) tuple(%x)\n}\n\n"
        "%cond (p: (s32[], f32[256])) -> pred[] {\n"
        "  ROOT %c = pred[] parameter(0)\n}\n\n"
    )
    call = (
        "  %w = (s32[], f32[256]{0}) while(%x), condition=%cond, body=%body, "
        f'backend_config={{"known_trip_count":{{"n":"{trips}"}}}}'
    )
    return entry(call, head=head)


@given(trips=st.integers(1, 40), cycles=st.integers(1, 10**6))
@settings(max_examples=25, deadline=None)
def test_loops_multiply(trips, cycles):
    step = run(loop(trips, kernel("a", cycles), REDUCE))
    assert step.step_time_s == pytest.approx(trips * (cycles * 1e-9 + 100 * US))
    assert step.collective_bytes["all-reduce"] == pytest.approx(1024 * trips)
    assert step.kernels == trips


def test_a_loop_keeps_its_overlap():
    step = run(loop(10, kernel("a", 10_000), START, kernel("b", 60_000), DONE))
    assert step.exposed_comm_time_s == pytest.approx(10 * 40 * US)
    assert step.step_time_s == pytest.approx(10 * 110 * US)


def test_unknown_and_absurd_estimates_take_the_roofline_and_are_counted():
    unknown = kernel("a", hlo.UNKNOWN_CYCLES).replace("f32[256]{0:S(1)}", "f32[1024]{0}")
    step = run(entry(unknown))
    # 4096 bytes written and 1024 read at 1 GB/s.
    assert step.compute_time_s == pytest.approx(5.12 * US)
    assert (step.unknown_kernels, step.absurd_kernels) == (1, 0)
    step = run(entry(kernel("a", 10**12).replace("f32[256]{0:S(1)}", "f32[1024]{0}")))
    assert step.compute_time_s == pytest.approx(5.12 * US)
    assert (step.unknown_kernels, step.absurd_kernels) == (1, 1)


def fused(name, phase, cycles=0):
    """A fusion that starts, carries along or ends the all-gather of channel 9."""
    target = {
        "start": '  %c = u32[] custom-call(), custom_call_target="AsyncCollectiveStart"\n',
        "done": '  %c = u32[] custom-call(), custom_call_target="AsyncCollectiveDone"\n',
        "fused": "",
    }[phase]
    head = (
        f"%{name}_body (p: f32[64]) -> f32[256] {{\n  %p = f32[64]{{0}} parameter(0)\n{target}"
        "  ROOT %g = f32[256]{0} all-gather(%p), channel_id=9, replica_groups={{0,1,2,3}}, "
        'dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"2"}}\n'
        "}\n\n"
    )
    tail = f'"window_config":{{"estimated_cycles":"{cycles}"}}' if cycles else '"flag_configs":[]'
    line = (
        f"  %{name} = f32[256]{{0}} fusion(%x), kind=kCustom, calls=%{name}_body, "
        f"backend_config={{{tail}}}"
    )
    return head, line


def test_an_all_gather_fused_into_kernels_counts_once_and_overlaps_them():
    parts = [fused("s", "start"), fused("k1", "fused", 30_000), fused("k2", "fused", 40_000)]
    parts += [fused("e", "done")]
    step = run(entry(*(line for _, line in parts), head="".join(head for head, _ in parts)))
    assert step.collective_counts == {"all-gather": 1}
    assert step.collective_bytes == {"all-gather": 1024}
    assert step.compute_time_s == pytest.approx(70 * US)
    assert step.exposed_comm_time_s == pytest.approx(30 * US)


LAYOUT = layout_for(parse_cluster("v5e:4x4"), {"data": 4, "model": 4})


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("mesh['a'=4,'b'=4] {'b'}", (1,)),
        ("mesh['a'=4,'b'=4] {'a'}", (0,)),
        ("[1,16]<=[16]", (0, 1)),
    ],
)
@pytest.mark.parametrize("kind", ["all-reduce", "all-gather", "reduce-scatter", "all-to-all"])
def test_groups_are_costed_on_the_axes_they_span(groups, axes, kind):
    collective = Collective(
        kind=kind,
        name="c",
        operand_bytes=1 << 20,
        result_bytes=1 << 20,
        dtype="bf16",
        groups=parse_groups(groups),
        pairs=(),
        op_name="",
    )
    expected = collective_time_s(kind.replace("-", "_"), 1 << 20, LAYOUT, axes)
    assert layout_timer(LAYOUT)(collective).time_s == pytest.approx(expected)


def test_a_part_of_an_axis_is_a_split_layout_with_the_same_devices():
    layout = layout_for(parse_cluster("v5e:4x4"), {"data": 16})
    groups = parse_groups("[4,4]<=[4,4]T(1,0)")
    assert groups is not None
    finer, axes = axes_of_group(layout, groups[0])
    assert [finer.mesh.axis_sizes[a] for a in axes] == [4]
    finer.validate()


def permute(pairs, n_bytes=1 << 20):
    return Collective(
        kind="collective-permute",
        name="p",
        operand_bytes=n_bytes,
        result_bytes=n_bytes,
        dtype="bf16",
        groups=None,
        pairs=tuple(pairs),
        op_name="",
    )


def test_a_shift_within_rows_is_a_hop_and_opposite_shifts_use_opposite_lanes():
    timer = layout_timer(LAYOUT)
    east = timer(permute([(r * 4 + c, r * 4 + c + 1) for r in range(4) for c in range(3)]))
    west = timer(permute([(r * 4 + c + 1, r * 4 + c) for r in range(4) for c in range(3)]))
    assert east.time_s == pytest.approx(west.time_s)
    assert not east.lanes & west.lanes
    far = timer(permute([(r * 4, r * 4 + 3) for r in range(4)]))
    assert far.time_s > east.time_s


def test_permuting_the_mesh_axes_permutes_the_costs():
    swapped = layout_for(parse_cluster("v5e:4x4"), {"model": 4, "data": 4})
    rows = permute([(i, (i + 4) % 16) for i in range(16)])
    columns = permute([(r * 4 + c, r * 4 + (c + 1) % 4) for r in range(4) for c in range(4)])
    times = {layout_timer(lay)(c).time_s for lay in (LAYOUT, swapped) for c in (rows, columns)}
    assert max(times) == pytest.approx(min(times))


def test_fields_are_seconds_and_counts():
    step = run(entry(kernel("a", 1_000)))
    values = dataclasses.asdict(step)
    assert all(v >= 0 for v in values.values() if isinstance(v, (int, float)))
