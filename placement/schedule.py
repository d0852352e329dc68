"""Step time from the compiler's schedule.

The model. One device runs the scheduled module in the order of its text:

* **Compute lane.** A kernel takes ``estimated_cycles / clock``, the compiler's own figure. A kernel
  with none, with "unknown", or with an absurd one (more than ABSURD_RATIO times its roofline and
  over ABSURD_TIME_S) takes its roofline ``max(bytes / memory bandwidth, flops / peak)`` instead (a
  GPU library's product the seconds of :mod:`cost_model.matmul`) and is counted in
  ``unknown_kernels`` / ``absurd_kernels``. Control, tuples, bitcasts, scalars and buffer allocation
  take nothing.
* **Memory lane.** Asynchronous copies between device and on-chip memory (``copy-start`` …
  ``copy-done``, sliced prefetches) run one after another at the memory bandwidth, beside compute;
  compute waits at the done.
* **Network lanes.** A collective takes ``timer(collective)`` seconds on the lanes it names (mesh
  axis and direction). It starts when it is issued and its lanes are free. A synchronous one blocks
  compute until it ends. An asynchronous one (``-start``/``-done``, or XLA:TPU's
  async_collective_fusion, which is the same channel seen in several fusions from
  ``async-collective-start`` to ``async-collective-done``) runs beside compute, which waits at the
  done.
* **Loops.** A body is walked until an iteration takes as long as the one before (at most
  MAX_WALKS times) and the last duration stands for the rest. What is in flight at a loop's edge
  stays in flight.

Left out: contention of a kernel and a prefetch for memory bandwidth, instruction issue, barriers
and stragglers. The figures come out as the compiler's estimate of one step, not a measurement.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping

from placement.hlo import Computation, Instruction, Module
from placement.hlo_collectives import (
    Collective,
    async_fusion_phase,
    collective_of,
    ring_length,
    windowed_kind,
)
from placement.hlo_flops import library_product, matmul_flops
from placement.hlo_loops import trip_count
from placement.hlo_traffic import moved_bytes

ABSURD_RATIO = 50.0
ABSURD_TIME_S = 0.02
MAX_WALKS = 4

_FREE_OPCODES = frozenset(
    "parameter get-tuple-element tuple bitcast constant iota partition-id replica-id after-all "
    "add-dependency opt-barrier domain get-dimension-size rng-get-and-update-state copy-done "
    "async-done async-update slice-done custom-call-done send send-done recv recv-done".split()
)
_FREE_CUSTOM_CALLS = (
    "AllocateBuffer",
    "ConcatBitcast",
    "AssumeGatherIndicesInBound",
    "GatherScatterIndicesBitpacked",
    "AsyncCollectiveStart",
    "AsyncCollectiveDone",
    "Sharding",
    "SPMDFullToShardShape",
    "SPMDShardToFullShape",
)
_TARGET = re.compile(r'custom_call_target="([^"]*)"')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timed:
    """What one collective costs on the network."""

    time_s: float
    lanes: frozenset[str]
    """Names of what it occupies while it runs; two that share a lane follow each other."""


CollectiveTimer = Callable[[Collective], Timed]
ProductTimer = Callable[[int, int, int, int, str, str], float]
"""Of batch, m, k, n and the types of operands and result, as HLO writes them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """What the schedule needs to know of one device."""

    clock_hz: float
    """Cycles of the compiler's estimates per second."""
    memory_bandwidth_bytes_per_s: float
    peak_flops_per_s: float
    """Of the dense matrix unit at the program's type."""
    product_s: ProductTimer | None = None
    """Seconds of a library's matrix product; its roofline where None."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduledStep:
    """One execution of the module's entry computation on one device."""

    step_time_s: float
    compute_time_s: float
    """Sum of kernel times."""
    exposed_comm_time_s: float
    """Time in which compute waits for the network."""
    exposed_memory_time_s: float
    """Time in which compute waits for asynchronous copies."""
    comm_time_s: float
    """Sum of collective times, hidden or not."""
    collective_bytes: Mapping[str, float]
    """Payload bytes by kind as emitted, loops multiplied; payload is the whole tensor of a group
    (all-gather: the result, reduce-scatter: the operand), per device."""
    logical_collective_bytes: Mapping[str, float]
    """The same with the permutes of windowed matmuls counted as the all-gather or reduce-scatter
    that they implement."""
    collective_counts: Mapping[str, int]
    kernels: int
    """Kernels executed, loops multiplied."""
    unknown_kernels: int
    unknown_time_s: float
    """Of kernels for which the compiler gave no usable estimate: their roofline."""
    absurd_kernels: int
    unbounded_loops: int
    """Loops whose trip count the text does not fix; walked once."""
    slowest: tuple[tuple[str, str, float], ...]
    """(name, JAX op name, seconds over the step) of the longest kernels, blocking collectives."""


def schedule(
    module: Module,
    *,
    chip: Chip,
    timer: CollectiveTimer,
) -> ScheduledStep:
    """Walk a scheduled module. See the module docstring for the model."""
    walk = _Walk(module, chip, timer)
    walk.computation(module.entry_computation, 1)
    walk.finish()
    slowest = sorted(walk.spent.items(), key=lambda kv: -kv[1])[:24]
    return ScheduledStep(
        step_time_s=walk.now,
        compute_time_s=walk.compute_s,
        exposed_comm_time_s=walk.exposed_comm_s,
        exposed_memory_time_s=walk.exposed_memory_s,
        comm_time_s=walk.comm_s,
        collective_bytes=dict(walk.bytes_by_kind),
        logical_collective_bytes=dict(walk.logical_bytes),
        collective_counts={k: round(v) for k, v in walk.counts.items()},
        kernels=round(walk.kernels),
        unknown_kernels=round(walk.unknown),
        unknown_time_s=walk.unknown_s,
        absurd_kernels=round(walk.absurd),
        unbounded_loops=walk.unbounded_loops,
        slowest=tuple((name, walk.op_names.get(name, ""), s) for name, s in slowest),
    )


class _Walk:
    """The state of the walk: the clock of compute, when each lane is free, what is in flight."""

    def __init__(self, module: Module, chip: Chip, timer: CollectiveTimer):
        self.module, self.chip, self.timer = module, chip, timer
        self.now = 0.0
        self.lane_free: dict[str, float] = {}
        self.in_flight: dict[str, float] = {}
        self.network_names: set[str] = set()
        self.last_end = 0.0
        self.weight = 1.0
        self.compute_s = self.exposed_comm_s = self.exposed_memory_s = self.comm_s = 0.0
        self.kernels = self.unknown = self.unknown_s = self.absurd = 0.0
        self.unbounded_loops = 0
        self.bytes_by_kind: dict[str, float] = {}
        self.logical_bytes: dict[str, float] = {}
        self.counts: dict[str, float] = {}
        self.spent: dict[str, float] = {}
        self.op_names: dict[str, str] = {}
        self.kernel_cache: dict[tuple[str, str], tuple[float, str]] = {}
        self.collective_cache: dict[tuple[str, str], tuple[Collective, Timed] | None] = {}

    # Every addition to the totals goes through ``weight``, which is 0 for the iterations that are
    # walked only to settle the lanes and >1 for the one that stands for many.

    def computation(self, computation: Computation, depth: int) -> None:
        for instruction in computation.instructions:
            self.instruction(computation, instruction, depth)

    def instruction(self, scope: Computation, i: Instruction, depth: int) -> None:
        if i.opcode == "async-update":
            self.hand_over(i)
        elif i.opcode in _FREE_OPCODES and not i.opcode.endswith("-done"):
            return
        elif i.opcode == "while":
            self.loop(scope, i, depth)
        elif i.opcode == "conditional":
            self.conditional(i, depth)
        elif i.opcode.endswith("-done"):
            self.done(i)
        elif i.opcode == "call" and i.called.get("to_apply") in self.module.computations:
            self.computation(self.module.computations[i.called["to_apply"]], depth)
        else:
            described = self.collective(scope, i)
            if described is not None:
                self.communicate(scope, i, *described)
            elif i.opcode in ("copy-start", "async-start"):
                self.prefetch(i)
            else:
                self.kernel(scope, i)

    def loop(self, scope: Computation, i: Instruction, depth: int) -> None:
        body = self.module.computations[i.called["body"]]
        trips = trip_count(self.module, scope, i)
        if trips is None:
            self.unbounded_loops += 1
            trips = 1
        outer, durations = self.weight, []
        for walked in range(trips):
            remaining = trips - walked
            settled = len(durations) >= 2 and math.isclose(
                durations[-1], durations[-2], rel_tol=1e-6, abs_tol=1e-12
            )
            last = settled or walked == MAX_WALKS - 1 or remaining == 1
            begin = self.now
            self.weight = outer * (remaining if last else 1)
            self.computation(body, depth + 1)
            durations.append(self.now - begin)
            if last:
                self.skip(durations[-1] * (remaining - 1))
                break
        self.weight = outer

    def skip(self, duration_s: float) -> None:
        """Let time pass with everything issued in the loop body keeping its distance to now."""
        if duration_s <= 0:
            return
        begin, self.now = self.now, self.now + duration_s
        for lane, free in self.lane_free.items():
            if free > begin:
                self.lane_free[lane] = max(self.now, free)

    def conditional(self, i: Instruction, depth: int) -> None:
        """The longest branch."""
        names = re.findall(r"(?:branch_computations=\{([^}]*)\})", i.attributes_text)
        branches = re.findall(r"%?([\w.\-]+)", names[0]) if names else []
        branches += re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", i.attributes_text)
        known = [self.module.computations[b] for b in branches if b in self.module.computations]
        if not known:
            return

        def length(branch: Computation) -> float:
            trial = _Walk(self.module, self.chip, self.timer)
            trial.computation(branch, depth + 1)
            return trial.now

        self.computation(max(known, key=length), depth + 1)

    def done(self, i: Instruction) -> None:
        key = i.operands[0] if i.operands else ""
        end = self.in_flight.pop(key, None)
        if end is not None:
            self.wait(end, network=key in self.network_names)

    def hand_over(self, i: Instruction) -> None:
        """What its operand started goes on under the name that the done will ask for."""
        key = i.operands[0] if i.operands else ""
        if key in self.in_flight:
            self.in_flight[i.name] = self.in_flight.pop(key)
        if key in self.network_names:
            self.network_names.add(i.name)

    def wait(self, end: float, *, network: bool) -> None:
        waited = max(0.0, end - self.now)
        self.now += waited
        if network:
            self.exposed_comm_s += waited * self.weight
        else:
            self.exposed_memory_s += waited * self.weight

    def collective(self, scope: Computation, i: Instruction) -> tuple[Collective, Timed] | None:
        key = (scope.name, i.name)
        if key not in self.collective_cache:
            found = collective_of(self.module, i)
            self.collective_cache[key] = None if found is None else (found, self.timer(found))
        return self.collective_cache[key]

    def communicate(
        self, scope: Computation, i: Instruction, what: Collective, cost: Timed
    ) -> None:
        phase, channel = async_fusion_phase(self.module, i)
        if phase is not None:
            flight = f"channel {channel}"
            if phase == "start":
                self.issue(what, cost, scope)
                self.in_flight[flight] = self.last_end
            elif phase == "fused":
                self.kernel(scope, i)
            else:
                end = self.in_flight.pop(flight, None)
                if end is not None:
                    self.wait(end, network=True)
            return
        self.issue(what, cost, scope)
        if i.opcode.endswith("-start"):
            self.in_flight[i.name] = self.last_end
            self.network_names.add(i.name)
        else:
            begin = self.now
            self.wait(self.last_end, network=True)
            self.note(i, self.now - begin)

    def issue(self, what: Collective, cost: Timed, scope: Computation) -> None:
        begin = max([self.now, *(self.lane_free.get(lane, 0.0) for lane in cost.lanes)])
        self.last_end = begin + cost.time_s
        for lane in cost.lanes:
            self.lane_free[lane] = self.last_end
        self.comm_s += cost.time_s * self.weight
        self._add(self.bytes_by_kind, what.kind, what.payload_bytes)
        self._add(self.counts, what.kind, 1)
        kind, payload = what.kind, float(what.payload_bytes)
        if kind == "collective-permute":
            windowed = windowed_kind(scope, what)
            if windowed is not None:
                ring = ring_length(what.pairs)
                kind, payload = windowed, payload * ring / max(1, ring - 1)
        self._add(self.logical_bytes, kind, payload)

    def prefetch(self, i: Instruction) -> None:
        arrays = i.arrays
        moved = arrays[1].size_bytes if len(arrays) > 1 else i.result_bytes
        if i.opcode == "copy-start" and arrays:
            moved = arrays[0].size_bytes
        begin = max(self.now, self.lane_free.get("memory", 0.0))
        end = begin + moved / self.chip.memory_bandwidth_bytes_per_s
        self.lane_free["memory"] = end
        self.in_flight[i.name] = end

    def kernel(self, scope: Computation, i: Instruction) -> None:
        key = (scope.name, i.name)
        if key not in self.kernel_cache:
            self.kernel_cache[key] = self._kernel_time(scope, i)
        time_s, quality = self.kernel_cache[key]
        if quality == "free":
            return
        self.now += time_s
        self.compute_s += time_s * self.weight
        self.kernels += self.weight
        if quality != "compiler":
            self.unknown += self.weight
            self.unknown_s += time_s * self.weight
            if quality == "absurd":
                self.absurd += self.weight
        self.note(i, time_s)

    def _kernel_time(self, scope: Computation, i: Instruction) -> tuple[float, str]:
        arrays = i.arrays
        if i.opcode == "custom-call":
            target = _TARGET.search(i.attributes_text)
            if target is not None and target[1] in _FREE_CUSTOM_CALLS:
                return 0.0, "free"
        if arrays and all(math.prod(a.shape) <= 1 for a in arrays):
            return 0.0, "free"
        cycles = i.estimated_cycles
        if cycles is not None:
            time_s = cycles / self.chip.clock_hz
            if time_s < ABSURD_TIME_S:
                return time_s, "compiler"
            floor = self._roofline_s(scope, i)
            if time_s <= ABSURD_RATIO * floor:
                return time_s, "compiler"
            return floor, "absurd"
        if self.chip.product_s is not None:
            product = library_product(scope, i)
            if product is not None:
                return self.chip.product_s(*product), "unknown"
        return self._roofline_s(scope, i), "unknown"

    def _roofline_s(self, scope: Computation, i: Instruction) -> float:
        moved = moved_bytes(self.module, scope, i)
        flops = matmul_flops(self.module, scope, i)
        return max(
            moved / self.chip.memory_bandwidth_bytes_per_s, flops / self.chip.peak_flops_per_s
        )

    def note(self, i: Instruction, seconds: float) -> None:
        self._add(self.spent, i.name, seconds)
        if i.name not in self.op_names:
            self.op_names[i.name] = i.op_name

    def _add(self, totals: dict[str, float], key: str, amount: float) -> None:
        totals[key] = totals.get(key, 0.0) + amount * self.weight

    def finish(self) -> None:
        """What is still in flight at the end must end too."""
        for name, end in list(self.in_flight.items()):
            self.wait(end, network=name in self.network_names or name.startswith("channel"))
