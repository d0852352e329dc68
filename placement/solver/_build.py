"""Compiled loops of the reduction."""

from __future__ import annotations

import numba
import numpy as np

_compile = numba.njit(cache=True, nogil=True)


@_compile
def arc_consistency(offsets, edge_nodes, edge_offsets, edge_costs, forbidden, constrains, alive):
    """Clear ``alive`` of strategies without an allowed partner; returns an emptied node or -1."""
    n_edges = len(edge_nodes)
    n = len(offsets) - 1
    dirty = np.ones(n, dtype=np.bool_)
    for i in range(n):
        left = 0
        for s in range(offsets[i], offsets[i + 1]):
            left += alive[s]
        if left == 0:
            return i
    changed = True
    while changed:
        changed = False
        next_dirty = np.zeros(n, dtype=np.bool_)
        for e in range(n_edges):
            i, j = edge_nodes[e, 0], edge_nodes[e, 1]
            if not constrains[e] or not (dirty[i] or dirty[j]):
                continue
            oi, oj = offsets[i], offsets[j]
            ki, kj = offsets[i + 1] - oi, offsets[j + 1] - oj
            at = edge_offsets[e]
            seen = np.zeros(kj, dtype=np.bool_)
            left_i, left_j = 0, 0
            for a in range(ki):
                if not alive[oi + a]:
                    continue
                partner = False
                for b in range(kj):
                    if alive[oj + b] and edge_costs[at + a * kj + b] < forbidden:
                        partner = True
                        seen[b] = True
                if partner:
                    left_i += 1
                else:
                    alive[oi + a] = False
                    next_dirty[i] = True
                    changed = True
            for b in range(kj):
                if alive[oj + b]:
                    if seen[b]:
                        left_j += 1
                    else:
                        alive[oj + b] = False
                        next_dirty[j] = True
                        changed = True
            if left_i == 0:
                return i
            if left_j == 0:
                return j
        dirty = next_dirty
    return -1


@_compile
def forbidding_edges(edge_offsets, edge_costs, forbidden):
    """[E] whether the edge forbids some pair."""
    found = np.zeros(len(edge_offsets) - 1, dtype=np.bool_)
    for e in range(len(found)):
        for c in range(edge_offsets[e], edge_offsets[e + 1]):
            if edge_costs[c] >= forbidden:
                found[e] = True
                break
    return found


@_compile
def _partners(offsets, edge_nodes, edge_offsets, edge_costs, forbidden, alive, e, from_first):
    """[K of the far end] the only allowed partner per strategy of the near end, or empty."""
    i, j = edge_nodes[e, 0], edge_nodes[e, 1]
    ki, kj = offsets[i + 1] - offsets[i], offsets[j + 1] - offsets[j]
    near, far = (i, j) if from_first else (j, i)
    kn, kf = (ki, kj) if from_first else (kj, ki)
    partner = np.full(kn, -1, dtype=np.int32)
    for a in range(kn):
        if not alive[offsets[near] + a]:
            continue
        for b in range(kf):
            if not alive[offsets[far] + b]:
                continue
            cell = a * kj + b if from_first else b * kj + a
            if edge_costs[edge_offsets[e] + cell] < forbidden:
                if partner[a] >= 0:
                    return np.empty(0, dtype=np.int32)
                partner[a] = b
    return partner


@_compile
def find_classes(offsets, edge_nodes, edge_offsets, edge_costs, forbidden, constrains, alive):
    """Nodes whose strategies determine each other one to one across edges, as classes.

    Returns root [N] (a node's representative), map_at [N+1] and maps: the strategy of node i where
    its root takes its a-th alive strategy is maps[map_at[i] + a]. The last result tells whether a
    strategy of a root was found impossible and cleared in ``alive`` (then run again).
    """
    n = len(offsets) - 1
    n_edges = len(edge_nodes)
    count = np.zeros(n, dtype=np.int64)
    for i in range(n):
        for s in range(offsets[i], offsets[i + 1]):
            count[i] += alive[s]
    tied = np.zeros(n_edges, dtype=np.bool_)
    degree = np.zeros(n + 1, dtype=np.int64)
    for e in range(n_edges):
        i, j = edge_nodes[e, 0], edge_nodes[e, 1]
        if not constrains[e] or count[i] != count[j] or count[i] == 1:
            continue
        partner = _partners(
            offsets, edge_nodes, edge_offsets, edge_costs, forbidden, alive, e, i >= 0
        )
        if len(partner) > 0:
            tied[e] = True
            degree[i + 1] += 1
            degree[j + 1] += 1
    start = degree  # Sums in plain loops: array expressions take seconds to compile.
    fill = np.empty(n, dtype=np.int64)
    for i in range(n):
        start[i + 1] += start[i]
        fill[i] = start[i]
    incident = np.empty(start[-1], dtype=np.int64)
    for e in range(n_edges):
        if tied[e]:
            for side in range(2):
                i = edge_nodes[e, side]
                incident[fill[i]] = e
                fill[i] += 1
    map_at = np.zeros(n + 1, dtype=np.int64)
    for i in range(n):
        map_at[i + 1] = map_at[i] + count[i]
    maps = np.empty(map_at[-1], dtype=np.int32)
    root = np.full(n, -1, dtype=np.int64)
    queue = np.empty(n, dtype=np.int64)
    killed = False
    for r in range(n):
        if root[r] >= 0:
            continue
        root[r] = r
        fill_at = map_at[r]
        for a in range(offsets[r + 1] - offsets[r]):
            if alive[offsets[r] + a]:
                maps[fill_at] = a
                fill_at += 1
        queue[0] = r
        size, at = 1, 0
        while at < size:
            i = queue[at]
            at += 1
            for c in range(start[i], start[i + 1]):
                e = incident[c]
                first = edge_nodes[e, 0] == i
                j = edge_nodes[e, 1] if first else edge_nodes[e, 0]
                partner = _partners(
                    offsets, edge_nodes, edge_offsets, edge_costs, forbidden, alive, e, first
                )
                fresh = root[j] < 0
                if fresh:
                    root[j] = r
                    queue[size] = j
                    size += 1
                for a in range(count[r]):
                    b = partner[maps[map_at[i] + a]]
                    if fresh:
                        maps[map_at[j] + a] = b
                    elif maps[map_at[j] + a] != b:
                        killed = True
                        alive[offsets[r] + maps[map_at[r] + a]] = False
        if killed:
            break
    if not killed:
        for e in range(n_edges):
            i, j = edge_nodes[e, 0], edge_nodes[e, 1]
            if constrains[e] and not tied[e] and root[i] == root[j]:
                r = root[i]
                kj = offsets[j + 1] - offsets[j]
                for a in range(count[r]):
                    cell = maps[map_at[i] + a] * kj + maps[map_at[j] + a]
                    if edge_costs[edge_offsets[e] + cell] >= forbidden:
                        killed = True
                        alive[offsets[r] + maps[map_at[r] + a]] = False
    return root, map_at, maps, killed


@_compile
def fold(
    offsets, edge_nodes, edge_offsets, edge_costs, node_costs, root, map_at, maps, group, core_at
):
    """Node costs of the core from nodes, edges inside a class, and edges to one-strategy nodes.

    ``group`` [N] is the core node, or -1 for a node with one strategy. Returns the costs, the cost
    that is always there, and for each edge the slot key (lesser core node * n_core + greater) of a
    core edge, or -1.
    """
    n = len(root)
    n_core = len(core_at) - 1
    unary = np.zeros(core_at[-1])
    constant = 0.0
    for i in range(n):
        g = group[i]
        if g < 0:
            constant += node_costs[offsets[i] + maps[map_at[i]]]
        else:
            for a in range(core_at[g + 1] - core_at[g]):
                unary[core_at[g] + a] += node_costs[offsets[i] + maps[map_at[i] + a]]
    key = np.full(len(edge_nodes), -1, dtype=np.int64)
    for e in range(len(edge_nodes)):
        i, j = edge_nodes[e, 0], edge_nodes[e, 1]
        gi, gj = group[i], group[j]
        kj = offsets[j + 1] - offsets[j]
        at = edge_offsets[e]
        mi, mj = map_at[i], map_at[j]
        if gi < 0 and gj < 0:
            constant += edge_costs[at + maps[mi] * kj + maps[mj]]
        elif gi < 0:
            for b in range(core_at[gj + 1] - core_at[gj]):
                unary[core_at[gj] + b] += edge_costs[at + maps[mi] * kj + maps[mj + b]]
        elif gj < 0:
            for a in range(core_at[gi + 1] - core_at[gi]):
                unary[core_at[gi] + a] += edge_costs[at + maps[mi + a] * kj + maps[mj]]
        elif gi == gj:
            for a in range(core_at[gi + 1] - core_at[gi]):
                unary[core_at[gi] + a] += edge_costs[at + maps[mi + a] * kj + maps[mj + a]]
        else:
            key[e] = min(gi, gj) * n_core + max(gi, gj)
    return unary, constant, key


@_compile
def gather_tables(
    offsets,
    edge_nodes,
    edge_offsets,
    edge_costs,
    map_at,
    maps,
    group,
    core_at,
    slot,
    slot_at,
    forbidden,
    stand_in,
):
    """Sum the tables of parallel edges; cell (a of lesser, b of greater) is row-major."""
    cells = np.zeros(slot_at[-1])
    for e in range(len(edge_nodes)):
        if slot[e] < 0:
            continue
        i, j = edge_nodes[e, 0], edge_nodes[e, 1]
        kj = offsets[j + 1] - offsets[j]
        swap = group[i] > group[j]
        ni = core_at[group[i] + 1] - core_at[group[i]]
        nj = core_at[group[j] + 1] - core_at[group[j]]
        to = slot_at[slot[e]]
        for a in range(ni):
            row = edge_offsets[e] + maps[map_at[i] + a] * kj
            for b in range(nj):
                c = edge_costs[row + maps[map_at[j] + b]]
                if c >= forbidden:
                    c = stand_in
                if swap:
                    cells[to + b * ni + a] += c
                else:
                    cells[to + a * nj + b] += c
    return cells


@_compile
def split_separable(pairs, slot_at, cells, core_at, unary):
    """Fold tables of the form f(a) + g(b) into node costs; returns [slots] whether one remains."""
    remains = np.ones(len(pairs), dtype=np.bool_)
    for x in range(len(pairs)):
        i, j = pairs[x, 0], pairs[x, 1]
        ki, kj = core_at[i + 1] - core_at[i], core_at[j + 1] - core_at[j]
        at = slot_at[x]
        corner = cells[at]
        separable = True
        for a in range(1, ki):
            side = cells[at + a * kj] - corner
            for b in range(1, kj):
                c = cells[at + a * kj + b]
                if abs(c - cells[at + b] - side) > 1e-12 * abs(c):
                    separable = False
                    break
            if not separable:
                break
        if separable:
            remains[x] = False
            for a in range(ki):
                unary[core_at[i] + a] += cells[at + a * kj]
            for b in range(kj):
                unary[core_at[j] + b] += cells[at + b] - corner
    return remains


@_compile
def orient(pairs, slot_at, cells, core_at, kept, table_at, out):
    """Both orientations of kept tables: [b, a] read by the lesser node, [a, b] by the greater."""
    m = len(kept)
    for x in range(m):
        i, j = pairs[kept[x], 0], pairs[kept[x], 1]
        ki, kj = core_at[i + 1] - core_at[i], core_at[j + 1] - core_at[j]
        at = slot_at[kept[x]]
        for a in range(ki):
            for b in range(kj):
                c = cells[at + a * kj + b]
                out[table_at[x] + b * ki + a] = c
                out[table_at[m + x] + a * kj + b] = c


@_compile
def gather_usages(usages, usage_offsets, usage_nodes, map_at, maps, group, core_at, slot, slot_at):
    """Sum the entries of a core node that share an interval: [slot, a]."""
    amounts = np.zeros(slot_at[-1])
    for u in range(len(usage_nodes)):
        if slot[u] < 0:
            continue
        i = usage_nodes[u]
        g = group[i]
        k = core_at[g + 1] - core_at[g] if g >= 0 else 1
        for a in range(k):
            amounts[slot_at[slot[u]] + a] += usages[usage_offsets[u] + maps[map_at[i] + a]]
    return amounts


@_compile
def usage_steps(event_time, event_owner, event_entry, event_sign, slot_at, amounts, n_points):
    """[n_points] greatest and least possible change of usage from each time point to the next.

    Events are sorted by time, then owner; one owner's entries change together, which is what makes
    a tensor that replaces another of its size no change at all.
    """
    most = np.zeros(n_points)
    least = np.zeros(n_points)
    widest = 1
    for u in range(len(slot_at) - 1):
        widest = max(widest, slot_at[u + 1] - slot_at[u])
    net = np.zeros(widest)
    e = 0
    while e < len(event_time):
        t, owner = event_time[e], event_owner[e]
        k = slot_at[event_entry[e] + 1] - slot_at[event_entry[e]]
        for a in range(k):
            net[a] = 0.0
        while e < len(event_time) and event_time[e] == t and event_owner[e] == owner:
            at = slot_at[event_entry[e]]
            for a in range(k):
                net[a] += event_sign[e] * amounts[at + a]
            e += 1
        if 0 < t < n_points:
            high, low = net[0], net[0]
            for a in range(1, k):
                high = max(high, net[a])
                low = min(low, net[a])
            most[t - 1] += high
            least[t - 1] += low
    return most, least
