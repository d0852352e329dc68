"""Planning a model with its rematerialisation and microbatches."""

import dataclasses

import jax
import pytest

import placement
from graphs.errors import MeshwrightError
from graphs.zoo import load_model_config
from placement.whole import build

SMALL = dataclasses.replace(load_model_config("gpt2_small"), n_layers=2, seq_len=256)


def plan(**kwargs):
    defaults = dict(cluster="v5e:2x2", global_batch=32, time_limit_s=60.0)
    return placement.optimize_model(SMALL, **(defaults | kwargs))


def test_with_ample_memory_contractions_are_not_recomputed():
    # of Llama-3-8B's width; a small model's layers are recomputed on chip for less than it costs
    # to read what was kept (SMALL compiled by XLA:TPU: full 10.0 ms, dots 9.8, none 11.0)
    wide = dataclasses.replace(
        load_model_config("llama3_8b"), n_layers=2, seq_len=2048, vocab_size=32000
    )

    def plan(**kwargs):
        return placement.optimize_model(
            wide, cluster="v5p:2x2x2", global_batch=32, time_limit_s=60.0, **kwargs
        )

    found = plan()
    assert found.program["remat"] in ("dots", "none") and found.program["microbatches"] == 1
    full = plan(remat="full")
    assert found.estimate.step_time_s < full.estimate.step_time_s
    assert found.estimate.peak_memory_bytes > full.estimate.peak_memory_bytes


def test_the_plan_binds_to_the_step_it_describes():
    found = plan(remat="dots", microbatches=2)
    step, args, donated = build(found, SMALL)
    assert donated == found.donate_argnums
    is_spec = lambda x: isinstance(x, jax.sharding.PartitionSpec)  # noqa: E731
    assert jax.tree.structure(found.bind(step, *args).in_specs, is_leaf=is_spec)


def test_bad_options_get_one_sentence():
    for change, sentence in (
        ({"remat": "half"}, "unknown remat"),
        ({"microbatches": 5}, "do not divide"),
        ({"global_batch_tokens": 1 << 20}, "either"),
        ({"global_batch": None, "global_batch_tokens": 100}, "holds no sequence"),
    ):
        with pytest.raises(MeshwrightError, match=sentence):
            plan(**change)
