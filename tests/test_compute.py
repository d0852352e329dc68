"""Operator times: physical limits, published compiler samples, shipped fits against profiles."""

import importlib.resources
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cost_model.calibration.cycles import read_cycles
from cost_model.calibration.fit import fit_profile, predict_cycles, read_profile
from cost_model.calibration.programs import build, parse_case
from cost_model.calibration.shapes import cases
from cost_model.cluster import parse_cluster
from cost_model.compute import (
    attention_time_s,
    elementwise_time_s,
    gather_time_s,
    memory_bound_time_s,
    sort_time_s,
)
from cost_model.device import device_names, load_device
from cost_model.fitted import load_calibration, parse_calibration
from cost_model.loops import fused_bytes_s
from cost_model.matmul import matmul_time_s
from graphs.errors import MeshwrightError

FOLDER = importlib.resources.files("cost_model") / "calibration"
PROFILED = [n for n in device_names() if (FOLDER / f"{n}.csv").is_file()]
SIDES = st.integers(1, 32768)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(device_names()), st.integers(1, 64), SIDES, SIDES, SIDES)
def test_a_matmul_takes_at_least_most_of_its_flops(name, b, m, k, n):
    device = load_device(name)
    seconds = float(matmul_time_s(device, b, m, k, n))
    assert np.isfinite(seconds) and seconds > 0
    assert seconds > 0.7 * 2 * b * m * k * n / device.peak("bfloat16")


@pytest.mark.parametrize("name", device_names())
def test_a_large_aligned_matmul_runs_near_the_peak(name):
    device = load_device(name)
    seconds = float(matmul_time_s(device, 1, 8192, 8192, 8192))
    ideal = 2 * 8192**3 / device.peak("bfloat16")
    assert 0.95 * ideal < seconds < 1.6 * ideal


@pytest.mark.parametrize("name", ["v5e", "v6e", "h100"])
def test_times_are_vectorised_and_zero_for_nothing(name):
    device = load_device(name)
    m = np.array([[0, 100], [1024, 4096]])
    table = matmul_time_s(device, 1, m, 512, 2048)
    assert table.shape == (2, 2) and table[0, 0] == 0
    assert table[1, 1] == pytest.approx(float(matmul_time_s(device, 1, 4096, 512, 2048)))
    moved = np.array([0.0, 1e6, 1e9])
    assert memory_bound_time_s(device, moved)[0] == 0
    assert np.all(np.diff(memory_bound_time_s(device, moved)) > 0)
    assert elementwise_time_s(device, 0.0, 0.0) == 0
    for seconds in (
        attention_time_s(device, 2, 8, 2048, 2048, [64, 128]),
        gather_time_s(device, [128, 4096], 1024),
        sort_time_s(device, [128, 4096], 512),
    ):
        assert seconds.shape == (2,) and np.all(seconds > 0)


def test_more_vector_work_never_takes_less_time():
    device = load_device("v5e")
    work = np.logspace(5, 12, 30)
    assert np.all(np.diff(elementwise_time_s(device, 1e8, work)) >= 0)


def test_ragged_sides_cost_as_their_tiles():
    device = load_device("v6e")
    ragged = float(matmul_time_s(device, 1, 8192, 8192, 2050))
    whole = float(matmul_time_s(device, 1, 8192, 8192, 2304))
    assert ragged == pytest.approx(whole, rel=0.15)


@pytest.mark.parametrize(
    ("name", "m", "k", "n", "seconds"),
    [
        ("v5e", 8192, 8192, 8192, 6371e-6),
        ("v5e", 8192, 128, 8192, 606e-6),
        ("v5e", 16384, 4096, 250, 276e-6),
        ("v6e", 8192, 8192, 8192, 1702e-6),
        ("v6e", 8192, 128, 8192, 272e-6),
        ("v5p", 8192, 8192, 8192, 2658e-6),
    ],
)
def test_the_compilers_own_estimates(name, m, k, n, seconds):
    # cycles of XLA's TPU compiler (libtpu 0.0.52) at the core clock; shapes not in the profile
    if name not in PROFILED:
        pytest.skip(f"no profile of {name}")
    assert float(matmul_time_s(load_device(name), 1, m, k, n)) == pytest.approx(seconds, rel=0.2)


@pytest.mark.parametrize("name", PROFILED)
def test_shipped_constants_fit_their_profile(name):
    device = load_device(name)
    profile = read_profile((FOLDER / f"{name}.csv").read_text(), device.core_clock_hz)
    content = json.loads((FOLDER / f"{name}.json").read_text())
    assert content["versions"] == profile.versions and profile.versions["jax"]
    fit = load_calibration(name)
    errors = [abs(predict_cycles(device, fit, r.case) / r.cycles - 1) for r in profile.rows]
    stated = content["held_out_error"]["all"]
    assert np.median(errors) <= stated["median"] + 0.01
    assert stated["shapes"] >= 0.15 * len(profile.rows)


def test_a_fit_recovers_the_device_that_made_the_profile():
    device = load_device("v5e")
    truth = parse_calibration(json.loads((FOLDER / "v5e.json").read_text()))
    made = [c for c in cases(seed=7, scale=0.3) if c.kind == "matmul" and dict(c.dims)["b"] == 1]
    lines = ["# v5e jax=0", "kind,variant,dtype,dims,cycles,seconds,kernels,unknown_kernels,"]
    lines[1] += "copy_bytes,error"
    for item in made:
        dims = " ".join(f"{k}={v}" for k, v in item.dims)
        cycles = predict_cycles(device, truth, item)
        lines.append(f"{item.kind},{item.variant},{item.dtype},{dims},{cycles},,1,0,0,")
    _, errors = fit_profile(device, read_profile("\n".join(lines), device.core_clock_hz))
    shapes, median, _ = errors["matmul"]
    assert shapes > 5 and median < 0.08


def test_rows_without_an_estimate_are_counted_not_used():
    head = "# v5e jax=0\nkind,variant,dtype,dims,cycles,seconds,kernels,unknown_kernels,"
    text = head + (
        "copy_bytes,error\n"
        "matmul,nn,bfloat16,b=1 m=8 k=8 n=8,5000,,1,0,0,\n"
        "matmul,nn,bfloat16,b=1 m=8 k=8 n=9,5000,,2,1,0,\n"
        "sort,sort,float32,r=8 c=8 k=1,17,,1,0,0,\n"
        "matmul,nn,bfloat16,b=1 m=8 k=8 n=10,,,,,,out of memory\n"
    )
    profile = read_profile(text, 1e9)
    assert (len(profile.rows), profile.unknown, profile.failed) == (1, 2, 1)
    with pytest.raises(MeshwrightError, match="version line"):
        read_profile("kind,variant\n", 1e9)


def test_cycles_of_a_schedule_count_loops_and_leave_out_sentinels():
    text = """HloModule m
%body.1 (p: (s32[])) -> (s32[]) {
  %f.1 = f32[8]{0} fusion(%x), backend_config={"window_config":{"estimated_cycles":"100"}}
}
%condition.1 (p: (s32[])) -> pred[] {
  %c = s32[]{:T(128)} constant(12)
}
ENTRY %main.2 (a: f32[8]) -> f32[8] {
  %copy-start = (bf16[4,8]{1,0:T(8,128)S(1)}, bf16[4,8]{1,0}, u32[]) copy-start(%a)
  %w = (s32[]) while(%t), condition=%condition.1, body=%body.1
  %f.2 = f32[8]{0} fusion(%x), backend_config={"estimated_cycles":"7"}
  %g = f32[8]{0} fusion(%x), backend_config={"estimated_cycles":"9223372036854775807"}
  %s = f32[8]{0} sort(%x), dimensions={0}
}
"""
    totals = read_cycles(text)
    assert totals.cycles == 12 * 100 + 7
    assert totals.kernels == 12 + 3 and totals.unknown_kernels == 2
    assert totals.copy_bytes == 64


def test_cases_are_reproducible_and_every_kind_traces():
    import jax

    made = cases(seed=3, scale=0.1)
    assert [c.name for c in made] == [c.name for c in cases(seed=3, scale=0.1)]
    seen = set()
    for item in cases(seed=3, scale=1.0):
        assert parse_case(item.name) == item
        if (item.kind, item.variant) not in seen:
            seen.add((item.kind, item.variant))
            program, arguments = build(item)
            jax.eval_shape(program, *arguments)
    assert len({kind for kind, _ in seen}) == 10


def profile(tmp_path, *more):
    from placement.experiments.profile import main

    arguments = ["device=cpu", "kinds=[elementwise]", "scale=0.06", "fit=false"]
    return main([*arguments, f"cache={tmp_path}/cache", f"out={tmp_path}/out", *more])


def test_the_profile_command_resumes_where_it_stopped(tmp_path, capsys):
    assert profile(tmp_path) == 0
    (store,) = (tmp_path / "cache").glob("cpu-*.jsonl")
    whole = store.read_text()
    lines = whole.splitlines()
    assert len(lines) >= 3 and all(json.loads(line)["seconds"] > 0 for line in lines)
    # killed while it wrote the last line
    store.write_text(whole[: -len(lines[-1]) // 2])
    assert profile(tmp_path) == 0
    kept = store.read_text()
    assert kept.startswith("\n".join(lines[:-1]))
    rows = read_profile((tmp_path / "out" / "cpu.csv").read_text(), 1e9).rows
    assert len(rows) == len(lines)
    assert "measured, 0 failed" in capsys.readouterr().out


def test_the_profile_command_refuses_what_it_does_not_know(tmp_path):
    with pytest.raises(MeshwrightError, match="no operator 'matmull'"):
        profile(tmp_path, "kinds=[matmull]")
    with pytest.raises(MeshwrightError, match="v5x"):
        profile(tmp_path, "device=v5x")
    with pytest.raises(MeshwrightError, match="finds no gpu"):
        profile(tmp_path, "device=h100")


def test_forced_host_devices_share_the_cache_of_the_machine():
    one, eight = (parse_cluster(f"cpu:{n}").device for n in (1, 8))
    assert eight.cache_bytes == one.cache_bytes / 8
    inside, outside = 0.9 * eight.cache_bytes, 1.1 * eight.cache_bytes
    assert fused_bytes_s(eight, inside) == inside / eight.cache_bandwidth_bytes_per_s
    assert fused_bytes_s(eight, outside) > 1.5 * fused_bytes_s(eight, inside)
    v5e = parse_cluster("v5e:4x4").device
    assert fused_bytes_s(v5e, 2.0) == 2.0 * fused_bytes_s(v5e, 1.0)
