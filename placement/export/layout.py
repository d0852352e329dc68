"""A training job's parallel degrees, batch and rematerialisation: what frameworks' flags say.

The degrees multiply to the devices: n = data · fsdp · fsdp_transpose · tensor · context · pipeline
· expert, where experts that are carved from the data ranks (Megatron, torchtitan) do not count.
"""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

from graphs.errors import MeshwrightError

REMATS = ("none", "dots", "attention", "full", "custom")
_SCHEMA = 1
_DEGREES = (
    "data",
    "fsdp",
    "fsdp_transpose",
    "tensor",
    "context",
    "pipeline",
    "virtual_pipeline",
    "expert",
    "expert_tensor",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobLayout:
    """How one training job is laid out."""

    n_devices: int
    n_slices: int = 1
    """parts joined by a slower network; divides data, fsdp or pipeline."""
    data: int = 1
    """replicas that share no weights."""
    fsdp: int = 1
    """ways that split both the batch and the states named by zero_stage."""
    fsdp_transpose: int = 1
    """the same, on the feed-forward dimension (MaxText)."""
    tensor: int = 1
    sequence_parallel: bool = False
    """norms and residuals are split over the tensor ranks."""
    context: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    """model chunks on each pipeline rank."""
    expert: int = 1
    expert_tensor: int = 1
    """ways that split each expert; 1 where the expert follows no tensor axis of its own."""
    expert_carved: bool = False
    """True where experts reuse the data ranks, False where they have an axis of their own."""
    zero_stage: int = 0
    """0 all replicated over data; 1 optimizer state, 2 gradients, 3 weights sharded as well."""
    seq_len: int | None = None
    global_batch: int | None = None
    """sequences in one optimizer step."""
    micro_batch: float | None = None
    """sequences of one data-parallel rank in one forward pass."""
    grad_accum: int = 1
    remat: str = "full"
    """none | dots | attention | full | custom."""
    remat_detail: tuple[tuple[str, str], ...] = ()
    """(tensor or module, "device" | "offload" | "recompute"), where remat is custom; or
    (a source's own words, "as said")."""
    precision: str = "bf16"
    """type of the large matrix products."""

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        for name in ("n_devices", "n_slices", "grad_accum", *_DEGREES):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise MeshwrightError(f"layout {name}={value!r} is not a whole number from 1 on")
        for name, kind in (("seq_len", int), ("global_batch", int), ("micro_batch", int | float)):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, kind) and value > 0):
                raise MeshwrightError(f"layout {name}={value!r} is not a number above 0")
        if self.product() != self.n_devices:
            degrees = " · ".join(
                f"{n} {getattr(self, n)}" for n in self.axes() if self.axes()[n] > 1
            )
            raise MeshwrightError(
                f"the degrees ({degrees or 'all 1'}) multiply to {self.product()} and the job has "
                f"{self.n_devices} devices; change one of them"
            )
        if self.expert_carved and self.ranks_for_experts() % self.expert:
            raise MeshwrightError(
                f"{self.expert} expert ranks cannot be carved from {self.ranks_for_experts()} "
                "data and context ranks; choose a divisor"
            )
        if self.zero_stage not in (0, 1, 2, 3):
            raise MeshwrightError(f"zero_stage={self.zero_stage} is not one of 0, 1, 2, 3")
        if self.remat not in REMATS:
            raise MeshwrightError(f"remat={self.remat!r} is not one of {', '.join(REMATS)}")

    def axes(self) -> dict[str, int]:
        """The degrees that take devices."""
        names = [n for n in _DEGREES if n not in ("virtual_pipeline", "expert_tensor", "expert")]
        axes = {name: getattr(self, name) for name in names}
        if not self.expert_carved:
            axes["expert"] = self.expert
        return axes

    def product(self) -> int:
        total = 1
        for size in self.axes().values():
            total *= size
        return total

    def ranks_for_experts(self) -> int:
        return self.data * self.fsdp * self.fsdp_transpose * self.context * self.tensor

    def batch_ranks(self) -> int:
        """Ways that split the batch."""
        own = 1 if self.expert_carved else self.expert
        return self.data * self.fsdp * self.fsdp_transpose * own


def to_json(layout: JobLayout) -> str:
    return json.dumps({"schema": _SCHEMA, **dataclasses.asdict(layout)}, indent=1) + "\n"


def from_json(text: str) -> JobLayout:
    """Reads what to_json wrote.

    Raises:
        MeshwrightError: not JSON, another schema, unknown or missing fields.
    """
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        raise MeshwrightError(f"the layout is not JSON ({error}); export it again") from error
    if not isinstance(raw, dict) or raw.pop("schema", None) != _SCHEMA:
        raise MeshwrightError(f"the layout is not of schema {_SCHEMA}; export it again")
    known = {f.name for f in dataclasses.fields(JobLayout)}
    unknown = sorted(set(raw) - known)
    if unknown or "n_devices" not in raw:
        raise MeshwrightError(
            f"the layout has unknown fields {unknown} or lacks n_devices; export it again"
        )
    raw["remat_detail"] = tuple((str(a), str(b)) for a, b in raw.get("remat_detail", ()))
    return JobLayout(**raw)


def layout_of_case(row: dict[str, str]) -> JobLayout:
    """An expert's configuration from a row with the columns of hand_tuned_cases.csv.

    Raises:
        MeshwrightError: a degree is missing, ambiguous, or does not multiply to the devices.
    """
    if not row.get("n_devices"):
        raise MeshwrightError(f"case {row.get('case_id')!r} names no number of devices")
    family = row.get("family") or ""
    own_expert = family.startswith(("maxtext", "NVIDIA JAX", "axlearn", "t5x"))
    data, fsdp = _whole(row, "dp"), _whole(row, "fsdp")
    titan = family.startswith(("torchtitan", "paper: Gemma"))
    if fsdp > 1 and not own_expert and not titan:
        # These tables write the FSDP group as a part of the data ranks.
        if data % fsdp:
            raise MeshwrightError(
                f"case {row.get('case_id')!r} has fsdp={fsdp}, which does not divide dp={data}"
            )
        data //= fsdp
    megatron = not own_expert and not titan
    transpose, context, expert = (_whole(row, k) for k in ("fsdp_transpose", "cp", "ep"))
    # MaxText and axlearn shard weights over their expert and context axes too.
    weights = fsdp * transpose * (context * expert if own_expert else 1)
    own = expert if own_expert else 1
    total, accumulation = _optional(row, "global_batch_seqs"), _whole(row, "grad_accum")
    micro = _float(row, "micro_batch_seqs")
    if micro is None and total is not None:
        micro = total / (data * fsdp * transpose * own * accumulation)
    remat, detail = _remat(row.get("remat") or "")
    return JobLayout(
        n_devices=_whole(row, "n_devices"),
        n_slices=_whole(row, "n_slices"),
        data=data,
        fsdp=fsdp,
        fsdp_transpose=transpose,
        tensor=_whole(row, "tp"),
        sequence_parallel=row.get("sp_norm") == "on",
        context=context,
        pipeline=_whole(row, "pp"),
        virtual_pipeline=_whole(row, "vpp"),
        expert=expert,
        expert_tensor=_whole(row, "etp"),
        expert_carved=not own_expert and expert > 1,
        zero_stage=3 if weights > 1 else 1 if megatron and data > 1 else 0,
        seq_len=_optional(row, "seq_len"),
        global_batch=total,
        micro_batch=micro,
        grad_accum=accumulation,
        remat=remat,
        remat_detail=detail,
        precision=_precision(row.get("precision") or "bf16"),
    )


def _whole(row: dict[str, str], key: str) -> int:
    text = (row.get(key) or "1").strip()
    try:
        value = float(text)
    except ValueError:
        raise MeshwrightError(
            f"case {row.get('case_id')!r} has {key}={text!r}; give one whole number"
        ) from None
    if not 1 <= value < 2**53 or value != int(value):
        raise MeshwrightError(f"case {row.get('case_id')!r} has {key}={text!r}; give one from 1 on")
    return int(value)


def _optional(row: dict[str, str], key: str) -> int | None:
    return _whole(row, key) if (row.get(key) or "").strip() else None


def _float(row: dict[str, str], key: str) -> float | None:
    try:
        return float(row.get(key) or "")
    except ValueError:
        return None


def _precision(words: str) -> str:
    """bf16 | fp16 | fp8 | fp8_full | mxfp8 | nvfp4 | int8: the type of the large products."""
    for mark, name in (
        ("mx", "mxfp8"),
        ("nvfp4", "nvfp4"),
        ("int8", "int8"),
        ("fp8_full", "fp8_full"),
        ("fp8", "fp8"),
        ("fp16", "fp16"),
    ):
        if mark in words:
            return name
    return "bf16"


def _remat(text: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The words that the table's sources use, as a policy."""
    words = text.lower().split("[")[0].strip()
    placed = tuple(
        (tensor.strip(), place)
        for tensors, place in re.findall(r"([\w,]+)=(offload|device)", words)
        for tensor in tensors.split(",")
    )
    if placed and words.startswith("custom"):
        return "custom", placed
    if words.startswith("selective:"):
        modules = tuple((m.strip(), "recompute") for m in words[10:].split(","))
        return "custom", modules
    if words.startswith("selective"):
        return "attention", ()
    if words.startswith(("none", "not stated")) or not words:
        return "none", ()
    if words.startswith(("minimal", "dots", "save_dot")):
        return "dots", ()
    if words.startswith("full"):
        return "full", ()
    return "custom", ((text, "as said"),)


def changed(before: JobLayout, after: JobLayout) -> dict[str, tuple[Any, Any]]:
    """Fields that differ."""
    return {
        f.name: (getattr(before, f.name), getattr(after, f.name))
        for f in dataclasses.fields(JobLayout)
        if getattr(before, f.name) != getattr(after, f.name)
    }
