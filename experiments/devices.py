"""meshwright devices [NAME …]: the accelerators that ship, or every number of one with its source.

examples:
  meshwright devices
  meshwright devices v5e
"""

from __future__ import annotations

from placement.experiments import _hydra


def main(argv: list[str]) -> int:
    from cost_model.device import device_names, load_device

    if _hydra.wants_help(argv):
        print((__doc__ or "").strip())
        return 0
    if argv:
        for name in argv:
            _print_one(load_device(name))
    else:
        _print_all([load_device(name) for name in device_names()])
    return 0


def _print_all(devices) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="accelerators (per JAX device)", title_justify="left")
    for head in ("name", "bf16 Tflop/s", "memory GB", "GB/s", "link GB/s", "shapes"):
        table.add_column(head, justify="right" if head not in ("name", "shapes") else "left")
    for device in devices:
        table.add_row(
            device.name,
            f"{device.peak('bfloat16') / 1e12:,.0f}",
            f"{device.hbm_capacity_bytes / 1e9:,.0f}",
            f"{device.hbm_bandwidth_bytes_per_s / 1e9:,.0f}",
            f"{device.link_bandwidth_bytes_per_s * device.links_per_device / 1e9:,.0f}",
            _shapes(device),
        )
    Console().print(table)


def _print_one(device) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=device.name, title_justify="left")
    table.add_column("number")
    table.add_column("value", justify="right")
    table.add_column("source")
    for key, source in sorted(device.sources.items()):
        value = device
        for part in key.split("."):
            value = value[part] if isinstance(value, dict) else getattr(value, part, None)
        said = f"{value:g}" if isinstance(value, int | float) else ""
        table.add_row(key, said, source)
    Console().print(table)


def _shapes(device) -> str:
    if device.family == "gpu":
        return f"{device.name}:GPUSxNODES, at most {device.domain_size} GPUs linked by NVLink"
    if device.family == "cpu":
        return f"{device.name}:N"
    sides = "AxB" if device.torus_dims == 2 else "AxBxC"
    return f"{device.name}:{sides} or N*{device.name}:{sides}, up to {device.max_chips} chips"
