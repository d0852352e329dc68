"""Parameters of J models, by part: whole numbers before any device or second.

attention  D (H h + K (h + v)) + H v D           (latent: the two low-rank products); twice in the
           decoder's layers of an encoder-decoder
MLP        (n_up + 1) D F
experts    E (n_up + 1) D Fm + shared + D E router
embedding  V D, and V D for the head where it is not tied
"""

from __future__ import annotations

import dataclasses

import numpy as np

from cost_model.jobs.columns import Jobs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameters:
    """[J] elements; of one layer unless said otherwise."""

    attention: np.ndarray
    dense_mlp: np.ndarray
    routed_experts: np.ndarray
    """all experts of one expert layer."""
    shared_experts: np.ndarray
    """the always-visited experts and the router of one expert layer."""
    embedding: np.ndarray
    """the input table."""
    head: np.ndarray
    """the output projection, also where it shares the table."""

    def dense_layer_mean(self, jobs: Jobs) -> np.ndarray:
        """[J] parameters of a mean layer that are not routed experts."""
        moe = jobs.n_moe_layers / jobs.n_layers
        return self.attention + (1 - moe) * self.dense_mlp + moe * self.shared_experts

    def expert_layer_mean(self, jobs: Jobs) -> np.ndarray:
        """[J] routed-expert parameters of a mean layer."""
        return jobs.n_moe_layers / jobs.n_layers * self.routed_experts

    def total(self, jobs: Jobs) -> np.ndarray:
        """[J] parameters of the model."""
        layer = self.dense_layer_mean(jobs) + self.expert_layer_mean(jobs)
        return jobs.n_layers * layer + self.embedding + self.head * (1 - jobs.tied)

    def active(self, jobs: Jobs) -> np.ndarray:
        """[J] parameters that one token meets in matmuls: no lookup, its experts only."""
        routed = self.expert_layer_mean(jobs) * jobs.experts_per_token
        routed = routed / np.maximum(jobs.n_experts, 1.0)
        return jobs.n_layers * (self.dense_layer_mean(jobs) + routed) + self.head


def parameters(jobs: Jobs) -> Parameters:
    """The parameter counts of J models."""
    d, heads, keys = jobs.d_model, jobs.n_heads, jobs.n_kv_heads
    plain = d * (heads * jobs.head_dim + keys * (jobs.head_dim + jobs.v_head_dim))
    nope = jobs.head_dim - jobs.qk_rope_dim
    low_rank = (
        jobs.q_lora_rank * (d + heads * jobs.head_dim)
        + d * (jobs.kv_lora_rank + jobs.qk_rope_dim)
        + jobs.kv_lora_rank * heads * (nope + jobs.v_head_dim)
    )
    attention = np.where(jobs.kv_lora_rank > 0, low_rank, plain) + heads * jobs.v_head_dim * d
    attention = attention * (1 + cross_share(jobs))
    expert = (jobs.n_up + 1) * d * jobs.moe_d_ff
    return Parameters(
        attention=attention,
        dense_mlp=(jobs.n_up + 1) * d * jobs.d_ff,
        routed_experts=jobs.n_experts * expert,
        shared_experts=jobs.shared_experts * expert + d * jobs.n_experts,
        embedding=jobs.vocab * d,
        head=jobs.vocab * d,
    )


def cross_share(jobs: Jobs) -> np.ndarray:
    """[J] share of the layers that attend to an encoder's output too."""
    return np.where(jobs.encoder_share > 0, 1 - jobs.encoder_share, 0.0)


def entry_layer(jobs: Jobs, params: Parameters) -> np.ndarray:
    """[J] parameters of a layer before the first stage: dense, with attention to itself alone."""
    return params.attention / (1 + cross_share(jobs)) + params.dense_mlp


def staged_layers(jobs: Jobs) -> np.ndarray:
    """[J] layers that stages divide."""
    return jobs.n_layers - jobs.entry_layers


def microbatches(jobs: Jobs) -> np.ndarray:
    """[J] forward passes of one rank in a step."""
    return np.maximum(jobs.global_batch / (jobs.dp * jobs.micro_batch), 1.0)


def expert_ways(jobs: Jobs) -> np.ndarray:
    """[J] ways that the routed experts of a layer are split, apart from weight sharding."""
    return np.maximum(jobs.ep, 1.0) * np.where(jobs.expert_tp > 0, jobs.tp, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageLayers:
    """[J] layers of the first stage, of each middle one, and of the last."""

    first: np.ndarray
    middle: np.ndarray
    last: np.ndarray


def layers_per_stage(jobs: Jobs) -> StageLayers:
    """How layers are divided over stages.

    Where the layers and the embedding and the head divide evenly over the stages, the first and
    the last stage have one layer fewer (Llama 3, arXiv:2407.21783, section 3.3.2; BLOOM). A job may
    state the layers of its first and last stage instead; the rest is divided over the others.
    """
    pp, layers = np.maximum(jobs.pp, 1.0), staged_layers(jobs)
    even = np.mod(layers, pp) == 0
    balanced = np.mod(layers + 2, pp) == 0
    middle = np.where(
        even, layers / pp, np.where(balanced, (layers + 2) / pp, np.ceil(layers / pp))
    )
    last = np.where(even, layers / pp, np.where(balanced, middle - 1, layers - (pp - 1) * middle))
    # an uneven remainder is taken from the last stages one by one
    last = np.maximum(last, np.floor(layers / pp) * ~balanced)
    first = np.where(balanced & ~even, np.maximum(middle - 1, 1.0), middle)
    stated = jobs.first_layers >= 0
    rest = layers - jobs.first_layers - jobs.last_layers
    inner = np.where(pp > 2, rest / np.maximum(pp - 2, 1.0), jobs.first_layers)
    return StageLayers(
        first=np.where(stated, jobs.first_layers, first),
        middle=np.where(stated, inner, middle),
        last=np.where(stated, jobs.last_layers, np.maximum(last, 0.0)),
    )
