"""How a model's train step is run: what does not change the function it computes."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import numpy as np

from graphs.errors import MeshwrightError
from graphs.zoo.ring import CONTEXT, sequence_order

REMATS = ("none", "dots", "attention", "full")
REMAT_SHARES = (0.25, 0.5, 0.75, 1.0)
ATTENTION_FORMS = ("auto", "naive", "chunked", "ring")
MOE_FORMS = ("capacity", "dropless")

CHUNKED_FROM_SEQ_LEN = 4096


def layers_of_share(share: float) -> int:
    """Consecutive layers of which a share of REMAT_SHARES is a whole number."""
    return Fraction(share).denominator


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Choices of the program, not of the architecture (capacity routing drops tokens)."""

    remat: str = "full"
    """Per layer: none | dots (save matmuls without batch dimensions) | attention (recompute the
    attention core only) | full (save only the layer's input)."""
    remat_layers: float = 1.0
    """Share of the layers that do so, one of REMAT_SHARES: of four (two) consecutive ones the first so
    many. The others save their matmuls, as under dots; below 1 remat is full."""
    scan: bool = True
    """Layers as lax.scan over stacked weights instead of unrolled."""
    attention: str = "auto"
    """naive (softmax of the whole score matrix) | chunked (lax.scan over blocks of queries, each
    rematerialised) | auto (chunked from sequence 4,096) | ring (keys and values go round the mesh
    axis ``context``, which splits the sequence: `graphs.zoo.ring`)."""
    query_chunk: int = 512
    """Queries of a block, chunked attention; the most of one in a ring."""
    mesh_shape: tuple[tuple[str, int], ...] = ()
    """(axis, size) of the whole mesh, which a ring needs."""
    zigzag: bool = True
    """Tokens of a ring's sequences lie in zig-zag order (`graphs.zoo.ring`), so that devices have
    equal work; else contiguous."""
    moe: str = "capacity"
    """capacity (each expert takes a fixed number of tokens of each sequence) | dropless
    (ragged_dot over tokens sorted by expert)."""
    loss_chunks: int = 1
    """The vocabulary projection and the loss are computed over this many blocks of the
    sequence, each rematerialised; divides the sequence."""
    compute_dtype: str = "bfloat16"
    """Type of activations and of weights where they are used."""

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        for field, allowed in (
            ("remat", REMATS),
            ("attention", ATTENTION_FORMS),
            ("moe", MOE_FORMS),
        ):
            if getattr(self, field) not in allowed:
                raise MeshwrightError(
                    f"train step option {field}={getattr(self, field)!r} is unknown; "
                    f"choose one of {', '.join(allowed)}"
                )
        if self.remat_layers not in REMAT_SHARES:
            raise MeshwrightError(
                f"train step option remat_layers={self.remat_layers} is no share that layers are "
                f"divided by; choose one of {', '.join(map(str, REMAT_SHARES))}"
            )
        if self.remat_layers < 1.0 and self.remat != "full":
            raise MeshwrightError(
                f"train step option remat_layers={self.remat_layers} goes with remat=full, not with "
                f"{self.remat}; change one of them"
            )
        if self.attention == "ring" and dict(self.mesh_shape).get(CONTEXT, 1) < 2:
            raise MeshwrightError(
                f"attention=ring goes round a mesh axis {CONTEXT!r} of at least 2 devices, this mesh "
                f"is {dict(self.mesh_shape)}; give mesh_shape with that axis or another attention"
            )
        if self.query_chunk < 1 or self.loss_chunks < 1:
            raise MeshwrightError(
                f"train step options query_chunk={self.query_chunk} and "
                f"loss_chunks={self.loss_chunks} must be at least 1"
            )

    def remat_of(self, layer: int) -> RunOptions:
        """The options of the layer at this place: beside a share of layers others save matmuls."""
        period = layers_of_share(self.remat_layers)
        if layer % period < self.remat_layers * period:
            return self
        return dataclasses.replace(self, remat="dots", remat_layers=1.0)

    def order(self, seq_len: int) -> np.ndarray | None:
        """int32 [S]: the position in the sequence of each slot of the program; None where slots are
        in the sequence's order."""
        if self.attention != "ring" or not self.zigzag:
            return None
        return sequence_order(seq_len, dict(self.mesh_shape)[CONTEXT], zigzag=True)

    def chunked(self, seq_len: int) -> bool:
        """Whether attention over this sequence runs in blocks of queries."""
        if self.attention == "auto":
            wanted = seq_len >= CHUNKED_FROM_SEQ_LEN
        else:
            wanted = self.attention == "chunked"
        return wanted and seq_len > self.query_chunk and seq_len % self.query_chunk == 0
