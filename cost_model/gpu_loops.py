"""Seconds of the loops of a light group on a GPU whose kernels were timed.

In each region of the program a light group is

- one loop that reads what it is handed and writes what others read;
- one for each reduction that cannot keep its rows (:mod:`cost_model.gpu_fusion`);
- one for each value that the region stacks: it reads and writes the value, because a stack is
  updated in place and no kernel updates two. Each stack is filled with zeros before its loop.

Each takes the time of :func:`cost_model.compute.loop_cycles`. That stacks are filled and updated by
kernels of their own is XLA:GPU's (jax 0.11.2), read off the kernels of a profiled train step; the
constants are those of single operators.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cost_model.compute import loop_cycles
from cost_model.fitted import load_calibration
from cost_model.fusion import Fusion
from cost_model.loops import Loops
from cost_model.pricing import Pricing
from graphs.choices import Choices
from graphs.groups import Group, Grouping


def gpu_loop_seconds(
    grouping: Grouping, item: Group, choices: Choices, pricing: Pricing, fusion: Fusion
) -> list[tuple[int, int, np.ndarray]]:
    """As :func:`cost_model.loops.loop_seconds`."""
    loops = _GpuLoops(grouping, item, choices, pricing, fusion)
    return list(loops.seconds())


class _GpuLoops(Loops):
    """What one group moves and computes, by region and kernel."""

    def __init__(
        self, grouping: Grouping, item: Group, choices: Choices, pricing: Pricing, fusion: Fusion
    ) -> None:
        self.kernels: dict[int, dict[tuple, tuple[np.ndarray, np.ndarray | float]]] = {}
        """region -> what a kernel is for -> ([S] bytes, [S] elements written)."""
        super().__init__(grouping, item, choices, pricing, fusion)

    def _stack(self, o: int) -> None:
        op = self.graph.ops[o]
        value, stack = op.inputs[0], op.outputs[0]
        elements = self.local(value, self.item.tensors[stack][1:])
        n_bytes = 2 * elements * self.graph.tensors[value].itemsize
        self._kernel(op.region, ("stack", o), n_bytes, elements)
        home, whole = self.graph.regions[op.region].parent, self.own(stack)
        self._kernel(home, ("fill", o), whole * self.graph.tensors[stack].itemsize, whole)
        self.last.setdefault(home, self._before(op.region, home))

    def _before(self, region: int, home: int) -> int:
        """The op of the region around a loop that is next to it."""
        ops, start = self.graph.ops, self.graph.regions[region].start
        near = (*range(start - 1, -1, -1), *range(start, len(ops)))
        return next((o for o in near if ops[o].region == home), 0)

    def _operands(self, o: int) -> None:
        super()._operands(o)
        op, tensors = self.graph.ops[o], self.graph.tensors
        sources = self.fusion.passes.get(o)
        if sources is None or op.inputs[0] not in self.item.tensors:
            return  # what another group hands over is read in any case
        operand = op.inputs[0]
        n_bytes = sum(tensors[t].n_bytes for t in sources) / tensors[operand].n_elements
        # reductions that read the same arrays are one kernel
        self._kernel(op.region, ("reduce", sources), self.own(operand) * n_bytes, 0.0)

    def _kernel(self, region: int, key: tuple, n_bytes: np.ndarray, elements) -> None:
        self.kernels.setdefault(region, {}).setdefault(key, (n_bytes, elements))

    def seconds(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """(op, region, seconds [S])."""
        device = self.pricing.device
        c = load_calibration(device.calibration).constants["vector"]
        for region in sorted({*self.moved, *self.work, *self.kernels}):
            loop = (self.moved.get(region, 0.0), self.written.get(region, 0.0))
            loops = [(*loop, self.work.get(region, 0.0))]
            loops += [(*kernel, 0.0) for kernel in self.kernels.get(region, {}).values()]
            cycles = np.zeros(len(self.choices))
            for n_bytes, elements, work in loops:
                found = loop_cycles(device, c, np.maximum(n_bytes, 1.0), work, elements)
                cycles = cycles + np.where(np.asarray(n_bytes) + work > 0, found, 0.0)
            yield self._position(region), region, cycles / device.core_clock_hz
