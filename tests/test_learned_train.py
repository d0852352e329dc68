"""Training: losses by their definitions, resumption with the same curve, two processes as one."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphs.errors import MeshwrightError
from placement.learned import losses
from placement.learned.candidates import N_AXIS, N_CANDIDATE, N_PAIR
from placement.learned.dataset import Arrays, Example, batches
from placement.learned.features import N_CLASS, N_GLOBAL, N_NODE, N_REGION, N_RELATIONS
from placement.learned.policy import load_policy
from placement.learned.run import WEIGHTS, run
from placement.learned.scoring import report
from placement.learned.train import TrainConfig, fingerprint
from placement.training.metrics import read_metrics


def example(seed: int) -> Example:
    """A made problem whose step time follows one feature of its candidates, unlike its estimate."""
    rng = np.random.default_rng(seed)
    n, c, r, u, k = 12 + seed % 5, 6, 2, 5, 10

    def random(*shape):
        return rng.uniform(-1, 1, shape).astype(np.float32)

    def mean(*shape):
        x = (rng.random(shape) < 0.3).astype(np.float32)
        return x / np.maximum(x.sum(-1, keepdims=True), 1)

    rows = random(k, N_CANDIDATE)
    arrays = Arrays(
        nodes=random(n, N_NODE),
        relations=mean(N_RELATIONS, n, n),
        classes=random(c, N_CLASS),
        classes_of_nodes=mean(n, c),
        nodes_of_classes=mean(c, n),
        regions=random(r, N_REGION),
        region_of_nodes=mean(n, r),
        nodes_of_regions=mean(r, n),
        overall=random(N_GLOBAL),
        axes=random(u, N_AXIS),
        pairs=random(c, u, N_PAIR),
        of=rng.integers(-1, u, (k, 3)),
        rows=rows,
        estimate=0.3 * random(k),
        pressure=0.3 * random(k),
    )
    return Example(
        name=f"made_{seed}",
        arrays=arrays,
        ideal_s=2.0,
        index=np.arange(k),
        step_time_s=2.0 * np.exp(1.0 + rows[:, 3].astype(np.float64)),
        memory_ratio=np.exp(2.0 * rows[:, 7].astype(np.float64)),
        fits=rows[:, 7] <= 0.2,
    )


SMALL = TrainConfig(
    members=1, hidden=16, batch_size=8, imitation_epochs=3, reinforcement_epochs=2, learning_rate=3e-3,
    draws=4, checkpoint_every=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def problems() -> tuple[list[Example], list[Example]]:
    return [example(s) for s in range(24)], [example(s) for s in range(100, 108)]


@given(st.lists(st.floats(-5, 0), min_size=2, max_size=9))
@settings(max_examples=25)
def test_an_advantage_is_over_the_mean_of_the_others(found):
    reward = np.array(found, np.float32)
    gains = np.asarray(losses.leave_one_out(jnp.asarray(reward)))
    for i in range(len(reward)):
        assert gains[i] == pytest.approx(reward[i] - np.delete(reward, i).mean(), abs=1e-4)


def test_rewards_are_measured_from_the_best_that_fits():
    time = jnp.log(jnp.array([2.0, 1.0, 4.0, 0.1]))
    reward = losses.rewards(time, jnp.array([1.0, 1.0, 1.0, 0.0]), jnp.ones(4))
    assert np.allclose(reward, [-np.log(2), 0.0, -np.log(4), 0.0], atol=1e-6)


def test_the_target_leaves_out_what_does_not_fit():
    time = jnp.array([0.0, 0.01, 1.0, -5.0, 0.0])
    fits, recorded = jnp.array([1.0, 1, 1, 0, 1]), jnp.array([1.0, 1, 1, 1, 0])
    target = np.asarray(losses.imitation_target(time, fits, recorded, 0.05))
    assert target.sum() == pytest.approx(1.0)
    assert target[3] == target[4] == 0.0
    assert target[0] > target[1] > 10 * target[2]


def test_the_listwise_loss_is_least_at_the_target():
    target = jnp.array([0.7, 0.3, 0.0])
    least = losses.listwise_loss(jnp.log(target + 1e-9), target, jnp.ones(3))
    for other in ([0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 2.0, 1.0]):
        assert losses.listwise_loss(jnp.array(other), target, jnp.ones(3)) > least


def test_the_policy_loss_has_no_pull_beyond_the_clip():
    """PPO: a good draw that is already 1.2 times as likely is pushed no further, a bad one that is
    still likelier is."""
    import jax

    pull = jax.grad(lambda x, gain: losses.clipped_policy_loss(x, 0.0, gain, 0.2))
    assert pull(0.5, 1.0) == 0.0
    assert pull(0.1, 1.0) < 0.0
    assert pull(0.5, -1.0) > 0.0
    assert pull(-0.5, -1.0) == 0.0


def test_what_is_not_recorded_is_never_drawn():
    log_p = losses.log_policy(jnp.array([5.0, 0.0, 1.0]), jnp.array([0.0, 1.0, 1.0]))
    assert jnp.exp(log_p)[0] == 0.0 and float(jnp.exp(log_p).sum()) == pytest.approx(1.0)


def test_training_learns_what_decides(problems, tmp_path):
    config = dataclasses.replace(
        SMALL, imitation_epochs=60, learning_rate=1e-2, average=0.9, checkpoint_every=20
    )
    rows = run(config, *problems, tmp_path)
    assert rows[-1]["regret"] < 0.5 * rows[0]["regret"]
    assert rows[-1]["value_error"] < 0.5 * rows[0]["value_error"]
    assert rows[-1]["stage"] == "reinforcement" and (tmp_path / "curves.png").stat().st_size > 0
    weights = load_policy(str(tmp_path / WEIGHTS))
    assert json.loads(weights.facts["config"])["imitation_epochs"] == 60


@pytest.fixture(scope="module")
def whole(problems, tmp_path_factory):
    """(folder, rows) of an uninterrupted run in this process."""
    out = tmp_path_factory.mktemp("whole")
    return out, run(SMALL, *problems, out)


def test_a_killed_run_goes_on_with_the_same_curve(problems, whole, tmp_path):
    folder, rows = whole

    class Killed(Exception):
        pass

    def kill(row):
        if row["step"] == 4:  # within the second stage, after the checkpoint of epoch 3
            raise Killed

    with pytest.raises(Killed):
        run(SMALL, *problems, tmp_path / "cut", on_row=kill)
    resumed = run(SMALL, *problems, tmp_path / "cut")
    for a, b in zip(rows, resumed, strict=True):
        assert a["step"] == b["step"]
        assert all(a[k] == pytest.approx(b[k], rel=1e-5, abs=1e-6) for k in ("loss", "regret"))
    one, two = (load_policy(str(n / WEIGHTS)).members for n in (folder, tmp_path / "cut"))
    for a, b in zip(one, two, strict=True):
        assert all(np.allclose(a[k], b[k], rtol=1e-5, atol=1e-6) for k in a)


def test_members_differ_and_are_averaged(problems, tmp_path):
    config = dataclasses.replace(SMALL, members=2, imitation_epochs=1, reinforcement_epochs=0)
    rows = run(config, *problems, tmp_path)
    assert [r["member"] for r in rows] == [0, 1] and rows[0]["loss"] != rows[1]["loss"]
    policy = load_policy(str(tmp_path / WEIGHTS))
    assert len(policy.members) == 2
    arrays = problems[1][0].arrays
    alone = [
        dataclasses.replace(policy, members=(m,)).heads(arrays).preference for m in policy.members
    ]
    assert np.allclose(policy.heads(arrays).preference, np.mean(alone, axis=0))


def test_checkpoints_of_another_run_are_refused(problems, tmp_path):
    config = dataclasses.replace(SMALL, imitation_epochs=1, reinforcement_epochs=0)
    run(config, *problems, tmp_path)
    with pytest.raises(MeshwrightError, match="another configuration"):
        run(dataclasses.replace(config, seed=1), *problems, tmp_path)


def test_a_fingerprint_changes_with_the_outcomes(problems):
    training = problems[0]
    changed = [dataclasses.replace(training[0], fits=~training[0].fits), *training[1:]]
    assert fingerprint(SMALL, training) != fingerprint(SMALL, changed)


def test_a_report_of_perfect_heads_is_perfect(problems):
    from placement.learned.forward import Heads

    pairs = [
        (b, Heads(preference=-b.log_time, fit=20 * b.fits - 10, value=b.log_time))
        for b in batches(problems[1], 8)
    ]
    said = report(pairs)
    assert said["regret"] == said["missed"] == said["value_error"] == 0.0
    assert said["infeasible_recall"] == 1.0


@pytest.mark.parametrize("wrong", [{"hidden": 0}, {"train_share": 0.0}, {"draws": 0}])
def test_settings_out_of_range_are_one_sentence(wrong):
    with pytest.raises(MeshwrightError):
        TrainConfig(**wrong)


_CHILD = """
import sys
sys.path.insert(0, {tests!r})
import jax
jax.distributed.initialize(coordinator_address="localhost:{port}", num_processes=2,
                           process_id=int(sys.argv[1]))
from test_learned_train import SMALL, example
from placement.learned.run import run
run(SMALL, [example(s) for s in range(24)], [example(s) for s in range(100, 108)], {out!r})
"""


def test_two_processes_train_as_one(whole, tmp_path):
    """Data parallel: each holds half of every batch; losses and weights are those of one."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    text = _CHILD.format(
        tests=str(pathlib.Path(__file__).parent), port=port, out=str(tmp_path / "two")
    )
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"),
    }
    children = [
        subprocess.Popen(
            [sys.executable, "-c", text, str(n)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for n in range(2)
    ]
    errors = [c.communicate(timeout=300)[1] for c in children]
    assert all(c.returncode == 0 for c in children), "\n".join(errors)[-3000:]
    folders = (whole[0], tmp_path / "two")
    one, two = (read_metrics(n / "member_0" / "metrics.jsonl") for n in folders)
    assert len(two) == SMALL.epochs
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3, abs=1e-4)
    (first,), (second,) = (load_policy(str(n / WEIGHTS)).members for n in folders)
    assert all(np.allclose(first[k], second[k], rtol=1e-2, atol=1e-3) for k in first)
