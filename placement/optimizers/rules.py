"""Hand-tuned rules: what experts write, as optimizers.

A rule says which named dimension classes each mesh axis shards on weights, on optimizer state and
on activations (HAND-TUNED practice: ZeRO, Rajbhandari et al. 2020; Megatron-LM, Shoeybi et al. 2019;
sequence parallelism, Korthikanti et al. 2022; 2-D finalized, t5x; fsdp, MaxText and axlearn). What a
rule leaves open, the operators between, is solved optimally, so each rule is at its best.

The last mesh axis is the model axis of rules that have one; all others are data axes. On a mesh of
one axis a rule with a model axis uses it as the model axis.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from cost_model.problem import FORBIDDEN, Problem
from cost_model.tables import Tables
from graphs.groups import COPY, HEAVY, LEAF, Group
from graphs.names import BATCH, HIDDEN, PARALLEL, SEQUENCE, name_classes
from graphs.rules import WHOLE
from placement.optimizers.interface import Assignment, Budget


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """One expert layout."""

    name: str
    summary: str
    model_axis: bool
    """Whether the last mesh axis does tensor parallelism."""
    weights_on_data: bool
    """ZeRO-3: weights sharded over the data axes."""
    state_on_data: bool
    """ZeRO-1: optimizer state sharded over the data axes."""
    gradients_on_data: bool
    """ZeRO-2: gradients reduce-scattered rather than all-reduced."""
    sequence_on_model: bool = False
    """Activations outside tensor-parallel regions sharded along the sequence."""
    hidden_on_model: bool = False
    """Activations outside tensor-parallel regions sharded along the hidden width (2-D finalized)."""


RULES: tuple[Rule, ...] = (
    Rule(name="data_parallel", summary="weights everywhere, gradients all-reduced",
         model_axis=False, weights_on_data=False, state_on_data=False, gradients_on_data=False),
    Rule(name="zero1", summary="data parallel, optimizer state sharded",
         model_axis=False, weights_on_data=False, state_on_data=True, gradients_on_data=False),
    Rule(name="zero2", summary="data parallel, optimizer state and gradients sharded",
         model_axis=False, weights_on_data=False, state_on_data=True, gradients_on_data=True),
    Rule(name="fsdp", summary="ZeRO-3: weights, gradients and state sharded over all devices",
         model_axis=False, weights_on_data=True, state_on_data=True, gradients_on_data=True),
    Rule(name="megatron", summary="tensor parallel over the model axis, ZeRO-1 over data",
         model_axis=True, weights_on_data=False, state_on_data=True, gradients_on_data=False),
    Rule(name="megatron_sp", summary="Megatron with sequence parallelism",
         model_axis=True, weights_on_data=False, state_on_data=True, gradients_on_data=True,
         sequence_on_model=True),
    Rule(name="fsdp_tp", summary="weights 2-D sharded: hidden over data, the rest over model",
         model_axis=True, weights_on_data=True, state_on_data=True, gradients_on_data=True),
    Rule(name="fsdp_tp_sp", summary="2-D sharded weights, sequence parallel activations",
         model_axis=True, weights_on_data=True, state_on_data=True, gradients_on_data=True,
         sequence_on_model=True),
    Rule(name="t5x_2d", summary="t5x 2-D finalized: activations' hidden width over model as well",
         model_axis=True, weights_on_data=True, state_on_data=True, gradients_on_data=True,
         hidden_on_model=True),
)  # fmt: skip


def rule_optimizer(rule: Rule):
    """The rule as an optimizer."""

    def optimize(tables: Tables, key: int, budget: Budget) -> Assignment:
        from placement.solver import solve

        problem = _restrict(tables.problem, _fixed(rule, tables))
        if not rule.gradients_on_data:
            problem.node_costs[_unscattered(tables, _data_axes(rule, tables))] = FORBIDDEN
        solution = solve(
            problem,
            time_limit_s=budget.time_limit_s,
            seed=key,
            max_evaluations=budget.max_evaluations,
        )
        return Assignment(
            choices=np.asarray(solution.assignment, np.int64),
            table_cost_s=float(solution.cost),
            lower_bound_s=0.0,
            feasible=bool(solution.feasible),
            evaluations=int(solution.evaluations),
        )

    optimize.__name__ = rule.name
    optimize.__doc__ = rule.summary
    return optimize


def _restrict(problem: Problem, fixed: dict[int, int]) -> Problem:
    """The problem with some nodes decided; memory does not bind a rule (it may not fit)."""
    costs = problem.node_costs.copy()
    for node, pick in fixed.items():
        a, b = problem.strategy_offsets[node], problem.strategy_offsets[node + 1]
        own = costs[a + pick]
        costs[a:b] = FORBIDDEN
        costs[a + pick] = own
    return dataclasses.replace(problem, node_costs=costs, usage_limit=np.inf)


def _fixed(rule: Rule, tables: Tables) -> dict[int, int]:
    """Choices of the nodes that the rule decides."""
    grouping = tables.grouping
    names = name_classes(grouping)
    sizes = tables.layout.mesh.axis_sizes
    n_axes = len(sizes)
    model = n_axes - 1 if rule.model_axis else -1
    data = _data_axes(rule, tables)
    graph = grouping.graph
    state_out = {graph.outputs[b] for _, b in graph.aliases}
    state_in = {graph.inputs[a] for a, _ in graph.aliases}
    fixed: dict[int, int] = {}
    for node, groups in enumerate(tables.groups_of):
        g = groups[0]
        item = grouping.groups[g]
        if item.kind in (HEAVY, COPY) or not item.sizes:
            continue
        role = names.of[g]
        updates = any(t in state_out for t in item.tensors)
        is_state = item.kind == LEAF and any(t in state_in for t in item.tensors)
        want = [-1] * n_axes
        if is_state or updates:
            sharded = rule.state_on_data if updates else rule.weights_on_data
            _place_state(item, role, names.root[g], sizes, data if sharded else [], model, want)
        elif BATCH not in role[: len(item.sizes)]:
            continue  # gradients on their way to the norm or the optimizer: whatever is best
        else:
            _place_activation(rule, item, role, sizes, data, model, want)
        pick = np.flatnonzero((tables.choices[node].place == np.array(want, np.int8)).all(1))
        if len(pick):
            fixed[node] = int(pick[0])
    return fixed


def _data_axes(rule: Rule, tables: Tables) -> list[int]:
    n_axes = len(tables.layout.mesh.axis_sizes)
    return list(range(n_axes - 1 if rule.model_axis else n_axes))


def _fits(item: Group, c: int, axes: list[int], sizes) -> bool:
    n = 1
    for a in axes:
        n *= sizes[a]
    return item.sizes[c] % n == 0


def _place_state(item, role, roots, sizes, data, model, want) -> None:
    """Weights and state: model axis on a parallel class, data axes on hidden or the largest."""
    free = list(range(len(item.sizes)))
    widest = max((len(dims) for dims in item.tensors.values()), default=0)
    if model >= 0 and widest > 1:
        for c in [c for c in free if role[c] == PARALLEL] + [
            c for c in free if role[c] not in (PARALLEL, HIDDEN)
        ]:
            if _fits(item, c, [model], sizes):
                want[model] = c
                free.remove(c)
                break
    if data:
        order = sorted(free, key=lambda c: (role[c] != HIDDEN, -item.sizes[c]))
        for c in order:
            if _fits(item, c, data, sizes):
                for a in data:
                    want[a] = c
                return
        for a in data:  # no class takes all data axes: spread them
            for c in order:
                taken = [b for b in range(len(want)) if want[b] == c]
                if _fits(item, c, [*taken, a], sizes):
                    want[a] = c
                    break


def _place_activation(rule, item, role, sizes, data, model, want) -> None:
    batch = [c for c in range(len(item.sizes)) if role[c] == BATCH]
    for a in data:
        for c in batch:
            taken = [b for b in range(len(want)) if want[b] == c]
            if _fits(item, c, [*taken, a], sizes):
                want[a] = c
                break
    if model < 0:
        return
    order = [c for c in range(len(item.sizes)) if role[c] == PARALLEL]
    order = [c for c in order if not _in_residual(item, role, c)]
    if rule.sequence_on_model:
        order += [c for c in range(len(item.sizes)) if role[c] == SEQUENCE]
    if rule.hidden_on_model:
        order += [c for c in range(len(item.sizes)) if role[c] == HIDDEN]
    for c in order:
        if _fits(item, c, [model], sizes):
            want[model] = c
            return


def _in_residual(item: Group, role, c: int) -> bool:
    """A parallel class beside the hidden one in one tensor is a weight's, not an activation's."""
    return any(
        c in dims and any(d != WHOLE and role[d] == HIDDEN for d in dims)
        for dims in item.tensors.values()
    )


def _unscattered(tables: Tables, data: list[int]) -> np.ndarray:
    """[sum S] True for choices that reduce-scatter a gradient over a data axis."""
    marks = []
    gradients = {e.node for e in tables.events if e.label == "gradient"}
    for node, menu in enumerate(tables.choices):
        bad = np.zeros(len(menu), bool)
        if node in gradients:
            bad = (menu.scatter[:, data] >= 0).any(axis=1)
        marks.append(bad)
    return np.concatenate(marks)
