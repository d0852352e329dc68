"""What a launch shows while it trains, and at its end."""

from __future__ import annotations

import pathlib
import statistics
from typing import Any

from placement.experiments import _summary
from placement.report import words


class Progress:
    """A bar, a line at each evaluation, and a summary. A context manager."""

    def __init__(self, steps: int, out: pathlib.Path, *, shown: bool) -> None:
        """shown: False in all processes of a job but one."""
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeRemainingColumn,
        )
        from rich.progress import (
            Progress as Bar,
        )

        self._steps, self._out, self._shown = steps, out, shown
        self._console = _summary.console()
        self._bar = Bar(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[said]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not (shown and self._console.is_terminal),
        )
        self._task = self._bar.add_task("", total=steps, said="")
        self._rows: list[dict[str, Any]] = []

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._bar.stop()
        if kind is None:
            self._summary()

    def say(self, *lines: str) -> None:
        if self._shown:
            for line in lines:
                self._console.print(line)

    def start(self, step: int) -> None:
        """Hears the step that a run goes on from."""
        self._bar.update(self._task, completed=step)
        if step:
            self.say(f"going on from the checkpoint of step {step}")

    def row(self, row: dict[str, Any]) -> None:
        """Hears of one step."""
        self._rows.append(row)
        self._bar.update(self._task, completed=row["step"], said=f"loss {row['loss']:.3f}")
        if "eval_loss" in row:
            self.say(
                f"step {row['step']}  loss {row['loss']:.4f}  held-out {row['eval_loss']:.4f}  "
                f"{row['tokens_per_s']:,.0f} tokens/s"
            )

    def _summary(self) -> None:
        if not self._rows:
            self.say(f"all {self._steps} steps were done before: see {self._out}")
            return
        last = self._rows[-1]
        # The first step compiles.
        later = self._rows[1:] or self._rows
        time_s, mfu, rate = (
            statistics.median(row[key] for row in later)
            for key in ("step_time_s", "mfu", "tokens_per_s")
        )
        self.say(
            f"  step time   {words.seconds(time_s)} measured, "
            f"{words.seconds(last['predicted_step_time_s'])} predicted",
            f"  throughput  {rate:,.0f} tokens per second measured, "
            f"{last['predicted_tokens_per_s']:,.0f} predicted",
            f"  MFU         {100 * mfu:.2f} % measured, {100 * last['predicted_mfu']:.2f} % "
            "predicted",
        )
        if last["energy_j"] is None:
            self.say("  energy      not estimated: the power of this device is not published")
        else:
            self.say(
                f"  energy      {words.quantity(last['energy_j'], 'J')} a step from its time, "
                f"{words.quantity(last['predicted_energy_j'], 'J')} predicted"
            )
        self.say(f"wrote {self._out}")
