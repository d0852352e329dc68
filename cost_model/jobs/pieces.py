"""Seconds of the pieces that a step of J whole jobs is made of: one layer, the head, one send.

Tensor-parallel collectives: two all-reduces (or gather / scatter pairs) a layer forward, two backward
(arXiv:1909.08053). Sharded weights are gathered for each microbatch, forward and backward, beside the
computation: max(compute, traffic) + residue min(compute, traffic). Context parallelism (`_context`)
passes keys and values round a ring beside the attention core or gathers them before it; experts
exchange tokens twice forward and twice backward.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from cost_model.jobs import counts, layer, network
from cost_model.jobs.columns import GATHERED, RING, Jobs
from cost_model.jobs.constants import Constants
from cost_model.jobs.memory import kept_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pieces:
    """Seconds [J], of a mean layer and one microbatch unless said otherwise."""

    work: layer.Part
    """matmuls, attention, pointwise."""
    weight_gradient: np.ndarray
    """the part of work.backward that computes gradients of weights, which nothing waits for."""
    tensor: np.ndarray
    """exposed tensor-parallel collectives, forward and backward."""
    context: np.ndarray
    expert: np.ndarray
    sharded: np.ndarray
    """exposed gathers and reductions of sharded weights."""
    host: np.ndarray
    offload: np.ndarray
    head: layer.Part
    """the output projection and the loss."""
    head_sharded: np.ndarray
    """exposed gathers of the head's and the embedding's weights."""
    first_gather: np.ndarray
    """of a step: the first layer's weights, beside nothing."""
    hop: np.ndarray
    """one send between stages; 0 without stages."""
    hop_exposed: np.ndarray
    """share of a send that is not hidden."""
    gradient: np.ndarray
    """of a step: exposed reduction of replicated weights' gradients."""
    optimizer: np.ndarray
    """of a step."""

    @property
    def layer(self) -> np.ndarray:
        """All of a layer."""
        return (
            self.work.total
            + self.tensor
            + self.expert
            + self.context
            + self.sharded
            + self.host
            + self.offload
        )

    @property
    def forward_share(self) -> np.ndarray:
        """Share of a layer's seconds that its forward pass takes, where it is drawn."""
        forward = self.work.forward + 0.4 * self.tensor + 0.5 * self.expert
        backward = self.work.backward + self.work.redone + 0.6 * self.tensor + 0.5 * self.expert
        return forward / (forward + backward)


def pieces(jobs: Jobs, constants: Constants) -> Pieces:
    """The pieces of J jobs."""

    def c(name: str) -> np.ndarray:
        return constants.of(name, jobs.device.family)

    rate = layer.rates(jobs, constants)
    t = layer.tokens(jobs)
    groups = network.groups(jobs, c("fast_share"))
    net = network.Network(
        slow_bytes_per_s=jobs.device.network_bytes_per_s
        * c("slow_share")
        * np.where(jobs.staged_network > 0, c("staged_share"), 1.0),
        latency_s=c("hop_latency_s"),
    )
    params = counts.parameters(jobs)
    moe_share = jobs.n_moe_layers / jobs.n_layers

    # one mean layer, computation
    attention_core = layer.core(jobs, rate, constants)
    matmuls = layer.projections(jobs, rate, constants)
    work = matmuls + layer.pointwise(jobs, rate, constants)
    work = work + attention_core
    if (moe_share < 1).any():
        mlp = layer.dense_mlp(jobs, rate, constants) * (1 - moe_share)
        work, matmuls = work + mlp, matmuls + mlp
    if (moe_share > 0).any():
        mlp = layer.expert_mlp(jobs, rate, constants) * moe_share
        work, matmuls = work + mlp, matmuls + mlp
    head = layer.head(jobs, rate, constants)

    # one mean layer, collectives
    activation = t * jobs.d_model * 2.0
    redone_pairs = np.minimum(jobs.remat_out + jobs.remat_down * (1 - moe_share), 2.0)
    # experts that are not split over the tensor ranks reduce nothing over them
    cross = counts.cross_share(jobs)
    pairs = 2.0 * (2.0 + cross - moe_share * (jobs.expert_tp == 0))
    pairs = pairs + redone_pairs + cross * jobs.remat_out
    hidden = np.where(jobs.tp_overlap > 0, c("tp_exposed"), 1.0)
    tensor = network.reduce_s(activation, groups["tp"], net) * pairs * hidden
    expert = network.exchange_s(activation / jobs.tp, jobs.experts_per_token, groups["ep"], net)
    expert = expert * 4.0 * moe_share
    context = _context(jobs, attention_core, groups["cp"], net, c("overlap_residue"))

    # saved activations that travel to host memory and back beside the computation
    kept, _ = kept_bytes(jobs)
    travel = kept * jobs.offload / jobs.device.host_bytes_per_s
    offload = np.maximum(travel - work.forward, 0.0)
    offload = offload + np.maximum(travel - work.backward - work.redone, 0.0)

    # the host launches every kernel: where it is slower than the device, the device waits
    launched = layer.kernels(jobs) * (3.0 + jobs.remat_pointwise) * c("launch_s")
    launched = np.where(jobs.cuda_graphs > 0, 0.0, launched)
    busy = work.total + tensor + expert
    host = np.maximum(launched - busy, 0.0) + jobs.engine_sync * c("sync_s")

    # sharded weights, gathered for every microbatch
    gathered = (jobs.zero_stage >= 2) & (jobs.fsdp > 1)
    dense_layer = params.dense_layer_mean(jobs) / jobs.tp
    expert_layer = params.expert_layer_mean(jobs) / counts.expert_ways(jobs)
    fetch = network.gather_s(2.0 * (dense_layer + expert_layer), groups["fsdp"], net)
    push = network.gather_s(jobs.grad_bytes * (dense_layer + expert_layer), groups["fsdp"], net)
    refetch = np.where(jobs.zero_stage >= 3, fetch, 0.0)
    forward_busy = work.forward + tensor * 0.4 + expert * 0.5
    backward_busy = work.backward + work.redone + tensor * 0.6 + expert * 0.5
    sharded = _beside(forward_busy, fetch, c("overlap_residue"))
    sharded = sharded + _beside(backward_busy, refetch + push, c("overlap_residue"))
    sharded = np.where(gathered, sharded, 0.0)
    table = params.embedding + params.head * (1 - jobs.tied)
    table_time = network.gather_s((4.0 + jobs.grad_bytes) * table / jobs.tp, groups["fsdp"], net)
    table_exposed = np.where(gathered, _beside(head.total, table_time, c("overlap_residue")), 0.0)
    first_gather = np.where(gathered, fetch, 0.0)

    sent = activation / jobs.tp
    crosses = jobs.device.domain < jobs.n_devices
    hop = sent / np.where(crosses, net.slow_bytes_per_s, groups["tp"].fast_bytes_per_s)
    hop = (hop + net.latency_s) * (jobs.pp > 1)

    # gradients of replicated weights, once a step
    stage_dense = (jobs.n_layers / jobs.pp) * dense_layer + table / jobs.tp / np.minimum(jobs.pp, 2)
    entry = jobs.entry_layers * counts.entry_layer(jobs, params) / jobs.tp
    stage_dense = stage_dense + entry * (1 - 1 / jobs.pp)  # whole on every stage
    stage_expert = (jobs.n_layers / jobs.pp) * expert_layer
    replicated = ~gathered
    back = np.where(jobs.zero_stage >= 1, 2.0, jobs.grad_bytes)
    gradient = network.gather_s(
        (jobs.grad_bytes + back) * stage_dense, groups["dp"], net
    ) + network.gather_s((jobs.grad_bytes + back) * stage_expert, groups["expert_dp"], net)
    between = 2.0 * network.gather_s(
        jobs.grad_bytes * (stage_dense + stage_expert) / jobs.fsdp, groups["replica"], net
    )
    gradient = np.where(replicated, gradient, between)
    gradient = gradient * np.where(jobs.dp_overlap > 0, c("dp_exposed"), 1.0)

    shards = np.where(jobs.zero_stage >= 1, np.where(gathered, jobs.fsdp, jobs.dp * jobs.cp), 1.0)
    states = (stage_dense + stage_expert) / shards
    optimizer = states * 30.0 / rate.hbm + (stage_dense + stage_expert) * 4.0 / rate.hbm * np.where(
        gathered, 1.0 / jobs.fsdp, 1.0
    )

    return Pieces(
        work=work,
        weight_gradient=0.5 * matmuls.backward,
        tensor=tensor,
        context=context,
        expert=expert,
        sharded=sharded,
        host=host,
        offload=offload,
        head=head,
        head_sharded=table_exposed,
        first_gather=first_gather,
        hop=hop,
        hop_exposed=np.where(jobs.tp_overlap > 0, c("tp_exposed"), 1.0),
        gradient=gradient,
        optimizer=optimizer,
    )


def _context(
    jobs: Jobs,
    core: layer.Part,
    group: network.Group,
    net: network.Network,
    residue: np.ndarray,
) -> np.ndarray:
    """[J] seconds that keys and values of other devices add to a layer (`columns.CONTEXT_FORMS`).

    gathered: once forward, again backward, and their gradients scattered, nothing beside. ring
    (`graphs.zoo.ring`): c - 1 hops forward, again where the core is computed again, and backward, where
    gradients in float32 follow for one hop more, and go home with nothing beside.
    """
    n_bytes = layer.key_bytes(jobs)
    gather = network.gather_s(n_bytes, group, net)
    beside = _beside(core.forward, gather, residue) + _beside(core.backward, 2 * gather, residue)
    hop, wide = network.hop_s(n_bytes, group, net), network.hop_s(2 * n_bytes, group, net)
    around = (jobs.cp - 1) * hop
    ring = _beside(core.forward, around, residue) + wide
    ring = ring + jobs.remat_core * _beside(core.forward, around, residue)
    ring = ring + _beside(core.backward, around + jobs.cp * wide, residue)
    return np.select(
        [jobs.context_form == RING, jobs.context_form == GATHERED], [ring, 3 * gather], beside
    )


def _beside(busy: np.ndarray, traffic: np.ndarray, residue: np.ndarray) -> np.ndarray:
    """[J] seconds that `traffic` adds to `busy` when both run side by side."""
    return np.maximum(traffic - busy, 0.0) + residue * np.minimum(busy, traffic)
