"""The tables: every tensor's spec, costs, what was searched, the compiler's word."""

from __future__ import annotations

import dataclasses
import re

from placement.report.data import CandidateRow, ReportData, TensorRow
from placement.report.words import escape, memory, quantity, seconds, share

_KINDS = ("parameter", "optimizer state", "input", "other")
_NUMBER = re.compile(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])|(?<=_)\d+(?![A-Za-z0-9])")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folded:
    """Tensors that differ only in a number of their name, such as the layers of a stack."""

    row: TensorRow
    """the first of them, the number in its name replaced by *."""
    count: int


def fold(rows: tuple[TensorRow, ...]) -> list[Folded]:
    """Equal tensors of repeated layers as one line each, in order of first appearance."""
    groups: dict[TensorRow, list[TensorRow]] = {}
    for row in rows:
        key = dataclasses.replace(row, name=_NUMBER.sub("*", row.name))
        groups.setdefault(key, []).append(row)
    return [
        Folded(row=key if len(found) > 1 else found[0], count=len(found))
        for key, found in groups.items()
    ]


def table(columns: str, body: str, *, name: str = "") -> str:
    """A table that scrolls sideways; columns whose heading ends with > hold numbers."""
    heads = "".join(
        f"<th class=n>{head[:-1]}" if head.endswith(">") else f"<th>{head}"
        for head in columns.split(", ")
    )
    identity = f' id="{name}"' if name else ""
    return (
        f"<div class=scroll><table{identity}><thead><tr>{heads}</thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def tensors(data: ReportData) -> str:
    """Every leaf of the arguments: shape, type, spec, bytes in all and on each device."""
    if not data.tensors:
        return "<p class=note>This plan carries no tensors.</p>"
    summary = []
    for kind in dict.fromkeys((*_KINDS, *(t.kind for t in data.tensors))):
        inside = [t for t in data.tensors if t.kind == kind]
        if not inside:
            continue
        total, local = sum(t.bytes_total for t in inside), sum(t.bytes_per_device for t in inside)
        copies = f"{local * data.n_devices / total:.1f}" if total else "–"
        summary.append(
            f"<tr><td>{escape(kind)}<td class=n>{len(inside)}<td class=n>{memory(total)}"
            f"<td class=n>{memory(local)}<td class=n>{copies}"
        )
    body = "".join(
        f"<tr><td><code>{escape(f.row.name)}</code>{f' <i>× {f.count}</i>' * (f.count > 1)}"
        f"<td>{escape(f.row.kind)}<td>{' × '.join(map(str, f.row.shape)) or 'scalar'}"
        f"<td>{escape(f.row.dtype)}<td><code>{escape(f.row.spec)}</code>"
        f"<td class=n>{memory(f.row.bytes_total * f.count)}"
        f"<td class=n>{memory(f.row.bytes_per_device * f.count)}"
        for f in fold(data.tensors)
    )
    return (
        table("kind, tensors>, in all>, per device>, copies over the machine>", "".join(summary))
        + "<label class=find>Find <input id=find type=search placeholder='attention'></label>"
        + table("tensor, kind, shape, type, spec, in all>, per device>", body, name="tensors")
    )


def costs(data: ReportData) -> str:
    if not data.costs:
        return "<p class=note>This plan carries no breakdown.</p>"
    rows = sorted(data.costs, key=lambda c: (-c.exposed_time_s, -c.time_s))
    counted = any(c.n_calls or c.moved_bytes for c in rows)
    columns = "what, kind, busy>, adds to the step>, of the step>"
    body = ""
    for c in rows:
        body += (
            f"<tr><td>{escape(c.name)}<td>{escape(c.kind)}<td class=n>{seconds(c.time_s)}"
            f"<td class=n>{seconds(c.exposed_time_s)}"
            f"<td class=n>{share(c.exposed_time_s, data.step_time_s)}"
        )
        if counted:
            moved = memory(c.moved_bytes) if c.moved_bytes else ""
            body += f"<td class=n>{c.n_calls:,.0f}<td class=n>{moved}"
    return table(columns + (", times>, moved per device>" if counted else ""), body)


def searched(rows: tuple[CandidateRow, ...]) -> str:
    body = "".join(
        f"<tr><td>{escape(r.mesh or r.name)}<td class=n>{seconds(r.step_time_s)}"
        f"<td class=n>{memory(r.peak_memory_bytes)}<td>{escape(r.status)}<td>{escape(r.note)}"
        for r in rows
    )
    return table("mesh, best step time>, memory>, status, note", body)


def pareto(data: ReportData) -> str:
    body = "".join(
        f"<tr><td>{escape(p.name)}<td class=n>{seconds(p.step_time_s)}"
        f"<td class=n>{quantity(p.value, p.unit)}"
        for p in data.pareto
    )
    return table("plan, step time>, against>", body)


def checks(data: ReportData) -> str:
    body = "".join(
        f"<tr><td>{escape(c.quantity)}<td class=n>{quantity(c.predicted, c.unit)}"
        f"<td class=n>{quantity(c.compiled, c.unit)}"
        f"<td class=n>{_difference(c.predicted, c.compiled)}"
        for c in data.checks
    )
    return table("quantity, predicted>, compiled>, difference>", body)


def _difference(predicted: float, compiled: float | None) -> str:
    return f"{100 * (predicted / compiled - 1):+.1f} %" if compiled else "–"
