"""The simulated step drawn out: what each lane does when, and the bytes alive meanwhile.

The same rules as cost_model.simulate, walked once in Python with a record kept. A loop's body is
recorded for its first turn; the turns after it are one stretch on each lane.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from cost_model.events import COMPUTE, RESHARD
from cost_model.pricing import KINDS
from cost_model.simulate import Simulator

COMPUTE_LANE, NETWORK_LANE = "compute", "network"
_REPEATS = "further turns of a loop"
_BLOCK, _EARLY = 0, 1
_END = 1 << 60
_RESOLUTION = 4000
"""Events shorter than this fraction of the step are joined with their neighbours of a kind."""
_MEMORY_POINTS = 400


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stretch:
    """One lane doing one thing."""

    lane: str
    name: str
    kind: str
    """operator class, collective kind, or "further turns of a loop"."""
    start_s: float
    end_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timeline:
    """A step from 0 to its end."""

    stretches: tuple[Stretch, ...]
    """in order of start."""
    memory: tuple[tuple[float, float], ...]
    """(time_s, live bytes of a device from then on), in order of time."""
    end_s: float


@dataclasses.dataclass(kw_only=True)
class _Loop:
    region: int
    began_s: float


def timeline(simulator: Simulator, assignment: np.ndarray) -> Timeline:
    """The step of one assignment."""
    graph = simulator.tables.grouping.graph
    stretches: list[Stretch] = []
    op_start_s: dict[int, float] = {}
    loops = [_Loop(region=0, began_s=0.0)]
    compute_s = network_s = before_s = 0.0
    following = 1
    for e, event in enumerate([*simulator.tables.events, None]):
        here = _END if event is None else event.op
        while len(loops) > 1 and graph.regions[loops[-1].region].stop <= here:
            loop = loops.pop()
            compute_s = max(compute_s, network_s)
            turns = graph.regions[loop.region].trips - 1.0
            end_s = compute_s + turns * (compute_s - loop.began_s)
            if end_s > compute_s:
                stretches += [
                    _stretch(lane, f"{turns:g} more turns", _REPEATS, compute_s, end_s)
                    for lane in (COMPUTE_LANE, NETWORK_LANE)
                ]
            # A branch that is taken less than once a step shortens what came before it.
            compute_s = network_s = end_s
        while following < len(graph.regions) and graph.regions[following].start <= here < _END:
            region = graph.regions[following]
            if region.stop > here and region.stop > region.start:
                compute_s = network_s = max(compute_s, network_s)
                loops.append(_Loop(region=following, began_s=compute_s))
            following += 1
        if event is None:
            break
        lasts_s, mode, kind = _duration(simulator, e, assignment)
        op_start_s.setdefault(event.op, compute_s)
        if event.kind == COMPUTE:
            before_s = compute_s
            compute_s += lasts_s
            name = graph.ops[event.op].primitive
            stretches.append(_stretch(COMPUTE_LANE, name, event.label, before_s, compute_s))
        elif lasts_s > 0:
            start_s = {
                _BLOCK: max(compute_s, network_s),
                _EARLY: max(network_s, loops[-1].began_s),
            }.get(mode, max(network_s, before_s))
            network_s = start_s + lasts_s
            if mode == _BLOCK:
                compute_s = network_s
            elif mode == _EARLY:
                compute_s = max(compute_s, network_s)
            stretches.append(_stretch(NETWORK_LANE, event.label, kind, start_s, network_s))
    end_s = max(compute_s, network_s)
    return Timeline(
        stretches=tuple(_joined(stretches, end_s / _RESOLUTION)),
        memory=tuple(_memory(simulator, assignment, op_start_s, end_s)),
        end_s=end_s,
    )


def _stretch(lane: str, name: str, kind: str, start_s: float, end_s: float) -> Stretch:
    return Stretch(lane=lane, name=name, kind=kind, start_s=start_s, end_s=end_s)


def _duration(simulator: Simulator, e: int, assignment: np.ndarray) -> tuple[float, int, str]:
    """(seconds, how it meets computation, collective kind) of an event under the assignment."""
    event = simulator.tables.events[e]
    pick: tuple[int, ...] = (int(assignment[event.node]),)
    if event.kind == RESHARD:
        assert event.rows is not None and event.columns is not None
        pick = (int(event.rows[assignment[event.source]]), int(event.columns[pick[0]]))
    flat = int(simulator.offset[e]) + int(np.ravel_multi_index(pick, event.seconds.shape))
    kind = ""
    if event.n_bytes is not None:
        amounts = event.n_bytes[(slice(None), *pick)]
        kind = KINDS[int(np.argmax(amounts))].replace("_", "-") if amounts.any() else "collective"
    return float(event.seconds[pick]), int(simulator.mode[flat]), kind


def _joined(stretches: list[Stretch], shortest_s: float) -> list[Stretch]:
    joined: list[Stretch] = []
    last_of: dict[str, int] = {}
    for one in sorted(stretches, key=lambda s: s.start_s):
        if one.end_s <= one.start_s:
            continue
        at = last_of.get(one.lane)
        last = joined[at] if at is not None else None
        if (
            at is not None
            and last is not None
            and last.kind == one.kind
            and one.start_s - last.end_s < shortest_s
            and one.end_s - one.start_s < shortest_s
        ):
            name = last.name if last.name == one.name else last.kind
            joined[at] = dataclasses.replace(last, name=name, end_s=max(last.end_s, one.end_s))
            continue
        last_of[one.lane] = len(joined)
        joined.append(one)
    return joined


def _memory(
    simulator: Simulator, assignment: np.ndarray, op_start_s: dict[int, float], end_s: float
) -> list[tuple[float, float]]:
    """Live bytes at the moments when they change, the highest of each short interval kept."""
    profile = simulator.memory_profile(np.asarray(assignment))
    points: dict[int, tuple[float, float]] = {}
    time_s = 0.0
    for position, live in enumerate(profile):
        time_s = max(time_s, op_start_s.get(position, time_s))
        slot = int(_MEMORY_POINTS * min(time_s / end_s, 1.0)) if end_s else 0
        if slot not in points or live > points[slot][1]:
            points[slot] = (time_s, float(live))
    ordered = [points[slot] for slot in sorted(points)]
    return [*ordered, (end_s, float(profile[-1]))] if len(profile) else []
