"""An assignment that the simulation has judged, and the plan made of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from cost_model.layout import MeshLayout
    from cost_model.simulate import Simulator
    from placement.plan import Plan


@dataclasses.dataclass(kw_only=True)
class Candidate:
    """One judged assignment."""

    layout: MeshLayout
    simulator: Simulator
    choices: np.ndarray
    """[nodes] int64."""
    optimizer: str
    step_time_s: float
    memory_bytes: float
    score: float
    """What the objective has least of."""
    table_cost_s: float
    table_bound_s: float


def plan_of(
    best: Candidate,
    candidates: Sequence[Candidate],
    *,
    program: tuple[Any, Sequence[Any], Sequence[int]],
    objective: str,
    pin_operands: bool,
    limit_bytes: float,
    lower_bound_s: float,
    evaluations: int,
    planning_time_s: float,
    status: str,
    warnings: Sequence[str] = (),
) -> Plan:
    """The plan of a candidate, chosen among ``candidates``.

    Args:
      program: (train step, abstract arguments, donated argument numbers) of the tables.
      pin_operands: whether the plan constrains what operations read.
      limit_bytes: what fits.
      warnings: besides those of the traced program.

    The other arguments are those of :class:`placement.plan.Plan`.
    """
    import jax

    from cost_model.estimate import estimate
    from cost_model.timeline import timeline
    from placement.decode import decode
    from placement.explain import reasons
    from placement.plan import Plan

    train_step, abstract_args, donated = program
    tables = best.simulator.tables
    inputs, outputs, results, operands, copies = decode(
        tables, best.choices, pin_operands=pin_operands
    )
    shapes = jax.eval_shape(train_step, *abstract_args)
    drawn = timeline(best.simulator, best.choices)
    return Plan(
        cluster=best.layout.cluster.notation,
        mesh_shape=best.layout.mesh.shape,
        placement=best.layout.placement,
        optimizer=best.optimizer,
        objective=objective,
        inputs=inputs,
        outputs=outputs,
        results=results,
        operands=operands,
        copies=copies,
        donate_argnums=tuple(donated),
        fingerprint=tables.grouping.graph.fingerprint,
        estimate=dataclasses.replace(
            estimate(best.simulator, best.choices, pinned=pin_operands),
            table_cost_s=best.table_cost_s,
        ),
        lower_bound_s=lower_bound_s,
        table_bound_s=best.table_bound_s,
        evaluations=evaluations,
        planning_time_s=planning_time_s,
        status=status,
        warnings=(*tables.grouping.warnings, *warnings),
        alternatives=tuple(
            {
                "mesh_shape": c.layout.mesh.shape,
                "optimizer": c.optimizer,
                "step_time_s": c.step_time_s,
                "memory_bytes": c.memory_bytes,
                "fits": c.memory_bytes <= limit_bytes,
            }
            for c in sorted(candidates, key=lambda c: c.score)
        ),
        reasons=reasons(best, candidates),
        timeline=tuple((x.lane, x.name, x.kind, x.start_s, x.end_s) for x in drawn.stretches),
        memory_over_time=drawn.memory,
        trees=(jax.tree.structure(tuple(abstract_args)), jax.tree.structure(shapes)),
        assignment=tuple(
            (tuple(map(int, menu.place[k])), tuple(map(int, menu.scatter[k])))
            for menu, k in zip(tables.choices, best.choices)
        ),
    )
