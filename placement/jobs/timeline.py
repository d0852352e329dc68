"""A whole job's step drawn out: every stage's computation, collectives and sends, over time.

Each stage works through its forward and backward chunks in the order of its schedule, a chunk as soon
as the stage is free and what it needs has arrived:

    1F1B, interleaved  warm-up, then one forward and one backward in turn (arXiv:2104.04473)
    GPipe              all forwards, then all backwards
    zero bubble        as 1F1B, the gradients of weights W apart and wherever the stage would wait
                       (arXiv:2401.10241); in lock step as `placement.pipeline.schedule` says

A chunk's seconds are the job model's (`cost_model.jobs.pieces`); what a chunk spends in collectives is
drawn beside it on the stage's network lanes, in the place that it has in the chunk's seconds. The
reduction of gradients and the optimizer follow the stage's last chunk. The closed form of the job
model (`cost_model.jobs.step`) and this simulation are written apart: a test compares them. With zero
bubble H2 stages end one after the other, and the next step's first stage starts meanwhile; the closed
form is a stage's own span.
"""

from __future__ import annotations

import dataclasses
import heapq
import math

import numpy as np

from cost_model.jobs import constants as constants_module
from cost_model.jobs import counts
from cost_model.jobs.columns import SCHEDULES
from cost_model.jobs.constants import Constants
from cost_model.jobs.pieces import Pieces, pieces
from cost_model.timeline import Stretch
from placement.jobs.search import JobPlan

_MOST = 1500
"""Chunks drawn one by one; a longer step is drawn with fewer microbatches, and says so."""
LANES = ("compute", "tensor", "data", "context", "expert", "send")


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobTimeline:
    """A step of a job from 0 to its end."""

    stretches: tuple[Stretch, ...]
    """lane by lane, stage 0 first, each in order of start: `stage N compute`, `stage N tensor` ..."""
    end_s: float
    drawn_microbatches: int
    """all of the step's, or as many as could be drawn."""


def job_timeline(plan: JobPlan, constants: Constants | None = None) -> JobTimeline:
    """Draw a plan's step."""
    job = plan.job
    piece = pieces(job, constants or constants_module.load())
    pp, vpp = int(job.pp[0]), int(job.vpp[0])
    m = int(counts.microbatches(job)[0])
    drawn = max(min(m, _MOST // (2 * pp * vpp) // pp * pp), min(m, pp))
    drawing = _Drawing(plan, piece, drawn)
    done = drawing.run()
    for stage in range(pp):
        drawing.finish(stage, done[stage])
    stretches = sorted(drawing.stretches, key=_place)
    return JobTimeline(
        stretches=tuple(stretches),
        end_s=max((s.end_s for s in stretches), default=0.0),
        drawn_microbatches=drawn,
    )


def order(
    schedule: str, *, pp: int, vpp: int, m: int, stage: int, lockstep: bool = False
) -> list[tuple[str, int, int]]:
    """What a stage does, in order: (F, B or W, chunk, microbatch); W only with zero bubble."""

    def item(k: int, backward: bool) -> tuple[int, int]:
        if vpp == 1:
            return 0, k
        chunk = (k % (pp * vpp)) // pp
        return (vpp - 1 - chunk if backward else chunk), k // (pp * vpp) * pp + k % pp

    total = m * vpp
    forward = [("F", *item(k, False)) for k in range(total)]
    backward = [("B", *item(k, True)) for k in range(total)]
    if schedule == "gpipe":
        return forward + backward
    ahead = pp - stage - 1
    if vpp > 1:
        ahead = 2 * (pp - stage - 1) + (vpp - 1) * pp
    if schedule == "zero_bubble_h2":
        ahead = 2 * (pp - stage - 1)
    ahead = min(ahead, total)
    found = forward[:ahead]
    for k in range(total):
        if ahead + k < total:
            found.append(forward[ahead + k])
        found.append(backward[k])
    if not schedule.startswith("zero"):
        return found
    # later stages put off more weight gradients, which then fill the time that they wait
    held = stage if schedule == "zero_bubble_h1" else 2 * stage
    out: list[tuple[str, int, int]] = []
    if lockstep:  # at once in the ticks in which every stage has a backward pass
        at_once = range(stage, stage + m - pp + 1)
        for step in found:
            out += [step, ("W", 0, step[2])] if step[0] == "B" and step[2] in at_once else [step]
        return out + [("W", 0, j) for j in range(m) if j not in at_once]
    done = 0
    for step in found:
        out.append(step)
        if step[0] == "B" and step[2] - done >= held:
            out.append(("W", 0, done))
            done += 1
    return out + [("W", 0, j) for j in range(done, m)]


class _Drawing:
    """The stages at work."""

    def __init__(self, plan: JobPlan, piece: Pieces, m: int) -> None:
        job = plan.job
        self.piece, self.m = piece, m
        self.pp, self.vpp = int(job.pp[0]), int(job.vpp[0])
        self.context = "collective-permute" if plan.context == "ring" else "all-gather"
        self.schedule = SCHEDULES[int(job.schedule[0])]
        stages = counts.layers_per_stage(job)
        layers = np.full(self.pp, float(stages.middle[0]))
        layers[0] = float(stages.first[0])
        layers[-1] = float(stages.last[0])
        if self.pp == 1:
            layers[:] = float(job.n_layers[0])
        self.layers = layers / self.vpp
        self.stretches: list[Stretch] = []
        head = float((piece.head.total + piece.head_sharded)[0])
        lockstep = job.lockstep[0] > 0 and self.pp > 1
        turns = math.ceil(m / self.pp) / m * float(job.entry_layers[0] * piece.layer[0])
        # seconds a microbatch of the head on the last stage, and of what all stages share
        self.head = 0.0 if lockstep else head
        self.spread = (head / self.pp + turns) / self.vpp if lockstep else 0.0
        self.lockstep = lockstep
        self.hop = float(piece.hop[0] * piece.hop_exposed[0])

    def seconds(self, stage: int, kind: str, chunk: int) -> float:
        piece = self.piece
        share = float(piece.forward_share[0])
        whole = self.layers[stage] * float(piece.layer[0])
        apart = self.schedule.startswith("zero")
        weights = self.layers[stage] * float(piece.weight_gradient[0]) if apart else 0.0
        at_end = stage == self.pp - 1 and chunk == self.vpp - 1
        if kind == "W":
            return weights
        found = whole * share if kind == "F" else whole * (1 - share) - weights
        beside = self.spread + (self.head if at_end else 0.0)
        return found + beside * (1 / 3 if kind == "F" else 2 / 3)

    def run(self) -> list[float]:
        """Seconds at which each stage is done; draws all chunks."""
        pp, vpp = self.pp, self.vpp
        schedule, lockstep = self.schedule, self.lockstep
        work = [
            order(schedule, pp=pp, vpp=vpp, m=self.m, stage=s, lockstep=lockstep) for s in range(pp)
        ]
        at, free = [0] * pp, [0.0] * pp
        ready: dict[tuple[str, int, int, int], float] = {}
        waiting: dict[tuple[str, int, int, int], int] = {}
        queue = [(0.0, s) for s in range(pp)]
        while queue:
            _, s = heapq.heappop(queue)
            while at[s] < len(work[s]):
                kind, chunk, j = work[s][at[s]]
                need = self.needs(s, kind, chunk, j)
                if need is not None and need not in ready:
                    waiting[need] = s
                    break
                begin = max(free[s], ready[need] + self.delay(s, need) if need else 0.0)
                end = begin + self.seconds(s, kind, chunk)
                self.draw(s, kind, chunk, j, begin, end)
                ready[kind, s, chunk, j] = end
                free[s] = end
                at[s] += 1
                other = waiting.pop((kind, s, chunk, j), None)
                if other is not None:
                    heapq.heappush(queue, (end, other))
        return free

    def needs(self, s: int, kind: str, chunk: int, j: int) -> tuple[str, int, int, int] | None:
        pp, vpp = self.pp, self.vpp
        if kind == "W":
            return ("B", s, chunk, j)
        if kind == "F":
            if s:
                return ("F", s - 1, chunk, j)
            return ("F", pp - 1, chunk - 1, j) if chunk else None
        if s < pp - 1:
            return ("B", s + 1, chunk, j)
        return ("B", 0, chunk + 1, j) if chunk < vpp - 1 else ("F", s, chunk, j)

    def delay(self, s: int, need: tuple[str, int, int, int]) -> float:
        return self.hop if need[1] != s else 0.0

    def draw(self, s: int, kind: str, chunk: int, j: int, begin: float, end: float) -> None:
        words = {"F": "forward", "B": "backward", "W": "weight gradients"}[kind]
        name = f"{words} of microbatch {j}" + (f", chunk {chunk}" if self.vpp > 1 else "")
        self.stretches.append(_stretch(f"stage {s} compute", name, words, begin, end))
        if kind == "W":
            return
        share = {"F": (0.4, 0.5), "B": (0.6, 0.5)}[kind]
        lane_seconds = (
            ("tensor", float(self.piece.tensor[0]) * share[0], "all-reduce"),
            ("expert", float(self.piece.expert[0]) * share[1], "all-to-all"),
            ("context", float(self.piece.context[0]) * share[0], self.context),
            ("data", float(self.piece.sharded[0]) * share[1], "all-gather"),
        )
        at = end
        for lane, seconds, collective in lane_seconds:
            lasts = min(seconds * self.layers[s], at - begin)
            if lasts > 0:
                self.stretches.append(
                    _stretch(f"stage {s} {lane}", name, collective, at - lasts, at)
                )
                at -= lasts
        sends = self.pp > 1 and self.hop > 0
        last = s == self.pp - 1 and chunk == self.vpp - 1
        first = s == 0 and chunk == 0
        if sends and not (last if kind == "F" else first):
            self.stretches.append(_stretch(f"stage {s} send", name, "send", end, end + self.hop))

    def finish(self, s: int, begin: float) -> None:
        reduced = begin + float(self.piece.gradient[0])
        if reduced > begin:
            self.stretches.append(
                _stretch(f"stage {s} data", "gradients", "reduce-scatter", begin, reduced)
            )
        updated = reduced + float(self.piece.optimizer[0])
        self.stretches.append(
            _stretch(f"stage {s} compute", "optimizer", "optimizer", reduced, updated)
        )


def _place(stretch: Stretch) -> tuple[int, int, float]:
    _, stage, lane = stretch.lane.split()
    return int(stage), LANES.index(lane), stretch.start_s


def _stretch(lane: str, name: str, kind: str, start_s: float, end_s: float) -> Stretch:
    return Stretch(lane=lane, name=name, kind=kind, start_s=start_s, end_s=end_s)
