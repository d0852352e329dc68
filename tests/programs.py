"""Small train steps in many styles, for tests that run the same program planned and unplanned.

PROGRAMS maps a name to a function returning (train_step, args, donate_argnums). The donated
arguments come first, the results that replace them come first too, and the last result is the loss
or a dict that holds it. All dimensions that matter divide by 8; everything runs in float32 unless
its name says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import programs_layers
import programs_libraries
import programs_plain

PROGRAMS: dict[str, Callable[[], tuple[Callable, tuple, tuple[int, ...]]]] = {
    **programs_plain.PROGRAMS,
    **programs_layers.PROGRAMS,
    **programs_libraries.PROGRAMS,
}


def loss_of(results: tuple) -> Any:
    """Scalar loss in the results of one step."""
    last = results[-1]
    return last["loss"] if isinstance(last, dict) else last


def next_args(args: tuple, donate_argnums: tuple[int, ...], results: tuple) -> tuple:
    """Arguments of the following step, on the same batch."""
    n = len(donate_argnums)
    return (*results[:n], *args[n:])
