"""Pipelined train steps executed on eight host devices beside the unsharded step."""

import pytest
from host_devices import run_on_eight_devices
from test_pipeline import SPARSE

RUN = """
import dataclasses, json, sys
import placement
from graphs.zoo import load_model_config
from placement.pipeline.check import compare
from placement.pipeline.plan import pipelined_plan

found = {}
for name, mesh, options, changes in json.loads(sys.argv[1]):
    tiny = dataclasses.replace(
        load_model_config("tiny"), **{"n_layers": 4, "vocab_size": 64, **changes})
    plan = pipelined_plan(
        tiny, cluster="cpu:8", mesh_shape=mesh, global_batch=8, seq_len=16,
        compute_dtype="float32", **options)
    found[name] = dataclasses.asdict(compare(plan, tiny))
print(json.dumps(found))
"""

ENCODER = {"encoder_layers": 2, "position": "relative", "activation": "gelu"}
EXECUTED = {
    # group: (name, mesh, options, changes to the model)
    "one segment": [
        ("two stages", {"stage": 2, "data": 2, "model": 2}, {"microbatches": 2}, {}),
        (
            "ring",
            {"stage": 2, "context": 2, "model": 2},
            {"microbatches": 2, "attention": "ring"},
            {},
        ),
        ("four stages", {"stage": 4, "data": 2}, {"microbatches": 4, "schedule": "gpipe"}, {}),
        (
            "interleaved",
            {"stage": 2, "data": 4},
            {"microbatches": 2, "schedule": "interleaved", "chunks": 2},
            {},
        ),
    ],
    "one stage": [
        ("tensor alone", {"stage": 1, "model": 8}, {"microbatches": 2}, {}),
    ],
    "zero bubble": [
        (name, mesh, {"microbatches": m, "schedule": "zero_bubble_h1"}, {})
        for name, mesh, m in (
            ("two stages", {"stage": 2, "data": 4}, 2),
            ("four stages", {"stage": 4, "data": 2}, 4),
            ("fewer microbatches than stages", {"stage": 4, "data": 2}, 2),
            ("tensor", {"stage": 2, "data": 2, "model": 2}, 4),
        )
    ],
    "leading layers": [
        (
            "microbatches in no rounds of the stages",
            {"stage": 4, "data": 2},
            {"microbatches": 2, "schedule": "zero_bubble_h1"},
            {"n_layers": 5, "first_dense_layers": 1, **SPARSE},
        ),
        (
            "interleaved",
            {"stage": 2, "data": 4},
            {"microbatches": 2, "schedule": "interleaved", "chunks": 2},
            {"n_layers": 5, "first_dense_layers": 1, **SPARSE},
        ),
    ],
    "encoder-decoder": [
        ("tensor", {"stage": 2, "data": 2, "model": 2}, {"microbatches": 4}, ENCODER),
        (
            "zero bubble",
            {"stage": 4, "data": 2},
            {"microbatches": 4, "schedule": "zero_bubble_h1"},
            ENCODER,
        ),
    ],
}


@pytest.mark.parametrize("group", EXECUTED)
def test_pipelined_steps_equal_the_unsharded_step(group):
    found = run_on_eight_devices(RUN, EXECUTED[group], timeout_s=1200)
    assert set(found) == {name for name, *_ in EXECUTED[group]}
    for name, differences in found.items():
        assert len(set(differences["losses"])) == 3, "the steps changed the parameters"
        permutes = differences["collectives"].get("collective-permute", 0)
        assert permutes >= 2 or group == "one stage", "forward and backward"
        assert differences["loss_difference"] < 1e-5, name
        allowed = max(1e-4, 10 * differences["rounding_difference"])
        assert differences["parameter_difference"] < allowed, (name, differences)
