"""The pictures over time and the bars: timeline by lane, memory, shares, comparisons."""

from __future__ import annotations

import dataclasses
import itertools

from placement.report.data import CandidateRow, Event, MemoryPoint, ReportData
from placement.report.words import escape, memory, seconds, share

_WIDTH = 4000
"""Units of the timeline's drawing; events under one unit are joined with their neighbours."""
_COLOURS = 8
REPEATS = "further turns of a loop"
"""Kind of the stretches that stand for the turns of a loop after its first; drawn in grey."""


def timeline(events: tuple[Event, ...]) -> str:
    """One stripe per lane, all on one scale, with a slider to magnify."""
    if not events:
        return "<p class=note>This plan carries no timeline.</p>"
    end_s = max(e.end_s for e in events)
    start_s = min(e.start_s for e in events)
    span_s = max(end_s - start_s, 1e-12)
    kinds = list(dict.fromkeys(e.kind for e in events))
    colours = {kind: i % (_COLOURS - 1) for i, kind in enumerate(k for k in kinds if k != REPEATS)}
    colours[REPEATS] = _COLOURS - 1
    lanes: dict[str, list[Event]] = {}
    for event in events:
        lanes.setdefault(event.lane, []).append(event)
    rows = []
    for lane, inside in lanes.items():
        joined = join_short(inside, span_s / _WIDTH)
        rects = "".join(
            f'<rect x="{(e.start_s - start_s) / span_s * _WIDTH:.2f}" y="0" '
            f'width="{max((e.end_s - e.start_s) / span_s * _WIDTH, 0.6):.2f}" height="20" '
            f'class="k{colours[e.kind]}"><title>{escape(e.name)}: '
            f"{seconds(e.end_s - e.start_s)}</title></rect>"
            for e in joined
        )
        busy_s = _busy_s(inside)
        rows.append(
            f"<div class=lane><span>{escape(lane)} "
            f"<i>{seconds(busy_s)} busy, {share(busy_s, span_s)}</i></span>"
            f'<svg viewBox="0 0 {_WIDTH} 20" preserveAspectRatio="none" role="img" '
            f'aria-label="{escape(lane)}">{rects}</svg></div>'
        )
    ticks = "".join(f"<span>{seconds(start_s + span_s * i / 4)}</span>" for i in range(5))
    legend = "".join(
        f'<li><b class="k{colours[kind]}"></b>{escape(kind or "other")}</li>' for kind in kinds
    )
    return (
        "<label class=zoom>Magnify <input type=range min=1 max=40 value=1 id=zoom></label>"
        f"<div class=scroll><div id=lanes>{''.join(rows)}<div class=ticks>{ticks}</div></div></div>"
        f"<ul class=legend>{legend}</ul>"
    )


def join_short(events: list[Event], shortest_s: float) -> list[Event]:
    """Runs of neighbours shorter than ``shortest_s`` become one event that says how many."""
    joined: list[Event] = []
    counts: list[int] = []
    for event in sorted(events, key=lambda e: e.start_s):
        last = joined[-1] if joined else None
        close = last is not None and event.start_s - last.end_s < shortest_s
        short = event.end_s - event.start_s < shortest_s
        if last is not None and close and short and last.kind == event.kind:
            counts[-1] += 1
            joined[-1] = dataclasses.replace(last, end_s=max(last.end_s, event.end_s))
        else:
            joined.append(event)
            counts.append(1)
    return [
        e if n == 1 else dataclasses.replace(e, name=f"{e.name} and {n - 1} more")
        for e, n in zip(joined, counts)
    ]


def memory_over_step(data: ReportData) -> str:
    """Live bytes against capacity, and what the peak is made of."""
    picture = ""
    if len(data.memory) > 1:
        picture = _memory_curve(data.memory, data.capacity_bytes)
    parts = ""
    if data.memory_parts:
        parts = share_bar(
            [(p.name, p.at_peak_bytes, memory(p.at_peak_bytes)) for p in data.memory_parts],
            data.capacity_bytes or data.peak_memory_bytes,
        )
    if not picture and not parts:
        return f"<p>Peak {memory(data.peak_memory_bytes)} of {memory(data.capacity_bytes)}.</p>"
    return picture + parts


def _memory_curve(points: tuple[MemoryPoint, ...], capacity_bytes: float) -> str:
    start_s, end_s = points[0].time_s, points[-1].time_s
    top = max(max(p.live_bytes for p in points), capacity_bytes) * 1.08 or 1.0
    width, height = 1000, 220

    def x(time_s: float) -> float:
        return (time_s - start_s) / max(end_s - start_s, 1e-12) * width

    def y(live_bytes: float) -> float:
        return height - live_bytes / top * height

    path = [f"M0 {height}", f"L0 {y(points[0].live_bytes):.1f}"]
    for before, point in itertools.pairwise(points):
        path.append(f"H{x(point.time_s):.1f}")
        if point.live_bytes != before.live_bytes:
            path.append(f"V{y(point.live_bytes):.1f}")
    path.append(f"V{height}Z")
    peak = max(points, key=lambda p: p.live_bytes)
    limit = y(capacity_bytes)
    return (
        f'<svg class="wide" viewBox="0 0 {width} {height}" preserveAspectRatio="none" role="img" '
        f'aria-label="live memory over the step"><path d="{" ".join(path)}" class="area"/>'
        f'<line x1="0" x2="{width}" y1="{limit:.1f}" y2="{limit:.1f}" class="limit"/></svg>'
        f"<p class=note>Red line: capacity {memory(capacity_bytes)}. Peak "
        f"{memory(peak.live_bytes)} at {seconds(peak.time_s)} of {seconds(end_s)}.</p>"
    )


def share_bar(parts: list[tuple[str, float, str]], whole: float) -> str:
    """A stacked bar of (name, size, size in words) against a whole, with its legend."""
    total = max(whole, sum(size for _, size, _ in parts), 1e-30)
    bar = "".join(
        f'<b class="k{i % _COLOURS}" style="width:{100 * size / total:.2f}%" '
        f'title="{escape(name)}: {escape(said)}"></b>'
        for i, (name, size, said) in enumerate(parts)
    )
    legend = "".join(
        f'<li><b class="k{i % _COLOURS}"></b>{escape(name)} {escape(said)}</li>'
        for i, (name, _, said) in enumerate(parts)
    )
    return f"<div class=bar>{bar}</div><ul class=legend>{legend}</ul>"


def comparison(data: ReportData) -> str:
    """Step time of the plan and of every baseline on one scale, bands and bound drawn in."""
    mine = CandidateRow(
        name="this plan",
        status=data.status,
        mesh=" × ".join(f"{a.name} {a.size}" for a in data.mesh_axes),
        step_time_s=data.step_time_s,
        peak_memory_bytes=data.peak_memory_bytes,
        p10_s=data.p10_s,
        p90_s=data.p90_s,
    )
    rows = [mine, *sorted(data.baselines, key=_order)]
    longest = max((r.p90_s or r.step_time_s or 0) for r in rows) or 1.0
    bound = ""
    if data.lower_bound_s is not None:
        bound = f'<u style="left:{100 * data.lower_bound_s / longest:.2f}%"></u>'
    body = "".join(_comparison_row(r, data, longest, bound) for r in rows)
    if not data.baselines:
        note = "Plan with baselines=true to see the hand-tuned rules beside it. "
    else:
        note = ""
    if mine.p90_s:
        note += "Whiskers: 10th to 90th percentile of the model's error. "
    if data.lower_bound_s is not None:
        note += (
            f"Green line: no plan in the space is faster than {seconds(data.lower_bound_s)} "
            "under the cost model."
        )
    return (
        "<div class=scroll><table class=compare><thead><tr><th>plan<th class=n>step time<th>"
        "<th class=n>× this plan<th class=n>memory<th>mesh<th>status</thead>"
        f"<tbody>{body}</tbody></table></div><p class=note>{note}</p>"
    )


def _comparison_row(row: CandidateRow, data: ReportData, longest: float, bound: str) -> str:
    if row.step_time_s is None:
        bar, ratio = "", "–"
    else:
        whisker = ""
        if row.p10_s is not None and row.p90_s is not None:
            left, right = 100 * row.p10_s / longest, 100 * row.p90_s / longest
            whisker = f'<s style="left:{left:.2f}%;width:{right - left:.2f}%"></s>'
        bar = (
            f'<div class=track><b style="width:{100 * row.step_time_s / longest:.2f}%"></b>'
            f"{whisker}{bound}</div>"
        )
        ratio = f"{row.step_time_s / data.step_time_s:.2f}" if data.step_time_s else "–"
    mark = ' class="mine"' if row.name == "this plan" else ""
    status = " · ".join(filter(None, [row.status, row.note]))
    return (
        f"<tr{mark}><td>{escape(row.name)}<td class=n>{seconds(row.step_time_s)}<td>{bar}"
        f"<td class=n>{ratio}<td class=n>{memory(row.peak_memory_bytes)}"
        f"<td>{escape(row.mesh)}<td>{escape(status)}"
    )


def _order(row: CandidateRow) -> tuple[bool, float]:
    return (row.status != "feasible", row.step_time_s or float("inf"))


def _busy_s(events: list[Event]) -> float:
    busy, reached = 0.0, float("-inf")
    for event in sorted(events, key=lambda e: e.start_s):
        busy += max(0.0, event.end_s - max(event.start_s, reached))
        reached = max(reached, event.end_s)
    return busy
