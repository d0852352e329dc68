"""The ``GpuTargetConfig`` text that lets XLA:GPU compile for a part that is not there.

The figures are in ``gpu_targets.yaml`` with their source; this file writes them in the proto's text
form (openxla/xla, xla/stream_executor/device_description.proto).
"""

from __future__ import annotations

import functools
import importlib.resources
from typing import Any

from graphs.errors import MeshwrightError

_BFLOAT16, _FLOAT16, _FLOAT32, _FLOAT64 = 16, 10, 11, 12
_EIGHT_BIT = (2, 6, 19, 20, 23, 24, 25, 28, 29, 33)
"""xla.PrimitiveType numbers."""


def gpu_names() -> tuple[str, ...]:
    """Parts that XLA:GPU can be asked to compile for, sorted."""
    return tuple(sorted(_figures()))


def device_memory_bytes(device: str) -> int:
    """Memory of the part. XLA:GPU does not refuse a program that needs more."""
    return int(_part(device)["device_memory_bytes"])


def target_config(device: str) -> str:
    """The text proto. MeshwrightError for a part that is not in the file."""
    part = _part(device)
    lines = [
        "gpu_device_info {",
        "  threads_per_block_limit: 1024",
        "  threads_per_warp: 32",
        "  shared_memory_per_block: 49152",
        f"  shared_memory_per_core: {part['shared_memory_per_core_bytes']}",
        "  threads_per_core_limit: 2048",
        f"  core_count: {part['core_count']}",
        f"  fpus_per_core: {part['fpus_per_core']}",
        "  block_dim_limit_x: 2147483647",
        "  block_dim_limit_y: 65535",
        "  block_dim_limit_z: 65535",
        f"  memory_bandwidth: {part['memory_bandwidth_bytes_per_s']}",
        f"  l2_cache_size: {part['l2_cache_bytes']}",
        f"  clock_rate_ghz: {part['clock_rate_ghz']}",
        f"  device_memory_size: {part['device_memory_bytes']}",
        f"  shared_memory_per_block_optin: {part['shared_memory_per_block_optin_bytes']}",
        f"  cuda_compute_capability {{ major: {part['compute_capability']} }}",
        "  registers_per_core_limit: 65536",
        "  registers_per_block_limit: 65536",
        "  thread_dim_limit_x: 1024",
        "  thread_dim_limit_y: 1024",
        "  thread_dim_limit_z: 64",
    ]
    if "matrix_ops_per_clock" in part:
        lines += ["  matrix_unit_description {", *_rates(part), "  }"]
    if "nvlinks" in part:
        lines += [
            f"  pcie_bandwidth: {part['pcie_bandwidth_bytes_per_s']}",
            f"  device_interconnect_info {{ active_links: {part['nvlinks']} }}",
        ]
    lines += [
        "}",
        'platform_name: "CUDA"',
        "dnn_version_info { major: 9 minor: 10 }",
        f'device_description_str: "{part["name"]}"',
    ]
    return "\n".join(lines) + "\n"


def _rates(part: dict[str, Any]) -> list[str]:
    ops = int(part["matrix_ops_per_clock"])
    by_type = {_BFLOAT16: ops, _FLOAT16: ops, _FLOAT32: ops // 2}
    by_type |= dict.fromkeys(_EIGHT_BIT, ops * 2)
    return [
        f"    rate_infos {{ key: {key} value {{ clock_rate_ghz: {part['matrix_clock_rate_ghz']} "
        f"units_per_core: 4 ops_per_clock: {rate} }} }}"
        for key, rate in sorted(by_type.items())
    ]


def _part(device: str) -> dict[str, Any]:
    figures = _figures()
    if device not in figures:
        raise MeshwrightError(
            f"XLA:GPU has no target for device {device!r}; use one of {', '.join(sorted(figures))}"
        )
    return figures[device]


@functools.cache
def _figures() -> dict[str, dict[str, Any]]:
    import yaml

    file = importlib.resources.files("placement") / "gpu_targets.yaml"
    return yaml.safe_load(file.read_text(encoding="utf-8"))
