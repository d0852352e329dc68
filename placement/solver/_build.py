"""Compiled loops of the reduction."""

from __future__ import annotations

import numba
import numpy as np

_compile = numba.njit(cache=True, nogil=True)


@_compile
def arc_consistency(offsets, edge_nodes, edge_offsets, edge_costs, forbidden, alive):
    """Clear ``alive`` of strategies without an allowed partner; returns an emptied node or -1."""
    n_edges = len(edge_nodes)
    n = len(offsets) - 1
    dirty = np.ones(n, dtype=np.bool_)
    constrains = np.zeros(n_edges, dtype=np.bool_)
    for e in range(n_edges):
        for c in range(edge_offsets[e], edge_offsets[e + 1]):
            if edge_costs[c] >= forbidden:
                constrains[e] = True
                break
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
            for a in range(ki):
                if not alive[oi + a]:
                    continue
                partner = False
                for b in range(kj):
                    if alive[oj + b] and edge_costs[at + a * kj + b] < forbidden:
                        partner = True
                        seen[b] = True
                if not partner:
                    alive[oi + a] = False
                    next_dirty[i] = True
                    changed = True
            for b in range(kj):
                if alive[oj + b] and not seen[b]:
                    alive[oj + b] = False
                    next_dirty[j] = True
                    changed = True
            left_i, left_j = 0, 0
            for a in range(ki):
                left_i += alive[oi + a]
            for b in range(kj):
                left_j += alive[oj + b]
            if left_i == 0:
                return i
            if left_j == 0:
                return j
        dirty = next_dirty
    return -1


@_compile
def fold_edges(edges, edge_nodes, edge_offsets, edge_costs, k, offsets, kept, unary):
    """Add the tables of edges with a one-strategy end to the other end's costs."""
    for e in edges:
        i, j = edge_nodes[e, 0], edge_nodes[e, 1]
        at = edge_offsets[e]
        if offsets[j + 1] - offsets[j] == 1:
            b = kept[offsets[j]]
            for s in range(offsets[i], offsets[i + 1]):
                unary[s] += edge_costs[at + kept[s] * k[j] + b]
        else:
            a = kept[offsets[i]]
            for s in range(offsets[j], offsets[j + 1]):
                unary[s] += edge_costs[at + a * k[j] + kept[s]]


@_compile
def copy_tables(
    edges,
    edge_nodes,
    edge_offsets,
    edge_costs,
    k,
    offsets,
    kept,
    forbidden,
    stand_in,
    table_at,
    cells,
):
    """Both orientations of every open edge: first owner i (rows over j), then owner j."""
    n_open = len(edges)
    for x in range(n_open):
        e = edges[x]
        i, j = edge_nodes[e, 0], edge_nodes[e, 1]
        ki, kj = offsets[i + 1] - offsets[i], offsets[j + 1] - offsets[j]
        to_i, to_j = table_at[x], table_at[n_open + x]
        for a in range(ki):
            row = edge_offsets[e] + kept[offsets[i] + a] * k[j]
            for b in range(kj):
                c = edge_costs[row + kept[offsets[j] + b]]
                if c >= forbidden:
                    c = stand_in
                cells[to_i + b * ki + a] = c
                cells[to_j + a * kj + b] = c
