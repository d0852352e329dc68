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
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import numpy as np

from graphs.errors import MeshwrightError

SCHEDULES = ("1f1b", "gpipe", "interleaved")
"""What a pipelined step can run; interleaved is 1F1B with several chunks a stage."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """Consecutive ticks that compute the same parts."""

    start: int
    stop: int
    forward: bool
    backward: bool


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
    def ticks(self) -> int:
        return self.first_backward + self.items + self.stages - 1

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

    def _item(self, k: Any) -> tuple[Any, Any]:
        # the remainder of an invalid k stays within the ranges of chunks and microbatches
        k = k % self.items
        round_ = self.stages * self.chunks
        return (k % round_) // self.stages, (k // round_) * self.stages + k % self.stages

    def phases(self) -> tuple[Phase, ...]:
        """The ticks of a step, in order."""
        forward_stop = self.items + self.stages - 1
        cuts = sorted({0, self.first_backward, forward_stop, self.ticks})
        return tuple(
            Phase(start=a, stop=b, forward=a < forward_stop, backward=a >= self.first_backward)
            for a, b in itertools.pairwise(cuts)
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
    def bubble(self) -> float:
        """Share of a step in which a stage has nothing to do."""
        return 1.0 - self.items / (self.items + self.stages - 1)
