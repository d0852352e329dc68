"""Flags for the verbs that take files, with errors of one sentence."""

from __future__ import annotations

import argparse
import os
import pathlib
import tempfile
from typing import NoReturn

from graphs.errors import MeshwrightError


class Parser(argparse.ArgumentParser):
    """Raises instead of printing a usage and leaving."""

    def error(self, message: str) -> NoReturn:
        raise MeshwrightError(f"{self.prog}: {message} (--help lists the options)")


def parser(verb: str, doc: str | None) -> Parser:
    return Parser(
        prog=f"meshwright {verb}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def check_writable(path: str) -> None:
    """Finds out before the work that its result could not be kept.

    Raises:
        MeshwrightError: the folder cannot be written.
    """
    writable_folder(os.path.dirname(os.path.abspath(path)))


def writable_folder(name: str | os.PathLike[str]) -> pathlib.Path:
    """The folder, made where it is missing.

    Raises:
        MeshwrightError: it cannot be made or written.
    """
    folder = pathlib.Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise _refused(str(name), error) from error
    return folder


def write_text(path: str, text: str) -> None:
    """Writes a file whole or not at all.

    Raises:
        MeshwrightError: the folder cannot be written.
    """
    folder = os.path.dirname(os.path.abspath(path))
    try:
        os.makedirs(folder, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=folder, suffix=".part")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as out:
                out.write(text)
            os.chmod(partial, 0o644)
            os.replace(partial, path)
        except BaseException:
            os.unlink(partial)
            raise
    except OSError as error:
        raise _refused(path, error) from error


def _refused(path: str, error: OSError) -> MeshwrightError:
    return MeshwrightError(
        f"{path!r} cannot be written ({error.strerror}); "
        "give a path in a folder that can be written and has room"
    )
