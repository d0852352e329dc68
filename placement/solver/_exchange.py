"""Exchange of parts between two assignments, and the change of usage of one node."""

from __future__ import annotations

import numba
import numpy as np

# Infinities occur, so not all of fastmath; no NaN does, which lets minima be vectorised.
compiled = numba.njit(
    cache=True,
    nogil=True,
    fastmath={"nnan", "nsz", "arcp", "contract", "reassoc"},
    error_model="numpy",
)


@compiled
def add_change(core, i, old, new, change):
    """Add node i's usage change to the difference array; returns its range of time points."""
    low, high = len(change), 0
    for u in range(core.use_start[i], core.use_start[i + 1]):
        value = core.use_value[u]
        delta = core.amounts[value + new] - core.amounts[value + old]
        if delta != 0.0:
            change[core.use_from[u]] += delta
            change[core.use_to[u]] -= delta
            low = min(low, core.use_from[u])
            high = max(high, core.use_to[u])
    return low, high


@compiled
def cross(core, x, use, y, state, passes):
    """Take over, in place, the parts of y that lower the cost of feasible x and keep the limit.

    Nodes where x and y differ fall into connected components that do not touch; each is an exchange
    of its own, with its own change of cost and usage (partition crossover, Whitley et al. 2009).
    ``state`` as in ``search``; returns the components taken over.
    """
    n = len(core.offsets) - 1
    n_times = len(core.fixed)
    limit, slack = core.limit, 1e-12 * core.limit
    label = np.full(n, -1, dtype=np.int64)
    members = np.empty(n, dtype=np.int64)
    starts = np.empty(n + 1, dtype=np.int64)
    n_parts, size = 0, 0
    for r in range(n):
        if x[r] == y[r] or label[r] >= 0:
            continue
        starts[n_parts] = size
        label[r] = n_parts
        members[size] = r
        at = size
        size += 1
        while at < size:
            i = members[at]
            at += 1
            for d in range(core.edge_start[i], core.edge_start[i + 1]):
                j = core.neighbour[d]
                if x[j] != y[j] and label[j] < 0:
                    label[j] = n_parts
                    members[size] = j
                    size += 1
        n_parts += 1
    starts[n_parts] = size
    rise = np.zeros(n_parts)
    for q in range(n_parts):
        for s in range(starts[q], starts[q + 1]):
            i = members[s]
            first = core.offsets[i]
            k = core.offsets[i + 1] - first
            rise[q] += core.unary[first + y[i]] - core.unary[first + x[i]]
            for d in range(core.edge_start[i], core.edge_start[i + 1]):
                j = core.neighbour[d]
                if label[j] < 0 or i < j:
                    rise[q] += core.cells[core.table[d] + y[j] * k + y[i]]
                    rise[q] -= core.cells[core.table[d] + x[j] * k + x[i]]
    done = np.zeros(n_parts, dtype=np.bool_)
    change = np.zeros(n_times + 1)
    taken = 0
    for _ in range(passes):
        moved = False
        for q in range(n_parts):
            if done[q] or rise[q] >= 0.0:
                continue
            low_t, high_t = n_times, 0
            for s in range(starts[q], starts[q + 1]):
                i = members[s]
                low, high = add_change(core, i, x[i], y[i], change)
                low_t, high_t = min(low_t, low), max(high_t, high)
            fits = True
            level = 0.0
            for t in range(low_t, high_t):
                level += change[t]
                if use[t] + level > limit + slack:
                    fits = False
                    break
            if fits:
                level = 0.0
                for t in range(low_t, high_t):
                    level += change[t]
                    use[t] += level
                for s in range(starts[q], starts[q + 1]):
                    x[members[s]] = y[members[s]]
                state[0] += rise[q]
                done[q] = True
                moved = True
                taken += 1
            for t in range(low_t, high_t + 1):
                change[t] = 0.0
        if not moved:
            break
    return taken
