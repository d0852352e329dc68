"""Where compiled results and compiler environments are kept, and who may use libtpu.

The directory is ``$MESHWRIGHT_CACHE_DIR`` or ``~/.cache/meshwright``. Every file is written beside
its place and renamed, so that a killed process leaves either the old file or the new one, and two
processes that compile the same program write the same bytes.
"""

from __future__ import annotations

import contextlib
import contextvars
import fcntl
import gzip
import hashlib
import json
import os
import pathlib
import threading
import uuid
from collections.abc import Iterator
from typing import IO, Any

from graphs.errors import MeshwrightError

_HELD: contextvars.ContextVar[IO[bytes] | None] = contextvars.ContextVar("libtpu", default=None)

LAYOUT_VERSION = 1
"""Of the cached entries; a change of what they hold changes every key."""


def cache_dir(*parts: str) -> pathlib.Path:
    """A folder of the cache, made if it is not there. MeshwrightError where it cannot be."""
    root = os.environ.get("MESHWRIGHT_CACHE_DIR")
    base = pathlib.Path(root).expanduser() if root else pathlib.Path.home() / ".cache/meshwright"
    folder = base.joinpath(*parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MeshwrightError(
            f"the cache folder {folder} cannot be made ({error.strerror}); "
            "set MESHWRIGHT_CACHE_DIR to a folder that can be written"
        ) from error
    return folder


def key_of(parts: dict[str, Any]) -> str:
    """A hexadecimal key of JSON-able facts."""
    text = json.dumps({"layout": LAYOUT_VERSION, **parts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def load_entry(folder: pathlib.Path, key: str) -> dict[str, Any] | None:
    """The entry of this key, None if there is none or it is damaged (then it is made again)."""
    try:
        return json.loads((folder / f"{key}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def store_entry(folder: pathlib.Path, key: str, entry: dict[str, Any]) -> None:
    write_atomically(folder / f"{key}.json", json.dumps(entry, indent=1).encode())


def store_text(path: pathlib.Path, text: str) -> None:
    """Gzip-compressed text, atomically."""
    write_atomically(path, gzip.compress(text.encode(), compresslevel=4, mtime=0))


def load_text(path: pathlib.Path) -> str:
    """Text that store_text wrote. MeshwrightError if it is missing or damaged."""
    try:
        return gzip.decompress(path.read_bytes()).decode()
    except (OSError, EOFError, ValueError) as error:
        raise MeshwrightError(
            f"the cached module text {path} cannot be read ({error}); "
            "delete it and its .json and compile again"
        ) from error


def write_atomically(path: pathlib.Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise MeshwrightError(
            f"{path} cannot be written ({error.strerror}); free some space or set "
            "MESHWRIGHT_CACHE_DIR to a folder that can be written"
        ) from error


@contextlib.contextmanager
def libtpu_lock(timeout_s: float = 3600.0) -> Iterator[IO[bytes]]:
    """Hold the right to use libtpu: two processes that load it at once collide.

    The file that is yielded can be handed to a child (``pass_fds``); the lock then lives as long as
    the child does, even if this process is killed. Inside of a held lock the same one is given, so
    a caller with several compiles can hold it over all of them.
    """
    held = _HELD.get()
    if held is not None:
        yield held
        return
    path = cache_dir() / "libtpu.lock"
    wait = _Wait(open(path, "ab"))
    thread = threading.Thread(target=wait.run, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if not wait.take():
        raise MeshwrightError(
            f"other processes have used libtpu for over {timeout_s:.0f} s "
            f"(lock {path}); wait for them or end them"
        )
    token = _HELD.set(wait.file)
    try:
        with wait.file:  # closing the last descriptor unlocks, also a child's
            yield wait.file
    finally:
        _HELD.reset(token)


class _Wait:
    """A blocking lock, which the kernel grants in turn, waited for with a limit."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.guard = threading.Lock()
        self.locked = self.abandoned = False

    def run(self) -> None:
        fcntl.flock(self.file, fcntl.LOCK_EX)
        with self.guard:
            self.locked = True
            if self.abandoned:
                self.file.close()

    def take(self) -> bool:
        """Whether the lock is held; if not, it is let go as soon as it comes."""
        with self.guard:
            self.abandoned = not self.locked
            return self.locked
