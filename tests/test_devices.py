"""Device files: every number has a source, and units are per JAX device."""

import importlib.resources

import pytest

from cost_model.device import device_names, load_device, parse_device
from graphs.errors import MeshwrightError


def _text(name: str) -> str:
    return (importlib.resources.files("cost_model") / "devices" / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", device_names())
def test_every_device_loads_with_a_source_for_each_number(name):
    device = load_device(name)
    assert device.name == name
    assert device.sources and all(s.strip() for s in device.sources.values())
    numbers = [k for k in device.sources if "." not in k]
    assert {"hbm_capacity_bytes", "hbm_bandwidth_bytes_per_s"} <= set(numbers)
    assert 0 < device.link_efficiency <= 1
    assert device.peak("bfloat16") > device.vector_flops_per_s


@pytest.mark.parametrize(
    "key",
    [
        "hbm_capacity_bytes: {value: 17179869184}",
        'hbm_capacity_bytes: {value: 17179869184, source: ""}',
        "hbm_capacity_bytes: 17179869184",
    ],
)
def test_a_number_without_a_source_is_refused(key):
    lines = [key if s.startswith("hbm_capacity") else s for s in _text("v5e").splitlines()]
    with pytest.raises(MeshwrightError, match="hbm_capacity_bytes has no source"):
        parse_device("\n".join(lines), "mine")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("value: 819.0e9", "value: fast", "give a number"),
        ("value: 819.0e9", "value: -1", "at least 0"),
        ("value: 819.0e9", "value: .nan", "finite"),
        ("hbm_bandwidth_bytes_per_s", "hbm_bandwith", "unknown key"),
        ("family: tpu", "family: npu", "use tpu, gpu or cpu"),
        ("  bfloat16:", "  bf16:", "no peak_flops_per_s.bfloat16"),
        ("family: tpu", "family: [", "not valid YAML"),
    ],
)
def test_bad_files_give_one_sentence(old, new, words):
    with pytest.raises(MeshwrightError, match=words) as caught:
        parse_device(_text("v5e").replace(old, new), "mine")
    assert "\n" not in str(caught.value)


def test_a_missing_number_is_named():
    lines = [s for s in _text("v5e").splitlines() if not s.startswith("core_clock_hz")]
    with pytest.raises(MeshwrightError, match="lacks core_clock_hz"):
        parse_device("\n".join(lines), "mine")


def test_unknown_device_lists_what_exists():
    with pytest.raises(MeshwrightError, match="v5e") as caught:
        load_device("v9z")
    assert all(name in str(caught.value) for name in device_names())


def test_numbers_are_per_jax_device():
    cores, chip = load_device("v4"), load_device("v4_megacore")
    assert (cores.jax_devices_per_chip, chip.jax_devices_per_chip) == (2, 1)
    for key in ("hbm_capacity_bytes", "hbm_bandwidth_bytes_per_s", "link_bandwidth_bytes_per_s"):
        assert 2 * getattr(cores, key) == getattr(chip, key)
    assert 2 * cores.peak("bfloat16") == chip.peak("bfloat16")
    # the clock is a property of the core, not shared out
    assert cores.core_clock_hz == chip.core_clock_hz


def test_types_without_a_native_rate_run_at_the_bfloat16_rate():
    a100, h100 = load_device("a100"), load_device("h100")
    assert a100.peak("float8_e4m3fn") == a100.peak("bfloat16")
    assert h100.peak("float8_e4m3fn") == pytest.approx(2 * h100.peak("bfloat16"), rel=1e-3)
    assert h100.peak("float64") == h100.peak("float32") < h100.peak("float16")
