"""Bytes added to a file whole: a disk that fills up may take a part of them without a word."""

from __future__ import annotations

import io
import pathlib

from graphs.errors import MeshwrightError


def open_to_append(path: pathlib.Path) -> io.FileIO:
    """Without a buffer, so that what was written is in the file and closing cannot fail."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return io.FileIO(path, "ab")
    except OSError as error:
        raise MeshwrightError(
            f"{str(path)!r} cannot be written ({error.strerror}); give another out="
        ) from error


def append(file: io.FileIO, content: bytes) -> None:
    """Raises MeshwrightError where the disk does not take all of it."""
    left = memoryview(content)
    try:
        while left:
            left = left[file.write(left) or 0 :]
    except OSError as error:
        raise MeshwrightError(
            f"{str(file.name)!r} cannot be written ({error.strerror}); make room and launch again: "
            "the run goes on from its last checkpoint"
        ) from error
