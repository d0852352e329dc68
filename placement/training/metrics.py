"""What a run measures at each step, beside what the plan predicts.

Model FLOPs of a token, forward and backward (PaLM, arXiv:2204.02311, appendix B):

    6 N + 12 L H Q T

N the parameters that a token meets, L layers, H heads, Q their width, T the tokens that it sees.
MFU is the model FLOPs of a step over what the devices could do at their peak in its time.
Rows go to a file of JSON lines, and those after the step that a run resumes from are dropped.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import statistics
import tempfile
from collections.abc import Sequence
from typing import Any

from graphs.errors import MeshwrightError
from placement.training.appending import append, open_to_append


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yardstick:
    """What turns a step's seconds into rates."""

    tokens: int
    """of a step."""
    model_flops: float
    """of a step."""
    peak_flops_per_s: float
    """of all devices."""
    predicted_step_time_s: float
    predicted_energy_j: float | None
    """None where the device's power is not published."""

    def row(self, step: int, loss: float, step_time_s: float) -> dict[str, Any]:
        """One step as plain numbers."""
        return {
            "step": step,
            "loss": loss,
            "step_time_s": step_time_s,
            "tokens_per_s": self.tokens / step_time_s,
            "mfu": self.model_flops / (step_time_s * self.peak_flops_per_s),
            "energy_j": self._energy_j(step_time_s),
            "predicted_step_time_s": self.predicted_step_time_s,
            "predicted_tokens_per_s": self.tokens / self.predicted_step_time_s,
            "predicted_mfu": self.model_flops
            / (self.predicted_step_time_s * self.peak_flops_per_s),
            "predicted_energy_j": self.predicted_energy_j,
        }

    def _energy_j(self, step_time_s: float) -> float | None:
        """The predicted power for the measured time: no meter is read."""
        if self.predicted_energy_j is None:
            return None
        return self.predicted_energy_j * step_time_s / self.predicted_step_time_s


def model_flops(config: Any, *, active_parameters: int, tokens: int, seq_len: int) -> float:
    """Of a step; attention windows shorten what a token sees."""
    seen = sum(min(kind.window or seq_len, seq_len) for kind in config.layer_kinds())
    seen += config.encoder_layers * seq_len
    attention = 12.0 * config.n_heads * config.head_dim * seen
    return tokens * (6.0 * active_parameters + attention)


class MetricsFile:
    """JSON lines, one a step, in the file as soon as written. A context manager."""

    def __init__(self, path: str | pathlib.Path, *, resumed_step: int, writes: bool = True) -> None:
        """resumed_step: rows after it are dropped. writes: False in all processes but one."""
        path = pathlib.Path(path)
        self._file = None
        if not writes:
            return
        kept = [row for row in read_metrics(path) if row["step"] <= resumed_step]
        try:
            if path.exists():
                _replace(path, "".join(json.dumps(row) + "\n" for row in kept))
        except OSError as error:
            raise MeshwrightError(
                f"{str(path)!r} cannot be written ({error.strerror}); make room or give another "
                "out="
            ) from error
        self._file = open_to_append(path)

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, row: dict[str, Any]) -> None:
        if self._file is not None:
            append(self._file, (json.dumps(row) + "\n").encode())


def read_metrics(path: str | pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; none where there is no file. A line cut short by a kill, which
    can only be the last, is left out."""
    path = pathlib.Path(path)
    if not path.exists():
        return []
    whole = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in whole]


def summary_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Last losses, and medians of what varies from step to step. rows: at least one.

    Steps that begin a process compile; the median passes over them.
    """
    last = rows[-1]
    held_out = [row["eval_loss"] for row in rows if "eval_loss" in row]
    middle = {
        key: statistics.median(row[key] for row in rows)
        for key in ("step_time_s", "tokens_per_s", "mfu")
    }
    predicted = {key: value for key, value in last.items() if key.startswith("predicted_")}
    return {
        "loss": last["loss"],
        "eval_loss": held_out[-1] if held_out else None,
        **middle,
        "energy_j": statistics.median(row["energy_j"] for row in rows)
        if last["energy_j"] is not None
        else None,
        **predicted,
    }


def _replace(path: pathlib.Path, text: str) -> None:
    handle, partial = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            out.write(text)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
