"""Lagrangian dual bound with sequential message passing, in compiled loops.

Usage limits get multipliers lambda_t >= 0 (one per time point), which leaves an unconstrained
pairwise problem whose bound L(lambda) is raised by tree-reweighted sequential message passing
(Kolmogorov, "Convergent tree-reweighted message passing", PAMI 2006). Nodes that hang off the
cyclic core as trees are eliminated exactly, leaves first. lambda follows multiplicative weights
(Arora, Hazan and Kale, 2012): lambda_t *= exp(rate * (usage_t / limit - 1)), which needs no scale
and lets a thousand idle time points vanish; small violations are lifted so that the first feasible
assignment is not far. Every value is a valid bound:

    bound = sum_i min_a theta_i(a) + sum_e min_ab theta_e(a, b) - limit * sum_t lambda_t

for the reparametrised node and edge costs theta; after a forward pass the edge minima are zero.
"""

from __future__ import annotations

import numba
import numpy as np

# Infinities occur, so not all of fastmath; no NaN does, which lets minima be vectorised.
_compile = numba.njit(
    cache=True,
    nogil=True,
    fastmath={"nnan", "nsz", "arcp", "contract", "reassoc"},
    error_model="numpy",
)


@_compile
def elimination_order(core):
    """[N] nodes with tree parts first, leaves inward, and [N] whether a node is in a tree part."""
    n = len(core.offsets) - 1
    degree = np.empty(n, dtype=np.int64)
    order = np.empty(n, dtype=np.int64)
    is_tree = np.zeros(n, dtype=np.bool_)
    size = 0
    for i in range(n):
        degree[i] = core.edge_start[i + 1] - core.edge_start[i]
        if degree[i] <= 1:
            order[size] = i
            is_tree[i] = True
            size += 1
    at = 0
    while at < size:
        i = order[at]
        at += 1
        for d in range(core.edge_start[i], core.edge_start[i + 1]):
            j = core.neighbour[d]
            degree[j] -= 1
            if degree[j] == 1 and not is_tree[j]:
                is_tree[j] = True
                order[size] = j
                size += 1
    for i in range(n):
        if not is_tree[i]:
            order[size] = i
            size += 1
    return order, is_tree


@_compile
def penalise(core, multipliers, scale, costs):
    """costs = unary + scale * (usage priced by the multipliers)."""
    n_times = len(multipliers)
    prefix = np.empty(n_times + 1)
    prefix[0] = 0.0
    for t in range(n_times):
        prefix[t + 1] = prefix[t] + multipliers[t]
    for s in range(len(costs)):  # Array assignment would take seconds to compile.
        costs[s] = core.unary[s]
    for i in range(len(core.offsets) - 1):
        first = core.offsets[i]
        k = core.offsets[i + 1] - first
        for u in range(core.use_start[i], core.use_start[i + 1]):
            price = scale * (prefix[core.use_to[u]] - prefix[core.use_from[u]])
            if price == 0.0:
                continue
            value = core.use_value[u]
            for a in range(k):
                costs[first + a] += price * core.amounts[value + a]


@_compile
def _send(core, messages, theta, d, j, k, gamma):
    """Give gamma*theta to directed edge d and push its minimum to neighbour j."""
    own = core.message[d]
    for a in range(k):
        messages[own + a] -= gamma * theta[a]
    far = core.message[core.reverse[d]]
    at = core.table[d]
    for b in range(core.offsets[j + 1] - core.offsets[j]):
        row = at + b * k
        low = np.inf
        for a in range(k):
            v = core.cells[row + a] - messages[own + a]
            low = min(low, v)
        messages[far + b] = low


@_compile
def sweep(core, costs, order, rank, is_tree, messages, backward):
    """One pass of message passing; returns the bound (valid after a forward pass)."""
    n = len(order)
    widest = 1
    for i in range(n):
        widest = max(widest, core.offsets[i + 1] - core.offsets[i])
    theta = np.empty(widest)
    bound = 0.0
    for step in range(n):
        i = order[n - 1 - step] if backward else order[step]
        if backward and is_tree[i]:
            break
        first = core.offsets[i]
        k = core.offsets[i + 1] - first
        for a in range(k):
            theta[a] = costs[first + a]
        ahead, behind = 0, 0
        for d in range(core.edge_start[i], core.edge_start[i + 1]):
            own = core.message[d]
            for a in range(k):
                theta[a] += messages[own + a]
            j = core.neighbour[d]
            if (rank[j] > rank[i]) != backward:
                if not (backward and is_tree[j]):
                    ahead += 1
            elif not is_tree[j]:
                behind += 1
        rest = 1.0
        if ahead > 0:
            gamma = 1.0 / max(ahead, behind)
            for d in range(core.edge_start[i], core.edge_start[i + 1]):
                j = core.neighbour[d]
                if (rank[j] > rank[i]) != backward and not (backward and is_tree[j]):
                    _send(core, messages, theta, d, j, k, gamma)
            rest = 1.0 - ahead * gamma
        if rest > 1e-12:
            low = np.inf
            for a in range(k):
                low = min(low, theta[a])
            bound += rest * low
    return bound


@_compile
def decode(core, costs, order, rank, messages, x):
    """States chosen against the order, each given those already chosen and the messages."""
    n = len(order)
    widest = 1
    for i in range(n):
        widest = max(widest, core.offsets[i + 1] - core.offsets[i])
    theta = np.empty(widest)
    for step in range(n - 1, -1, -1):
        i = order[step]
        first = core.offsets[i]
        k = core.offsets[i + 1] - first
        for a in range(k):
            theta[a] = costs[first + a]
        for d in range(core.edge_start[i], core.edge_start[i + 1]):
            j = core.neighbour[d]
            if rank[j] > rank[i]:
                row = core.table[d] + x[j] * k
                for a in range(k):
                    theta[a] += core.cells[row + a]
            else:
                own = core.message[d]
                for a in range(k):
                    theta[a] += messages[own + a]
        best = 0
        for a in range(1, k):
            if theta[a] < theta[best]:
                best = a
        x[i] = best


@_compile
def usage_of(core, x, use):
    """use[t] = bytes live at time point t."""
    n_times = len(core.fixed)
    change = np.zeros(n_times + 1)
    for i in range(len(core.offsets) - 1):
        for u in range(core.use_start[i], core.use_start[i + 1]):
            amount = core.amounts[core.use_value[u] + x[i]]
            change[core.use_from[u]] += amount
            change[core.use_to[u]] -= amount
    level = 0.0
    for t in range(n_times):
        level += change[t]
        use[t] = level + core.fixed[t]


@_compile
def cost_of(core, x):
    """Objective of a core assignment."""
    total = 0.0
    for i in range(len(core.offsets) - 1):
        total += core.unary[core.offsets[i] + x[i]]
        k = core.offsets[i + 1] - core.offsets[i]
        for d in range(core.edge_start[i], core.edge_start[i + 1]):
            j = core.neighbour[d]
            if i < j:
                total += core.cells[core.table[d] + x[j] * k + x[i]]
    return total


@_compile
def _copy(source, target):
    for t in range(len(source)):
        target[t] = source[t]


@_compile
def ascend(core, order, rank, is_tree, messages, state, n_steps, target):
    """Raise the dual bound for ``n_steps`` steps, changing messages and state in place.

    state = (multipliers [T], best multipliers [T], x [N] int32 decoded last, best_x [N] int32
    decoded best, scalars [6]: best bound, rate, stale steps, best_x cost, its excess, steps done).
    Stops early when the gap to the lesser of ``target`` and best_x's cost is closed.
    """
    multipliers, best_multipliers, x, best_x, scalars = state
    n_times = len(core.fixed)
    costs = np.empty(len(core.unary))
    use = np.empty(n_times)
    for done in range(n_steps):
        penalise(core, multipliers, 1.0, costs)
        n_sweeps = 4 if scalars[5] == 0.0 else 1
        scalars[5] += 1.0
        bound = 0.0
        for _ in range(n_sweeps):
            for half in range(2):
                bound = sweep(core, costs, order, rank, is_tree, messages, half == 0)
        priced = 0.0
        for t in range(n_times):
            bound -= multipliers[t] * (core.limit - core.fixed[t])
            priced = max(priced, multipliers[t])
        decode(core, costs, order, rank, messages, x)
        usage_of(core, x, use)
        excess = 0.0
        for t in range(n_times):
            excess = max(excess, use[t] - core.limit)
        cost = cost_of(core, x)
        if excess <= 1e-12 * core.limit:
            excess = 0.0
            if scalars[4] > 0.0 or cost < scalars[3]:
                scalars[3], scalars[4] = cost, 0.0
                _copy(x, best_x)
                target = min(target, cost)
        elif scalars[4] > 0.0 and excess < scalars[4]:
            scalars[3], scalars[4] = cost, excess
            _copy(x, best_x)
        if bound > scalars[0] + 1e-5 * abs(scalars[0]):
            scalars[2] = 0.0
            scalars[1] = min(1.0, scalars[1] * 1.05)
        elif bound < scalars[0] - 0.03 * abs(scalars[0]):
            scalars[2] += 4.0  # Far too long a step.
        elif scalars[4] == 0.0 or bound < scalars[0]:
            scalars[2] += 1.0
        if bound > scalars[0]:
            scalars[0] = bound
            _copy(multipliers, best_multipliers)
            if target < np.inf and target - bound <= 1e-7 * abs(target):
                return done + 1
        if priced == 0.0:
            if excess > 0.0:
                # Small against the costs, and equal at all times: usage decides what grows.
                start = 1e-4 * max(abs(bound), 1e-3 * abs(cost)) / core.limit / n_times
                for t in range(n_times):
                    multipliers[t] = start
            continue
        if scalars[2] >= 8.0:
            scalars[2] = 0.0
            scalars[1] = max(0.7 * scalars[1], 1e-3)
            _copy(best_multipliers, multipliers)
            continue
        highest = 0.0
        lift = max(1.0, 0.25 * core.limit / excess) if excess > 0.0 else 1.0
        for t in range(n_times):
            g = use[t] / core.limit - 1.0
            if g > 0.0:
                g = min(1.0, g * lift)
            multipliers[t] *= np.exp(scalars[1] * g)
            highest = max(highest, multipliers[t])
        for t in range(n_times):
            multipliers[t] = max(multipliers[t], 1e-9 * highest)
    return n_steps


@_compile
def least_with(core, costs, messages, bound, least):
    """least[s] = a bound on the cost of assignments that take strategy s, for every strategy.

    Valid after a forward pass that gave ``bound`` (of the priced problem): every edge's least is
    then zero, and a node may draw the least of each of its edges to itself.
    """
    for i in range(len(core.offsets) - 1):
        first = core.offsets[i]
        k = core.offsets[i + 1] - first
        rest = np.inf
        for a in range(k):
            own = costs[first + a]
            for d in range(core.edge_start[i], core.edge_start[i + 1]):
                own += messages[core.message[d] + a]
            rest = min(rest, own)
        for a in range(k):
            least[first + a] = bound - rest + costs[first + a]
        for d in range(core.edge_start[i], core.edge_start[i + 1]):
            j = core.neighbour[d]
            far = core.message[core.reverse[d]]
            table = core.table[core.reverse[d]]
            kj = core.offsets[j + 1] - core.offsets[j]
            for a in range(k):
                row = table + a * kj
                low = np.inf
                for b in range(kj):
                    low = min(low, core.cells[row + b] - messages[far + b])
                least[first + a] += low
