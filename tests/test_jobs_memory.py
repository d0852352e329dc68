"""Activations of a stage against the order of its passes, counted one by one."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_jobs import CONSTANTS, job_of

from cost_model.jobs.memory import kept_bytes, memory


def layers_alive(pp: int, chunks: int, m: int, rank: int, held: list[int]) -> int:
    """The most layers times microbatches that a stage keeps under (interleaved) 1F1B.

    held: layers of each of the stage's chunks. Megatron-LM's passes: pp microbatches of a chunk in
    turn, some forward passes first, then one forward and one backward in turn.
    """
    order = [at // pp % chunks for at in range(m * chunks)]
    ahead = 2 * (pp - rank - 1) + (chunks - 1) * pp if chunks > 1 else pp - rank - 1
    alive = most = sum(held[chunk] for chunk in order[:ahead])
    for at in range(m * chunks):
        alive += held[order[ahead + at]] if ahead + at < m * chunks else 0
        most = max(most, alive)
        alive -= held[chunks - 1 - order[at]]
    return most


@settings(max_examples=40, deadline=None)
@given(
    pp=st.integers(3, 8),
    chunks=st.integers(1, 4),
    depth=st.integers(1, 3),
    rounds=st.integers(2, 4),
    balanced=st.booleans(),
)
def test_the_fullest_stage_keeps_what_its_order_of_passes_keeps(
    pp, chunks, depth, rounds, balanced
):
    """Stages of equal chunks, and those whose first and last chunk lack a layer beside the embedding
    and the head (Llama 3)."""
    m = rounds * pp
    layers = pp * chunks * depth - 2 * balanced
    job = job_of(
        dp="1", n_devices=str(pp), pp=str(pp), virtual_pp=str(chunks), global_batch_seqs=str(m)
    ).replace(n_layers=float(layers), vocab=8.0)  # fmt: skip
    kept, _ = kept_bytes(job)
    found = float(memory(job, CONSTANTS).activations_bytes[0] / kept[0])
    each = [depth] * chunks
    of_rank = {
        0: layers_alive(pp, chunks, m, 0, [depth - balanced, *each[1:]]),
        1: layers_alive(pp, chunks, m, 1, each),
    }
    if balanced:  # whichever of the two holds more in all
        assert any(found == pytest.approx(most, abs=1) for most in of_rank.values())
        assert found >= of_rank[1] - 1
    else:
        assert found == pytest.approx(of_rank[0])


def test_the_second_stage_is_the_fullest_where_the_first_holds_the_embedding_instead_of_a_layer():
    job = job_of(
        model_name="Llama 3 405B", n_devices="128", tp="4", sp="True", pp="16", virtual_pp="8",
        dp="2", global_batch_seqs="768",
    )  # fmt: skip
    kept, _ = kept_bytes(job)
    held = memory(job, CONSTANTS)
    most = layers_alive(16, 8, 384, 1, [1] * 8)
    assert most == 141 > layers_alive(16, 8, 384, 0, [0] + [1] * 7)
    assert float(held.activations_bytes[0] / kept[0]) == pytest.approx(most)
    plain = dataclasses.replace(job, vpp=job.vpp * 0 + 1)
    assert float(memory(plain, CONSTANTS).activations_bytes[0]) < held.activations_bytes[0]
