"""What a model of the zoo is: its architecture in numbers, with no batch and no hardware."""

from __future__ import annotations

import dataclasses
import math

from graphs.errors import MeshwrightError

ATTENTIONS = ("mha", "gqa", "mqa", "mla")
NORMS = ("rmsnorm", "layernorm", "layernorm_nobias")
NORM_PLACEMENTS = ("pre", "post", "both")
QK_NORMS = ("none", "head", "full")
POSITIONS = ("rope", "learned", "alibi", "relative", "none")
ACTIVATIONS = ("silu", "gelu", "relu")
ROUTER_SCORES = ("softmax", "sigmoid")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerKind:
    """What makes two layers of one model differ in shape or in mask."""

    window: int | None
    """Keys that a query sees, itself included; None for all of the past."""
    moe: bool
    """Mixture-of-experts feed-forward instead of a dense one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """Consecutive layers: a period of kinds, repeated."""

    name: str
    """Key of the segment in the parameter tree."""
    repeats: int
    """>= 1"""
    kinds: tuple[LayerKind, ...]
    """[P] the layers of one period."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder (or, with encoder_layers > 0, an encoder-decoder) language model."""

    name: str
    """Public name."""
    source: str = ""
    """Where the dimensions come from."""
    n_layers: int
    """L, decoder layers, >= 1."""
    d_model: int
    """D, width of the residual stream."""
    n_heads: int
    """H, query heads."""
    n_kv_heads: int
    """K, key and value heads; divides H."""
    head_dim: int
    """Width of a head (with mla: qk_nope_dim + qk_rope_dim)."""
    d_ff: int
    """F, width of the dense feed-forward; unused where every layer has experts."""
    vocab_size: int
    """V."""
    seq_len: int = 4096
    """S, default training sequence; also the table length of learned positions."""
    attention: str = "gqa"
    """mha | gqa | mqa | mla."""
    gated: bool = True
    """Feed-forward act(x Wg) * (x Wu) instead of act(x Wu)."""
    activation: str = "silu"
    """silu | gelu | relu."""
    tied_embeddings: bool = False
    """The output head is the transposed token embedding."""
    norm: str = "rmsnorm"
    """rmsnorm | layernorm | layernorm_nobias."""
    norm_placement: str = "pre"
    """Norm before each sublayer (pre), after it (post), or both (Gemma 2, Grok-1)."""
    qk_norm: str = "none"
    """RMSNorm of queries and keys: none, over each head, or over the full width."""
    embedding_norm: bool = False
    """A norm on the embedding (BLOOM)."""
    scale_embeddings: bool = False
    """Embedding times sqrt(D) (Gemma)."""
    parallel_block: bool = False
    """Attention and feed-forward read the same normed input (PaLM, Falcon)."""
    attention_bias: bool = False
    """Biases of the query, key and value projections."""
    output_bias: bool = False
    """Bias of the attention output projection."""
    mlp_bias: bool = False
    """Biases of the feed-forward, of experts and router too."""
    position: str = "rope"
    """rope | learned | alibi | relative (T5) | none."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    sliding_window: int | None = None
    """Keys seen by a local layer; None: every layer is global."""
    local_per_global: int = 0
    """Local layers before each global one; 0 with a window: every layer is local."""
    logit_softcap: float | None = None
    """c tanh(logits / c)."""
    attention_softcap: float | None = None
    """c tanh(scores / c)."""
    attention_sink: bool = False
    """A learned logit per head that takes softmax mass (GPT-OSS)."""
    n_experts: int = 0
    """E; 0 for a dense model."""
    experts_per_token: int = 0
    """k, >= 1 with experts."""
    moe_d_ff: int = 0
    """Width of an expert."""
    shared_experts: int = 0
    """Experts that every token visits, fused into one feed-forward."""
    first_dense_layers: int = 0
    """Leading layers without experts."""
    moe_every: int = 1
    """After those, the last of each moe_every layers has experts (Llama 4 Maverick: 2)."""
    router_score: str = "softmax"
    """softmax | sigmoid (DeepSeek-V3)."""
    capacity_factor: float = 1.25
    """Slots of an expert over its fair share, capacity routing only."""
    q_lora_rank: int = 0
    """mla: rank of the query compression."""
    kv_lora_rank: int = 0
    """mla: rank of the key-value compression."""
    qk_nope_dim: int = 0
    """mla: query-key width of a head without position."""
    qk_rope_dim: int = 0
    """mla: query-key width of a head with position."""
    v_head_dim: int = 0
    """mla: value width of a head."""
    encoder_layers: int = 0
    """> 0: encoder-decoder (T5)."""
    relative_buckets: int = 32
    """Buckets of relative positions."""
    relative_max_distance: int = 128
    """Distance from which relative positions share the last bucket."""

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raises MeshwrightError with the first rule broken."""
        for field in ("n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "vocab_size"):
            if getattr(self, field) < 1:
                raise MeshwrightError(
                    f"model {self.name!r} has {field}={getattr(self, field)}; make it at least 1"
                )
        for field, allowed in (
            ("attention", ATTENTIONS),
            ("norm", NORMS),
            ("norm_placement", NORM_PLACEMENTS),
            ("qk_norm", QK_NORMS),
            ("position", POSITIONS),
            ("activation", ACTIVATIONS),
            ("router_score", ROUTER_SCORES),
        ):
            if getattr(self, field) not in allowed:
                raise MeshwrightError(
                    f"model {self.name!r} has {field}={getattr(self, field)!r}; "
                    f"choose one of {', '.join(allowed)}"
                )
        if self.n_heads % self.n_kv_heads:
            raise MeshwrightError(
                f"model {self.name!r} has n_heads={self.n_heads}, not a multiple of "
                f"n_kv_heads={self.n_kv_heads}; make n_kv_heads a divisor"
            )
        expected = {"mha": self.n_heads, "mqa": 1}.get(self.attention, self.n_kv_heads)
        if self.n_kv_heads != expected:
            raise MeshwrightError(
                f"model {self.name!r} has attention={self.attention} and "
                f"n_kv_heads={self.n_kv_heads}; set n_kv_heads={expected} or attention=gqa"
            )
        if self.attention == "mla":
            ranks = ("q_lora_rank", "kv_lora_rank", "qk_nope_dim", "qk_rope_dim", "v_head_dim")
            for field in ranks:
                if getattr(self, field) < 1:
                    raise MeshwrightError(
                        f"model {self.name!r} has attention=mla and {field}="
                        f"{getattr(self, field)}; make it at least 1"
                    )
        if self.n_experts:
            if not 1 <= self.experts_per_token <= self.n_experts:
                raise MeshwrightError(
                    f"model {self.name!r} has experts_per_token={self.experts_per_token}; "
                    f"make it between 1 and n_experts={self.n_experts}"
                )
            if self.moe_d_ff < 1:
                raise MeshwrightError(
                    f"model {self.name!r} has experts and moe_d_ff={self.moe_d_ff}; "
                    "make it at least 1"
                )
            if not 0 <= self.first_dense_layers < self.n_layers:
                raise MeshwrightError(
                    f"model {self.name!r} has first_dense_layers={self.first_dense_layers}; "
                    f"make it less than n_layers={self.n_layers}"
                )
        if (not self.n_experts or self.first_dense_layers or self.moe_every > 1) and self.d_ff < 1:
            raise MeshwrightError(
                f"model {self.name!r} has dense layers and d_ff={self.d_ff}; make it at least 1"
            )
        if self.moe_every < 1:
            raise MeshwrightError(
                f"model {self.name!r} has moe_every={self.moe_every}; make it at least 1"
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise MeshwrightError(
                f"model {self.name!r} has sliding_window={self.sliding_window}; "
                "make it at least 1 or null"
            )
        if self.local_per_global and self.sliding_window is None:
            raise MeshwrightError(
                f"model {self.name!r} has local_per_global={self.local_per_global} and no "
                "sliding_window; give the window of its local layers"
            )
        if self.encoder_layers and (self.n_experts or self.attention == "mla"):
            raise MeshwrightError(
                f"model {self.name!r} has encoder_layers={self.encoder_layers} with experts or "
                "mla; an encoder-decoder here is dense with plain heads"
            )
        if self.position == "rope" and self.attention != "mla" and self.head_dim % 2:
            raise MeshwrightError(
                f"model {self.name!r} has head_dim={self.head_dim} and rotary positions; "
                "make head_dim even"
            )

    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """[L] the kind of each decoder layer, first to last."""
        kinds = []
        for layer in range(self.n_layers):
            after_dense = layer - self.first_dense_layers
            moe = (
                self.n_experts > 0
                and after_dense >= 0
                and after_dense % self.moe_every == self.moe_every - 1
            )
            period = self.local_per_global + 1
            local = self.sliding_window is not None and (
                self.local_per_global == 0 or layer % period != period - 1
            )
            kinds.append(LayerKind(window=self.sliding_window if local else None, moe=moe))
        return tuple(kinds)

    def segments(self) -> tuple[Segment, ...]:
        """The layers as repeated periods, so that a scan runs over each."""
        kinds = self.layer_kinds()
        head = self.first_dense_layers if self.n_experts else 0
        period = math.lcm(
            self.local_per_global + 1 if self.sliding_window is not None else 1,
            self.moe_every if self.n_experts else 1,
        )
        body = (len(kinds) - head) // period * period
        parts: list[tuple[int, tuple[LayerKind, ...]]] = []
        parts += _runs(kinds[:head])
        if body:
            parts.append((body // period, kinds[head : head + period]))
        parts += _runs(kinds[head + body :])
        segments: list[Segment] = []
        for repeats, period_kinds in parts:
            name = "layers"
            if self.n_experts:
                name = "moe_layers" if any(kind.moe for kind in period_kinds) else "dense_layers"
            taken = sum(segment.name.startswith(name) for segment in segments)
            name = f"{name}_{taken + 1}" if taken else name
            segments.append(Segment(name=name, repeats=repeats, kinds=period_kinds))
        return tuple(segments)


def _runs(kinds: tuple[LayerKind, ...]) -> list[tuple[int, tuple[LayerKind, ...]]]:
    runs: list[tuple[int, tuple[LayerKind, ...]]] = []
    for kind in kinds:
        if runs and runs[-1][1] == (kind,):
            runs[-1] = (runs[-1][0] + 1, (kind,))
        else:
            runs.append((1, (kind,)))
    return runs
