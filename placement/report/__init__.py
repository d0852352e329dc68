"""One self-contained HTML page about a plan."""

from placement.report.data import (
    CandidateRow,
    CheckRow,
    CostRow,
    Event,
    MemoryPart,
    MemoryPoint,
    MeshAxis,
    ParetoRow,
    PhysicalAxis,
    ReportData,
    Span,
    TensorRow,
)
from placement.report.page import render, write

__all__ = [
    "CandidateRow",
    "CheckRow",
    "CostRow",
    "Event",
    "MemoryPart",
    "MemoryPoint",
    "MeshAxis",
    "ParetoRow",
    "PhysicalAxis",
    "ReportData",
    "Span",
    "TensorRow",
    "render",
    "write",
]
