"""Train the policy: imitation of recorded outcomes, then reinforcement learning on its own draws.

``make_train(config)`` returns ``train(training, validation, ...)``. An epoch goes once over all
problems in an order that only the seed and the epoch decide; the random draws of the second stage
are keyed by them too, so a run that was killed goes on from its checkpoint with the same curve.
Every array has the problems of a batch in front, laid over all devices of all processes; parameters
are on each, so that gradients are averaged by the compiler.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from graphs.errors import MeshwrightError
from placement.learned import forward, losses
from placement.learned.blinding import blinded
from placement.learned.dataset import Arrays, Batch, Example, Masks, batches
from placement.learned.distributed import Spread
from placement.learned.network import PolicyNetwork
from placement.learned.policy import load_policy
from placement.learned.scoring import report

for _kind in (Arrays, Masks, Batch, forward.Heads):
    jax.tree_util.register_dataclass(
        _kind, data_fields=[f.name for f in dataclasses.fields(_kind)], meta_fields=[]
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides the weights besides the recorded outcomes."""

    seed: int = 0
    members: int = 2
    """Networks trained, one after another, whose heads are averaged."""
    hidden: int = 64
    batch_size: int = 8
    """Problems of one update, a multiple of the devices."""
    imitation_epochs: int = 60
    reinforcement_epochs: int = 20
    """0 trains by imitation alone."""
    learning_rate: float = 1e-3
    """Of imitation, falling to a tenth along a cosine."""
    reinforcement_rate: float = 2e-4
    weight_decay: float = 1e-2
    temperature: float = 0.05
    """T of the imitation target, in logs of step time."""
    fit_weight: float = 0.5
    value_weight: float = 1.0
    draws: int = 16
    """G, candidates drawn for a problem in an epoch."""
    passes: int = 2
    """Updates on the same draws."""
    clip: float = 0.2
    entropy_weight: float = 2e-3
    allowed_violation: float = 0.01
    """Share of draws that may exceed the memory."""
    multiplier_rate: float = 1.0
    """Step of the dual ascent, per epoch and unit of violation."""
    average: float = 0.99
    """Decay of the averaged weights, which are what is shipped."""
    start: str = ""
    """Weights that training goes on from, a file or ``learned`` for those that ship; empty: the seed's
    first ones."""
    start_member: int = 0
    """Which network of them."""
    train_share: float = 1.0
    """Share of the training problems used, the first ones."""
    edges: bool = True
    mesh: bool = True
    """False hides them (:mod:`placement.learned.blinding`)."""
    checkpoint_every: int = 5
    """Epochs."""

    def __post_init__(self) -> None:
        for name in ("members", "hidden", "batch_size", "imitation_epochs", "draws", "passes"):
            least = 0 if name == "imitation_epochs" and self.start else 1
            if getattr(self, name) < least:
                raise MeshwrightError(f"{name}={getattr(self, name)}; make it at least {least}")
        if not 0.0 < self.train_share <= 1.0:
            raise MeshwrightError(f"train_share={self.train_share}; give a share above 0, up to 1")

    def member(self, number: int) -> TrainConfig:
        """The configuration of one network."""
        return dataclasses.replace(
            self, seed=self.seed + 1000 * number, members=1, start_member=number
        )

    @property
    def epochs(self) -> int:
        return self.imitation_epochs + self.reinforcement_epochs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """What a run leaves."""

    params: dict[str, np.ndarray]
    """Averaged weights by name."""
    rows: tuple[dict[str, Any], ...]
    """One of each epoch run here."""


Keep = Callable[[int, Any], None]
"""Takes the epoch and the state, to write a checkpoint."""


def make_train(config: TrainConfig):
    """The training function of a configuration."""

    def train(
        training: Sequence[Example],
        validation: Sequence[Example],
        *,
        start: tuple[int, Any] | None = None,
        keep: Keep = lambda epoch, state: None,
        on_row: Callable[[dict[str, Any]], None] = lambda row: None,
    ) -> Trained:
        """Trains from `start` (epochs done, state) or from the seed's first weights."""
        return _Run(config, training, validation).run(start, keep, on_row)

    return train


def first_state(config: TrainConfig) -> dict[str, Any]:
    """Parameters, their average, the optimizer's state and the multiplier, before any epoch."""
    params = PolicyNetwork(config.hidden, seed=config.seed).params()
    if config.start:
        params = jax.tree.map(jnp.asarray, started(config))
    return {
        "params": params,
        "average": params,
        "optimizer": _optimizer(config, 1).init(params),
        "multiplier": jnp.ones(()),
    }


def started(config: TrainConfig) -> dict[str, np.ndarray]:
    """The weights of ``config.start_member`` of ``config.start``. MeshwrightError where there are no
    such networks."""
    members = load_policy(config.start).members
    if config.start_member >= len(members):
        raise MeshwrightError(
            f"members={config.start_member + 1}, but {config.start} holds {len(members)} networks; "
            "train as many"
        )
    found = members[config.start_member]
    if forward.hidden_of(found) != config.hidden:
        raise MeshwrightError(
            f"hidden={config.hidden}, but {config.start} holds networks of width "
            f"{forward.hidden_of(found)}; give that"
        )
    return dict(found)


def _optimizer(config: TrainConfig, updates: int) -> optax.GradientTransformation:
    """updates: of one epoch of imitation."""
    total = updates * config.imitation_epochs
    rate = optax.join_schedules(
        [
            optax.cosine_decay_schedule(config.learning_rate, max(1, total), alpha=0.1),
            optax.constant_schedule(config.reinforcement_rate),
        ],
        [total],
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=config.weight_decay)
    )


def heads(params: Any, batch: Batch) -> forward.Heads:
    """Heads of a batch, [B, K]."""

    def one(arrays: Arrays, masks: Masks):
        states = forward.encode(params, arrays, arrays, jnp, masks)
        found = forward.outer(params, states, arrays, jnp)
        return found.preference, found.fit, found.value

    preference, fit, value = jax.vmap(one)(batch.arrays, batch.masks)
    return forward.Heads(preference=preference, fit=fit, value=value)


class _Run:
    def __init__(self, config, training, validation) -> None:
        self.config = config
        count = max(1, round(config.train_share * len(training)))
        self.spread = Spread.over_all(config.batch_size)
        self.training = batches(self._seen(training[:count]), config.batch_size)
        self.validation = batches(self._seen(validation), config.batch_size)
        self.problems = count
        self.optimizer = _optimizer(config, len(self.training))
        self.imitate = jax.jit(self._imitate)
        self.draw = jax.jit(self._draw)
        self.reinforce = jax.jit(self._reinforce)
        self.heads = jax.jit(heads)

    def _seen(self, examples: Sequence[Example]) -> list[Example]:
        c = self.config
        return [
            dataclasses.replace(e, arrays=blinded(e.arrays, edges=c.edges, mesh=c.mesh))
            for e in examples
        ]

    def run(self, start, keep: Keep, on_row) -> Trained:
        done, state = start or (0, first_state(self.config))
        state = self.spread.everywhere(state)
        rows = []
        for epoch in range(done, self.config.epochs):
            began = time.perf_counter()
            state, said = self._epoch(epoch, state)
            row = {"step": epoch + 1, **said, **self.evaluate(state["average"])}
            row["seconds"] = time.perf_counter() - began
            rows.append(row)
            on_row(row)
            last = epoch + 1 == self.config.epochs
            if (epoch + 1) % self.config.checkpoint_every == 0 or last:
                keep(epoch + 1, state)
        params = {k: np.asarray(v) for k, v in self.spread.here(state["average"]).items()}
        return Trained(params=params, rows=tuple(rows))

    def _epoch(self, epoch: int, state):
        order = np.random.default_rng([self.config.seed, epoch]).permutation(len(self.training))
        said: list[dict[str, Any]] = []
        if epoch < self.config.imitation_epochs:
            for n in order:
                state, facts = self.imitate(state, self.spread.rows(self.training[n]))
                said.append(facts)
            return state, {"stage": "imitation", **_mean(said)}
        key = jax.random.fold_in(jax.random.key(self.config.seed), epoch)
        old = state["params"]
        for n in order:
            batch = self.spread.rows(self.training[n])
            drawn = self.draw(old, batch, jax.random.fold_in(key, int(n)))
            for _ in range(self.config.passes):
                state, facts = self.reinforce(state, batch, drawn)
            said.append(facts)
        mean = _mean(said)
        excess = mean["violations"] - self.config.allowed_violation
        multiplier = max(0.0, float(self.spread.here(state["multiplier"]))
                         + self.config.multiplier_rate * excess)  # fmt: skip
        state = {**state, "multiplier": self.spread.everywhere(jnp.asarray(multiplier))}
        return state, {"stage": "reinforcement", **mean, "multiplier": multiplier}

    def _imitate(self, state, batch: Batch):
        config = self.config
        target = losses.imitation_target(
            batch.log_time, batch.fits, batch.recorded, config.temperature
        )

        def loss(params):
            found = heads(params, batch)
            parts = self._supervised(found, batch)
            each = losses.listwise_loss(found.preference, target, batch.recorded)
            parts["listwise"] = losses.weighted_mean(each, target.sum(-1))
            total = (
                parts["listwise"]
                + config.fit_weight * parts["fit"]
                + config.value_weight * parts["value"]
            )
            return total, {"loss": total, **parts}

        return self._update(state, loss)

    def _supervised(self, found: forward.Heads, batch: Batch) -> dict[str, Any]:
        there = (batch.recorded.sum(-1) > 0).astype(jnp.float32)
        fit = losses.fit_loss(found.fit, batch.fits, batch.recorded)
        value = losses.value_loss(found.value, batch.log_time, batch.fits, batch.recorded)
        return {
            "fit": losses.weighted_mean(fit, there),
            "value": losses.weighted_mean(value, there),
        }

    def _draw(self, params, batch: Batch, key):
        """Groups of candidates that the policy draws, with their log probabilities."""
        log_p = losses.log_policy(heads(params, batch).preference, batch.recorded)
        shape = (self.config.draws, log_p.shape[0])
        picks = jax.random.categorical(key, log_p, axis=-1, shape=shape).T
        return picks, jnp.take_along_axis(log_p, picks, axis=-1)

    def _reinforce(self, state, batch: Batch, drawn):
        config = self.config
        picks, old = drawn
        reward = losses.rewards(batch.log_time, batch.fits, batch.recorded)
        reward = jnp.take_along_axis(reward, picks, axis=-1)
        violated = 1.0 - jnp.take_along_axis(batch.fits, picks, axis=-1)
        possible = ((batch.fits * batch.recorded).sum(-1) > 0).astype(jnp.float32)
        gain = losses.leave_one_out(reward - state["multiplier"] * violated)

        def loss(params):
            found = heads(params, batch)
            log_p = losses.log_policy(found.preference, batch.recorded)
            new = jnp.take_along_axis(log_p, picks, axis=-1)
            policy = losses.clipped_policy_loss(new, old, gain, config.clip).mean(-1)
            parts = self._supervised(found, batch)
            spread = losses.weighted_mean(losses.entropy(log_p, batch.recorded), possible)
            total = (
                losses.weighted_mean(policy, possible)
                - config.entropy_weight * spread
                + config.fit_weight * parts["fit"]
                + config.value_weight * parts["value"]
            )
            return total, {
                "loss": total,
                **parts,
                "entropy": spread,
                "reward": losses.weighted_mean(reward.mean(-1), possible),
                "violations": losses.weighted_mean(violated.mean(-1), possible),
            }

        return self._update(state, loss)

    def _update(self, state, loss):
        (_, facts), gradient = jax.value_and_grad(loss, has_aux=True)(state["params"])
        change, optimizer = self.optimizer.update(gradient, state["optimizer"], state["params"])
        params = optax.apply_updates(state["params"], change)
        keep = self.config.average
        average = jax.tree.map(lambda a, p: keep * a + (1 - keep) * p, state["average"], params)
        return {**state, "params": params, "average": average, "optimizer": optimizer}, facts

    def evaluate(self, params) -> dict[str, float]:
        """Of the averaged weights on the validation problems, computed by every process alike."""
        own = self.spread.here(params)
        return report([(b, self.heads(own, b)) for b in self.validation])


def _mean(said: list[dict[str, Any]]) -> dict[str, float]:
    local = [{k: float(np.asarray(v.addressable_data(0))) for k, v in f.items()} for f in said]
    return {k: float(np.mean([f[k] for f in local])) for k in local[0]}


def fingerprint(config: TrainConfig, training: Sequence[Example]) -> str:
    """What a checkpoint has to agree with: the configuration and the recorded outcomes."""
    import hashlib

    text = hashlib.sha256(json.dumps(dataclasses.asdict(config), sort_keys=True).encode())
    for e in training:
        text.update(e.name.encode() + e.step_time_s.tobytes() + e.fits.tobytes())
    return text.hexdigest()[:16]


def provenance(config: TrainConfig, training: Sequence[Example], rows) -> dict[str, str]:
    """What goes into the file of weights."""
    from placement.learned.dataset import features_version
    from placement.learned.problems import VERSION

    count = max(1, round(config.train_share * len(training)))
    return {
        "config": json.dumps(dataclasses.asdict(config), sort_keys=True),
        "splits": VERSION,
        "features": features_version(),
        "problems": str(count),
        "candidates": str(sum(len(e.index) for e in training[:count])),
        "outcomes": fingerprint(config, training),
        "last": json.dumps(rows[-1] if rows else {}),
    }
