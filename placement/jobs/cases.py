"""Hand-tuned configurations from published recipes, as jobs.

One row of ``cost_model/data/hand_tuned_cases.csv`` is what an expert sets for a model on a cluster.
It becomes the same record as a published run (`cost_model.jobs.runs`), so that it is scored by the
same model. A row that states too little, or whose degrees cannot be, carries the reason.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import pathlib
import re

import cost_model
from cost_model.jobs.runs import Run, read_row
from graphs.errors import MeshwrightError

HAND_TUNED = pathlib.Path(cost_model.__file__).parent / "data" / "hand_tuned_cases.csv"

# Names of hardware in recipes, and the device they mean; first match wins.
_HARDWARE = (
    (r"grand teton", "h100_96g_hbm2e_500w"),
    (r"tpu-?7x|ironwood|tpu7x", "tpu7x"),
    (r"v5litepod|tpu ?v5e|v5e", "v5e"),
    (r"v5p", "v5p"),
    (r"v6e|trillium", "v6e"),
    (r"tpu-?v4|tpu ?v4|tpuv4", "v4"),
    (r"gb300", "gb300"),
    (r"gb200", "gb200"),
    (r"b300", "b300"),
    (r"b200", "b200"),
    (r"h200", "h200"),
    (r"h800|h100|p5\.48", "h100"),
    (r"a100", "a100"),
)
_PRECISION = (
    (r"nvfp4", "nvfp4"),
    (r"mxfp8", "mxfp8"),
    (r"^bf16", "bf16"),
    (r"fp16", "fp16"),
    (r"int8", "int8"),
    (r"fp8", "fp8"),
)
_REQUIRED = ("case_id", "model", "hardware", "n_devices", "seq_len", "global_batch_seqs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One row: the expert's run, and the text of what its source reports."""

    case_id: str
    run: Run
    reason: str
    """why the row cannot be scored; empty where it can."""
    reported: str


def read_cases(path: str | pathlib.Path | None) -> list[Case]:
    """All rows of a file in order; raises MeshwrightError where it is no table of cases."""
    path = pathlib.Path(path or HAND_TUNED)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise MeshwrightError(f"cannot read cases file {str(path)!r}; give a CSV file") from error
    reader = csv.DictReader(io.StringIO(text, newline=""))
    missing = [name for name in _REQUIRED if name not in (reader.fieldnames or [])]
    if missing:
        raise MeshwrightError(
            f"cases file {str(path)!r} lacks column {missing[0]}; "
            "give the columns of the shipped hand_tuned_cases.csv"
        )
    return [
        _case(reader.line_num, {k: (v or "").strip() for k, v in row.items() if k})
        for row in reader
    ]


def _case(line: int, row: dict[str, str]) -> Case:
    raw, reason = _as_run(row)
    run, faults = read_row(line, raw)
    run = _with_partial_remat(run, row.get("remat", ""))
    check = row.get("mesh_check", "")
    notes = [run.reason] if run.reason else []
    if not row.get("seq_len") and raw["seq_len"]:
        notes.append(f"assumed: seq_len {raw['seq_len']}, the default that its recipe starts from")
    if check.startswith("dp*") and raw["dp"] and "." not in raw["dp"]:
        # the degrees that place a model are right; the printed dp is left out, as in measured_runs
        notes.append(
            f"assumed: dp {raw['dp']}, for the printed one does not multiply to the devices"
        )
        check = ""
    if run.record is not None:
        run = dataclasses.replace(run, reason="; ".join(notes))
    if (check and not check.startswith("ok")) or "INFEASIBLE" in check:
        reason = f"the row's own mesh check fails: {check}"
    elif faults:
        reason = "; ".join(f"{f.column}: {f.problem}" for f in faults)
    elif run.record is None:
        reason = reason or run.reason
    return Case(
        case_id=row["case_id"] or f"line-{line}",
        run=run,
        reason=reason,
        reported=row.get("result_reported", ""),
    )


def _with_partial_remat(run: Run, text: str) -> Run:
    """Full recomputation of some layers: `full on N layers` of each chunk of a stage (Megatron-LM,
    recompute_method block) is that share of every part."""
    counted = re.match(r"full on (\d+) layers", text)
    if counted is None or run.record is None:
        return run
    record = run.record
    share = min(float(counted[1]) * record["pp"] * record["vpp"] / record["n_layers"], 1.0)
    parts = {name: share for name in record if name.startswith("remat_")}
    return dataclasses.replace(run, record={**record, **parts})


def _match(table: tuple[tuple[str, str], ...], text: str) -> str:
    return next((name for pattern, name in table if re.search(pattern, text.lower())), "")


def _as_run(row: dict[str, str]) -> tuple[dict[str, str], str]:
    """The row with the columns of a runs file, and why it cannot be one."""

    def number(name: str) -> float | None:
        # "64 (0)" states the configuration of two results; the first is reported first
        try:
            return float(re.sub(r" \(.*\)$", "", row.get(name, ""))) or None
        except ValueError:
            return None

    def text(value: float | None) -> str:
        return "" if value is None else f"{value:g}"

    device = _match(_HARDWARE, row["hardware"])
    chips = number("n_chips") or number("n_devices")
    devices = number("n_devices")
    count = chips if device == "tpu7x" else devices
    tp, pp, cp = (number(name) or 1.0 for name in ("tp", "pp", "cp"))
    family = f"{row.get('family', '')} {row.get('source', '')}"
    dp = devices / (tp * pp * cp) if devices else None
    seq = number("seq_len") or _default_seq_len(row)
    batch = number("global_batch_seqs")
    per_device = number("per_device_batch_seqs")
    if batch is None and per_device and devices:
        batch = per_device * devices
    megatron = re.search("Megatron|NeMo|Korthikanti|DeepSeek", family) is not None
    micro = number("micro_batch_seqs")
    if micro is None and pp > 1:
        micro = 1.0
    if micro is None and batch and dp and (number("grad_accum") or not megatron):
        micro = batch / dp / (number("grad_accum") or 1.0)
    remat = row.get("remat", "")
    sharded = (number("fsdp") or 1.0) * (number("fsdp_transpose") or 1.0)
    experts = number("ep") or 1.0
    if not megatron:
        sharded *= experts if row.get("ep") else 1.0
    zero = "3" if sharded > 1 else ("1" if megatron and "SC21" not in family else "0")
    if "Korthikanti" in family or "SC21" in family:
        zero = "0"
    reason = "" if device else f"hardware {row['hardware']!r} is not known"
    shape = _shape(row["model"])
    release = re.match(r"mb-([\d.]+)-", row["case_id"])
    container = f"{release[1]} NeMo Container" if release else ""
    slices = number("n_slices") or 1.0
    raw = {
        "id": row["case_id"],
        "source": family,
        "model_name": row["model"],
        "hardware": device or row["hardware"],
        "seq_len": text(seq),
        "global_batch_seqs": text(batch),
        "micro_batch_seqs": text(micro),
        "n_devices": text(count),
        "dp": text(dp),
        "fsdp": text(min(sharded, dp) if dp else sharded),
        "zero_stage": zero,
        "tp": text(tp),
        "sp": {"on": "True", "off": "False"}.get(row.get("sp_norm", ""), ""),
        "pp": text(pp),
        "virtual_pp": text(number("vpp") or 1.0),
        "cp": text(cp),
        "ep": text(experts),
        "recompute": _remat_class(remat),
        "dtype": _match(_PRECISION, row.get("precision", "")) or "bf16",
        "notes": "; ".join(
            (
                f"{text(slices)} slices",
                container,
                remat,
                row.get("notes", ""),
                "head_dim 256" if shape is _CUSTOM_MOE_700B else "",
            )
        ),
        **_measured(row.get("result_reported", "")),
        **shape,
    }
    return raw, reason


def _remat_class(text: str) -> str:
    if re.match(r"none listed|not stated|recipe default|see ", text):
        return ""
    if re.match(r"none|cpu activation offload|offload \d+", text):
        return "none"
    if re.match(r"full.*num_layers=|full on \d+ layers", text):
        return "none"
    if re.match(r"full", text):
        return "full"
    return "selective" if text else ""


def _measured(text: str) -> dict[str, str]:
    """The first figure of a reported result, under the runs file's column for it."""
    seconds = re.match(r"([\d.]+) s\b|([\d.]+) s/iteration", text)
    if seconds:
        return {"step_time_s": seconds[1] or seconds[2]}
    rate = re.match(r"([\d.]+)(?: \([\d.]+\))? (?:tok/s/GPU|TPS/GPU)", text)
    if rate:
        return {"tokens_per_s_per_device": rate[1]}
    flops = re.match(r"([\d.]+) TFLOP/s/(?:chip|GPU|device)|([\d.]+), [\d.]+ ?%", text)
    if flops:
        return {"tflops_per_device": flops[1] or flops[2]}
    return {}


_SEQ_LEN = (
    # (family, model) of a recipe that sets no sequence length, and that of what it starts from:
    # github:NVIDIA-NeMo/Megatron-Bridge@067f987d docs/performance-summary.md, whose runs are of these
    # recipes; github:AI-Hypercomputer/maxtext base.yml, max_target_length
    (r"Megatron-Bridge recipe", r"llama3_", 8192.0),
    (r"Megatron-Bridge recipe", r"deepseek_v3|gpt_oss", 4096.0),
    (r"^maxtext$", r"maxtext 22B", 2048.0),
)


def _default_seq_len(row: dict[str, str]) -> float | None:
    for family, model, tokens in _SEQ_LEN:
        if re.search(family, row.get("family", "")) and re.search(model, row["model"]):
            return tokens
    return None


_CUSTOM_MOE_700B = {
    # github:AI-Hypercomputer/maxtext benchmarks/maxtext_trillium_model_configs.py, custom_moe_700b
    "n_layers": "56", "d_model": "8192", "n_heads": "128", "n_kv_heads": "8", "d_ff": "32768",
    "vocab": "32000", "gated_mlp": "True", "n_experts": "16", "experts_per_token": "2",
}  # fmt: skip
_MAXTEXT_DEFAULT = {
    # github:AI-Hypercomputer/maxtext@04262f3cf base.yml times global_parameter_scale:
    # layers, width, heads, MLP width
    "16B": (32, 5120, 40, 20480),
    "32B": (32, 8192, 64, 28672),
    "64B": (64, 8192, 64, 28672),
    "128B": (64, 8192, 128, 57344),
    "256B": (64, 16384, 128, 57344),
    "512B": (128, 16384, 128, 57344),
    "1024B": (128, 16384, 256, 114688),
}


def _shape(model: str) -> dict[str, str]:
    """Dimensions that a case's model name itself states."""
    if model == "custom 700B MoE":
        return _CUSTOM_MOE_700B
    default = re.search(r"maxtext default (\d+B)", model)
    if default and default[1] in _MAXTEXT_DEFAULT:
        layers, width, heads, d_ff = _MAXTEXT_DEFAULT[default[1]]
        sizes = {"n_layers": layers, "d_model": width, "n_heads": heads, "d_ff": d_ff}
        return {**{k: str(v) for k, v in sizes.items()}, "vocab": "32000", "gated_mlp": "True"}
    stated = re.search(r"\(L(\d+) h(\d+) a(\d+)\)", model)
    if stated:
        layers, width, heads = (int(x) for x in stated.groups())
        sizes = {"n_layers": layers, "d_model": width, "n_heads": heads, "d_ff": 4 * width}
        return {**{k: str(v) for k, v in sizes.items()}, "vocab": "51200", "gated_mlp": "False"}
    stated = re.search(r"\((\d+)L d(\d+) (\d+)h ff(\d+)\)", model)
    if stated:
        layers, width, heads, d_ff = (int(x) for x in stated.groups())
        sizes = {"n_layers": layers, "d_model": width, "n_heads": heads, "d_ff": d_ff}
        return {**{k: str(v) for k, v in sizes.items()}, "vocab": "32768", "gated_mlp": "False"}
    return {}
