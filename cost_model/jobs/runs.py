"""Published training runs from a CSV file, as jobs and measured step times.

One row is one run; the columns are those of ``cost_model/data/measured_runs.csv``. A cell that the
source leaves empty is filled from the model zoo or from arithmetic on other cells where that is
possible; otherwise the row carries the reason why it cannot be predicted. A cell that cannot be
right (text in a number, degrees that do not multiply to the devices, unknown hardware) is a
`Fault`, reported by row and column.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import pathlib
import re

from cost_model.jobs import hardware, measured
from cost_model.jobs.columns import DTYPE_BYTES, Jobs, stack
from cost_model.jobs.dimensions import Unstated, model_of_row
from cost_model.jobs.split import is_fitted
from cost_model.jobs.stack import facts, offload_share, remat_shares
from graphs.errors import MeshwrightError

MEASURED_RUNS = pathlib.Path(__file__).parent.parent / "data" / "measured_runs.csv"

_NUMBERS = (
    "n_layers d_model n_heads n_kv_heads d_ff vocab seq_len n_experts experts_per_token params_b "
    "global_batch_seqs micro_batch_seqs n_devices dp fsdp zero_stage tp pp virtual_pp cp ep "
    "step_time_s tokens_per_s_per_device tflops_per_device mfu_reported memory_gb_reported"
).split()
_TEXTS = "id source model_name gated_mlp hardware sp recompute dtype notes flops_basis".split()
_OPTIONAL = ("exclude",)
_DEGREES = ("dp", "tp", "pp", "cp", "n_devices")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """A cell that cannot be right."""

    line: int
    """line of the file, the header being 1."""
    row_id: str
    column: str
    problem: str

    def __str__(self) -> str:
        return f"line {self.line} ({self.row_id}), column {self.column}: {self.problem}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One row."""

    line: int
    id: str
    source: str
    hardware: str
    record: dict[str, float] | None
    """the job's columns, None where it cannot be predicted."""
    network_bytes_per_s: float | None
    """the cluster's own network per device where the source states it."""
    reason: str
    """why there is no prediction, or what was assumed for it; empty for neither."""
    measured_step_time_s: float | None
    measured_memory_gb: float | None
    out_of_memory: bool
    exclude: str
    dtype: str
    remat_stated: bool
    """True where the source states the recomputation."""
    fitted: bool
    """True where the constants may be fitted on this row (`split`)."""
    full_layout: bool
    """True where the source states shape, batch, degrees and recomputation."""
    analytic: bool
    """True where the source computed the figure instead of measuring it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runs:
    """All rows of a file in order, and its faults."""

    rows: tuple[Run, ...]
    faults: tuple[Fault, ...]


def read(path: str | pathlib.Path) -> Runs:
    """Read a file of runs; raises MeshwrightError where it is no table of runs at all."""
    path = pathlib.Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise MeshwrightError(
            f"cannot read runs file {str(path)!r} ({error.strerror}); give a CSV file"
        ) from error
    except UnicodeDecodeError as error:
        raise MeshwrightError(
            f"runs file {str(path)!r} is not UTF-8 text; save it as one"
        ) from error
    reader = csv.DictReader(io.StringIO(text, newline=""))
    header = [name for name in reader.fieldnames or [] if name]
    if "id" not in header and "hardware" not in header:
        raise MeshwrightError(
            f"runs file {str(path)!r} has neither column id nor hardware; "
            "give a CSV file with the columns of the shipped measured_runs.csv"
        )
    faults = [
        Fault(line=1, row_id="header", column=name, problem="the column is missing")
        for name in (*_NUMBERS, *_TEXTS)
        if name not in header
    ]
    rows = []
    for raw in reader:
        run, found = read_row(reader.line_num, {k: (v or "").strip() for k, v in raw.items() if k})
        rows.append(run)
        faults.extend(found)
    return Runs(rows=tuple(rows), faults=tuple(faults))


def jobs_of(rows: tuple[Run, ...] | list[Run]) -> Jobs:
    """The rows that have a record, as columns."""
    kept = [run for run in rows if run.record is not None]
    device = hardware.device_columns([run.hardware for run in kept])
    slow = device.network_bytes_per_s.copy()
    for index, run in enumerate(kept):
        if run.network_bytes_per_s is not None:
            slow[index] = run.network_bytes_per_s
    records = [run.record for run in kept if run.record is not None]
    return stack(records, device.replace(network_bytes_per_s=slow))


def read_row(line: int, raw: dict[str, str]) -> tuple[Run, list[Fault]]:
    """One row of a runs file, its cells as text by column, and what cannot be right in it."""
    row_id = raw.get("id") or f"line-{line}"
    faults: list[Fault] = []

    def fault(column: str, problem: str) -> None:
        faults.append(Fault(line=line, row_id=row_id, column=column, problem=problem))

    numbers: dict[str, float | None] = {}
    for name in _NUMBERS:
        text = raw.get(name, "")
        numbers[name] = None
        if text:
            try:
                value = float(text)
            except ValueError:
                fault(name, f"{text!r} is not a number")
                continue
            if not math.isfinite(value) or value < 0:
                fault(name, f"{text!r} is not a finite number of at least 0")
                continue
            numbers[name] = value
    device = raw.get("hardware", "")
    try:
        hardware.canonical(device)
    except MeshwrightError as error:
        fault("hardware", str(error))
    dtype = raw.get("dtype", "")
    if dtype and dtype not in DTYPE_BYTES:
        fault("dtype", f"{dtype!r} is not one of {', '.join(DTYPE_BYTES)}")
    recompute = raw.get("recompute", "")
    if recompute not in ("", "none", "selective", "full"):
        fault("recompute", f"{recompute!r} is not one of none, selective, full")
    for name in ("dp", "tp", "pp", "cp", "ep", "virtual_pp", "n_devices", "n_layers"):
        value = numbers[name]
        if value is not None and (value < 1 or value != int(value)):
            fault(name, f"{value:g} is not a whole number of at least 1")
            numbers[name] = None
    faults.extend(_impossible(line, row_id, device, numbers))

    record, reason, network, full = None, "", None, False
    if faults:
        reason = "; ".join(f"{f.column}: {f.problem}" for f in faults)
    else:
        try:
            record, network, assumed, full = _record(raw, numbers)
            reason = f"assumed: {', '.join(assumed)}" if assumed else ""
        except Unstated as error:
            reason = str(error)
    if "OUT OF MEMORY" in raw.get("notes", ""):
        reason = "; ".join(part for part in ("ran out of memory: no measured time", reason) if part)
    measured_s = None
    if record is not None:
        measured_s = measured.step_time_s(raw.get("flops_basis", ""), numbers, record)
    elif numbers["step_time_s"]:
        measured_s = numbers["step_time_s"]
    return (
        Run(
            line=line,
            id=row_id,
            source=raw.get("source", ""),
            hardware=device,
            record=record,
            network_bytes_per_s=network,
            reason=reason,
            measured_step_time_s=measured_s,
            measured_memory_gb=numbers["memory_gb_reported"],
            out_of_memory="OUT OF MEMORY" in raw.get("notes", ""),
            exclude=raw.get("exclude", ""),
            dtype=dtype,
            remat_stated=bool(raw.get("recompute"))
            or raw.get("flops_basis") == "hardware_incl_full_recompute",
            fitted=is_fitted(raw.get("source", ""), raw.get("notes", "")),
            full_layout=full,
            analytic="analytic" in raw.get("notes", ""),
        ),
        faults,
    )


def _impossible(
    line: int, row_id: str, device: str, numbers: dict[str, float | None]
) -> list[Fault]:
    """Degrees that cannot be together."""
    found: list[Fault] = []

    def fault(column: str, problem: str) -> None:
        found.append(Fault(line=line, row_id=row_id, column=column, problem=problem))

    def one(name: str) -> float:
        return numbers[name] or 1.0

    dp, tp, pp, cp, devices = (one(name) for name in _DEGREES)
    ways = dp * tp * pp * cp
    chips = 2.0 if device in ("tpu7x", "tpu7x_ironwood") else 1.0
    stated = numbers["dp"] is not None and numbers["n_devices"] is not None
    # an expert axis of its own (MaxText, axlearn) multiplies the others
    apart = {ways, ways * one("ep")}
    if stated and not apart & {devices, devices * chips}:
        fault("n_devices", f"dp*tp*pp*cp is {ways:g} on {devices:g} devices; make them equal")
    if numbers["n_layers"] and pp > numbers["n_layers"]:
        fault("pp", f"{pp:g} stages for {numbers['n_layers']:g} layers; use at most as many")
    if numbers["n_heads"] and tp > numbers["n_heads"]:
        fault("tp", f"{tp:g} ranks for {numbers['n_heads']:g} heads; use at most as many")
    if numbers["fsdp"] and stated and numbers["fsdp"] > dp * cp:
        fault("fsdp", f"{numbers['fsdp']:g} is more than dp*cp, {dp * cp:g}; use a divisor of it")
    if numbers["zero_stage"] is not None and numbers["zero_stage"] not in (0, 1, 2, 3):
        fault("zero_stage", f"{numbers['zero_stage']:g} is not one of 0, 1, 2, 3")
    batch, micro = numbers["global_batch_seqs"], numbers["micro_batch_seqs"]
    if stated and batch and micro and micro * dp > batch * (1 + 1e-9):
        fault(
            "micro_batch_seqs",
            f"{micro:g} on each of {dp:g} ranks is more than the global batch of {batch:g}",
        )
    if numbers["n_experts"] and numbers["n_experts"] % one("ep"):
        fault(
            "ep", f"{one('ep'):g} does not divide {numbers['n_experts']:g} experts; use a divisor"
        )
    return found


def _record(
    raw: dict[str, str], given: dict[str, float | None]
) -> tuple[dict[str, float], float | None, list[str], bool]:
    assumed: list[str] = []
    model, shape_given = model_of_row(raw, given, assumed)
    source, notes = raw.get("source", ""), raw.get("notes", "")
    stack_facts = facts(source, f"{source} {notes} {raw.get('dtype', '')}")

    def need(name: str) -> float:
        value = given[name]
        if value is None:
            raise Unstated(f"{name} is not stated by the source")
        return value

    seq = given["seq_len"]
    if seq is None:
        stated = re.search(r"used (\d{3,6}) tokens", notes)
        if not stated:
            raise Unstated("seq_len is not stated by the source")
        seq = float(stated[1])
        assumed.append(f"seq_len {seq:g}")
    chips = need("n_devices")
    device = hardware.device_columns([raw["hardware"]])
    devices = chips * float(device.devices_per_chip[0])
    tp, pp, cp = (given[name] or 1.0 for name in ("tp", "pp", "cp"))
    dp = given["dp"]
    if dp is None:
        if given["tp"] is None:
            raise Unstated("dp and tp are not stated by the source")
        dp = devices / (tp * pp * cp)
    fsdp_given = given["fsdp"]
    apart = given["ep"] or 1.0
    if apart > 1 and dp * tp * pp * cp * apart in (chips, devices):
        # an expert axis of its own splits the batch, and shards weights, outside the experts
        dp *= apart
        if fsdp_given and fsdp_given > 1:
            fsdp_given *= apart
    if dp * tp * pp * cp == chips != devices:
        dp *= devices / chips
    if dp * tp * pp * cp != devices:
        raise Unstated(f"dp*tp*pp*cp is {dp * tp * pp * cp:g}, not the {devices:g} devices")
    batch = need("global_batch_seqs")
    micro = given["micro_batch_seqs"]
    if micro is None:
        micro = 1.0
        assumed.append("micro_batch_seqs 1")
    micro = max(min(micro, batch / dp), 1e-9)
    zero, fsdp = given["zero_stage"], fsdp_given
    jax = bool(stack_facts["jax"])
    if zero is None:
        zero = (
            3.0
            if (fsdp or 0) > 1
            else (1.0 if not re.search("2104|2205|sc21|tables", source) else 0.0)
        )
    if fsdp is None:
        fsdp = dp if zero >= 2 else 1.0
    if stack_facts["fsdp_over_cp"] and cp > 1 and fsdp == dp:
        fsdp, zero = dp * cp, 3.0
    recompute = raw.get("recompute", "")
    default = ("", "selective", "full")[int(stack_facts["default_remat"])]
    if not recompute and default:
        recompute = default
        assumed.append(f"recompute {default}")
    if not recompute and raw.get("flops_basis") == "hardware_incl_full_recompute":
        recompute = "full"
        assumed.append("recompute full")
    full = bool(raw.get("recompute")) and given["micro_batch_seqs"] is not None and shape_given
    fused = stack_facts["fused_attention"]
    redone = remat_shares(
        recompute,
        f"{source} {notes}",
        jax=jax,
        fused=bool(fused),
        skips_last=bool(stack_facts["skips_last"]),
    )
    tpu = bool(device.links[0])
    # fp8 and int8 need matmul units for them; without any, the type stays as wide as bf16
    width = DTYPE_BYTES.get(raw.get("dtype", "") or "bf16", 2.0)
    n_slices = _slices(notes, chips, device) if tpu else 1.0
    record = {
        **model,
        "seq_len": seq,
        "global_batch": batch,
        "micro_batch": micro,
        "n_devices": devices,
        "dp": dp,
        "fsdp": fsdp,
        "zero_stage": zero,
        "tp": tp,
        "sp": float(raw.get("sp", "") == "True" or (not raw.get("sp") and tp > 1)),
        "pp": pp,
        "vpp": given["virtual_pp"] or 1.0,
        "schedule": 0.0,
        "first_layers": -1.0,
        "last_layers": -1.0,
        "lockstep": 0.0,
        "entry_layers": 0.0,
        "encoder_share": 0.0,
        "cp": cp,
        "context_form": 0.0,
        "ep": (given["ep"] or 1.0) if model["n_experts"] else 1.0,
        "n_slices": n_slices,
        **{f"remat_{part}": share for part, share in redone.items()},
        "offload": offload_share(notes, model["n_layers"]),
        "matmul_bytes": width,
        "scaled_blocks": float(raw.get("dtype") in ("mxfp8", "nvfp4")),
        "integer": float(raw.get("dtype") == "int8"),
        "fp16": float(raw.get("dtype") == "fp16"),
        **{
            name: stack_facts[name]
            for name in (
                "fused_attention compiled tp_overlap dp_overlap grad_bytes grad_store_bytes "
                "weight_bytes master_bytes cuda_graphs attention_speed engine_sync fp32_pointwise "
                "staged_network caching_allocator fused_experts skips_last "
                "expert_tp expandable_segments fused_loss"
            ).split()
        },
    }
    if record["ep"] > 1 and dp * tp * cp % record["ep"]:
        assumed.append(f"ep {math.gcd(int(record['ep']), int(dp * tp * cp))}")
        record["ep"] = float(math.gcd(int(record["ep"]), int(dp * tp * cp)))
    if device.family[0] != hardware.FAMILIES.index("blackwell"):
        record["fused_experts"] = 0.0  # block-scaled grouped kernels exist for Blackwell alone
    if pp > 1 and zero >= 2:
        # with stages, sharded weights are gathered once a step and kept until its last microbatch
        # (torchtitan: no resharding after forward under pipelining; Llama 3, section 3.3)
        record.update(zero_stage=1.0, fsdp=1.0, weight_bytes=2.0, master_bytes=12.0)
    if device.family[0] == hardware.FAMILIES.index("hopper"):
        record["attention_speed"] *= stack_facts["attention_speed_hopper"]
    network = stack_facts.get("network_gbit_s")
    return record, (network * 1e9 / 8 * 0.92 if network else None), assumed, full


def _slices(notes: str, chips: float, device: hardware.DeviceColumns) -> float:
    """TPU slices of a run: as the notes say, else as many as the largest slice forces."""
    stated = re.search(r"^(\d+) (?:slices?|x v)", notes)
    largest = float(device.domain[0]) / float(device.devices_per_chip[0])
    return float(stated[1]) if stated else math.ceil(chips / largest)
