"""Runs the code blocks of one document, in order, in the current folder.

``python`` blocks share one namespace; one marked ``file=NAME`` is written there instead. Each line
of a ``sh`` block is a ``meshwright`` command and must leave with status 0. Other blocks are text.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import shlex
import sys

BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    language: str
    file: str
    """Where a block marked file=NAME goes; empty for the others."""
    code: str
    line: int


def blocks(path: pathlib.Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        named = re.search(r"file=(\S+)", match[2])
        found.append(
            Block(
                language=match[1],
                file=named[1] if named else "",
                code=match[3],
                line=text[: match.start()].count("\n") + 2,
            )
        )
    return found


def main(path: str) -> None:
    sys.path.insert(0, "")
    from placement.experiments import cli

    namespace: dict[str, object] = {"__name__": "__document__"}
    for block in blocks(pathlib.Path(path)):
        if block.file:
            pathlib.Path(block.file).write_text(block.code, encoding="utf-8")
        elif block.language == "python":
            # Blank lines in front make line numbers of errors those of the document.
            source = "\n" * (block.line - 1) + block.code
            exec(compile(source, path, "exec"), namespace)
        elif block.language == "sh":
            for command in filter(None, block.code.splitlines()):
                program, *arguments = shlex.split(command)
                assert program == "meshwright", f"{path}:{block.line}: {command}"
                status = cli.main([*arguments, "--traceback"])
                assert status == 0, f"{path}:{block.line}: {command} left with {status}"


if __name__ == "__main__":
    main(sys.argv[1])
