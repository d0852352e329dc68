"""Which chunk of which microbatch every stage works on at every tick.

One SPMD program runs all stages in lock step. At a tick a stage computes one forward and one
backward chunk; ticks in which no stage has one of them leave it out. With p stages, m microbatches,
v chunks a stage, stage s at tick t works on the k-th item of a fixed order, in rounds of p
microbatches (the interleaved order of arXiv:2104.04473, section 2.2):

    forward   k = t - s              chunk (k mod p v) // p          microbatch p (k // p v) + k mod p
    backward  k = t - t0 - (p-1-s)   chunk v-1 - (k mod p v) // p    microbatch the same

1F1B starts backward at t0 = p v - 1, in the tick in which the last stage has finished its first
microbatch; GPipe (arXiv:1811.06965) when all forwards are done. Either takes (m + (p-1)/v) forward
and backward passes of a stage: the bubble of the literature. In lock step 1F1B keeps up to 2p - 1
stage inputs instead of p, for a sent result waits for the next tick.

Zero bubble H1 (arXiv:2401.10241) divides the backward pass in B, the gradient of the input, and W,
those of the weights, which no other stage waits for. The m - p + 1 ticks in which every stage has a
backward pass do both at once. The p - 1 before them and the p - 1 after them, in which some stages
have none, do B alone. Stage s puts off W of its first s microbatches and of its last p-1-s: p - 1 on
every stage, done in p - 1 ticks at the end in which no stage waits. A step of F, B and W seconds takes

    1F1B  (m + p - 1) (F + B + W)        zero bubble H1  (m + p - 1) (F + B) + m W

and the least that lock step allows: F and B depend on the neighbour's of the tick before. Where stages
run each at its own pace W also fills F's and B's waits, and the paper's bubble is (p - 1)(F + B - W).
Kept inputs are those of 1F1B; what W needs of p - 1 microbatches is kept beside them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import numpy as np

from graphs.errors import MeshwrightError

ZERO_BUBBLE = "zero_bubble_h1"
SCHEDULES = ("1f1b", "gpipe", "interleaved", ZERO_BUBBLE)
"""What a pipelined step can run; interleaved is 1F1B with several chunks a stage. The names are those
of `cost_model.jobs.columns.SCHEDULES`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """Consecutive ticks that compute the same parts."""

    start: int
    stop: int
    forward: bool
    backward: bool
    """The gradient of a chunk's input."""
    weights: bool
    """The gradients of its weights: with backward of the same microbatch, else of one put off."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """p stages, m microbatches, v chunks of layers on each stage."""

    kind: str
    """one of SCHEDULES."""
    stages: int
    microbatches: int
    chunks: int = 1

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        if self.kind not in SCHEDULES:
            raise MeshwrightError(
                f"schedule {self.kind!r} cannot be run; use one of {', '.join(SCHEDULES)}"
            )
        if min(self.stages, self.microbatches, self.chunks) < 1:
            raise MeshwrightError(
                f"a pipeline of {self.stages} stages, {self.chunks} chunks and "
                f"{self.microbatches} microbatches is empty; give at least 1 of each"
            )
        if self.chunks > 1 and self.microbatches % self.stages:
            raise MeshwrightError(
                f"{self.microbatches} microbatches are not a multiple of {self.stages} stages, "
                "which chunks are interleaved in rounds of; change one, or use 1 chunk"
            )

        if self.kind == ZERO_BUBBLE and self.chunks > 1:
            raise MeshwrightError(
                f"{ZERO_BUBBLE} is a schedule of 1 chunk a stage, not {self.chunks}; use "
                "interleaved for chunks"
            )

    @property
    def items(self) -> int:
        """Forward (and backward) chunks that a stage computes in a step."""
        return self.microbatches * self.chunks

    @property
    def first_backward(self) -> int:
        """Tick t0 of the last stage's first backward chunk."""
        if self.kind == "gpipe":
            return self.items + self.stages - 1
        return self.stages * self.chunks - 1

    @property
    def put_off(self) -> int:
        """Microbatches of which a stage computes the gradients of weights at the end."""
        return min(self.stages - 1, self.microbatches) if self.kind == ZERO_BUBBLE else 0

    @property
    def backward_stop(self) -> int:
        """Tick after the first stage's last backward chunk."""
        return self.first_backward + self.items + self.stages - 1

    @property
    def ticks(self) -> int:
        return self.backward_stop + self.put_off

    def forward(self, tick: Any, stage: Any) -> tuple[Any, Any, Any]:
        """(valid, chunk, microbatch) at a tick, of ints or arrays."""
        k = tick - stage
        chunk, microbatch = self._item(k)
        return (k >= 0) & (k < self.items), chunk, microbatch

    def backward(self, tick: Any, stage: Any) -> tuple[Any, Any, Any]:
        """(valid, chunk, microbatch) at a tick, of ints or arrays."""
        k = tick - self.first_backward - (self.stages - 1 - stage)
        chunk, microbatch = self._item(k)
        return (k >= 0) & (k < self.items), self.chunks - 1 - chunk, microbatch

    def weights_put_off(self, tick: Any, stage: Any) -> tuple[Any, Any]:
        """(valid, place) at a tick that does B alone: where what W needs is kept, of `put_off`."""
        k = tick - self.first_backward - (self.stages - 1 - stage)
        # the ticks between, in which W is done at once, take no place
        at_once = max(self.items - self.stages + 1, 0)
        after = tick >= self.first_backward + self.stages - 1 + at_once
        return (k >= 0) & (k < self.items), k - after * at_once

    def weights_done(self, tick: Any) -> Any:
        """The place whose W every stage does at a tick after the last backward chunk."""
        return tick - self.backward_stop

    def _item(self, k: Any) -> tuple[Any, Any]:
        # the remainder of an invalid k stays within the ranges of chunks and microbatches
        k = k % self.items
        round_ = self.stages * self.chunks
        return (k % round_) // self.stages, (k // round_) * self.stages + k % self.stages

    def phases(self) -> tuple[Phase, ...]:
        """The ticks of a step, in order."""
        forward_stop = self.items + self.stages - 1
        cuts = {0, self.first_backward, forward_stop, self.backward_stop, self.ticks}
        # with zero bubble, both parts of the backward pass while every stage has one
        both = range(self.first_backward, self.backward_stop)
        if self.kind == ZERO_BUBBLE:
            both = range(both.start + self.stages - 1, both.stop - self.stages + 1)
            cuts |= {both.start, both.stop} if both else set()
        return tuple(
            Phase(
                start=a,
                stop=b,
                forward=a < forward_stop,
                backward=self.first_backward <= a < self.backward_stop,
                weights=a in both or a >= self.backward_stop,
            )
            for a, b in itertools.pairwise(sorted(cuts))
        )

    @functools.cached_property
    def slots(self) -> int:
        """Microbatches of which a stage keeps its input at the same time, for each chunk.

        The least n such that microbatches j and j + n never need one place at once.
        """
        stage = np.arange(self.stages)
        tick = np.arange(self.ticks)[:, None]
        begin = np.zeros((self.stages, self.chunks, self.microbatches), int)
        end = np.zeros_like(begin)
        for where, found in ((begin, self.forward(tick, stage)), (end, self.backward(tick, stage))):
            valid, chunk, microbatch = (
                np.broadcast_to(x, (self.ticks, self.stages)) for x in found
            )
            t, s = np.nonzero(valid)
            where[s, chunk[t, s], microbatch[t, s]] = t
        for n in range(1, self.microbatches):
            if (begin[..., n:] > end[..., :-n]).all():
                return n
        return self.microbatches

    @property
    def loss_slots(self) -> int:
        """Microbatches whose loss gradient waits for its backward pass."""
        return self.microbatches if self.kind == "gpipe" else 1

    @property
    def work(self) -> int:
        """Passes of a chunk one after the other in a step: forward, input's and weights' gradients."""
        return sum(
            (phase.stop - phase.start) * (phase.forward + phase.backward + phase.weights)
            for phase in self.phases()
        )

    @property
    def bubble(self) -> float:
        """Share of a step in which a stage has nothing to do, where the three passes take as long."""
        return 1.0 - 3 * self.items / self.work
