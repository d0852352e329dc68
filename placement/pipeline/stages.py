"""A model cut into stages: which layers each holds, and the functions that a stage computes.

Virtual stage q = chunk * stages + stage holds consecutive layers. The stacked weights [L, ...] of
the model's repeated segment become [stages * chunks * slots, ...] in the order stage, chunk, slot,
so that a stage's weights are one shard. Where layers do not divide evenly, slots past a chunk's last
layer hold zeros and pass their input on.

Layers before the repeated ones (leading dense layers of a model with experts) and the encoder of an
encoder-decoder belong to no stage: every stage holds their weights, as those of the embedding, and
they are computed with it (`ticks` says by whom).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from graphs.errors import MeshwrightError
from graphs.zoo.config import ModelConfig, Segment
from graphs.zoo.decoder import Layer as DecoderOnlyLayer
from graphs.zoo.decoder import Period, rotary_of
from graphs.zoo.encoder_decoder import DecoderLayer
from graphs.zoo.loss import cross_entropy
from graphs.zoo.options import RunOptions
from graphs.zoo.train_step import abstract_model
from placement.pipeline.chunk_backward import Layer


def pipelined_segment(config: ModelConfig) -> Segment:
    """The repeated layers that stages divide, the decoder's in an encoder-decoder; raises
    MeshwrightError where the model ends on layers of another kind."""
    segments = config.segments()
    main = max(segments, key=lambda s: s.repeats * len(s.kinds))
    if main is not segments[-1] or main.repeats < 2:
        raise MeshwrightError(
            f"model {config.name!r} ends on layers of another kind than those that repeat, which "
            "stages do not divide; plan it without stages"
        )
    return dataclasses.replace(main, name="decoder") if config.encoder_layers else main


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Which layer of the repeated segment lies in which slot."""

    layers: tuple[tuple[int, ...], ...]
    """[stages][chunks] layers of each; virtual stages in order hold consecutive layers."""

    @classmethod
    def even(cls, n_layers: int, stages: int, chunks: int = 1) -> Layout:
        """As even as can be; the last virtual stages, which have the head, hold the fewer."""
        if n_layers < stages * chunks:
            raise MeshwrightError(
                f"{n_layers} repeated layers do not fill {stages} stages of {chunks} chunks; "
                "use fewer"
            )
        each, more = divmod(n_layers, stages * chunks)
        counts = [each + (q < more) for q in range(stages * chunks)]
        return cls(
            layers=tuple(
                tuple(counts[c * stages + s] for c in range(chunks)) for s in range(stages)
            )
        )

    @property
    def stages(self) -> int:
        return len(self.layers)

    @property
    def chunks(self) -> int:
        return len(self.layers[0])

    @property
    def slots(self) -> int:
        """Layers of the longest chunk."""
        return max(max(row) for row in self.layers)

    @property
    def n_layers(self) -> int:
        return sum(sum(row) for row in self.layers)

    @functools.cached_property
    def index(self) -> np.ndarray:
        """[stages * chunks * slots] layer in each slot, -1 for none."""
        found = np.full((self.stages, self.chunks, self.slots), -1)
        first = 0
        for c in range(self.chunks):
            for s in range(self.stages):
                n = self.layers[s][c]
                found[s, c, :n] = np.arange(first, first + n)
                first += n
        return found.reshape(-1)

    def mask(self) -> np.ndarray:
        """[stages, chunks, slots] whether a slot holds a layer."""
        return (self.index >= 0).reshape(self.stages, self.chunks, self.slots)

    def arrange(self, leaf: Any) -> Any:
        """[L, ...] in model order -> [stages * chunks * slots, ...]."""
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct((len(self.index), *leaf.shape[1:]), leaf.dtype)
        if np.array_equal(self.index, np.arange(len(self.index))):
            return leaf
        taken = jnp.take(leaf, np.maximum(self.index, 0), axis=0)
        held = (self.index >= 0).reshape(-1, *(1,) * (leaf.ndim - 1))
        return jnp.where(held, taken, jnp.zeros((), leaf.dtype))

    def restore(self, leaf: Any) -> Any:
        """The inverse of :meth:`arrange`."""
        slots = np.flatnonzero(self.index >= 0)
        order = slots[np.argsort(self.index[slots])]
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct((self.n_layers, *leaf.shape[1:]), leaf.dtype)
        return jnp.take(leaf, order, axis=0)


def map_layers(fn: Callable[[Any], Any], tree: Any, segment: str) -> Any:
    """`fn` on the leaves of a segment's stacked weights (or moments), wherever they are in a tree
    of parameters or optimizer state."""

    def one(path, leaf):
        named = any(
            getattr(entry, "key", getattr(entry, "name", None)) == segment for entry in path
        )
        return fn(leaf) if named and getattr(leaf, "ndim", 0) > 0 else leaf

    return jax.tree_util.tree_map_with_path(one, tree)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageFunctions:
    """What a stage computes. `outer` is the parameter tree without the repeated layers.

    W is the width of what is sent: D, or 2 D in an encoder-decoder, where the encoder's output goes
    along with the decoder's activations.
    """

    segment: str
    layer: Layer
    """(weights of a slot, shared, x [B, S, W], whether it holds a layer) -> [B, S, W]."""
    plain_layer: Layer
    """The same without rematerialisation inside, which a period of several layers has."""
    embed: Callable[[Any, dict[str, jax.Array]], jax.Array]
    """(outer, tokens [B, S] by name) -> [B, S, W]: embedding, and layers before the repeated ones."""
    loss: Callable[[Any, jax.Array, jax.Array], jax.Array]
    """(outer, hidden [B, S', D], targets [B, S']) -> mean loss of these tokens."""
    d_model: int
    width: int
    """W."""
    takes_turns: bool
    """`embed` runs layers, so that stages take turns at it."""
    shared: tuple[str, ...] = ()
    """Names in outer of what every repeated layer reads."""

    def layers(
        self, weights: Any, mask: jax.Array, x: jax.Array, shared: Any
    ) -> tuple[jax.Array, jax.Array]:
        """(weights of a chunk [slots, ...], mask [slots], x [B, S, W]) -> ([B, S, W], what entered
        each layer [slots, B, S, W])."""

        def body(x, at):
            own, valid = at
            return self.layer(own, shared, x, valid), x

        return jax.lax.scan(body, x, (weights, mask))


def stage_functions(config: ModelConfig, options: RunOptions, seq_len: int) -> StageFunctions:
    """The parts of a model's loss, to be put together by stages."""
    main = pipelined_segment(config)
    before = [s.name for s in config.segments()[:-1]]
    graphdef, abstract = abstract_model(config, options)
    absent = {main.name: abstract[main.name]}

    def embed(outer, tokens):
        model = nnx.merge(graphdef, {**outer, **absent})
        if config.encoder_layers:
            x = model.embed(tokens["inputs"])
            return jnp.concatenate([x, model.encode(tokens["encoder_inputs"])], axis=-1)
        x, rotary = model.embed(tokens["inputs"]), model.rotary(tokens["inputs"].shape[1])
        for name in before:
            x = getattr(model, name)(x, rotary)
        return x

    def loss(outer, hidden, targets):
        model = nnx.merge(graphdef, {**outer, **absent})
        return cross_entropy(
            model.final_norm(hidden),
            model.head_weight(),
            targets,
            softcap=config.logit_softcap,
            chunks=options.loss_chunks if hidden.shape[1] % options.loss_chunks == 0 else 1,
        )

    return StageFunctions(
        segment=main.name,
        layer=_layer(config, options, main, seq_len),
        plain_layer=_layer(config, dataclasses.replace(options, remat="none"), main, seq_len),
        embed=embed,
        loss=loss,
        d_model=config.d_model,
        width=config.d_model * (2 if config.encoder_layers else 1),
        takes_turns=bool(before or config.encoder_layers),
        shared=("decoder_positions",) if config.encoder_layers else (),
    )


def _layer(config: ModelConfig, options: RunOptions, main: Segment, seq_len: int) -> Layer:

    def create() -> nnx.Module:
        rngs = nnx.Rngs(params=0)
        if config.encoder_layers:
            return DecoderLayer(config, options, rngs=rngs)
        if len(main.kinds) == 1:
            return DecoderOnlyLayer(config, options, main.kinds[0], rngs=rngs)
        return Period(config, options, main.kinds, rngs=rngs)

    layer_def, _ = nnx.split(nnx.eval_shape(create))

    def one(weights, shared, x, valid):
        layer = nnx.merge(layer_def, weights)
        if not config.encoder_layers:
            return jnp.where(valid, layer(x, rotary_of(config, options, seq_len)), x)
        x, memory = jnp.split(x, 2, axis=-1)
        y = layer(x, memory, shared["decoder_positions"])
        return jnp.concatenate([jnp.where(valid, y, x), memory], axis=-1)

    return one


def uneven(n_layers: int, stages: int, chunks: int, counts: Sequence[int] | None) -> Layout:
    """A layout from the layers of each virtual stage, first to last; even where None."""
    if counts is None:
        return Layout.even(n_layers, stages, chunks)
    if len(counts) != stages * chunks or sum(counts) != n_layers or min(counts) < 0:
        raise MeshwrightError(
            f"layers per stage {list(counts)} do not divide {n_layers} repeated layers over "
            f"{stages} stages of {chunks} chunks; give {stages * chunks} counts of that sum"
        )
    return Layout(
        layers=tuple(tuple(counts[c * stages + s] for c in range(chunks)) for s in range(stages))
    )
