"""Large-neighbourhood local search by dynamic programming on random trees, in compiled loops.

A move grows a random set of nodes whose induced subgraph is a tree, and sets all of them to the
optimum of their tree given the rest (two passes of min-sum dynamic programming), under costs that
carry the multipliers of the usage limits, scaled by a random factor, and half of the time random
noise, because the best feasible assignment need not be the optimum for any multipliers. Some moves
grow a set that is a tree but for its root, and try every state of the root: around a node with many
neighbours the cycles pass through it, and its neighbours only change together with it. A move is
kept if it lowers

    merit = cost + penalty * sum_t max(0, usage_t - limit),

so that a feasible assignment stays feasible, or, with probability exp(-rise / temperature), if it
raises the merit a little without breaking the limit.
"""

from __future__ import annotations

import numpy as np

from placement.solver._exchange import add_change, compiled


@compiled
def _grow(core, root, target, conditioned, stamp, mark, block, parent, link, hub_link):
    """Collect up to ``target`` nodes whose induced subgraph is a tree; returns how many.

    ``parent`` and ``link`` (directed edge to it) are -1 for the root. ``conditioned``: what is left
    without the root is a forest instead, and ``hub_link`` is each node's edge to the root, or -1.
    """
    block[0] = root
    parent[0], link[0], hub_link[0] = -1, -1, -1
    mark[root] = stamp
    size, at = 1, 0
    while at < size and size < target:
        i = block[at]
        start, stop = core.edge_start[i], core.edge_start[i + 1]
        width = stop - start
        skip = np.random.randint(width) if width > 0 else 0
        for step in range(width):
            j = core.neighbour[start + (step + skip) % width]
            if mark[j] == stamp:
                continue
            inside, up, hub = 0, -1, -1
            for f in range(core.edge_start[j], core.edge_start[j + 1]):
                other = core.neighbour[f]
                if mark[other] != stamp:
                    continue
                if conditioned and other == root:
                    hub = f
                    continue
                inside += 1
                up = f
                if inside > 1:
                    break
            if inside > 1:
                continue
            mark[j] = stamp
            block[size] = j
            parent[size] = core.neighbour[up] if up >= 0 else -1
            link[size], hub_link[size] = up, hub
            size += 1
            if size >= target:
                break
        at += 1
    return size


@compiled
def _own_costs(core, x, block, size, stamp, mark, prefix, scale, amplitude, belief):
    """Costs of each node's states given what is outside the block, with priced usage and noise."""
    for s in range(size):
        i = block[s]
        first = core.offsets[i]
        k = core.offsets[i + 1] - first
        for a in range(k):
            belief[first + a] = core.unary[first + a]
        for u in range(core.use_start[i], core.use_start[i + 1]):
            price = scale * (prefix[core.use_to[u]] - prefix[core.use_from[u]])
            if price > 0.0:
                value = core.use_value[u]
                for a in range(k):
                    belief[first + a] += price * core.amounts[value + a]
        for d in range(core.edge_start[i], core.edge_start[i + 1]):
            j = core.neighbour[d]
            if mark[j] != stamp:
                row = core.table[d] + x[j] * k
                for a in range(k):
                    belief[first + a] += core.cells[row + a]
        if amplitude > 0.0:
            for a in range(k):
                belief[first + a] -= amplitude * np.log(np.random.random() + 1e-300)


@compiled
def _upward(core, block, first_s, size, parent, link, belief):
    """Add to each parent's states the least cost below; returns the least cost of all trees."""
    total = 0.0
    for s in range(size - 1, first_s - 1, -1):
        i, p = block[s], parent[s]
        first = core.offsets[i]
        k = core.offsets[i + 1] - first
        if p < 0:
            low = np.inf
            for a in range(k):
                low = min(low, belief[first + a])
            total += low
            continue
        up = core.offsets[p]
        at_cell = core.table[link[s]]
        for b in range(core.offsets[p + 1] - up):
            row = at_cell + b * k
            low = np.inf
            for a in range(k):
                low = min(low, belief[first + a] + core.cells[row + a])
            belief[up + b] += low
    return total


@compiled
def _downward(core, block, first_s, size, parent, link, belief, chosen):
    """The states that attain the least cost, parents first."""
    for s in range(first_s, size):
        i, p = block[s], parent[s]
        first = core.offsets[i]
        k = core.offsets[i + 1] - first
        low, arg = np.inf, 0
        row = core.table[link[s]] + chosen[p] * k if p >= 0 else 0
        for a in range(k):
            v = belief[first + a]
            if p >= 0:
                v += core.cells[row + a]
            if v < low:
                low, arg = v, a
        chosen[i] = arg


@compiled
def _add_hub(core, block, size, hub_link, state, belief, work):
    """work = belief, given the state of the block's root."""
    for s in range(1, size):
        i = block[s]
        first = core.offsets[i]
        k = core.offsets[i + 1] - first
        for a in range(k):
            work[first + a] = belief[first + a]
        if hub_link[s] >= 0:
            row = core.table[hub_link[s]] + state * k
            for a in range(k):
                work[first + a] += core.cells[row + a]


@compiled
def _condition(core, block, size, parent, link, hub_link, belief, work, chosen):
    """Optimum of the block: the forest's for each state of the root, and the best of these."""
    root = block[0]
    first = core.offsets[root]
    low, arg = np.inf, 0
    for state in range(core.offsets[root + 1] - first):
        _add_hub(core, block, size, hub_link, state, belief, work)
        total = belief[first + state] + _upward(core, block, 1, size, parent, link, work)
        if total < low:
            low, arg = total, state
    chosen[root] = arg
    _add_hub(core, block, size, hub_link, arg, belief, work)
    _upward(core, block, 1, size, parent, link, work)
    _downward(core, block, 1, size, parent, link, work, chosen)


@compiled
def _rise(core, x, chosen, block, size, stamp, mark, parent, link, hub_link):
    """(True change of cost, nodes that change); an edge inside the block counts at its child."""
    rise = 0.0
    changed = 0
    root = block[0]
    for s in range(size):
        i = block[s]
        new, old = chosen[i], x[i]
        first = core.offsets[i]
        k = core.offsets[i + 1] - first
        if new != old:
            changed += 1
            rise += core.unary[first + new] - core.unary[first + old]
            for d in range(core.edge_start[i], core.edge_start[i + 1]):
                j = core.neighbour[d]
                if mark[j] != stamp:
                    row = core.table[d] + x[j] * k
                    rise += core.cells[row + new] - core.cells[row + old]
        p = parent[s]
        if p >= 0 and (new != old or chosen[p] != x[p]):
            cell = core.table[link[s]]
            rise += core.cells[cell + chosen[p] * k + new]
            rise -= core.cells[cell + x[p] * k + old]
        if hub_link[s] >= 0 and (new != old or chosen[root] != x[root]):
            cell = core.table[hub_link[s]]
            rise += core.cells[cell + chosen[root] * k + new]
            rise -= core.cells[cell + x[root] * k + old]
    return rise, changed


@compiled
def search(
    core,
    x,
    use,
    best_x,
    state,
    multipliers,
    n_moves,
    most_scored,
    block_size,
    temperature,
    noise,
    penalty,
    hubs,
    seed,
):
    """Run moves from x in place. ``state`` [4]: cost of x, its excess, best cost, its excess.

    ``hubs`` is the share of moves that are conditioned on their root. Usage beyond the limit by
    1e-12 of it is rounding. Returns the number of assignments scored.
    """
    np.random.seed(seed)
    n = len(core.offsets) - 1
    n_times = len(core.fixed)
    n_cells = len(core.unary)
    prefix = np.zeros(n_times + 1)
    for t in range(n_times):
        prefix[t + 1] = prefix[t] + multipliers[t]
    change = np.zeros(n_times + 1)
    limit, slack = core.limit, 1e-12 * core.limit
    mark = np.full(n, -1, dtype=np.int64)
    block = np.empty(n, dtype=np.int64)
    parent = np.empty(n, dtype=np.int64)
    link = np.empty(n, dtype=np.int64)
    hub_link = np.empty(n, dtype=np.int64)
    chosen = np.empty(n, dtype=np.int32)
    belief = np.empty(n_cells)
    work = np.empty(n_cells)
    open_nodes = np.empty(n, dtype=np.int64)
    n_open = 0
    for i in range(n):
        if core.offsets[i + 1] - core.offsets[i] > 1:
            open_nodes[n_open] = i
            n_open += 1
    if n_open == 0:
        return 0
    scored = 0
    for move in range(n_moves):
        if scored >= most_scored:
            break
        root = open_nodes[np.random.randint(n_open)]
        target = 1 + np.random.randint(block_size)
        scale = 2.0 * np.random.random() if np.random.random() < 0.7 else 1.0
        conditioned = np.random.random() < hubs
        if conditioned:  # a neighbour of a random node: the more, the more neighbours it has
            width = core.edge_start[root + 1] - core.edge_start[root]
            if width > 0:
                root = core.neighbour[core.edge_start[root] + np.random.randint(width)]
        size = _grow(core, root, target, conditioned, move, mark, block, parent, link, hub_link)
        amplitude = 0.0
        if np.random.random() < 0.5:
            amplitude = noise * np.exp(8.0 * np.random.random() - 4.0)
        _own_costs(core, x, block, size, move, mark, prefix, scale, amplitude, belief)
        if conditioned:
            _condition(core, block, size, parent, link, hub_link, belief, work, chosen)
        else:
            _upward(core, block, 0, size, parent, link, belief)
            _downward(core, block, 0, size, parent, link, belief, chosen)
        rise, changed = _rise(core, x, chosen, block, size, move, mark, parent, link, hub_link)
        if changed == 0:
            continue
        scored += 1
        allowance = 0.0
        if temperature > 0.0:
            allowance = -temperature * np.log(np.random.random() + 1e-300)
        if state[1] <= 0.0 and rise > allowance:
            continue
        low_t, high_t = n_times, 0
        for s in range(size):
            i = block[s]
            if chosen[i] != x[i]:
                low, high = add_change(core, i, x[i], chosen[i], change)
                low_t, high_t = min(low_t, low), max(high_t, high)
        excess = 0.0
        level = 0.0
        feasible = state[1] <= 0.0
        for t in range(low_t, high_t):
            level += change[t]
            over = use[t] + level - limit
            if over > slack:
                excess += over
                if feasible:
                    break
            if not feasible:
                excess -= max(0.0, use[t] - limit)
        left = state[1] + excess
        if left <= slack:
            left = 0.0
        merit = rise + penalty * (left - state[1])
        keep = merit <= allowance and (left == 0.0 or not feasible)
        if not feasible and left == 0.0:
            keep = True
        if keep:
            state[0] += rise
            state[1] = left
            level = 0.0
            for t in range(low_t, high_t):
                level += change[t]
                use[t] += level
            for s in range(size):
                x[block[s]] = chosen[block[s]]
            if (left == 0.0 and (state[3] > 0.0 or state[0] < state[2])) or (
                left > 0.0 and state[3] > left
            ):
                state[2], state[3] = state[0], left
                for i in range(n):
                    best_x[i] = x[i]
        for t in range(low_t, high_t + 1):
            change[t] = 0.0
    return scored
