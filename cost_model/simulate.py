"""The schedule simulation: what a step takes when computation and communication overlap.

Two lanes run in program order: the computation of one device, and its network. A collective that
something waits for at once (partial sums, resharded activations) stops the computation lane. One
that hides (weights to be gathered, gradients to be reduced) starts as soon as the loop body starts
(weights) or its operand is computed (gradients) and stops the computation only at its reader or at
the end of the loop body. The body of a loop is simulated once and multiplied by its trips.

What may hide is a fact of the compiler, not of the network: XLA:TPU overlaps all-gathers and the
reduce-scatter of a contraction (as collective matmuls), and runs all-reduce and all-to-all
synchronously; XLA:GPU overlaps all of them (``xla_gpu_enable_latency_hiding_scheduler``).
"""

from __future__ import annotations

import dataclasses
import functools

import numba
import numpy as np

from cost_model.events import COMPUTE, RESHARD
from cost_model.fitted import load_calibration
from cost_model.operands import add_operands
from cost_model.pricing import KINDS
from cost_model.tables import Tables

_BLOCK, _EARLY, _LATE = 0, 1, 2
"""How a communication event meets computation: stops it, may start early, may end late."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Simulator:
    """Events of a :class:`Tables` in flat arrays, ready to replay for any assignment."""

    tables: Tables
    kind: np.ndarray
    op: np.ndarray
    node: np.ndarray
    source: np.ndarray
    seconds: np.ndarray
    """flat values of all events."""
    mode: np.ndarray
    """same length: _BLOCK, _EARLY or _LATE."""
    offset: np.ndarray
    """[events] first value."""
    n_columns: np.ndarray
    rows: np.ndarray
    """flat row index of each choice of the source."""
    row_offset: np.ndarray
    columns: np.ndarray
    column_offset: np.ndarray
    region_start: np.ndarray
    region_stop: np.ndarray
    region_trips: np.ndarray

    @classmethod
    def of(cls, tables: Tables) -> Simulator:
        gpu = tables.pricing.device.family == "gpu"
        seconds, mode, rows, columns = [], [], [], []
        offset, n_columns, row_offset, column_offset = [], [], [], []
        at = row_at = column_at = 0
        shared: dict[tuple, int] = {}
        row_at_of: dict[int, int] = {}
        column_at_of: dict[int, int] = {}
        for e in tables.events:
            # One array may be priced for a gather that hides and for one that stops computation.
            key = (id(e.seconds), e.kind, e.hides, e.late, id(e.waits))
            if key not in shared:
                shared[key] = at
                seconds.append(np.ascontiguousarray(e.seconds, np.float64).ravel())
                mode.append(_modes(e, gpu).ravel())
                at += e.seconds.size
            offset.append(shared[key])
            if e.kind == RESHARD:
                assert e.rows is not None and e.columns is not None
                n_columns.append(e.seconds.shape[1])
                if id(e.rows) not in row_at_of:
                    row_at_of[id(e.rows)] = row_at
                    rows.append(e.rows.astype(np.int32))
                    row_at += len(e.rows)
                if id(e.columns) not in column_at_of:
                    column_at_of[id(e.columns)] = column_at
                    columns.append(e.columns.astype(np.int32))
                    column_at += len(e.columns)
                row_offset.append(row_at_of[id(e.rows)])
                column_offset.append(column_at_of[id(e.columns)])
            else:
                n_columns.append(0)
                row_offset.append(0)
                column_offset.append(0)
        regions = tables.grouping.graph.regions
        empty = np.zeros(0, np.int32)
        return cls(
            tables=tables,
            kind=np.array([e.kind for e in tables.events], np.int64),
            op=np.array([e.op for e in tables.events], np.int64),
            node=np.array([e.node for e in tables.events], np.int64),
            source=np.array([e.source for e in tables.events], np.int64),
            seconds=np.concatenate(seconds) if seconds else np.zeros(0),
            mode=np.concatenate(mode) if mode else np.zeros(0, np.int8),
            offset=np.array(offset, np.int64),
            n_columns=np.array(n_columns, np.int64),
            rows=np.concatenate(rows) if rows else empty,
            row_offset=np.array(row_offset, np.int64),
            columns=np.concatenate(columns) if columns else empty,
            column_offset=np.array(column_offset, np.int64),
            region_start=np.array([r.start for r in regions], np.int64),
            region_stop=np.array([r.stop for r in regions], np.int64),
            region_trips=np.array([r.trips for r in regions], np.float64),
        )

    def __call__(self, assignments: np.ndarray) -> np.ndarray:
        """[K, nodes] choices -> [K, 3]: step, computation and communication seconds."""
        array = np.ascontiguousarray(np.atleast_2d(assignments), np.int64)
        return _simulate(
            array, self.kind, self.op, self.node, self.source, self.seconds, self.mode,
            self.offset, self.n_columns, self.rows, self.row_offset, self.columns,
            self.column_offset, self.region_start, self.region_stop, self.region_trips,
        )  # fmt: skip

    def peak_memory_bytes(self, assignment: np.ndarray) -> float:
        """Largest sum of live bytes."""
        return float(self.memory_profile(assignment).max(initial=0.0))

    def memory_profile(self, assignment: np.ndarray) -> np.ndarray:
        """[ops + 2] live bytes of device memory at each position."""
        p = self.tables.problem
        n = len(self.tables.grouping.graph.ops) + 2
        profile, passing = np.zeros(n + 1), np.zeros(n + 1)
        if len(p.usage_nodes):
            values = p.usages[p.usage_offsets[:-1] + assignment[p.usage_nodes]]
            ends = np.minimum(p.usage_intervals[:, 1], n)
            np.add.at(profile, p.usage_intervals[:, 0], values)
            np.add.at(profile, ends, -values)
            near = self.passing & (values <= self.on_chip_bytes)
            np.add.at(passing, p.usage_intervals[near, 0], values[near])
            np.add.at(passing, ends[near], -values[near])
        add_operands(profile, self.tables.operands, assignment)
        on_chip = np.minimum(np.cumsum(passing), self.on_chip_bytes)
        return (np.cumsum(profile) - on_chip)[:-1]

    @functools.cached_property
    def on_chip_bytes(self) -> float:
        """What stays on chip between kernels, as contractions find their operands there."""
        pricing = self.tables.pricing
        constants = load_calibration(pricing.device.calibration).constants
        return constants["matmul"]["resident_bytes"] if pricing.fuses else 0.0

    @functools.cached_property
    def passing(self) -> np.ndarray:
        """[usage entries] whether one holds activations or weights for a while inside one region."""
        p, regions = self.tables.problem, self.tables.grouping.graph.regions
        start, stop = p.usage_intervals[:, 0], p.usage_intervals[:, 1]
        found = np.isin(np.array(self.tables.usage_labels), ("activations", "weights"))
        for r in regions:
            if r.parent >= 0:  # lives through a loop, or is handed from one to another
                found &= ~((start <= r.start) & (stop >= r.stop))
        return found


def _modes(event, gpu: bool) -> np.ndarray:
    if event.kind == COMPUTE or not event.hides:
        return np.zeros(event.seconds.shape, np.int8)
    sync = event.n_bytes[KINDS.index("all_to_all")] + event.n_bytes[KINDS.index("all_reduce")]
    free = _LATE if event.late else _EARLY
    if gpu:
        return np.full(event.seconds.shape, free, np.int8)
    if event.waits is not None:
        sync = sync + event.waits
    return np.where(sync > 0, _BLOCK, free).astype(np.int8)


@numba.njit(cache=True)
def value_at(
    e, choices, kind, node, source, offset, n_columns, rows, row_offset, columns, column_offset
):  # fmt: skip
    """Where the values of event e are for an assignment ([nodes])."""
    if kind[e] == 2:
        row = rows[row_offset[e] + choices[source[e]]]
        return offset[e] + row * n_columns[e] + columns[column_offset[e] + choices[node[e]]]
    return offset[e] + choices[node[e]]


@numba.njit(cache=True)
def _simulate(
    assignments, kind, op, node, source, seconds, mode, offset, n_columns, rows, row_offset,
    columns, column_offset, region_start, region_stop, region_trips,
):  # fmt: skip
    n_regions = len(region_start)
    out = np.zeros((len(assignments), 3))
    stack = np.zeros(n_regions + 1, np.int64)
    began = np.zeros(n_regions + 1)
    began_compute = np.zeros(n_regions + 1)
    began_comm = np.zeros(n_regions + 1)
    for k in range(len(assignments)):
        a = assignments[k]
        t = 0.0  # the computation lane is busy until here
        n = 0.0  # the network lane
        computed = 0.0
        communicated = 0.0
        before = 0.0  # when the last computation began
        depth = 0
        stack[0] = 0
        began[0] = 0.0
        following = 1
        e = 0
        n_events = len(kind)
        while True:
            here = op[e] if e < n_events else 1 << 60
            # close loops that end before this event, open those that start at or before it
            while depth > 0 and region_stop[stack[depth]] <= here:
                r = stack[depth]
                t = max(t, n)
                extra = region_trips[r] - 1.0
                t += extra * (t - began[depth])
                computed += extra * (computed - began_compute[depth])
                communicated += extra * (communicated - began_comm[depth])
                n = t
                depth -= 1
            while (
                following < n_regions
                and region_start[following] <= here
                and region_start[following] < (1 << 59)
            ):
                r = following
                following += 1
                if region_stop[r] <= here or region_stop[r] <= region_start[r]:
                    continue
                depth += 1
                stack[depth] = r
                t = max(t, n)
                n = t
                began[depth] = t
                began_compute[depth] = computed
                began_comm[depth] = communicated
            if e >= n_events:
                break
            index = value_at(
                e, a, kind, node, source, offset, n_columns, rows, row_offset, columns,
                column_offset,
            )  # fmt: skip
            d = seconds[index]
            if kind[e] == 0:
                before = t
                t += d
                computed += d
            elif d > 0.0:
                communicated += d
                m = mode[index]
                if m == 0:
                    t = max(t, n) + d
                    n = t
                elif m == 1:
                    n = max(n, began[depth]) + d
                    t = max(t, n)
                else:
                    n = max(n, before) + d
            e += 1
        out[k, 0] = max(t, n)
        out[k, 1] = computed
        out[k, 2] = communicated
    return out
