"""Cluster notation and physical axes.

``device:AxBxC`` as XLA names topologies (``v5e:16x16``, ``v5p:8x8x16``, counted in chips), several
TPU slices ``4*v5e:16x16``, GPUs ``h100:8x64`` (8 per NVLink domain x 64 domains), ``cpu:8``.

Wrap-around links: v5e and v6e wrap only a dimension of 16; v4, v5p and tpu7x wrap the dimensions
that are multiples of 4 in slices of whole 4x4x4 cubes (scaling-book, tpus.md, "TPU Networking").
Facts about libtpu 0.0.52: ``coords`` are (x, y, z) in the order of the notation and the device id
is ``core + cores * (x + X * (y + Y * z))``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re

from cost_model.device import Device, device_names, load_device
from graphs.errors import MeshwrightError

_NOTATION = re.compile(r"(?:(\d+)\*)?([A-Za-z0-9_]+):(\d+(?:x\d+)*)")
_SMALL_3D = ((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
"""3-D slices below one cube that Cloud TPU offers (docs.cloud.google.com/tpu/docs/v5p)."""
_MAX_DEVICES = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhysicalAxis:
    """One direction in which devices are wired."""

    name: str
    """``slice``, ``x``, ``y``, ``z``, ``core``, ``node``, ``gpu`` or ``host``."""
    size: int
    """devices along the axis, > 1 except on a one-device cluster."""
    kind: str
    """``dcn``, ``ici``, ``core``, ``network``, ``nvlink`` or ``host``: the lane it loads."""
    wraps: bool
    """whether the last device has a link to the first."""
    bandwidth_bytes_per_s: float
    """sustained, one direction, per device (per link for ``ici``)."""
    latency_s: float
    """one hop."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """Devices of one kind and how they are wired."""

    device: Device
    notation: str
    """canonical notation, ``parse_cluster(notation)`` gives this cluster."""
    n_devices: int
    """JAX devices."""
    n_slices: int
    """TPU slices joined by the data-centre network; 1 for others."""
    slice_shape: tuple[int, ...]
    """chips along x, y, z of one slice; (per node, nodes) for GPUs; (N,) for cpu."""
    physical_axes: tuple[PhysicalAxis, ...]
    """slowest network first; the product of the sizes is n_devices."""
    topology_name: str
    """name for jax.experimental.topologies of one slice; ``1xNODESxGPUS`` for GPUs; "" for cpu."""
    topology_options: tuple[tuple[str, int | str], ...]
    """keyword arguments of get_topology_desc besides name and platform."""

    def __hash__(self) -> int:
        return hash(self.notation)

    @property
    def platform(self) -> str:
        """platform argument of jax.experimental.topologies.get_topology_desc."""
        return {"tpu": "tpu", "gpu": "cuda", "cpu": "cpu"}[self.device.family]


@functools.cache
def parse_cluster(notation: str) -> Cluster:
    """The cluster of this notation. Raises MeshwrightError that lists what exists."""
    match = _NOTATION.fullmatch(notation.strip())
    if not match:
        raise MeshwrightError(
            f"cluster {notation!r} is not in the notation [slices*]device:AxB; "
            "write for example v5e:16x16, 4*v5e:16x16, v5p:4x4x8, h100:8x64 or cpu:8"
        )
    slices, name, dims = match.groups()
    if name not in device_names():
        raise MeshwrightError(
            f"cluster {notation!r} names the unknown device {name!r}; "
            f"use one of {', '.join(device_names())}"
        )
    shape = tuple(int(d) for d in dims.split("x"))
    n_slices = 1 if slices is None else int(slices)
    device = load_device(name)
    if math.prod(shape) * n_slices < 1 or math.prod(shape) * n_slices > _MAX_DEVICES:
        raise MeshwrightError(
            f"cluster {notation!r} has {math.prod(shape) * n_slices} chips; "
            f"use between 1 and {_MAX_DEVICES}"
        )
    if device.family != "tpu" and n_slices > 1:
        raise MeshwrightError(
            f"cluster {notation!r} has slices of {name}, which only TPUs have; "
            "write more nodes instead, for example h100:8x64"
        )
    build = {"tpu": _tpu, "gpu": _gpu, "cpu": _cpu}[device.family]
    return build(device, notation, n_slices, shape)


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _check_tpu_shape(device: Device, notation: str, shape: tuple[int, ...]) -> None:
    if device.wrap_rule == "full_16":
        if len(shape) != 2 or any(d not in (1, 2, 4, 8, 16) for d in shape):
            raise MeshwrightError(
                f"cluster {notation!r}: {device.name} slices are AxB with A and B each one of "
                "1, 2, 4, 8, 16; for more chips join slices, for example "
                f"4*{device.name}:16x16"
            )
        return
    whole_cubes = len(shape) == 3 and all(d % 4 == 0 for d in shape)
    if len(shape) != 3 or not (shape in _SMALL_3D or whole_cubes):
        raise MeshwrightError(
            f"cluster {notation!r}: {device.name} slices are AxBxC, one of "
            f"{', '.join(map(_text, _SMALL_3D))}, or every side a multiple of 4, "
            f"for example {device.name}:4x4x8"
        )
    if math.prod(shape) > device.max_chips:
        raise MeshwrightError(
            f"cluster {notation!r} has {math.prod(shape)} chips in a slice and {device.name} "
            f"has at most {device.max_chips}; join slices, for example 2*{device.name}:8x8x16"
        )


def _wraps(device: Device, shape: tuple[int, ...], size: int) -> bool:
    if device.wrap_rule == "full_16":
        return size == 16
    return all(d % 4 == 0 for d in shape) and size % 4 == 0


def _tpu(device: Device, notation: str, n_slices: int, shape: tuple[int, ...]) -> Cluster:
    _check_tpu_shape(device, notation, shape)
    per_chip = device.jax_devices_per_chip
    axes = []
    if n_slices > 1:
        axes.append(
            PhysicalAxis(
                name="slice",
                size=n_slices,
                kind="dcn",
                wraps=False,
                bandwidth_bytes_per_s=device.inter_slice_bandwidth_bytes_per_s
                * device.inter_slice_efficiency,
                latency_s=device.inter_slice_latency_s,
            )
        )
    axes += [
        PhysicalAxis(
            name=name,
            size=size,
            kind="ici",
            wraps=_wraps(device, shape, size),
            bandwidth_bytes_per_s=device.link_bandwidth_bytes_per_s * device.link_efficiency,
            latency_s=device.link_latency_s,
        )
        for name, size in zip("xyz", shape)
        if size > 1
    ]
    if per_chip > 1:
        axes.append(
            PhysicalAxis(
                name="core",
                size=per_chip,
                kind="core",
                wraps=False,
                bandwidth_bytes_per_s=device.core_bandwidth_bytes_per_s,
                latency_s=device.launch_latency_s,
            )
        )
    options: tuple[tuple[str, int | str], ...] = ()
    if device.name == "v4_megacore":
        options += (("chip_config_name", "megacore"),)
    if n_slices > 1:
        options += (("num_slices", n_slices),)
    prefix = f"{n_slices}*" if n_slices > 1 else ""
    return _cluster(
        device,
        f"{prefix}{device.name}:{_text(shape)}",
        n_slices,
        shape,
        axes,
        f"{device.compile_topology}:{_text(shape)}",
        options,
    )


def _gpu(device: Device, notation: str, n_slices: int, shape: tuple[int, ...]) -> Cluster:
    if len(shape) > 2:
        raise MeshwrightError(
            f"cluster {notation!r}: GPUs are written device:PERNODExNODES, "
            f"for example {device.name}:{device.domain_size}x4"
        )
    per_node, nodes = (*shape, 1)[:2]
    if per_node > device.domain_size:
        raise MeshwrightError(
            f"cluster {notation!r} has {per_node} GPUs on one NVLink domain and {device.name} "
            f"has at most {device.domain_size}; write for example "
            f"{device.name}:{device.domain_size}x{max(1, per_node * nodes // device.domain_size)}"
        )
    axes = []
    if nodes > 1:
        axes.append(
            PhysicalAxis(
                name="node",
                size=nodes,
                kind="network",
                wraps=False,
                bandwidth_bytes_per_s=device.inter_node_bandwidth_bytes_per_s
                * device.inter_node_efficiency,
                latency_s=device.inter_node_latency_s,
            )
        )
    if per_node > 1:
        axes.append(
            PhysicalAxis(
                name="gpu",
                size=per_node,
                kind="nvlink",
                wraps=False,
                bandwidth_bytes_per_s=device.link_bandwidth_bytes_per_s
                * device.links_per_device
                * device.link_efficiency,
                latency_s=device.link_latency_s,
            )
        )
    return _cluster(
        device,
        f"{device.name}:{per_node}x{nodes}",
        n_slices,
        (per_node, nodes),
        axes,
        f"1x{nodes}x{per_node}",
        (),
    )


def _cpu(device: Device, notation: str, n_slices: int, shape: tuple[int, ...]) -> Cluster:
    if len(shape) != 1:
        raise MeshwrightError(f"cluster {notation!r}: write cpu:N, for example cpu:8")
    device = _share_of_cores(device, shape[0])
    axes = [
        PhysicalAxis(
            name="host",
            size=shape[0],
            kind="host",
            wraps=False,
            bandwidth_bytes_per_s=device.link_bandwidth_bytes_per_s * device.link_efficiency,
            latency_s=device.link_latency_s,
        )
    ]
    return _cluster(device, f"{device.name}:{shape[0]}", n_slices, shape, axes, "", ())


def _share_of_cores(device: Device, n_devices: int) -> Device:
    """One of n forced-host devices: they run on the same cores and memory."""
    share = min(1.0, device.cores / n_devices)
    return dataclasses.replace(
        device,
        peak_flops_per_s={k: v * share for k, v in device.peak_flops_per_s.items()},
        vector_flops_per_s=device.vector_flops_per_s * share,
        hbm_bandwidth_bytes_per_s=device.hbm_bandwidth_bytes_per_s * share,
        cache_bytes=device.cache_bytes / n_devices,
        cache_bandwidth_bytes_per_s=device.cache_bandwidth_bytes_per_s * share,
        link_bandwidth_bytes_per_s=device.link_bandwidth_bytes_per_s * share,
    )


def _cluster(
    device: Device,
    notation: str,
    n_slices: int,
    shape: tuple[int, ...],
    axes: list[PhysicalAxis],
    topology_name: str,
    options: tuple[tuple[str, int | str], ...],
) -> Cluster:
    if not axes:
        kind = {"tpu": "ici", "gpu": "nvlink", "cpu": "host"}[device.family]
        axes = [
            PhysicalAxis(
                name="x",
                size=1,
                kind=kind,
                wraps=False,
                bandwidth_bytes_per_s=device.link_bandwidth_bytes_per_s,
                latency_s=device.link_latency_s,
            )
        ]
    return Cluster(
        device=device,
        notation=notation,
        n_devices=math.prod(a.size for a in axes),
        n_slices=n_slices,
        slice_shape=shape,
        physical_axes=tuple(axes),
        topology_name=topology_name,
        topology_options=options,
    )
