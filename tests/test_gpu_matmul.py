"""Matrix multiplications on a GPU: tiles in waves, operands that do not fit blocks, the profile."""

import dataclasses
import importlib.resources
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cost_model.calibration.fit import fit_profile, read_profile
from cost_model.compute import elementwise_time_s, memory_bound_time_s
from cost_model.device import load_device
from cost_model.fitted import load_calibration
from cost_model.gpu_matmul import gpu_matmul_cycles
from cost_model.matmul import matmul_time_s
from cost_model.product import Product

DEVICE = load_device("h200")
CONSTANTS = load_calibration("h200").constants["matmul"]
FOLDER = importlib.resources.files("cost_model") / "calibration"
EIGHTS = st.integers(1, 1000).map(lambda x: 8 * x)


def _cycles(b, m, k, n, dtype="bfloat16", turned=(False, False)):
    return gpu_matmul_cycles(DEVICE, CONSTANTS, Product.of(b, m, k, n, dtype, turned=turned))


def test_tiles_run_in_waves():
    # with more rows the multiprocessors are all busy, then wait for the few tiles of one more wave
    rows = 64 * np.arange(16, 200)
    cycles = _cycles(1, rows, 4096, 4096)
    assert np.all(np.diff(cycles) >= 0)
    assert np.mean(np.diff(cycles) < 0.002 * cycles[:-1]) > 0.5
    rate = rows / cycles
    assert np.any(rate[1:] < 0.9 * rate[:-1]) and rate[-1] > 0.9 * rate.max()


@settings(max_examples=60, deadline=None)
@given(EIGHTS, EIGHTS, EIGHTS)
def test_more_of_any_side_takes_no_less(m, k, n):
    sides = np.array([[m, k, n], [m + 256, k, n], [m, k + 1024, n], [m, k, n + 256]]).T
    cycles = _cycles(1, *sides)
    assert np.all(cycles[1:] >= 0.999 * cycles[0])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(128, 1000).map(lambda x: 8 * x), EIGHTS, st.integers(2, 1000).map(lambda x: 8 * x)
)
def test_rows_that_do_not_start_at_blocks_are_slower(m, k, n):
    whole, words, odd = _cycles(1, m, np.array([k, k - 2, k - 1]), n)
    assert whole <= 1.001 * words and words <= 1.001 * odd


def test_a_misaligned_operand_makes_a_large_product_much_slower():
    whole, words, odd = (float(_cycles(1, 8192, k, 8192)) for k in (8192, 8190, 8191))
    assert 1.8 * whole < words < odd
    # one that lies [k, m] and [k, n] has rows of m and n
    assert float(_cycles(1, 8192, 8191, 8192, turned=(True, False))) == pytest.approx(
        whole, rel=1e-2
    )


def test_float32_wants_rows_of_k():
    along_k = float(_cycles(1, 8192, 8192, 8192, "float32", (False, True)))
    across = float(_cycles(1, 8192, 8192, 8192, "float32"))
    assert across > 1.2 * along_k > 1.2 * float(_cycles(1, 8192, 8192, 8192))


def test_a_long_k_is_cut_into_parts():
    # 128 x 128 results have at most 16 tiles; more multiprocessors than that take part
    rate = 2 * 128 * 128 * 262144 / float(_cycles(1, 128, 262144, 128))
    one = DEVICE.peak("bfloat16") / DEVICE.core_clock_hz / DEVICE.multiprocessors
    assert rate > 20 * one


def test_the_h100_differs_in_its_memory_only():
    other = load_device("h100")
    assert other.calibration == "h200" and other.multiprocessors == DEVICE.multiprocessors
    times = [float(matmul_time_s(d, 1, 8192, 8192, 8192)) for d in (other, DEVICE)]
    assert times[0] == pytest.approx(times[1], rel=0.02)
    times = [float(memory_bound_time_s(d, 4e9)) for d in (other, DEVICE)]
    rates = [d.hbm_bandwidth_bytes_per_s for d in (DEVICE, other)]
    assert times[0] / times[1] == pytest.approx(rates[0] / rates[1], rel=0.02)


def test_small_arrays_come_from_the_cache():
    small, large = float(elementwise_time_s(DEVICE, 8e6, 1e6)), elementwise_time_s(DEVICE, 8e9, 1e9)
    least = 8e6 / DEVICE.hbm_bandwidth_bytes_per_s
    assert small < least + 2e-6 and float(large) > 8e9 / DEVICE.hbm_bandwidth_bytes_per_s


def test_the_stated_held_out_error_is_that_of_the_shipped_files():
    profile = read_profile((FOLDER / "h200.csv").read_text(), DEVICE.core_clock_hz)
    stated = json.loads((FOLDER / "h200.json").read_text())
    assert profile.versions == stated["versions"]
    dots = tuple(r for r in profile.rows if r.case.kind == "matmul")
    content, errors = fit_profile(DEVICE, dataclasses.replace(profile, rows=dots))
    shapes, median, high = errors["matmul"]
    error = stated["held_out_error"]["matmul"]
    assert shapes == error["shapes"] > 60
    assert median == pytest.approx(error["median"], abs=0.01)
    assert high == pytest.approx(error["p95"], abs=0.05)
    assert median < 0.16
    for name, value in stated["constants"]["matmul"].items():
        assert content["constants"]["matmul"][name] == pytest.approx(value, rel=0.1), name


def test_all_kinds_state_a_held_out_error():
    stated = json.loads((FOLDER / "h200.json").read_text())["held_out_error"]
    assert {"matmul", "elementwise", "reduce", "attention", "index", "move"} <= set(stated)
    assert stated["all"]["median"] < 0.16 and stated["elementwise"]["median"] < 0.13
