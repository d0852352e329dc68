"""One planning problem with its space and its judge.

The space is that of :mod:`placement.whole`: a program variant (rematerialisation, microbatches), a
mesh layout, and a choice for every node of the tables. An *outer* candidate fixes the first three;
the engine (:mod:`placement.solver`) completes it; the schedule simulation judges. One evaluation is
one complete plan judged; the engine's own steps are no evaluations but take time.

The clock is the processor time of this process, so that what else runs on the machine does not
count. Programs, tables and completions are kept in a store that runs on the same problem may share
(:meth:`Instance.fork`): what another run has made is not made again, but its seconds are charged to
each run that asks for it, once, as if it had made it itself. :meth:`Instance.seconds` is that clock;
everything that plans an instance takes its time from it.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from graphs.collecting import without_collection
from placement.learned.problems import PlanningProblem
from placement.mesh_search import MEMORY_RESERVE
from placement.whole import MICROBATCHES, REMAT

if TYPE_CHECKING:
    from cost_model.analysis import Analysis
    from cost_model.layout import MeshLayout
    from cost_model.simulate import Simulator
    from cost_model.tables import Tables
    from graphs.groups import Grouping

EXPOSURE = 0.3
"""Share of hideable communication at which tables are priced by default."""
MAX_AXES = 3
"""Most mesh axes of a candidate."""
SOLVER_STEPS = 1000
"""Assignments that the engine may score by tables to complete one candidate."""
ALMOST = 1.5
"""Times the memory limit up to which a plan is worth another completion."""
_KEPT_BYTES = 4e9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    """What is decided before the operators."""

    remat: str | None
    """One of REMAT; None where the program is given as a function."""
    microbatches: int
    layout: MeshLayout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """One complete plan, judged."""

    step_time_s: float
    """Simulated; of no meaning where the plan does not fit."""
    memory_bytes: float
    """Peak of one device."""
    fits: bool
    choices: np.ndarray
    """[nodes] int64."""
    evaluations: int
    """Plans judged to get it: 1."""
    seconds: float
    """Processor time, tables and program included if they were made for it."""


class Instance:
    """A problem to plan. Tables are kept up to a limit of bytes, oldest dropped first."""

    def __init__(
        self, problem: PlanningProblem, *, max_axes: int = MAX_AXES, store: _Store | None = None
    ) -> None:
        from cost_model.cluster import parse_cluster
        from cost_model.layout import enumerate_layouts

        self.problem = problem
        self.cluster = parse_cluster(problem.cluster)
        self.layouts: tuple[MeshLayout, ...] = tuple(
            enumerate_layouts(self.cluster, max_axes=max_axes)
        )
        self.limit_bytes = self.cluster.device.hbm_available_bytes * (1.0 - MEMORY_RESERVE)
        counts = [m for m in MICROBATCHES if problem.global_batch % m == 0]
        self.outers: tuple[Outer, ...] = tuple(
            Outer(remat=remat, microbatches=count, layout=layout)
            for remat in REMAT
            for count in counts
            for layout in self.layouts
        )
        """All candidates: rematerialisation, then microbatches, then layouts, in fixed order."""
        self.microbatches = tuple(counts)
        self._store = _Store() if store is None else store
        self._paid: set[Any] = set()
        self._charged_s = 0.0
        self._start_s = time.process_time()

    def fork(self) -> Instance:
        """The same problem for another run: nothing paid, clock at zero, work shared."""
        twin = object.__new__(Instance)
        twin.__dict__.update(self.__dict__)
        twin._paid, twin._charged_s, twin._start_s = set(), 0.0, time.process_time()
        return twin

    def seconds(self) -> float:
        """Processor seconds of this run, those of work it took from the store included."""
        return time.process_time() - self._start_s + self._charged_s

    @property
    def tracing_s(self) -> float:
        """Processor seconds that it took to trace the base program."""
        _ = self.base
        return self._store.cost_s["program", REMAT[0], 1]

    @property
    def base(self) -> Grouping:
        """The program with full rematerialisation and one microbatch."""
        return self.grouping(REMAT[0], 1)

    def grouping(self, remat: str | None, microbatches: int) -> Grouping:
        """The traced program of a variant."""
        return self._program(remat, microbatches)[0]

    def tied(self, remat: str | None, microbatches: int) -> tuple[int, ...]:
        """``graphs.fold.fold`` of a variant."""
        return self._program(remat, microbatches)[1]

    def analysis(self, remat: str | None, microbatches: int) -> Analysis:
        """What is known of a variant before any mesh."""
        remat = remat or REMAT[0]
        grouping, tied = self._program(remat, microbatches)

        def make() -> Analysis:
            from cost_model.analysis import Analysis

            return Analysis.of(
                grouping, self.cluster.device, tied=tied, contractions=self._store.contractions
            )

        return self.shared(("analysis", remat, microbatches), make)

    def tables(self, outer: Outer) -> Tables:
        """Tables of a candidate at EXPOSURE with the memory limit (their events without bytes)."""
        return self._judge(outer).tables

    def simulator(self, outer: Outer) -> Simulator:
        """The judge of a candidate."""
        return self._judge(outer)

    def evaluate(
        self,
        outer: Outer,
        *,
        prior: np.ndarray | None = None,
        exposure: float = EXPOSURE,
        time_limit_s: float = 60.0,
    ) -> Outcome:
        """Complete a candidate with the engine and judge it: one evaluation.

        The engine stops after SOLVER_STEPS assignments, so that the result does not depend on the
        machine's load; ``time_limit_s`` (of the wall clock) only guards against stalls. Where what
        it found exceeds the memory by copies that resharding makes, it is asked once more with all
        of them counted.

        ``prior`` ([sum S] seconds, >= 0) is added to node costs while solving; the judge does not
        see it. Without a prior the result is kept in the store.
        """
        began = self.seconds()
        key = ("solved", self.key(outer), exposure, time_limit_s)
        simulator = self._judge(outer)
        if prior is None:
            choices = self.shared(
                key, lambda: self._complete(simulator, None, exposure, time_limit_s)
            )
        else:
            choices = self._complete(simulator, prior, exposure, time_limit_s)
        return self.judge(outer, choices, began=began)

    def shorten(self, outer: Outer, choices: np.ndarray) -> Iterator[tuple[float, Outcome]]:
        """:func:`placement.bound.rounds` from a plan on: (bound of the candidate, plan judged).

        Each is one evaluation. As in :meth:`evaluate`, the engine stops after SOLVER_STEPS.
        """
        from placement.bound import rounds

        found = rounds(
            self._judge(outer),
            choices,
            limit_bytes=self.limit_bytes,
            time_limit_s=60.0,
            max_evaluations=SOLVER_STEPS,
        )
        while True:
            began = self.seconds()
            one = next(found)
            yield one.bound_s, self.judge(outer, one.choices, began=began)

    def judge(self, outer: Outer, choices: np.ndarray, *, began: float | None = None) -> Outcome:
        """Score a complete plan: one evaluation."""
        began = self.seconds() if began is None else began
        simulator = self._judge(outer)
        choices = np.asarray(choices, np.int64)
        step_s = float(simulator(choices)[0, 0])
        memory = simulator.peak_memory_bytes(choices)
        return Outcome(
            step_time_s=step_s,
            memory_bytes=memory,
            fits=bool(memory <= self.limit_bytes),
            choices=choices,
            evaluations=1,
            seconds=self.seconds() - began,
        )

    def _complete(
        self, simulator: Simulator, prior, exposure: float, time_limit_s: float
    ) -> np.ndarray:
        from cost_model.operands import with_operands
        from placement.solver import NEAR, solve

        tables = simulator.tables
        problem = tables.problem if exposure == tables.exposure else tables.at(exposure).problem
        if prior is not None:
            problem = dataclasses.replace(problem, node_costs=problem.node_costs + prior)
        found = solve(
            problem,
            time_limit_s=time_limit_s,
            max_evaluations=SOLVER_STEPS,
            bound=False,
            tolerance=NEAR,
        )
        choices = np.asarray(found.assignment, np.int64)
        over = simulator.peak_memory_bytes(choices) / self.limit_bytes
        if not 1.0 < over <= ALMOST or problem.peak_usage(choices) > self.limit_bytes:
            return choices
        found = solve(
            with_operands(problem, tables.operands),
            time_limit_s=time_limit_s,
            max_evaluations=SOLVER_STEPS,
            bound=False,
            tolerance=NEAR,
        )
        counted = np.asarray(found.assignment, np.int64)
        fits = simulator.peak_memory_bytes(counted) <= self.limit_bytes
        return counted if fits else choices

    def key(self, outer: Outer) -> tuple[Any, ...]:
        """Names a candidate in the store."""
        return (outer.remat, outer.microbatches, outer.layout.key, outer.layout.mesh.axis_sizes)

    def _program(self, remat: str | None, microbatches: int):
        remat = remat or REMAT[0]
        return self.shared(
            ("program", remat, microbatches),
            lambda: trace_variant(self.problem, remat, microbatches),
        )

    def _judge(self, outer: Outer) -> Simulator:
        """The simulator of a candidate; it holds the tables."""
        analysis = self.analysis(outer.remat, outer.microbatches)

        def make() -> Simulator:
            from cost_model.simulate import Simulator
            from cost_model.tables import build_tables

            tables = build_tables(
                analysis,
                outer.layout,
                usage_limit_bytes=self.limit_bytes,
                exposure=EXPOSURE,
            )
            return _slim(Simulator.of(tables))

        return self.shared(("tables", *self.key(outer)), make, size=_size)

    def shared(self, key, make, size=lambda _: 0):
        """From the store, charged once to this run; or made now. ``make`` must not nest."""
        store = self._store
        if key in store.items:
            if key not in self._paid:
                self._charged_s += store.cost_s[key]
                self._paid.add(key)
            store.touch(key)
            return store.items[key]
        before = time.process_time()
        with without_collection():
            item = make()
        spent = time.process_time() - before
        if key in store.cost_s:  # made before and dropped: only the first making counts
            self._charged_s += (0.0 if key in self._paid else store.cost_s[key]) - spent
        else:
            store.cost_s[key] = spent
        self._paid.add(key)
        store.keep(key, item, size(item))
        return item


class _Store:
    """Work shared by the runs on one problem."""

    def __init__(self) -> None:
        self.items: dict[Any, Any] = {}
        self.cost_s: dict[Any, float] = {}
        self.contractions: dict[tuple, float] = {}
        self._sizes: collections.OrderedDict[Any, int] = collections.OrderedDict()

    def touch(self, key) -> None:
        if key in self._sizes:
            self._sizes.move_to_end(key)

    def keep(self, key, item, n_bytes: int) -> None:
        self.items[key] = item
        if n_bytes:
            self._sizes[key] = n_bytes
        while len(self._sizes) > 1 and sum(self._sizes.values()) > _KEPT_BYTES:
            oldest, _ = self._sizes.popitem(last=False)
            del self.items[oldest]


def trace_variant(
    problem: PlanningProblem, remat: str | None, microbatches: int
) -> tuple[Grouping, tuple[int, ...]]:
    """(groups, tied groups) of a problem's train step under a variant."""
    from graphs.fold import fold
    from graphs.groups import group
    from graphs.trace import trace
    from graphs.zoo import build_train_step

    step, args, donated = build_train_step(
        problem.config(),
        global_batch=problem.global_batch,
        seq_len=problem.seq_len,
        optimizer=problem.optimizer,
        microbatches=microbatches,
        remat=remat or REMAT[0],
        scan=problem.scan,
    )
    grouping = group(trace(step, *args, donate_argnums=donated))
    return grouping, fold(grouping)


def _slim(simulator: Simulator) -> Simulator:
    """Without the bytes of each event, which only reports read."""
    events = tuple(
        e if e.n_bytes is None else dataclasses.replace(e, n_bytes=None)
        for e in simulator.tables.events
    )
    return dataclasses.replace(
        simulator, tables=dataclasses.replace(simulator.tables, events=events)
    )


def _size(simulator: Simulator) -> int:
    """Bytes that keeping it takes."""
    p = simulator.tables.problem
    return 2 * p.edge_costs.nbytes + 2 * simulator.seconds.nbytes + 4 * p.node_costs.nbytes
