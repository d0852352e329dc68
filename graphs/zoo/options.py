"""How a model's train step is run: what does not change the function it computes."""

from __future__ import annotations

import dataclasses

from graphs.errors import MeshwrightError

REMATS = ("none", "dots", "attention", "full")
ATTENTION_FORMS = ("auto", "naive", "chunked")
MOE_FORMS = ("capacity", "dropless")

CHUNKED_FROM_SEQ_LEN = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Choices of the program, not of the architecture (capacity routing drops tokens)."""

    remat: str = "full"
    """Per layer: none | dots (save matmuls without batch dimensions) | attention (recompute the
    attention core only) | full (save only the layer's input)."""
    scan: bool = True
    """Layers as lax.scan over stacked weights instead of unrolled."""
    attention: str = "auto"
    """naive (softmax of the whole score matrix) | chunked (lax.scan over blocks of queries, each
    rematerialised) | auto (chunked from sequence 4,096)."""
    query_chunk: int = 512
    """Queries of a block, chunked attention."""
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
        if self.query_chunk < 1 or self.loss_chunks < 1:
            raise MeshwrightError(
                f"train step options query_chunk={self.query_chunk} and "
                f"loss_chunks={self.loss_chunks} must be at least 1"
            )

    def chunked(self, seq_len: int) -> bool:
        """Whether attention over this sequence runs in blocks of queries."""
        if self.attention == "auto":
            wanted = seq_len >= CHUNKED_FROM_SEQ_LEN
        else:
            wanted = self.attention == "chunked"
        return wanted and seq_len > self.query_chunk and seq_len % self.query_chunk == 0
