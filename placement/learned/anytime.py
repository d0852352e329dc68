"""What a planner had found after so many evaluations and so many seconds."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any

from placement.learned.instance import Instance, Outcome, Outer

if TYPE_CHECKING:
    from cost_model.layout import MeshLayout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """Improvements of one run, in order."""

    evaluations: tuple[int, ...]
    """Plans judged when each improvement was found."""
    seconds: tuple[float, ...]
    """Processor seconds then."""
    step_time_s: tuple[float, ...]
    """Best simulated step time of a plan that fits, falling."""
    total_evaluations: int
    """Plans judged in all."""
    total_seconds: float

    def at_evaluations(self, n: int) -> float:
        """Best step time after n evaluations, inf where nothing fitting was found yet."""
        found = [t for e, t in zip(self.evaluations, self.step_time_s) if e <= n]
        return found[-1] if found else math.inf

    def at_seconds(self, seconds: float) -> float:
        """Best step time after so many processor seconds."""
        found = [t for s, t in zip(self.seconds, self.step_time_s) if s <= seconds]
        return found[-1] if found else math.inf

    def evaluations_to(self, step_time_s: float) -> float:
        """Evaluations until a plan at most this slow was found, inf if never."""
        pairs = zip(self.evaluations, self.step_time_s)
        return next((float(e) for e, t in pairs if t <= step_time_s), math.inf)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, text: str) -> Curve:
        data = json.loads(text)
        return cls(
            evaluations=tuple(data["evaluations"]),
            seconds=tuple(data["seconds"]),
            step_time_s=tuple(data["step_time_s"]),
            total_evaluations=int(data["total_evaluations"]),
            total_seconds=float(data["total_seconds"]),
        )


class Recorder:
    """Judges plans of an instance within a budget and keeps what was best when."""

    def __init__(self, instance: Instance, *, max_evaluations: int, time_limit_s: float) -> None:
        self.instance = instance
        self.max_evaluations, self.time_limit_s = max_evaluations, time_limit_s
        self.evaluations = 0
        self.best: Outcome | None = None
        self.best_outer: Outer | None = None
        self.last_fits = False
        self._meshes: dict[int, tuple[float, MeshLayout]] = {}
        self._points: list[tuple[int, float, float]] = []

    def over(self) -> bool:
        """Whether the budget is spent."""
        spent = self.evaluations >= self.max_evaluations
        return spent or self.instance.seconds() >= self.time_limit_s

    def offer(self, outer: Outer, outcome: Outcome) -> Outcome:
        """Count a judged plan."""
        self.evaluations += outcome.evaluations
        self.last_fits = outcome.fits
        if outcome.fits:
            known = self._meshes.get(id(outer.layout), (math.inf, outer.layout))[0]
            self._meshes[id(outer.layout)] = (min(known, outcome.step_time_s), outer.layout)
        if outcome.fits and (self.best is None or outcome.step_time_s < self.best.step_time_s):
            self.best, self.best_outer = outcome, outer
            self._points.append((self.evaluations, self.instance.seconds(), outcome.step_time_s))
        return outcome

    def best_meshes(self, count: int) -> list[MeshLayout]:
        """The layouts of the fastest plans that fit."""
        ranked = sorted(self._meshes.values(), key=lambda x: x[0])
        return [layout for _, layout in ranked[:count]]

    def curve(self) -> Curve:
        return curve_of(self._points, self.evaluations, self.instance.seconds())


def curve_of(
    points: list[tuple[int, float, float]], total_evaluations: int, total_seconds: float
) -> Curve:
    """From (evaluations, seconds, best step time) at improvements (or oftener)."""
    kept: list[tuple[int, float, float]] = []
    for e, s, t in points:
        if math.isfinite(t) and (not kept or t < kept[-1][2]):
            kept.append((int(e), float(s), float(t)))
    evaluations, seconds, times = zip(*kept) if kept else ((), (), ())
    return Curve(
        evaluations=evaluations,
        seconds=seconds,
        step_time_s=times,
        total_evaluations=int(total_evaluations),
        total_seconds=float(total_seconds),
    )
