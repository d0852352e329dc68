"""A plan checked by the compiler it is for: predicted beside compiled.

XLA's compiler for the plan's cluster compiles the train step with the plan's shardings and
constraints in a child process (:mod:`placement.compile`); :mod:`placement.schedule` reads step,
compute and exposed communication time from the schedule it made.

Collective bytes are compared by kind as payload (the whole tensor of one group, per device, loops
multiplied). The permutes of windowed matmuls count as the all-gather or reduce-scatter that they
carry out, and so does an all-reduce followed by the slice that is kept.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from placement.compile import CODE, MEMORY, Compiled, compile_for_cluster
from placement.network import chip_of, layout_timer
from placement.schedule import ScheduledStep, schedule

if TYPE_CHECKING:
    from placement.plan import Plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One quantity, predicted and compiled."""

    quantity: str
    predicted: float
    compiled: float
    unit: str
    """``s``, ``bytes`` or empty for a count."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verification:
    """What the compiler says of a plan, beside what was predicted. Per device."""

    cluster: str
    fits: bool
    """Whether it compiled and its memory is within the device's."""
    status: str
    """``ok``, ``out_of_memory`` or ``failed``."""
    message: str
    """The compiler's sentence where the status is not ok, else empty."""
    capacity_bytes: float
    predicted_peak_bytes: float
    peak_bytes: float
    """Arguments, outputs not aliased to them, and temporaries; 0 if it did not compile."""
    predicted_step_time_s: float
    step_time_s: float
    """From the compiler's schedule; NaN if it did not compile, or not to the end."""
    predicted_compute_time_s: float
    compute_time_s: float
    """Kernels, by the compiler's cycles."""
    predicted_exposed_comm_time_s: float
    exposed_comm_time_s: float
    predicted_collectives: Mapping[str, float]
    """Payload bytes by kind."""
    collectives: Mapping[str, float]
    collectives_as_emitted: Mapping[str, float]
    """The same before windowed matmuls are counted as what they carry out."""
    kernels: int
    unknown_kernels: int
    """Kernels that the compiler gave no usable estimate of: they count by their roofline."""
    full_rematerializations: tuple[str, ...]
    """Tensors that the partitioner replicates to change their sharding: missing constraints."""
    compile_time_s: float
    cached: bool
    versions: Mapping[str, str]

    def rows(self) -> list[Row]:
        """The comparison, one row a quantity; only memory where it did not compile to the end."""
        rows = [
            Row(
                quantity="peak memory",
                predicted=self.predicted_peak_bytes,
                compiled=self.peak_bytes,
                unit="bytes",
            )
        ]
        if self.status != "ok" or math.isnan(self.step_time_s):
            return rows
        times = (
            ("step time", self.predicted_step_time_s, self.step_time_s),
            ("compute time", self.predicted_compute_time_s, self.compute_time_s),
            (
                "exposed communication",
                self.predicted_exposed_comm_time_s,
                self.exposed_comm_time_s,
            ),
        )
        rows += [Row(quantity=n, predicted=p, compiled=c, unit="s") for n, p, c in times]
        for kind in sorted({*self.predicted_collectives, *self.collectives}):
            predicted = self.predicted_collectives.get(kind, 0.0)
            compiled = self.collectives.get(kind, 0.0)
            if predicted or compiled:
                name = f"{kind.replace('_', '-')} bytes"
                rows.append(
                    Row(quantity=name, predicted=predicted, compiled=compiled, unit="bytes")
                )
        return rows


def verify(
    plan: Plan,
    train_step: Callable[..., Any],
    *abstract_args: Any,
    timeout_s: float = 900.0,
    cache: bool = True,
    memory_only: bool = False,
) -> Verification:
    """Compile a plan for its cluster and compare.

    ``memory_only`` stops the compiler once it has assigned its buffers, which XLA:TPU has after
    seconds: its word on the memory, and none on time or collectives.

    Raises MeshwrightError if the compiler's plugin is missing, the plan is for another function,
    or the compiler is killed or takes longer than ``timeout_s``.
    """
    if plan.trees is None:
        plan = plan.bind(train_step, *abstract_args)
    until = MEMORY if memory_only else CODE
    compiled, step = compile_plan(
        plan, train_step, *abstract_args, timeout_s=timeout_s, cache=cache, until=until
    )
    if memory_only:  # XLA:GPU gives a schedule as well
        step = None
    capacity = _capacity_bytes(plan)
    estimate = plan.estimate
    nan = float("nan")
    return Verification(
        cluster=plan.cluster,
        fits=compiled.status == "ok" and compiled.peak_bytes <= capacity,
        status=compiled.status,
        message=compiled.message,
        capacity_bytes=capacity,
        predicted_peak_bytes=float(estimate.peak_memory_bytes),
        peak_bytes=float(compiled.peak_bytes),
        predicted_step_time_s=float(estimate.step_time_s),
        step_time_s=step.step_time_s if step else nan,
        predicted_compute_time_s=float(estimate.compute_time_s),
        compute_time_s=step.compute_time_s if step else nan,
        predicted_exposed_comm_time_s=float(estimate.exposed_comm_time_s),
        exposed_comm_time_s=step.exposed_comm_time_s if step else nan,
        predicted_collectives={k.replace("-", "_"): v for k, v in estimate.collectives.items()},
        collectives=_underscored(step.logical_collective_bytes) if step else {},
        collectives_as_emitted=_underscored(step.collective_bytes) if step else {},
        kernels=step.kernels if step else 0,
        unknown_kernels=step.unknown_kernels if step else 0,
        full_rematerializations=compiled.full_rematerializations,
        compile_time_s=compiled.seconds,
        cached=compiled.cached,
        versions=compiled.versions,
    )


def compile_plan(
    plan: Plan,
    train_step: Callable[..., Any],
    *abstract_args: Any,
    timeout_s: float = 900.0,
    cache: bool = True,
    until: str = CODE,
) -> tuple[Compiled, ScheduledStep | None]:
    """The compiler's result and, if it compiled, its schedule. Raises as :func:`verify`.

    ``until``: as in :func:`placement.compile.compile_for_cluster`; no schedule comes with MEMORY.
    """
    layout = plan.layout()
    compiled = compile_for_cluster(
        plan.apply(train_step),
        abstract_args,
        in_specs=plan.in_specs,
        out_specs=plan.out_specs,
        donate_argnums=plan.donate_argnums,
        layout=layout,
        timeout_s=timeout_s,
        cache=cache,
        until=until,
    )
    if not compiled.text_path:
        return compiled, None
    return compiled, schedule(compiled.module(), chip=chip_of(layout), timer=layout_timer(layout))


def _capacity_bytes(plan: Plan) -> float:
    """What the compiler allows itself; XLA:TPU refuses more by itself, XLA:GPU does not."""
    return float(plan.layout().cluster.device.hbm_available_bytes)


def _underscored(by_kind: Mapping[str, float]) -> dict[str, float]:
    """cost_model's names of the kinds; a broadcast counts as the all-gather it is costed as."""
    total: dict[str, float] = {}
    names = {"ragged-all-to-all": "all_to_all", "collective-broadcast": "all_gather"}
    for kind, amount in by_kind.items():
        name = names.get(kind, kind.replace("-", "_"))
        total[name] = total.get(name, 0.0) + amount
    return total
