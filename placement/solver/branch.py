"""Branch and cut by HiGHS on a reduced core.

Binary z[i, a] chooses strategies; for each edge, continuous y[a, b] >= 0 with row sums z[i, a] and
column sums z[j, b] (the local marginal polytope), which is integral once z is. One row per time
point bounds usage. The form of Alpa's program (Zheng et al., OSDI 2022, section 4.2).
"""

from __future__ import annotations

import math
import time

import numpy as np

from placement.solver.incumbent import Incumbent

_MOST_CELLS, _MOST_USAGES = 3_000_000, 50_000_000
_FEW_CELLS, _FEW_USAGES = 200_000, 8_000_000


def promising(core) -> bool:
    """Whether the program is small enough for branch and cut to be worth a try."""
    usages = len(core.fixed) * len(core.unary)
    return len(core.cells) // 2 <= _FEW_CELLS and usages <= _FEW_USAGES


def branch_and_cut(best: Incumbent, deadline: float) -> bool:
    """Improve the incumbent and its bound by HiGHS; returns whether it proved the optimum."""
    import highspy

    core = best.core
    if len(core.cells) // 2 > _MOST_CELLS or len(core.fixed) * len(core.unary) > _MOST_USAGES:
        return False
    model, n_choices, scale = _model(core, best.reduced.forbidden)
    highs = highspy.Highs()
    highs.setOptionValue("output_flag", False)
    highs.setOptionValue("log_to_console", False)
    highs.setOptionValue("mip_feasibility_tolerance", 1e-9)
    highs.setOptionValue("primal_feasibility_tolerance", 1e-9)
    highs.setOptionValue("threads", 1)
    highs.setOptionValue("mip_rel_gap", 0.0)
    highs.setOptionValue("mip_abs_gap", 1e-7)
    highs.setOptionValue("time_limit", max(deadline - time.monotonic(), 0.01))
    highs.passModel(model)
    if best.feasible:
        chosen = core.offsets[:-1] + best.x
        start = np.zeros(n_choices)
        start[chosen] = 1.0
        highs.setSolution(n_choices, np.arange(n_choices, dtype=np.int32), start)
    highs.run()
    status, info = highs.getModelStatus(), highs.getInfo()
    if status == highspy.HighsModelStatus.kInfeasible:
        if best.feasible:
            best.prove()
        else:
            best.raise_bound(best.reduced.forbidden)
        return True
    if info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible:
        values = np.array(highs.getSolution().col_value)
        best.evaluations += max(int(info.mip_node_count), 1)
        bounds = zip(core.offsets[:-1], core.offsets[1:])
        best.offer(np.array([values[a:b].argmax() for a, b in bounds], dtype=np.int32))
    if math.isfinite(info.mip_dual_bound):
        best.raise_bound(min(info.mip_dual_bound * scale, best.cost))
    # Its assignment may pass the limit by its tolerance, and was then not taken.
    met = best.cost - best.bound <= 1e-6 * abs(best.cost + best.reduced.constant)
    return status == highspy.HighsModelStatus.kOptimal and best.feasible and met


def _model(core, forbidden: float):
    import highspy
    from scipy import sparse

    n_choices = len(core.unary)
    rows, cols, vals, lower, upper = [], [], [], [], []
    objective = [core.unary]
    n_rows, n_cols = 0, n_choices
    upper_bounds = [np.ones(n_choices)]

    def add(row, col, val, low, up):
        for column, part in zip((rows, cols, vals, lower, upper), (row, col, val, low, up)):
            column.append(part)

    n = len(core.offsets) - 1
    k = np.diff(core.offsets)
    add(
        np.repeat(np.arange(n), k), np.arange(n_choices), np.ones(n_choices), np.ones(n), np.ones(n)
    )
    n_rows = n
    for i in range(n):
        for d in range(core.edge_start[i], core.edge_start[i + 1]):
            j = int(core.neighbour[d])
            if j < i:
                continue
            ki, kj = int(k[i]), int(k[j])
            table = core.cells[core.table[d] : core.table[d] + ki * kj]
            y = n_cols + np.arange(ki * kj)
            n_cols += ki * kj
            objective.append(np.where(table < forbidden, table, 0.0))
            upper_bounds.append(np.where(table < forbidden, 1.0, 0.0))
            b, a = np.divmod(np.arange(ki * kj), ki)
            zero_i, zero_j = np.zeros(ki), np.zeros(kj)
            add(n_rows + a, y, np.ones(ki * kj), zero_i, zero_i)
            add(n_rows + np.arange(ki), core.offsets[i] + np.arange(ki), -np.ones(ki), [], [])
            n_rows += ki
            add(n_rows + b, y, np.ones(ki * kj), zero_j, zero_j)
            add(n_rows + np.arange(kj), core.offsets[j] + np.arange(kj), -np.ones(kj), [], [])
            n_rows += kj
    n_times = len(core.fixed)
    usage = np.zeros((n_times + 1, n_choices))
    for u, i in enumerate(np.repeat(np.arange(n), np.diff(core.use_start))):
        amount = core.amounts[core.use_value[u] : core.use_value[u] + k[i]] / core.limit
        columns = slice(core.offsets[i], core.offsets[i + 1])
        usage[core.use_from[u], columns] += amount
        usage[core.use_to[u], columns] -= amount
    usage = np.cumsum(usage[:-1], axis=0)
    usage[np.abs(usage) < 1e-12] = 0.0  # Left by rounding where an entry ends.
    row, col = np.nonzero(usage)
    add(n_rows + row, col, usage[row, col], [], [])
    if n_times:
        lower.append(np.full(n_times, -np.inf))
        upper.append(1.0 - core.fixed / core.limit)
        n_rows += n_times
    cost = np.concatenate(objective)
    scale = max(float(np.abs(cost).max()), 1e-300) / 1e3
    matrix = sparse.coo_matrix(
        (np.concatenate(vals), (np.concatenate(rows), np.concatenate(cols))), (n_rows, n_cols)
    ).tocsc()
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = n_cols, n_rows
    lp.col_cost_ = cost / scale
    lp.col_lower_, lp.col_upper_ = np.zeros(n_cols), np.concatenate(upper_bounds)
    lp.row_lower_, lp.row_upper_ = np.concatenate(lower), np.concatenate(upper)
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    lp.a_matrix_.start_ = matrix.indptr.astype(np.int32)
    lp.a_matrix_.index_ = matrix.indices.astype(np.int32)
    lp.a_matrix_.value_ = matrix.data.astype(np.float64)
    lp.integrality_ = [
        highspy.HighsVarType.kInteger if c < n_choices else highspy.HighsVarType.kContinuous
        for c in range(n_cols)
    ]
    return lp, n_choices, scale
