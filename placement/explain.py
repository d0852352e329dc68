"""Sentences that say why each mesh axis is where it is, and what the next best mesh costs."""

from __future__ import annotations

from collections import Counter

from graphs.names import name_classes


def reasons(best, candidates) -> tuple[str, ...]:
    """Plain sentences about a chosen candidate among those considered."""
    tables = best.simulator.tables
    grouping = tables.grouping
    names = name_classes(grouping)
    mesh = tables.layout.mesh
    graph = grouping.graph
    state = {graph.inputs[a] for a, _ in graph.aliases}
    sentences = []
    for axis, (name, size) in enumerate(zip(mesh.axis_names, mesh.axis_sizes)):
        uses: dict[str, Counter[str]] = {"weights": Counter(), "activations": Counter()}
        for node, groups in enumerate(tables.groups_of):
            g = groups[0]
            item = grouping.groups[g]
            cls = int(tables.choices[node].place[int(best.choices[node]), axis])
            label = names.of[g][cls] if cls >= 0 else "replicated"
            bucket = "weights" if any(t in state for t in item.tensors) else "activations"
            for t in item.tensors:
                uses[bucket][label] += graph.tensors[t].n_bytes
        parts = []
        for bucket, counter in uses.items():
            total = sum(counter.values()) or 1
            top = ", ".join(f"{k} {v / total:.0%}" for k, v in counter.most_common(3))
            parts.append(f"{bucket}: {top}")
        sentences.append(f"axis {name} ({size}) shards, by bytes, {'; '.join(parts)}.")
    others = sorted(
        (c for c in candidates if c.layout.mesh.shape != best.layout.mesh.shape),
        key=lambda c: c.score,
    )
    if others and best.step_time_s > 0:
        other = others[0]
        change = other.step_time_s / best.step_time_s - 1.0
        sentences.append(
            f"the next best mesh is {other.layout.mesh.shape}: {other.step_time_s * 1e3:.2f} ms a "
            f"step, {change:+.1%}, {other.memory_bytes / 2**30:.2f} GiB per device."
        )
    return tuple(sentences)
