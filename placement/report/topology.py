"""The mesh drawn on the machine: a cell per device, one picture per mesh axis.

Device p with physical coordinates p[a] has, on a mesh axis made of spans, the coordinate whose
mixed-radix digits (major to minor) are (p[span.physical_axis] // span.stride) % span.size.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

from placement.report.data import MeshAxis, PhysicalAxis, ReportData
from placement.report.words import escape

_CELL = 13
_MAX_COLUMNS = 32
_MAX_ROWS = 32
_MAX_CELLS = 1536


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window:
    """The part of the machine that is drawn: devices evenly spaced along each physical axis."""

    sizes: tuple[int, ...]
    """devices drawn along each physical axis."""
    full: bool
    """True where the whole machine is drawn."""


def coordinate(axis: MeshAxis, position: tuple[int, ...]) -> int:
    """Index of the device at a physical position along a mesh axis."""
    index = 0
    for span in axis.spans:
        index = index * span.size + (position[span.physical_axis] // span.stride) % span.size
    return index


def window(axes: tuple[PhysicalAxis, ...]) -> Window:
    """At most 32 × 32 devices a plane and 1,536 in all, whole planes where they fit."""
    limits = [_MAX_COLUMNS, _MAX_ROWS, 8, 4, 2]
    sizes = [min(a.size, limits[min(i, 4)]) for i, a in enumerate(axes)]
    for i in reversed(range(len(sizes))):
        while math.prod(sizes) > _MAX_CELLS and sizes[i] > 1:
            sizes[i] -= 1
        while axes[i].size % sizes[i]:
            # A divisor, so that what is drawn is evenly spaced.
            sizes[i] -= 1
    return Window(sizes=tuple(sizes), full=math.prod(sizes) == math.prod(a.size for a in axes))


def section(data: ReportData) -> str:
    """The whole machine coloured by mesh coordinates, then a card for every mesh axis."""
    if not data.physical_axes:
        return _cards(data, None)
    drawn = window(data.physical_axes)
    shown = [axis for axis in data.mesh_axes if axis.size > 1]
    picture = _svg(
        data.physical_axes,
        drawn,
        lambda position: _mixed_colour(shown, position),
        lambda position: _tip(data, position),
        f"{data.n_devices} devices of {data.cluster} coloured by mesh coordinate",
    )
    note = "" if drawn.full else f"<p class=note>{_elision(data, drawn)}</p>"
    legend = _legend(shown)
    return f"<div class=machine><div class=scroll>{picture}</div>{legend}{note}</div>" + _cards(
        data, drawn
    )


def _cards(data: ReportData, drawn: Window | None) -> str:
    cards = []
    for axis in data.mesh_axes:
        networks = _networks(axis, data.physical_axes)
        where = " · ".join(filter(None, [axis.role, networks]))
        picture = ""
        if drawn is not None and axis.size > 1:
            picture = _group_picture(axis, data, drawn)
        why = f"<p>{escape(axis.why)}</p>" if axis.why else ""
        other = f"<p class=note>Next best: {escape(axis.next_best)}</p>" if axis.next_best else ""
        cards.append(
            f"<article class=card><h3><code>{escape(axis.name)}</code> × {axis.size}</h3>"
            f"<p class=note>{escape(where)}</p>{picture}{why}{other}</article>"
        )
    return f"<div class=cards>{''.join(cards)}</div>"


def _group_picture(axis: MeshAxis, data: ReportData, drawn: Window) -> str:
    """One group of devices that communicate along the axis, against the rest."""
    free = {s.physical_axis: [] for s in axis.spans}
    for span in axis.spans:
        free[span.physical_axis].append(span)

    def member(position: tuple[int, ...]) -> bool:
        for a, p in enumerate(position):
            rest = p
            for span in free.get(a, ()):
                rest -= ((p // span.stride) % span.size) * span.stride
            if rest:
                return False
        return True

    def colour(position: tuple[int, ...]) -> str:
        return "var(--accent)" if member(position) else "var(--cell)"

    return (
        "<div class=scroll>"
        + _svg(
            data.physical_axes,
            drawn,
            colour,
            lambda position: "",
            f"one group of {axis.size} devices along {axis.name}",
            scale=0.6,
        )
        + (f"</div><p class=note>one of {data.n_devices // axis.size} groups of {axis.size}</p>")
    )


def _svg(axes, drawn: Window, colour, tip, label: str, scale: float = 1.0) -> str:
    columns = drawn.sizes[0]
    rows = drawn.sizes[1] if len(axes) > 1 else 1
    planes = list(_planes(drawn.sizes[2:]))
    plane_width, plane_height = columns * _CELL + 10, rows * _CELL + (24 if planes[0] else 10)
    per_line = max(1, min(len(planes), 720 // plane_width))
    lines = -(-len(planes) // per_line)
    margin = 34
    # Small machines are narrower than the names of their axes.
    width = max(margin + per_line * plane_width, 200)
    height = 18 + max(lines * plane_height, 90 if len(axes) > 1 else 0)
    parts = [
        f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {width} {height}" '
        f'width="{width * scale:.0f}" height="{height * scale:.0f}">',
        f'<text x="{margin}" y="11" class="t">{_axis_label(axes[0])} →</text>',
    ]
    if len(axes) > 1:
        parts.append(
            f'<text class="t" transform="translate(12 {max(20 + rows * _CELL, 106)}) rotate(-90)">'
            f"{_axis_label(axes[1])} →</text>"
        )
    for n, outer in enumerate(planes):
        x0, y0 = margin + (n % per_line) * plane_width, 18 + (n // per_line) * plane_height
        if outer:
            name = ", ".join(
                f"{a.name}={i * a.size // n}" for a, i, n in zip(axes[2:], outer, drawn.sizes[2:])
            )
            parts.append(f'<text x="{x0}" y="{y0 + 10}" class="t">{escape(name)}</text>')
            y0 += 14
        for y in range(rows):
            for x in range(columns):
                index = ((x, y) if len(axes) > 1 else (x,)) + outer
                position = tuple(i * a.size // n for i, a, n in zip(index, axes, drawn.sizes))
                text = tip(position)
                title = f"<title>{escape(text)}</title>" if text else ""
                parts.append(
                    f'<rect x="{x0 + x * _CELL}" y="{y0 + y * _CELL}" width="{_CELL - 1}" '
                    f'height="{_CELL - 1}" rx="2" fill="{colour(position)}">{title}</rect>'
                )
    parts.append("</svg>")
    return "".join(parts)


def _planes(sizes: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    # The outermost axis varies slowest, so that the planes of a slice stay together.
    for outer in itertools.product(*(range(n) for n in reversed(sizes))):
        yield tuple(reversed(outer))


def _mixed_colour(axes: list[MeshAxis], position: tuple[int, ...]) -> str:
    """Hue by the first mesh axis, lightness by the second."""
    hue, light = 215.0, 55.0
    if axes:
        hue = 360 * coordinate(axes[0], position) / axes[0].size
    if len(axes) > 1:
        light = 32 + 44 * coordinate(axes[1], position) / (axes[1].size - 1)
    return f"hsl({hue:.0f} 55% {light:.0f}%)"


def _tip(data: ReportData, position: tuple[int, ...]) -> str:
    place = ", ".join(f"{a.name}={p}" for a, p in zip(data.physical_axes, position))
    mesh = ", ".join(f"{m.name} {coordinate(m, position)}" for m in data.mesh_axes)
    return f"{place}: {mesh}"


def _legend(axes: list[MeshAxis]) -> str:
    if not axes:
        return "<p class=note>The mesh has one device along every axis.</p>"
    said = f"Colour: position along <code>{escape(axes[0].name)}</code>"
    if len(axes) > 1:
        said += f"; lightness: along <code>{escape(axes[1].name)}</code>"
    return f"<p class=note>{said}. Point at a device for its coordinates.</p>"


def _elision(data: ReportData, drawn: Window) -> str:
    shown = " × ".join(f"{n} of {a.size} {a.name}" for n, a in zip(drawn.sizes, data.physical_axes))
    return f"Drawn: {escape(shown)}; the rest repeats the pattern."


def _axis_label(axis: PhysicalAxis) -> str:
    wrap = ", wraps" if axis.wraps else ""
    return escape(f"{axis.name} ({axis.size}, {axis.network}{wrap})")


def _networks(axis: MeshAxis, physical: tuple[PhysicalAxis, ...]) -> str:
    if not physical:
        return ""
    used = [physical[s.physical_axis] for s in axis.spans if s.size > 1]
    return ", ".join(f"{p.network} {p.name}" for p in used)
