"""Seconds of the collectives of a whole job, on J clusters.

A group of g devices of which p share the fast network (an NVSwitch domain, a torus slice) gathers
or reduces B bytes in

    max( B (g-1)/g / fast ,  B (g/p - 1)/(g/p) / (p * slow) ) + (hops) * latency

because the p members of a domain fetch disjoint parts over their own network cards (hierarchical
all-gather: Rajbhandari et al., ZeRO++, section 3; scaling book, "Training", for the torus). A ring
all-reduce is a reduce-scatter and an all-gather. On a torus a group laid on some of the axes uses
both directions of each of them; a ring of blocks goes one way, a block of B/g a hop.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from cost_model.jobs.columns import Jobs
from cost_model.jobs.counts import expert_ways


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """One device's collective group in each of J jobs."""

    size: np.ndarray
    """[J] members."""
    near: np.ndarray
    """[J] members of one fast domain, 1..size."""
    fast_bytes_per_s: np.ndarray
    """[J] one way, of the links that the group may use."""
    hop_bytes_per_s: np.ndarray
    """[J] to the next member of a fast domain."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """Usable bandwidths [J], after the efficiencies."""

    slow_bytes_per_s: np.ndarray
    latency_s: np.ndarray
    """[J] of one hop."""


def groups(jobs: Jobs, fast_efficiency: np.ndarray) -> dict[str, Group]:
    """The groups of each parallelism; tp innermost, then cp, ep, dp, and pp outermost."""
    d = jobs.device
    tpu = d.links > 0
    slice_size = np.where(tpu, jobs.n_devices / jobs.n_slices, d.domain)
    domain = np.minimum(slice_size, jobs.n_devices)
    link = d.link_bytes_per_s * fast_efficiency
    axes = np.maximum(d.links / 2, 1.0)
    # tensor (or expert, or context) groups lie on one torus axis; the batch axis keeps the rest.
    inner = jobs.tp * jobs.cp
    rest = np.where(inner > 1, (axes - 1) / axes, 1.0)
    side = np.where(axes > 2, np.cbrt(slice_size / d.devices_per_chip), np.sqrt(slice_size))
    wrapped = np.where(axes > 2, side >= 3.9, side >= 15.9)
    link = np.where(tpu & ~wrapped, link * 0.5, link)

    def group(size: np.ndarray, stride: np.ndarray, share: np.ndarray) -> Group:
        near = np.clip(np.floor(domain / stride), 1.0, size)
        return Group(
            size=size,
            near=near,
            fast_bytes_per_s=np.where(tpu, link * share, link),
            hop_bytes_per_s=d.link_bytes_per_s * fast_efficiency / np.maximum(d.links, 1.0),
        )

    one = np.ones_like(link)
    return {
        "tp": group(jobs.tp, one, np.where(tpu, 1 / axes, one)),
        "cp": group(jobs.cp, jobs.tp, np.where(tpu, 1 / axes, one)),
        "ep": group(jobs.ep, one, np.where(tpu, 1 / axes, one)),
        "fsdp": group(jobs.fsdp, np.where(jobs.fsdp > jobs.dp, jobs.tp, inner), rest),
        "dp": group(jobs.dp * jobs.cp, jobs.tp, rest),
        "replica": group(
            np.maximum(jobs.dp * jobs.cp / np.maximum(jobs.fsdp, 1.0), 1.0),
            jobs.tp * jobs.fsdp,
            rest,
        ),
        "expert_dp": group(
            np.maximum(jobs.dp * jobs.cp * jobs.tp / expert_ways(jobs), 1.0),
            expert_ways(jobs),
            rest,
        ),
    }


def gather_s(full_bytes: np.ndarray, group: Group, network: Network) -> np.ndarray:
    """[J] all-gather to (or reduce-scatter from) `full_bytes` on each member."""
    g, p = group.size, group.near
    far = np.maximum(g / p, 1.0)
    fast = full_bytes * (g - 1) / g / group.fast_bytes_per_s
    slow = full_bytes * (far - 1) / far / (p * network.slow_bytes_per_s)
    return np.where(g > 1, np.maximum(fast, slow) + _hops(g, far) * network.latency_s, 0.0)


def hop_s(full_bytes: np.ndarray, group: Group, network: Network) -> np.ndarray:
    """[J] every member's block of `full_bytes` to the next member, around; the slowest hop rules."""
    g = group.size
    crosses = g > group.near
    slowest = np.where(
        crosses, np.minimum(group.hop_bytes_per_s, network.slow_bytes_per_s), group.hop_bytes_per_s
    )
    return np.where(g > 1, full_bytes / g / slowest + network.latency_s, 0.0)


def reduce_s(full_bytes: np.ndarray, group: Group, network: Network) -> np.ndarray:
    """[J] all-reduce of `full_bytes`."""
    return 2.0 * gather_s(full_bytes, group, network)


def exchange_s(
    token_bytes: np.ndarray, copies: np.ndarray, group: Group, network: Network
) -> np.ndarray:
    """[J] all-to-all of a device's tokens, `token_bytes` together, each to `copies` members.

    A token crosses to a far domain once, however many of its copies live there, and is handed on
    over the fast network (DeepSeek-V3, arXiv:2412.19437, section 3.2.2): with copies spread evenly
    over F domains a far one is met with probability 1 - (1 - 1/F)^copies.
    """
    g, p = group.size, group.near
    far = np.maximum(g / p, 1.0)
    met = (far - 1) * (1 - (1 - 1 / far) ** copies)
    fast = token_bytes * copies * (p - 1) / p / group.fast_bytes_per_s
    slow = token_bytes * met / network.slow_bytes_per_s
    return np.where(g > 1, np.maximum(fast, slow) + np.sqrt(g) * network.latency_s, 0.0)


def _hops(size: np.ndarray, far: np.ndarray) -> np.ndarray:
    # rings within a domain and between domains; long rings give way to trees
    near = np.minimum(size / far - 1, 8.0)
    return near + np.minimum(far - 1, 4.0 * np.log2(np.maximum(far, 1.0)) + 8.0)
