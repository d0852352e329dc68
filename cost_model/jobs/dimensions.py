"""The model's dimensions of a row of a runs file, filled from the zoo and by arithmetic.

The row wins over the zoo, but for what a row has no column for. A model that neither describes is
`Unstated`; what is filled by assumption is named.
"""

from __future__ import annotations

import re

from cost_model.jobs import shape as shapes
from cost_model.jobs.columns import model_columns


class Unstated(Exception):
    """A cell that the source leaves empty and nothing else gives."""


def model_of_row(
    raw: dict[str, str], given: dict[str, float | None], assumed: list[str]
) -> tuple[dict[str, float], bool]:
    """The model's columns, and whether the row itself states the shape."""
    known = shapes.find(raw.get("model_name", ""))
    if known is not None and given["d_model"] not in (None, float(known.d_model)):
        known = None
    base = model_columns(known) if known else {}
    notes = raw.get("notes", "")
    complete = all(
        given[n] is not None for n in ("n_layers", "d_model", "n_heads", "d_ff", "vocab")
    )

    def value(name: str, column: str, default: float | None = None) -> float:
        number = given[column]
        if number is not None:
            return number
        if name in base:
            return base[name]
        if default is None:
            raise Unstated(f"{column} is not stated by the source")
        assumed.append(f"{column} {default:g}")
        return default

    width = value("d_model", "d_model")
    vocab_default = 51200.0 if re.match(r"GPT-\d+B", raw.get("model_name", "")) else None
    vocab = value("vocab", "vocab", vocab_default)
    ff_stated = given["d_ff"] is not None or bool(base)
    gated_text = raw.get("gated_mlp", "")
    n_up = {"True": 2.0, "False": 1.0}.get(gated_text, base.get("n_up", 1.0))
    d_ff = given["d_ff"] if given["d_ff"] is not None else base.get("d_ff", 4 * width)
    if not ff_stated:
        assumed.append(f"d_ff {d_ff:g}")
    heads = value("n_heads", "n_heads", max(width // 128, 1.0))
    keys = given["n_kv_heads"] if given["n_kv_heads"] is not None else base.get("n_kv_heads", heads)
    if given["n_heads"] is None and given["n_kv_heads"] is None and not base:
        keys = heads
    layers = given["n_layers"]
    if layers is None and not base and given["params_b"]:
        per_layer = width * width * 4 + (n_up + 1) * width * d_ff
        layers = float(round((given["params_b"] * 1e9 - vocab * width) / per_layer))
        assumed.append(f"n_layers {layers:g} from params_b")
    elif layers is None:
        layers = value("n_layers", "n_layers")
    stated = re.search(r"head_dim (\d+)", notes)
    if base:
        head_dim, v_head_dim = base["head_dim"], base["v_head_dim"]
    else:
        head_dim = float(stated[1]) if stated else width / heads
        v_head_dim = head_dim
    experts = given["n_experts"] or base.get("n_experts", 0.0) or 0.0
    out = dict(base) or {
        "shared_experts": 0.0,
        "expert_bias": 0.0,
        "q_lora_rank": 0.0,
        "kv_lora_rank": 0.0,
        "qk_rope_dim": 0.0,
        "window": 0.0,
        "window_share": 0.0,
        "tied": float(n_up == 1.0 or "tied embedding" in notes),
        "n_moe_layers": layers if experts else 0.0,
        "moe_d_ff": d_ff if experts else 0.0,
    }
    if base and layers != base["n_layers"] and experts:
        out["n_moe_layers"] = base["n_moe_layers"] * layers / base["n_layers"]
    out.update(
        n_layers=layers,
        d_model=width,
        n_heads=heads,
        n_kv_heads=keys,
        head_dim=head_dim,
        v_head_dim=v_head_dim,
        vocab=vocab,
        n_up=n_up,
        n_experts=experts,
        experts_per_token=given["experts_per_token"] or base.get("experts_per_token", 0.0) or 0.0,
        d_ff=(base.get("d_ff", 0.0) if experts else d_ff),
    )
    if base and not experts:
        out["d_ff"] = base["d_ff"]
    return out, complete
