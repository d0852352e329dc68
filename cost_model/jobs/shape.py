"""Dimensions of a published decoder-only transformer, by name.

The dimensions that a table of runs has no column for (head width, latent attention, sliding
windows, leading dense layers, shared experts, interleaving of expert layers) are read from
``cost_model/data/model_zoo.csv``, every row of which names its source.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import pathlib
import re

ZOO = pathlib.Path(__file__).parent.parent / "data" / "model_zoo.csv"

# Names that tables of runs print, as regular expressions over the name reduced to lower-case
# letters and digits, and the model of the zoo they mean. First match wins.
_ALIASES = (
    (r"^deepseekv?3(?!\.\d)(?!small)", "DeepSeek-V3 671B"),
    (r"^deepseekv?2(236b)?$", "DeepSeek-V2 236B"),
    (r"^kimik2", "Kimi-K2 1T"),
    (r"^gptoss120b", "GPT-OSS 120B"),
    (r"^gptoss20b", "GPT-OSS 20B"),
    (r"^qwen330ba3b", "Qwen3 30B-A3B"),
    (r"^qwen3235ba22b", "Qwen3 235B-A22B"),
    (r"^qwen3(coder)?480b", "Qwen3-Coder 480B-A35B"),
    (r"^llama4(scout|17b16e|e16)", "Llama 4 Scout 17B-16E"),
    (r"^llama4(maverick|17b128e|e128)", "Llama 4 Maverick 17B-128E"),
    (r"^(llama31?405b|fuji405b)", "Llama 3.1 405B"),
    (r"^(llama31?70b|fuji70bv3)", "Llama 3 70B"),
    (r"^(llama31?8b|fuji8b)", "Llama 3 8B"),
    (r"^(llama270b|fuji70b)", "Llama 2 70B"),
    (r"^llama213b", "Llama 2 13B"),
    (r"^(llama27b|fuji7b)", "Llama 2 7B"),
    (r"^mixtral8x7b", "Mixtral 8x7B"),
    (r"^mixtral8x22b", "Mixtral 8x22B"),
    (r"^grok1", "Grok-1 314B"),
    (r"^palm540b", "PaLM 540B"),
    (r"^(gpt3175b|gpt3$)", "GPT-3 175B"),
    (r"^bloom", "BLOOM 176B"),
    (r"^(mtnlg|turing)530b", "MT-NLG 530B"),
    (r"^gemma426b", "Gemma 4 26B"),
    (r"^gemma431b", "Gemma 4 31B"),
    (r"^gemma412b", "Gemma 4 12B"),
    (r"^gemma4(e2b|2b)", "Gemma 4 E2B"),
    (r"^gemma4(e4b|4b)", "Gemma 4 E4B"),
    (r"^nemotron415b", "Nemotron-4 15B"),
    (r"^nemotron4340b", "Nemotron-4 340B"),
    (r"^nemotron38b", "Nemotron-3 8B"),
    (r"^megatron22b", "Megatron GPT 22B"),
    (r"^(megatron|gpt)1t", "Megatron GPT 1T"),
    (r"^(megatron|gpt)145b", "Megatron GPT 145B (SC21)"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelShape:
    """One transformer; widths are elements."""

    name: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    """width of one query / key head."""
    v_head_dim: int
    """width of one value head (equal to head_dim but for latent attention)."""
    d_ff: int
    """width of the dense MLP; 0 when every layer has experts and no dense MLP."""
    vocab: int
    gated: bool
    """True: two up projections (SwiGLU and kin)."""
    tied: bool
    """True: the output head is the embedding."""
    n_experts: int = 0
    experts_per_token: int = 0
    moe_d_ff: int = 0
    shared_experts: int = 0
    """experts of width moe_d_ff that every token visits."""
    first_dense_layers: int = 0
    moe_period: int = 1
    """an expert layer every so many layers."""
    attention_bias: bool = False
    """True where projections have biases; experts then have them too."""
    q_lora_rank: int = 0
    """0 for ordinary attention; latent attention (MLA) otherwise."""
    kv_lora_rank: int = 0
    qk_rope_dim: int = 0
    window: int = 0
    """sliding-window length, 0 for none."""
    window_share: float = 0.0
    """share of the layers that use the window."""
    encoder_layers: int = 0
    """of n_layers the encoder's, in an encoder-decoder; the others attend to its output too."""
    seq_len_default: int = 2048


def reduced(name: str) -> str:
    """The name in lower-case letters and digits only, without a parenthesis that follows it."""
    return re.sub(r"[^a-z0-9]", "", re.sub(r"\(.*?\)", "", name.lower()))


@functools.lru_cache(maxsize=1)
def zoo() -> dict[str, ModelShape]:
    """Every model of the shipped table, by its name there."""
    with ZOO.open(newline="") as file:
        return {row["model"]: _from_row(row) for row in csv.DictReader(file)}


def find(name: str) -> ModelShape | None:
    """The zoo's model that a run's model name means, or None."""
    models = zoo()
    if name in models:
        return models[name]
    short = reduced(name)
    for pattern, target in _ALIASES:
        if re.search(pattern, short):
            return models[target]
    for model in models.values():
        if short == reduced(model.name):
            return model
    return None


def _from_row(row: dict[str, str]) -> ModelShape:
    def integer(key: str) -> int:
        return int(float(row[key])) if row[key] else 0

    notes = f"{row['attention_type']} {row['arch_notes']}".lower()
    period = re.search(r"every (\d)\w* layer moe", notes)
    ratio = re.search(r"(\d+) sliding[- ]window\s*:\s*(\d+)", notes)
    share = 0.0
    if integer("sliding_window"):
        share = 1.0
        if ratio:
            share = int(ratio[1]) / (int(ratio[1]) + int(ratio[2]))
        elif "1:1" in notes:
            share = 0.5
    mla = bool(row["kv_lora_rank"])
    dense_everywhere = not row["n_experts"]
    keeps_dense = bool(integer("first_dense_layers")) or bool(period)
    return ModelShape(
        name=row["model"],
        n_layers=integer("n_layers"),
        d_model=integer("d_model"),
        n_heads=integer("n_heads"),
        n_kv_heads=integer("n_kv_heads"),
        head_dim=integer("qk_nope_dim") + integer("qk_rope_dim") if mla else integer("head_dim"),
        v_head_dim=integer("v_head_dim") if mla else integer("head_dim"),
        d_ff=integer("d_ff") if dense_everywhere or keeps_dense else 0,
        vocab=integer("vocab"),
        gated=row["gated"] == "True",
        tied=row["tied_embeddings"] == "True",
        n_experts=integer("n_experts"),
        experts_per_token=integer("experts_per_token"),
        moe_d_ff=integer("moe_d_ff"),
        shared_experts=integer("shared_experts"),
        first_dense_layers=integer("first_dense_layers"),
        moe_period=int(period[1]) if period else 1,
        attention_bias=row["attn_bias"] == "True",
        q_lora_rank=integer("q_lora_rank"),
        kv_lora_rank=integer("kv_lora_rank"),
        qk_rope_dim=integer("qk_rope_dim") if mla else 0,
        window=integer("sliding_window"),
        window_share=share,
        seq_len_default=integer("seq_len_default") or 2048,
    )
