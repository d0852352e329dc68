"""Real train steps: forward, backward, gradient accumulation, clipping and the update.

`train_step(params, opt_state, batch) -> (params, opt_state, {"loss": ...})` is pure; params is a
nested dict of float32 arrays, batch a dict of int32 tokens. Nothing is allocated until it runs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from graphs.errors import MeshwrightError
from graphs.zoo.config import ModelConfig
from graphs.zoo.decoder import Decoder
from graphs.zoo.loss import cross_entropy
from graphs.zoo.options import RunOptions
from graphs.zoo.ring import CONTEXT, ring_mesh, sequence_order
from graphs.zoo.update_rules import learning_rates, update_rule

TrainStep = Callable[[Any, Any, Any], tuple[Any, Any, dict[str, jax.Array]]]


def build_train_step(
    config: ModelConfig,
    *,
    global_batch: int,
    seq_len: int | None = None,
    optimizer: str = "adamw",
    microbatches: int = 1,
    remat: str = "full",
    remat_layers: float = 1.0,
    scan: bool = True,
    attention: str = "auto",
    query_chunk: int = 512,
    mesh_shape: Mapping[str, int] | None = None,
    zigzag: bool = True,
    moe: str = "capacity",
    loss_chunks: int = 1,
    optimizer_state_dtype: str = "float32",
    compute_dtype: str = "bfloat16",
    learning_rate: float = 3e-4,
    warmup_steps: int = 0,
    decay_steps: int | None = None,
    clip_norm: float | None = 1.0,
) -> tuple[TrainStep, tuple[Any, Any, Any], tuple[int, ...]]:
    """(train_step, abstract arguments, donate_argnums) of one model.

    global_batch: sequences of one step, a multiple of microbatches. seq_len: tokens of each, the
    model's default where None. mesh_shape: axis -> size of the whole mesh, which attention=ring needs;
    its specs name these axes. Options: see RunOptions; warmup_steps and decay_steps: see
    update_rules.learning_rates. Raises MeshwrightError.
    """
    seq_len = config.seq_len if seq_len is None else seq_len
    options = RunOptions(
        remat=remat,
        remat_layers=remat_layers,
        scan=scan,
        attention=attention,
        query_chunk=query_chunk,
        mesh_shape=tuple((mesh_shape or {}).items()),
        zigzag=zigzag,
        moe=moe,
        loss_chunks=loss_chunks,
        compute_dtype=compute_dtype,
    )
    options = check_ring(config, options, seq_len)
    _check_batch(config, global_batch, seq_len, microbatches, loss_chunks)
    rule = update_rule(
        optimizer,
        learning_rate=learning_rates(
            learning_rate, warmup_steps=warmup_steps, decay_steps=decay_steps
        ),
        clip_norm=clip_norm,
        state_dtype=optimizer_state_dtype,
    )
    graphdef, params = abstract_model(config, options)

    def loss_fn(params, batch):
        return loss_of(nnx.merge(graphdef, params), batch)

    def train_step(params, opt_state, batch):
        if microbatches == 1:
            loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        else:
            loss, grads = _accumulate(loss_fn, params, batch, microbatches)
        updates, opt_state = rule.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return params, opt_state, {"loss": loss}

    opt_state = jax.eval_shape(rule.init, params)
    batch = abstract_batch(config, global_batch, seq_len)
    step = train_step if options.attention != "ring" else _under_mesh(train_step, options)
    return step, (params, opt_state, batch), (0, 1)


def _under_mesh(train_step: TrainStep, options: RunOptions) -> TrainStep:
    """The step traced under its ring's mesh, so that its operations are the same under none."""

    @functools.wraps(train_step)
    def wrapped(params, opt_state, batch):
        with jax.sharding.use_abstract_mesh(ring_mesh(options.mesh_shape)):
            return train_step(params, opt_state, batch)

    return wrapped


def init_state(
    config: ModelConfig,
    key: jax.Array,
    *,
    optimizer: str = "adamw",
    scan: bool = True,
    optimizer_state_dtype: str = "float32",
    learning_rate: float = 3e-4,
    warmup_steps: int = 0,
    decay_steps: int | None = None,
    clip_norm: float | None = 1.0,
) -> tuple[Any, Any]:
    """Real (params, opt_state) for the step built with the same options."""
    rule = update_rule(
        optimizer,
        learning_rate=learning_rates(
            learning_rate, warmup_steps=warmup_steps, decay_steps=decay_steps
        ),
        clip_norm=clip_norm,
        state_dtype=optimizer_state_dtype,
    )

    def init(key):
        model = _model(config, RunOptions(scan=scan), nnx.Rngs(params=key))
        params = nnx.to_pure_dict(nnx.state(model))
        return params, rule.init(params)

    return jax.jit(init)(key)


def parameter_count(config: ModelConfig) -> int:
    """Parameters of the model as built."""
    _, params = abstract_model(config, RunOptions())
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def active_parameter_count(config: ModelConfig) -> int:
    """Parameters that one token meets: of each layer's E experts only k."""
    _, params = abstract_model(config, RunOptions())
    total = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        keys = [entry.key for entry in path]
        of_experts = "experts" in keys and "shared" not in keys and "router" not in keys[-1]
        share = config.experts_per_token / config.n_experts if of_experts else 1.0
        total += math.prod(leaf.shape) * share
    return round(total)


@functools.lru_cache(maxsize=64)
def abstract_model(config: ModelConfig, options: RunOptions) -> tuple[Any, dict[str, Any]]:
    """(flax graph definition, nested dict of ShapeDtypeStruct): the model without its numbers."""
    model = nnx.eval_shape(lambda: _model(config, options, nnx.Rngs()))
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def abstract_batch(config: ModelConfig, global_batch: int, seq_len: int) -> dict[str, Any]:
    """The tokens of one step, int32 [B, S] each."""
    names = ("inputs", "targets")
    if config.encoder_layers:
        names = ("encoder_inputs", "inputs", "targets")
    return {name: jax.ShapeDtypeStruct((global_batch, seq_len), jnp.int32) for name in names}


def loss_of(model, batch: dict[str, jax.Array]) -> jax.Array:
    """Mean next-token loss of a model on a batch, float32 scalar."""
    batch = in_order(model.options, batch)
    if model.config.encoder_layers:
        hidden = model.hidden(batch["encoder_inputs"], batch["inputs"])
    else:
        hidden = model.hidden(batch["inputs"])
    return cross_entropy(
        hidden,
        model.head_weight(),
        batch["targets"],
        softcap=model.config.logit_softcap,
        chunks=model.options.loss_chunks,
    )


def in_order(options: RunOptions, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The tokens in the order that the options' sequences have; what is said of all is the same."""
    order = options.order(batch["inputs"].shape[1])
    return batch if order is None else {name: x[:, order] for name, x in batch.items()}


def check_ring(config: ModelConfig, options: RunOptions, seq_len: int) -> RunOptions:
    """The options, contiguous where the order of tokens decides which of them experts drop.

    Raises MeshwrightError where the model or the sequence has no ring.
    """
    if options.attention != "ring":
        return options
    if config.encoder_layers:
        raise MeshwrightError(
            f"model {config.name!r} is an encoder-decoder, which attention=ring does not know; "
            "use another attention"
        )
    if config.n_experts and options.moe == "capacity":
        options = dataclasses.replace(options, zigzag=False)
    sequence_order(seq_len, dict(options.mesh_shape)[CONTEXT], zigzag=options.zigzag)
    return options


def _model(config: ModelConfig, options: RunOptions, rngs: nnx.Rngs) -> nnx.Module:
    if config.encoder_layers:
        from graphs.zoo.encoder_decoder import EncoderDecoder

        return EncoderDecoder(config, options, rngs=rngs)
    return Decoder(config, options, rngs=rngs)


def _accumulate(loss_fn, params, batch, microbatches: int):
    """Mean loss and gradients over microbatches, one at a time."""

    def split(x):
        # neighbours go to different microbatches, so that a sharded batch stays where it is
        return jnp.moveaxis(x.reshape(-1, microbatches, *x.shape[1:]), 1, 0)

    def body(carry, microbatch):
        loss, grads = jax.value_and_grad(loss_fn)(params, microbatch)
        return jax.tree.map(jnp.add, carry, (loss, grads)), None

    zero = (jnp.float32(0.0), jax.tree.map(jnp.zeros_like, params))
    total, _ = jax.lax.scan(body, zero, jax.tree.map(split, batch))
    return jax.tree.map(lambda x: x / microbatches, total)


def _check_batch(
    config: ModelConfig, global_batch: int, seq_len: int, microbatches: int, loss_chunks: int
) -> None:
    if global_batch < 1 or seq_len < 1 or microbatches < 1:
        raise MeshwrightError(
            f"global_batch={global_batch}, seq_len={seq_len} and microbatches={microbatches} "
            "must be at least 1"
        )
    if global_batch % microbatches:
        raise MeshwrightError(
            f"global_batch={global_batch} is not a multiple of microbatches={microbatches}; "
            "choose a divisor"
        )
    if seq_len % loss_chunks:
        raise MeshwrightError(
            f"seq_len={seq_len} is not a multiple of loss_chunks={loss_chunks}; choose a divisor"
        )
    if config.position == "learned" and seq_len > config.seq_len:
        raise MeshwrightError(
            f"seq_len={seq_len} exceeds the {config.seq_len} learned positions of "
            f"{config.name!r}; choose a shorter sequence or raise the model's seq_len"
        )
