"""When cyclic garbage is looked for. A full collection visits every object of the process, which
takes as long as tracing a small program; the objects that planning makes nearly all stay."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Puts off the collection of cyclic garbage. Part of what this saves is spent later, by the
    next collection."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def settle() -> None:
    """Collect the garbage there is, and leave what survives out of later collections: for a process
    that starts on the next of several problems."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()
