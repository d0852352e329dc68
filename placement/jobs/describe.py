"""A job from a model's name, a cluster and a batch: what a search needs, before any degrees."""

from __future__ import annotations

import re

from cost_model.cluster import parse_cluster
from cost_model.jobs import shape as shapes
from cost_model.jobs.columns import DTYPE_BYTES, Jobs
from cost_model.jobs.runs import jobs_of, read_row
from graphs.errors import MeshwrightError

_DEVICE = {"v4_megacore": "v4"}


def describe_job(
    model: str, *, cluster: str, global_batch: int, seq_len: int, dtype: str = "bf16"
) -> Jobs:
    """One job in a JAX program, fully sharded over the cluster until a search changes that.

    Args:
      model: a model of the zoo (`cost_model.jobs.shape.zoo`), by its name there or one like it.
      cluster: in the cluster notation, ``v5p:8x8x16`` or ``h100:8x64``.
      global_batch: sequences of one optimizer step.
      seq_len: tokens of a sequence.
      dtype: of the matmuls: bf16, fp16, fp8, int8, mxfp8 or nvfp4.

    Raises:
      MeshwrightError: an unknown model, cluster or type, or a batch that no degrees divide.
    """
    known = shapes.find(model)
    if known is None:
        near = ", ".join(sorted(shapes.zoo()))
        raise MeshwrightError(f"model {model!r} is not in the zoo; use one of {near}")
    if dtype not in DTYPE_BYTES:
        raise MeshwrightError(f"dtype {dtype!r} is not known; use one of {', '.join(DTYPE_BYTES)}")
    if global_batch < 1 or seq_len < 1:
        raise MeshwrightError(
            f"a batch of {global_batch} sequences of {seq_len} tokens is empty; give at least 1"
        )
    found = parse_cluster(cluster)
    devices = found.n_devices
    dp = devices
    while dp > 1 and global_batch % dp:
        dp = next(d for d in range(dp - 1, 0, -1) if devices % d == 0)
    rest = devices // dp
    heads = known.n_heads
    tp = max(t for t in range(1, rest + 1) if rest % t == 0 and heads % t == 0)
    if seq_len % (rest // tp):
        raise MeshwrightError(
            f"a batch of {global_batch} sequences cannot be spread over {devices} devices; "
            "give a larger batch or fewer devices"
        )
    chips = devices / found.device.jax_devices_per_chip
    run, faults = read_row(
        1,
        {
            "id": model,
            "source": "maxtext",
            "model_name": known.name,
            "hardware": _DEVICE.get(found.device.name, found.device.name),
            "seq_len": str(seq_len),
            "global_batch_seqs": str(global_batch),
            "micro_batch_seqs": f"{global_batch / dp:g}",
            "n_devices": f"{chips:g}",
            "dp": str(dp),
            "tp": str(tp),
            "cp": str(rest // tp),
            "pp": "1",
            "zero_stage": "3",
            "recompute": "full",
            "dtype": dtype,
            "notes": f"{found.n_slices} slices",
        },
    )
    if faults or run.record is None:
        problem = str(faults[0]) if faults else re.sub(r"\s+", " ", run.reason)
        raise MeshwrightError(f"job {model!r} on {cluster!r} cannot be described: {problem}")
    return jobs_of([run])
