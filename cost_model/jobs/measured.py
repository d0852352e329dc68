"""The measured step time of a run, from what its source prints.

    seconds = step time                                   where printed
            = G s / (n tokens/s/device)                   tokens per second and device
            = flops per step / (n TFLOP/s/device)         by the source's own count of flops

G sequences of s tokens on n devices (chips on tpu7x). The count of flops of a step of T = G s
tokens, N matmul parameters, L layers of width H h: 6 N T + 12 L (H h) s T with full attention, half
the second term where the source counts causal attention; 4/3 of it where the source counts the
forward pass of full recomputation as well (arXiv:2104.04473, section 5.1).
"""

from __future__ import annotations

import typing


def step_time_s(
    basis: str, given: typing.Mapping[str, float | None], job: typing.Mapping[str, float]
) -> float | None:
    """Seconds, or None where the source gives no figure; tokens/s wins over TFLOP/s."""
    if given["step_time_s"]:
        return given["step_time_s"]
    devices = given["n_devices"]
    if not devices:
        return None
    tokens = job["global_batch"] * job["seq_len"]
    if given["tokens_per_s_per_device"]:
        return tokens / (devices * given["tokens_per_s_per_device"])
    if given["tflops_per_device"]:
        return counted_flops(basis, job) / (devices * given["tflops_per_device"] * 1e12)
    return None


def counted_flops(basis: str, job: typing.Mapping[str, float]) -> float:
    """Flops of a step as sources of this basis count them."""
    tokens = job["global_batch"] * job["seq_len"]
    layers, width = job["n_layers"], job["d_model"]
    attention = width * (
        job["n_heads"] * job["head_dim"]
        + job["n_kv_heads"] * (job["head_dim"] + job["v_head_dim"])
        + job["n_heads"] * job["v_head_dim"]
    )
    moe = job["n_moe_layers"] / layers
    mlp = (job["n_up"] + 1) * width * job["d_ff"] * (1 - moe)
    active_experts = job["experts_per_token"] + job["shared_experts"]
    experts = moe * (job["n_up"] + 1) * width * job["moe_d_ff"] * active_experts
    parameters = layers * (attention + mlp + experts) + job["vocab"] * width
    quadratic = 12.0 * layers * job["n_heads"] * job["head_dim"] * job["seq_len"] * tokens
    share = 0.5 if "causal" in basis else 1.0
    if job["window"]:
        seen = min(job["window"] / job["seq_len"], 1.0)
        share *= job["window_share"] * seen + 1 - job["window_share"]
    model = 6.0 * parameters * tokens + share * quadratic
    if basis == "hardware_incl_full_recompute":
        return model * 4.0 / 3.0
    return model
