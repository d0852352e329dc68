"""Batches of a text, in an order that a seed and a position give, put on the devices ahead of use.

The text is cut into windows of S + 1 bytes that overlap in one (an encoder's inputs come before, so
2 S + 1). Epoch e visits them in the order of a permutation drawn from (seed, e); the position is
the number of windows taken since the start, so that it alone resumes the stream.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from graphs.errors import MeshwrightError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batches:
    """The batches of one text."""

    text: np.ndarray
    """[n] uint8."""
    names: tuple[str, ...]
    """inputs and targets, with encoder_inputs for an encoder-decoder."""
    global_batch: int
    """B, windows of a batch."""
    seq_len: int
    """S, tokens of a window."""
    seed: int

    def __post_init__(self) -> None:
        if self.n_windows < 1:
            raise MeshwrightError(
                f"the text has {len(self.text)} bytes and one window takes {self._reach + 1}; "
                "use a shorter train.seq_len or a longer text"
            )

    @property
    def _reach(self) -> int:
        return self.seq_len * (2 if "encoder_inputs" in self.names else 1)

    @property
    def n_windows(self) -> int:
        """Windows of an epoch."""
        return (len(self.text) - 1) // self._reach

    def at(self, position: int) -> dict[str, np.ndarray]:
        """[B, S] int32 each: the batch after ``position`` windows."""
        numbers = np.arange(position, position + self.global_batch)
        epochs, places = numbers // self.n_windows, numbers % self.n_windows
        windows = np.empty(self.global_batch, np.int64)
        for epoch in np.unique(epochs):
            order = np.random.default_rng((self.seed, int(epoch))).permutation(self.n_windows)
            windows[epochs == epoch] = order[places[epochs == epoch]]
        starts = windows * self._reach
        tokens = self.text[starts[:, None] + np.arange(self._reach + 1)].astype(np.int32)
        s = self.seq_len
        parts = {"inputs": tokens[:, -s - 1 : -1], "targets": tokens[:, -s:]}
        if "encoder_inputs" in self.names:
            parts["encoder_inputs"] = tokens[:, :s]
        return {name: parts[name] for name in self.names}


def on_devices(batch: Mapping[str, np.ndarray], shardings: Mapping[str, Any]) -> dict[str, Any]:
    """The batch as global arrays; each process copies only what its own devices hold."""
    import jax

    return {
        name: jax.make_array_from_callback(
            values.shape, shardings[name], lambda index, values=values: values[index]
        )
        for name, values in batch.items()
    }


class Prefetch:
    """Makes the next items in a thread while the last is used. A context manager."""

    def __init__(self, make: Callable[[int], Any], numbers: range, ahead: int = 1) -> None:
        self._make, self._numbers = make, numbers
        self._made: queue.Queue = queue.Queue(maxsize=ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)

    def __enter__(self) -> Prefetch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def __iter__(self) -> Iterator[Any]:
        """Items in order; an error of the thread is raised where its item was due."""
        for _ in self._numbers:
            item, error = self._made.get()
            if error is not None:
                raise error
            yield item

    def _work(self) -> None:
        for number in self._numbers:
            try:
                made = (self._make(number), None)
            except Exception as error:  # handed to the consumer, which raises it
                made = (None, error)
            while not self._stop.is_set():
                try:
                    self._made.put(made, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if self._stop.is_set() or made[1] is not None:
                return
