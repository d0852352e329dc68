"""Seconds of one optimizer step of J whole jobs.

    T = [ m max_stage + fill + m p2p + first gather + gradient reduction + optimizer ]
          * (1 + spread log2(nodes) + flush)
    fill = (pp - 1) ( (mean_stage - k W) / vpp + 2 sends )

m microbatches in stages. A stage is its layers, forward, backward and recomputed, and the head on the
last (`pieces`). The bubble is (pp - 1)/vpp microbatches for 1F1B and the interleaved schedule
(arXiv:2104.04473, section 2.2), the same for GPipe (arXiv:1811.06965). Zero-bubble schedules
compute the gradients of weights, W of a mean stage, apart from the backward pass and fill the bubble
with them: k is 2 for H1 and 3 for H2 (arXiv:2401.10241, table 1: (p - 1)(F + B - W) and
(p - 1)(F + B - 2W), where their B does not hold W). In lock step a stage's F and B cannot move for W,
so that k is 1 (`placement.pipeline.schedule`). There the loss and the layers before the first stage
are spread over all stages, the latter in whole microbatches, whose activations travel beside the
others'; in an encoder-decoder the encoder's output is sent along.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from cost_model.jobs import counts
from cost_model.jobs.columns import SCHEDULES, Jobs
from cost_model.jobs.constants import Constants
from cost_model.jobs.memory import memory
from cost_model.jobs.pieces import pieces

_DEVICES_PER_NODE = 8.0
_FILLED = np.array(
    [{"zero_bubble_h1": 2.0, "zero_bubble_h2": 3.0}.get(name, 0.0) for name in SCHEDULES]
)
"""k: weight gradients that fill the bubble of a stage, by schedule."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds [J] of a step and of what it is made of; the parts sum to the step."""

    step_time_s: np.ndarray
    compute_s: np.ndarray
    """matmuls, attention and pointwise work of one device, without recomputation."""
    remat_s: np.ndarray
    tensor_s: np.ndarray
    """exposed tensor-parallel collectives."""
    context_s: np.ndarray
    expert_s: np.ndarray
    """expert all-to-all."""
    sharded_s: np.ndarray
    """exposed gathers and reductions of sharded weights."""
    gradient_s: np.ndarray
    """exposed gradient reduction of replicated weights."""
    bubble_s: np.ndarray
    """pipeline fill and drain, stage imbalance, sends between stages."""
    optimizer_s: np.ndarray
    host_s: np.ndarray
    """the device waiting for the host."""
    offload_s: np.ndarray
    """exposed traffic of activations to and from host memory."""
    spread_s: np.ndarray
    """waiting for the slowest node, and for an allocator that runs short."""


def step_time(jobs: Jobs, constants: Constants) -> StepTime:
    """Predict J steps."""

    def c(name: str) -> np.ndarray:
        return constants.of(name, jobs.device.family)

    piece = pieces(jobs, constants)
    m = counts.microbatches(jobs)
    stages = counts.layers_per_stage(jobs)
    head_time = piece.head.total + piece.head_sharded
    # in lock step every stage computes its share of the loss, and layers before the first in turn
    lockstep = jobs.lockstep > 0
    turns = np.ceil(m / jobs.pp) / m * jobs.entry_layers * piece.layer
    spread = np.where(lockstep, head_time / jobs.pp + turns, 0.0)
    stage_middle = stages.middle * piece.layer + spread
    stage_last = stages.last * piece.layer + np.where(lockstep, spread, head_time)
    longest = np.where(jobs.pp > 1, np.maximum(stage_middle, stage_last), stage_last)
    layers = counts.staged_layers(jobs)
    mean = (layers * piece.layer + head_time) / jobs.pp
    head_weights = np.where(lockstep, 0.0, 0.5 * piece.head.backward)
    weights = (layers * piece.weight_gradient + head_weights) / jobs.pp
    hop = piece.hop * np.where(lockstep, 1.0 + (jobs.encoder_share > 0), 1.0)
    p2p = 2.0 * hop * jobs.vpp * piece.hop_exposed * (1.0 + (jobs.entry_layers > 0))
    filled = _FILLED[jobs.schedule.astype(int)]
    filled = np.where(lockstep, np.minimum(filled, 1.0), filled)
    bubble = np.maximum(mean - filled * weights, 0.0)
    fill = (jobs.pp - 1) * (bubble / jobs.vpp + 2.0 * hop)
    pipeline = m * (longest + p2p) + fill

    total = pipeline + piece.first_gather + piece.gradient + piece.optimizer
    nodes = np.maximum(jobs.n_devices / _DEVICES_PER_NODE, 1.0)
    waiting = total * c("spread") * np.log2(nodes)
    waiting = waiting + total * c("slice_spread") * np.log2(jobs.n_slices)
    # a caching allocator that runs short frees and allocates within the step
    held = memory(jobs, constants)
    short = np.clip((held.peak_bytes / held.capacity_bytes - 0.85) / 0.15, 0.0, 1.0)
    flush = total * short * jobs.caching_allocator * c("flush_share")
    waiting = waiting + flush
    used = m * jobs.n_layers / jobs.pp
    work = piece.work
    compute = used * (work.forward + work.backward) + m * piece.head.total / jobs.pp
    parts = {
        "compute_s": compute,
        "remat_s": used * work.redone,
        "tensor_s": used * piece.tensor,
        "context_s": used * piece.context,
        "expert_s": used * piece.expert,
        "sharded_s": used * piece.sharded + m * piece.head_sharded / jobs.pp + piece.first_gather,
        "gradient_s": piece.gradient,
        "optimizer_s": piece.optimizer,
        "host_s": used * piece.host,
        "offload_s": used * piece.offload,
        "spread_s": waiting,
    }
    bubble = total + waiting - sum(parts.values())
    return StepTime(step_time_s=total + waiting, bubble_s=bubble, **parts)
