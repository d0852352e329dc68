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
from placement.report.from_plan import report_data, write_report
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
    "report_data",
    "write",
    "write_report",
]
