"""What a report shows, as plain data: no plan, graph or cluster object is needed to draw the page.

Every list may be empty; its section then says that there is nothing to show, or is left out.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhysicalAxis:
    """One axis of the machine as built: a torus dimension, the GPUs of a node, the nodes."""

    name: str
    """short, unique: "x", "y", "z", "gpu", "node", "slice"."""
    size: int
    """devices along the axis, >= 1."""
    network: str
    """what links its neighbours: "ICI", "NVLink", "InfiniBand", "DCN"."""
    wraps: bool = False
    """True where the last device links back to the first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Span:
    """A part of a physical axis given to a logical axis.

    The logical axis moves in steps of ``stride`` devices along physical axis ``physical_axis``,
    ``size`` of them: its coordinate there is ``(p // stride) % size``.
    """

    physical_axis: int
    """index into ReportData.physical_axes."""
    size: int
    stride: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshAxis:
    """One axis of the plan's mesh, and why it is where it is."""

    name: str
    size: int
    spans: tuple[Span, ...]
    """major to minor; the product of their sizes is ``size``."""
    role: str = ""
    """the field's word: "data", "fully-sharded", "tensor", "context", "expert", "pipeline"."""
    why: str = ""
    """one or two sentences."""
    next_best: str = ""
    """the next best choice for this axis and what it would cost."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorRow:
    """One leaf of the step's arguments."""

    name: str
    """path in the pytree: "params/layers/attention/q/kernel"."""
    kind: str
    """"parameter", "optimizer state", "input", "other"."""
    shape: tuple[int, ...]
    dtype: str
    spec: str
    """the PartitionSpec as one would write it: "P('data', None)"."""
    bytes_total: int
    bytes_per_device: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """A stretch of one lane of the step's timeline."""

    lane: str
    """"compute", or the network: "ICI x", "NVLink", "DCN", "stage 2 compute" …"""
    name: str
    start_s: float
    end_s: float
    kind: str = ""
    """colour group: "matmul", "attention", "all-gather", "reduce-scatter" …"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryPoint:
    """Bytes live on one device from this moment to the next point."""

    time_s: float
    live_bytes: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryPart:
    """A share of the peak."""

    name: str
    """"parameters", "optimizer state", "gradients", "activations", "temporaries" …"""
    at_peak_bytes: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostRow:
    """Where time goes: one class of operator, or one kind of collective on one axis."""

    name: str
    """"matmul", "all-gather over data"."""
    kind: str
    """"compute" or "communication"."""
    time_s: float
    """busy time of its lane over the step."""
    exposed_time_s: float
    """the part nothing else hides; equals time_s for compute."""
    n_calls: float = 0
    moved_bytes: float = 0
    """per device; 0 for compute."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CandidateRow:
    """A plan compared: this one, a hand-tuned baseline, or a mesh that the search tried."""

    name: str
    status: str
    """"feasible", or why not in a few words."""
    mesh: str
    """"data 16 × model 16"."""
    step_time_s: float | None
    peak_memory_bytes: float | None
    p10_s: float | None = None
    p90_s: float | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParetoRow:
    """One plan of a front: step time against another objective."""

    name: str
    step_time_s: float
    value: float
    unit: str
    """"J", "g CO2e", "USD", "bytes"."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckRow:
    """A prediction beside what the compiler says."""

    quantity: str
    predicted: float
    compiled: float | None
    unit: str
    """"s", "bytes", "1"."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything on the page."""

    title: str
    """"Llama-3-8B on v5e:16x16"."""
    cluster: str
    device: str
    n_devices: int
    objective: str
    optimizer: str
    status: str
    """"feasible" or the reason why not."""
    step_time_s: float
    compute_time_s: float
    exposed_comm_time_s: float
    peak_memory_bytes: float
    capacity_bytes: float
    planning_time_s: float
    evaluations: int
    lower_bound_s: float | None = None
    p10_s: float | None = None
    p90_s: float | None = None
    energy_j: float | None = None
    tokens_per_step: float | None = None
    mfu: float | None = None
    """0..1, model flops over peak flops."""
    physical_axes: tuple[PhysicalAxis, ...] = ()
    """innermost (fastest network) first; the product of sizes is n_devices."""
    mesh_axes: tuple[MeshAxis, ...] = ()
    """outermost first."""
    tensors: tuple[TensorRow, ...] = ()
    timeline: tuple[Event, ...] = ()
    memory: tuple[MemoryPoint, ...] = ()
    """in order of time."""
    memory_parts: tuple[MemoryPart, ...] = ()
    costs: tuple[CostRow, ...] = ()
    baselines: tuple[CandidateRow, ...] = ()
    searched: tuple[CandidateRow, ...] = ()
    pareto: tuple[ParetoRow, ...] = ()
    checks: tuple[CheckRow, ...] = ()
    explanation: str = ""
    """plan.explain(), shown as it is."""
    warnings: tuple[str, ...] = ()
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    """name to version of what made the plan."""
