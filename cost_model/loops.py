"""Seconds of the fused loops of a light group, for every choice of its sharding.

In each region of the program a light group reads what other groups or regions hand it, writes what
others read, and executes vector instructions; the longest of these counts. XLA gives a loop to all
that the group stores there, and one to each round of reductions: those of a round run together,
and a round waits for the one before. A result of a contraction that is reduced at once, or that
element-wise operations only pass on, is worked on inside the contraction's kernel.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cost_model.compute import SUSTAINED_MEMORY
from cost_model.device import Device
from cost_model.fitted import load_calibration
from cost_model.fusion import REDUCTIONS, Fusion, vector_cost
from cost_model.pricing import Pricing
from graphs.choices import Choices
from graphs.groups import LEAF, Group, Grouping

_Sums = dict[int, np.ndarray]


def loop_seconds(
    grouping: Grouping, item: Group, choices: Choices, pricing: Pricing, fusion: Fusion
) -> list[tuple[int, int, np.ndarray]]:
    """(op at which it is scheduled, region, seconds [S] a trip) of the loops of a light group."""
    loops = Loops(grouping, item, choices, pricing, fusion)
    return list(loops.seconds())


class Loops:
    """What one group moves and computes, by region."""

    def __init__(self, grouping, item: Group, choices: Choices, pricing: Pricing, fusion: Fusion):
        self.graph, self.item, self.choices, self.pricing = grouping.graph, item, choices, pricing
        constants = load_calibration(pricing.device.calibration).constants
        self.program = constants["program"]
        self.fused = pricing.fuses
        """Whether contractions compute their operands, as XLA:TPU has it."""
        self.fusion = fusion
        self.moved: _Sums = {}
        """bytes read and written."""
        self.work: _Sums = {}
        """vector instructions."""
        self.written: _Sums = {}
        """elements of the largest tensor that a loop of its own writes."""
        self.reduced: dict[tuple[int, int], np.ndarray] = {}
        """(region, round) -> elements that its reductions pass over."""
        self.at_hand: set[tuple[int, int]] = set()
        """Rounds that have reductions in a contraction's kernel."""
        self.bare: _Sums = {}
        """elements that kernels of one instruction pass over."""
        self.last: dict[int, int] = {}
        self._shares: dict[tuple[int, ...], np.ndarray] = {}
        self._seen: set[tuple[int, int]] = set()
        self._rounds: dict[int, int] = {}
        self._cast: set[int] = set()
        self._again: set[int] = set()
        graph = self.graph
        state = {graph.outputs[b] for _, b in graph.aliases}
        self.updates = any(t in state for t in item.tensors)
        self._arrivals()
        for o in item.ops:
            if not (self.fused and o in fusion.inside):
                self._op(o)

    def local(self, t: int, dims: tuple[int, ...]) -> np.ndarray:
        """[S] elements of a tensor on one device."""
        if dims not in self._shares:
            self._shares[dims] = 1.0 / self.choices.shards(dims, self.pricing.axis_sizes)
        return self.graph.tensors[t].n_elements * self._shares[dims]

    def own(self, t: int) -> np.ndarray:
        return self.local(t, self.item.tensors[t])

    def _move(self, region: int, t: int, elements: np.ndarray) -> None:
        _add(self.moved, region, elements * self.graph.tensors[t].itemsize)

    def _arrivals(self) -> None:
        """What is handed to the group."""
        graph, fusion = self.graph, self.fusion
        batches = set(graph.inputs) - {graph.inputs[a] for a, _ in graph.aliases}
        for view in self.item.views:
            at_hand = fusion.inside | fusion.ended if self.fused else frozenset()
            if not all(o in at_hand for o in view.ops):
                self._move(view.region, view.tensor, self.local(view.tensor, view.dims))
        for t in self.item.tensors:
            if t in batches:  # an argument that is no state is brought in once a step
                self._move(0, t, self.own(t))

    def _op(self, o: int) -> None:
        op = self.graph.ops[o]
        self.last[op.region] = o
        out = op.outputs[0]
        if op.primitive == "scan_stack":
            self._stack(o)
            return
        if self.item.kind == LEAF and op.primitive in ("scan_slice", "convert_element_type"):
            # casts of weights are hoisted out of loops and made once, by kernels of their own
            source = op.inputs[0]
            if source in self._again or source in self._cast:
                self._again.update(op.outputs)
                return
            self._cast.add(source)
        self._operands(o)
        if op.primitive == "scan_slice":
            self._move(op.region, out, self.own(out))
            return
        if self.item.kind == LEAF and op.primitive == "convert_element_type":
            _add(self.bare, op.region, self.own(out))
        self._results(o)

    def _stack(self, o: int) -> None:
        op = self.graph.ops[o]
        out = op.outputs[0]
        self._move(op.region, op.inputs[0], self.local(op.inputs[0], self.item.tensors[out][1:]))
        if self.updates:  # the stack that gradients are put into is filled first
            home = self.graph.regions[op.region].parent
            _add(self.bare, home, self.own(out))
            self.last.setdefault(home, o)

    def _operands(self, o: int) -> None:
        """Reads of tensors of the group that come from another region; rounds of reductions."""
        op = self.graph.ops[o]
        turn = 0
        for t in op.inputs:
            turn = max(turn, self._rounds.get(t, 0))
            if t in self.item.tensors and (t, op.region) not in self._seen:
                tensor = self.graph.tensors[t]
                outside = tensor.producer < 0 or self.graph.ops[tensor.producer].region != op.region
                if outside and op.primitive not in ("carry_in", "carry_out", "scan_slice"):
                    self._seen.add((t, op.region))
                    self._move(op.region, t, self.own(t))
        if op.primitive in REDUCTIONS and op.inputs[0] in self.item.tensors:
            turn += 1
            key = (op.region, turn)
            if self.fused and op.inputs[0] in self.fusion.at_end:  # its kernel has the operand
                self.at_hand.add(key)
            else:
                known = self.reduced.get(key, 0.0)
                self.reduced[key] = np.maximum(known, self.own(op.inputs[0]))
        for t in op.outputs:
            self._rounds[t] = turn

    def _results(self, o: int) -> None:
        op = self.graph.ops[o]
        carried = op.primitive in ("carry_in", "carry_out")
        passed_on = self.fused and o in self.fusion.ended
        for t in op.outputs:
            stored = t in self.fusion.stored and not carried
            if stored and not passed_on:
                self._move(op.region, t, self.own(t))
            cost = vector_cost(op.primitive)
            if cost:
                _add(self.work, op.region, cost * self.own(t))
                if not passed_on and (stored or not self.fused):
                    written = self.written.get(op.region, 0.0)
                    self.written[op.region] = np.maximum(written, self.own(t))

    def seconds(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """(op, region, seconds [S])."""
        device, program = self.pricing.device, self.program
        per_register = 1024 * device.core_clock_hz
        for region in sorted({*self.moved, *self.work, *self.bare}):
            rounds = sum(n for r, n in self.reduced.items() if r[0] == region and self._passes(r))
            passes = program["pass_cycles"] * self.written.get(region, 0.0)
            passes = passes + program["reduce_cycles"] * rounds
            bare = program["bare_cycles"] * self.bare.get(region, 0.0)
            busy = self.work.get(region, 0.0) / device.vector_flops_per_s
            busy = np.maximum(busy, np.maximum(passes, bare) / per_register)
            found = np.maximum(fused_bytes_s(device, self.moved.get(region, 0.0)), busy)
            yield self._position(region), region, found + np.zeros(len(self.choices))

    def _passes(self, key: tuple[int, int]) -> bool:
        """Whether a round of reductions has a pass of its own: the others of one whose first are
        done by a contraction wait for the next round, where there is one."""
        region, turn = key
        return key not in self.at_hand or (region, turn + 1) not in self.reduced

    def _position(self, region: int) -> int:
        if region in self.last:
            return self.last[region]
        readers = [o for v in self.item.views if v.region == region for o in v.ops]
        return min(readers, default=0)


def _add(table: _Sums, region: int, amount: np.ndarray) -> None:
    table[region] = table.get(region, 0.0) + amount


def fused_bytes_s(device: Device, n_bytes) -> np.ndarray:
    """Seconds to move bytes inside fused loops: at the sustained share of memory bandwidth, or at
    the cache's where all of them fit into it."""
    moved = np.asarray(n_bytes)
    seconds = moved / (device.hbm_bandwidth_bytes_per_s * SUSTAINED_MEMORY)
    if device.cache_bytes:
        cached = moved / device.cache_bandwidth_bytes_per_s
        seconds = np.where(moved <= device.cache_bytes, cached, seconds)
    return seconds
