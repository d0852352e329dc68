"""What is known of a program on a kind of device before any mesh is chosen."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np

from cost_model.device import Device
from cost_model.fusion import Fusion
from cost_model.gpu_fusion import own_passes
from cost_model.live import SLICED, Lifetime, lifetimes, readers_of
from cost_model.partial_sums import Sums
from cost_model.pricing import times_kernels
from cost_model.state_copies import contracted, relaid_state, state_of
from graphs.fold import fold
from graphs.groups import HEAVY, Grouping


@dataclasses.dataclass(frozen=True, kw_only=True)
class Analysis:
    """How the compiler of a device treats a program, the same on every mesh."""

    grouping: Grouping
    device: Device
    tied: tuple[int, ...]
    """[groups] :func:`graphs.fold.fold`, or ``range`` where repeated groups stay apart."""
    times: np.ndarray
    """[regions] how often each runs in a step."""
    fusion: Fusion
    sums: Sums
    gradients: frozenset[int]
    """Heavy groups whose result only the optimizer reads (the groups that make the new state)."""
    state: frozenset[int]
    """Tensors of :func:`cost_model.state_copies.state_of`."""
    contracted: frozenset[int]
    """:func:`cost_model.state_copies.contracted`."""
    readers: Mapping[tuple[int, int], list[int]]
    """:func:`cost_model.live.readers_of`."""
    lifetimes: tuple[Lifetime, ...]
    contractions: dict[tuple, float]
    """Memo of contraction seconds, as of :class:`cost_model.pricing.Pricing`."""

    @classmethod
    def of(
        cls,
        grouping: Grouping,
        device: Device,
        *,
        tied: tuple[int, ...] | None = None,
        contractions: dict[tuple, float] | None = None,
    ) -> Analysis:
        """``contractions`` may be shared by programs for one device."""
        fusion = Fusion.of(grouping)
        if times_kernels(device):
            fusion = dataclasses.replace(fusion, passes=own_passes(grouping, fusion.stored))
        sums, gradients = Sums.of(grouping, device), _gradients(grouping)
        state, weights = state_of(grouping.graph), contracted(grouping)
        tpu = device.family == "tpu"
        return cls(
            grouping=grouping,
            device=device,
            tied=fold(grouping) if tied is None else tied,
            times=grouping.graph.multiplicities(),
            fusion=fusion,
            sums=sums,
            gradients=gradients,
            state=state,
            contracted=weights,
            readers=readers_of(grouping),
            lifetimes=lifetimes(
                grouping,
                fusion,
                device,
                sliced=sums.sliced & gradients if tpu else frozenset(),
                relaid=relaid_state(grouping, state, weights) if tpu else frozenset(),
            ),
            contractions={} if contractions is None else contractions,
        )

    @functools.cached_property
    def waiting(self) -> dict[int, tuple[int, int]]:
        """Group whose result may be sliced when it is combined -> when it then waits for its reader."""
        return {x.group: x.interval for x in self.lifetimes if x.where == SLICED}


def _gradients(grouping: Grouping) -> frozenset[int]:
    updates = {grouping.group_of[grouping.graph.outputs[b]] for _, b in grouping.graph.aliases}
    read_by: dict[int, set[int]] = {}
    for g, item in enumerate(grouping.groups):
        for view in item.views:
            read_by.setdefault(grouping.source_group(g, view), set()).add(g)
    return frozenset(
        g
        for g, item in enumerate(grouping.groups)
        if item.kind == HEAVY and read_by.get(g) and read_by[g] <= updates
    )
