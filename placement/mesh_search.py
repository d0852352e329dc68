"""The search over meshes: the optimizer completes each, the simulation judges, the best is the plan."""

from __future__ import annotations

import dataclasses
import time

import numpy as np

from placement.candidate import Candidate

MEMORY_RESERVE = 0.06
"""Share of device memory kept free for the runtime and fragmentation."""
GRACE_S = 10.0
"""Seconds beyond a short time limit in which something that fits is still looked for."""
LEAST_S = 0.5
"""Seconds that a solve gets at least while nothing fits."""
LEARNED = "learned"
"""Name of the learned optimizer: the policy orders the meshes, the engine completes each."""
EXPOSURES = (0.3, 1.0)
"""Shares of hideable communication at which tables are priced; the simulation judges the results."""
ROUNDS = 16
"""Most rounds of :func:`placement.bound.rounds` on one mesh."""
QUIET_ROUNDS = 5
"""Rounds without gain after which a mesh is left."""
WORTH_A_ROUND = 5e-4
"""Relative gain that counts as one; meshes whose bound comes as near to the best plan are left."""


class MeshSearch:
    """Outer search over meshes; the optimizer solves each, the simulation judges."""

    def __init__(
        self,
        *,
        grouping,
        layouts,
        optimizer,
        objective,
        deadline,
        grace_s,
        max_evaluations,
        seed,
        policy,
        pin_operands=None,
    ) -> None:
        """``deadline`` (time.monotonic()) ends the search, or ``grace_s`` later if nothing fits.

        ``pin_operands``: whether plans constrain what operations read; None as the optimizer does.
        """
        from cost_model.analysis import Analysis
        from graphs.fold import fold
        from placement.optimizers import HAND_TUNED

        self.grouping, self.layouts = grouping, layouts
        self.optimizer, self.objective = optimizer, objective
        self.deadline, self.grace_s = deadline, grace_s
        self.max_evaluations, self.seed = max_evaluations, seed
        self.policy, self.tied = policy, fold(grouping)
        self.pins = optimizer not in HAND_TUNED if pin_operands is None else pin_operands
        device = layouts[0].cluster.device
        self.analysis = Analysis.of(grouping, device, tied=self.tied)
        self.limit = device.hbm_available_bytes * (1.0 - MEMORY_RESERVE)
        self.candidates: list[Candidate] = []
        self.bounds: list[float] = []
        self.evaluations = 0
        self.skipped = 0

    def run(self) -> None:
        order = self._order()
        for n, layout in enumerate(order):
            grace_s = 0.0 if self._fitting() else self.grace_s
            if self.candidates and self._expired(grace_s):
                self.skipped = len(order) - n
                break
            self._solve_layout(layout, len(order) - n)

    def _order(self):
        if self.policy is None:
            return promising_first(self.layouts)
        from placement.learned.advice import order_layouts

        return order_layouts(self.policy, self.grouping, self.layouts, self.tied)

    def _expired(self, grace_s: float = 0.0) -> bool:
        spent = self.max_evaluations is not None and self.evaluations >= self.max_evaluations
        return spent or time.monotonic() >= self.deadline + grace_s

    def _fitting(self) -> list[Candidate]:
        return [c for c in self.candidates if c.memory_bytes <= self.limit]

    def _solve_layout(self, layout, remaining: int) -> None:
        from cost_model.operands import with_operands
        from cost_model.simulate import Simulator
        from cost_model.tables import build_tables
        from placement.bound import computation_bound_s
        from placement.optimizers import HAND_TUNED, OPTIMIZERS

        propose = OPTIMIZERS[self.optimizer]
        until = time.monotonic() + 3 * self._slice(remaining)
        base = build_tables(
            self.analysis, layout, usage_limit_bytes=self.limit, exposure=EXPOSURES[0]
        )
        simulator = Simulator.of(base)
        first = len(self.candidates)
        searches = self.optimizer in ("search", "exact")
        known = min((c.step_time_s for c in self._fitting()), default=np.inf)
        if searches and self.objective in ("time", "cost") and known < np.inf:
            enough_s = known * (1 - WORTH_A_ROUND)
            bound = computation_bound_s(
                simulator,
                limit_bytes=self.limit,
                time_limit_s=self._slice(remaining),
                enough_s=enough_s,
            )
            if bound >= enough_s:
                self.bounds.append(bound)
                return
        for n, exposure in enumerate(EXPOSURES if searches else EXPOSURES[:1]):
            if n and time.monotonic() + self._slice(remaining) > until:
                break  # even one solve takes more than its share
            tables = base.at(exposure)
            found = propose(tables, self.seed, self._budget(remaining))
            self.evaluations += found.evaluations
            memory = self._judge(layout, simulator, found)
            if found.feasible and memory > self.limit and self.optimizer not in HAND_TUNED:
                counted = with_operands(tables.problem, tables.operands)
                found = propose(
                    dataclasses.replace(tables, problem=counted),
                    self.seed,
                    self._budget(remaining),
                )
                self.evaluations += found.evaluations
                self._judge(layout, simulator, found)
            if self._expired():
                break
        n_rounds = ROUNDS if searches and time.monotonic() < until else 1
        self._shorten_paths(layout, simulator, first, n_rounds, until)

    def _budget(self, remaining: int):
        """What one of three solves of a layout may spend."""
        from placement.optimizers import Budget

        left = None
        if self.max_evaluations is not None:
            left = max(1, self.max_evaluations - self.evaluations)
        return Budget(time_limit_s=self._slice(remaining), max_evaluations=left)

    def _shorten_paths(self, layout, simulator, first: int, n_rounds: int, until: float) -> None:
        """The bound of a layout; and plans that charge what its simulated step waits for.

        Goes on from the best of the candidates from ``first`` on while it pays, to time.monotonic()
        ``until``.
        """
        from cost_model.estimate import table_cost
        from placement.bound import rounds
        from placement.optimizers.interface import Assignment

        own = self.candidates[first:]
        start = min(own, key=lambda c: (c.memory_bytes > self.limit, c.step_time_s))
        limit_s = max(0.05, until - time.monotonic()) / 2
        bound, quiet, best = 0.0, 0, start.step_time_s
        for n, found in enumerate(
            rounds(
                simulator,
                start.choices,
                limit_bytes=self.limit,
                time_limit_s=limit_s,
            )
        ):
            gained = found.bound_s > bound * (1 + WORTH_A_ROUND)
            bound = max(bound, found.bound_s)
            if n_rounds > 1 and not np.array_equal(found.choices, start.choices):
                judged = Assignment(
                    choices=found.choices,
                    table_cost_s=table_cost(simulator, found.choices),
                    lower_bound_s=0.0,
                    feasible=True,
                    evaluations=1,
                )
                self.evaluations += 1
                memory = self._judge(layout, simulator, judged)
                last = self.candidates[-1]
                if memory > self.limit or last.score >= start.score:
                    self.candidates.pop()
                elif last.step_time_s < best:
                    gained, best = True, last.step_time_s
            quiet = 0 if gained else quiet + 1
            known = min((c.step_time_s for c in self._fitting()), default=np.inf)
            if (
                n + 1 >= n_rounds
                or quiet >= QUIET_ROUNDS
                or bound >= known * (1 - WORTH_A_ROUND)
                or time.monotonic() >= until
                or self._expired()
            ):
                break
        self.bounds.append(bound)

    def _judge(self, layout, simulator, found) -> float:
        """Add the candidate; its peak memory, bytes."""
        step, compute, _ = simulator(found.choices)[0]
        memory = simulator.peak_memory_bytes(found.choices)
        self.candidates.append(
            Candidate(
                layout=layout,
                simulator=simulator,
                choices=found.choices,
                optimizer=self.optimizer if self.policy is None else LEARNED,
                step_time_s=float(step),
                memory_bytes=memory,
                score=self._score(float(step), float(compute), memory, layout),
                table_cost_s=found.table_cost_s,
                table_bound_s=found.lower_bound_s,
            )
        )
        return memory

    def _score(self, step: float, compute: float, memory: float, layout) -> float:
        from cost_model.energy import devices_energy_j, max_power_w

        if self.objective == "memory":
            return memory
        if self.objective in ("energy", "carbon"):  # carbon is energy times the region's intensity
            max_power_w(layout.cluster.device.name)  # refuses a device of unpublished power
            return (
                devices_energy_j(
                    layout.cluster.device,
                    n_devices=layout.cluster.n_devices,
                    step_time_s=step,
                    compute_time_s=compute,
                )
                or 0.0
            )
        return step  # time; money is devices x time, and the devices are given

    def plan(self, train_step, abstract_args, donated, start):
        from placement.candidate import plan_of
        from placement.optimizers import HAND_TUNED

        fitting = self._fitting()
        if not fitting and self.optimizer not in HAND_TUNED:  # a rule that does not fit is that
            self._lean()
            fitting = self._fitting()
        pool = fitting or self.candidates
        best = min(pool, key=lambda c: c.score if fitting else c.memory_bytes)
        status = "feasible"
        if not fitting:
            status = self._why_not(best)
        elif self.skipped:
            status = "time_limit"
        return plan_of(
            best,
            self.candidates,
            program=(train_step, abstract_args, donated),
            objective=self.objective,
            pin_operands=self.pins,
            limit_bytes=self.limit,
            lower_bound_s=self._bound(best.step_time_s if fitting else np.inf),
            evaluations=self.evaluations,
            planning_time_s=time.monotonic() - start,
            status=status,
            warnings=self._indivisible(),
        )

    def _bound(self, found_s: float) -> float:
        """Of all meshes, given the step time of the best plan; 0 where some were not tried."""
        return 0.0 if self.skipped else min(found_s, *self.bounds)

    def _slice(self, remaining: int) -> float:
        """Seconds one of three solves of a layout may take, when `remaining` layouts are left."""
        share = max(0.05, self.deadline - time.monotonic()) / (3 * remaining)
        return share if self._fitting() else max(share, LEAST_S)

    def _why_not(self, best: Candidate) -> str:
        from placement.fits import smallest_fit
        from placement.optimizers import HAND_TUNED

        cluster = best.layout.cluster
        capacity = cluster.device.hbm_available_bytes
        found = "no plan fits"
        if self.skipped:
            found = f"no plan was found to fit in time, with {self.skipped} meshes not tried"
        sentence = (
            f"{found}: the least memory found is {best.memory_bytes / 2**30:.2f} GiB per device "
            f"and {cluster.device.name} has {capacity / 2**30:.2f} GiB, of which "
            f"{MEMORY_RESERVE:.0%} is reserved"
        )
        if self.optimizer in HAND_TUNED:
            return f"{sentence}; {self.optimizer} is a fixed rule, use optimizer=search"
        if self.skipped:
            return f"{sentence}; give a longer time_limit_s"
        bigger = smallest_fit(self.grouping, cluster, 1.0 - MEMORY_RESERVE)
        if bigger is None:
            return (
                sentence
                + "; no larger cluster of this kind was found to fit it, use a smaller batch"
            )
        return sentence + f"; the smallest cluster of this kind found to fit it is {bigger}"

    def _lean(self) -> None:
        """Nothing fits: add the assignment that holds the least, for each mesh tried."""
        from cost_model.estimate import table_cost
        from placement.fits import least_memory

        for c in list({id(c.layout): c for c in self.candidates}.values()):
            tables = c.simulator.tables
            memory, choices = least_memory(tables)
            step, compute, _ = c.simulator(choices)[0]
            self.candidates.append(
                dataclasses.replace(
                    c,
                    choices=choices,
                    table_cost_s=table_cost(c.simulator, choices),
                    table_bound_s=0.0,
                    memory_bytes=memory,
                    step_time_s=float(step),
                    score=self._score(float(step), float(compute), memory, c.layout),
                )
            )

    def _indivisible(self) -> tuple[str, ...]:
        """Large arguments that no mesh axis divides."""
        graph = self.grouping.graph
        sizes = sorted({n for x in self.layouts for n in x.mesh.axis_sizes if n > 1})
        found = []
        for t, name in zip(graph.inputs, graph.input_names):
            shape = graph.tensors[t].shape
            big = [n for n in shape if n > 1]
            if sizes and big and not any(n % s == 0 for n in big for s in sizes):
                found.append(f"{name}{list(shape)}")
        if not found:
            return ()
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        return (
            f"no mesh axis divides a dimension of {found[0]}{more} (axis sizes tried: "
            f"{', '.join(map(str, sizes))}), so it is whole on every device; pad the dimension or "
            "pin another mesh_shape",
        )


def promising_first(layouts):
    """Whole-axis layouts before split ones, fewer axes first."""
    return sorted(layouts, key=lambda x: (x.splits, len(x.mesh.axis_sizes)))
