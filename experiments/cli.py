"""meshwright: plans how a training step is laid out over a cluster.

usage: meshwright VERB [KEY=VALUE …]
       meshwright VERB --help
       meshwright --version
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.util
import os
import sys

from graphs.errors import MeshwrightError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verb:
    """One command; its work is ``main(argv) -> exit status`` of a module of this package."""

    name: str
    module: str
    does: str
    """one line for the list of verbs."""


_ALL = (
    Verb(name="plan", module="plan", does="plan a training step for a cluster"),
    Verb(name="verify", module="verify", does="compile a plan with XLA and compare"),
    Verb(name="report", module="report", does="draw a plan as one HTML page"),
    Verb(name="export", module="export", does="write a plan as flags of another framework"),
    Verb(name="import", module="import_", does="read another framework's flags back"),
    Verb(name="launch", module="launch", does="train under a plan on the devices that are there"),
    Verb(name="evaluate", module="evaluate", does="score optimizers over a suite of cases"),
    Verb(name="validate", module="validate", does="predict published runs and report the error"),
    Verb(name="energy", module="energy", does="predict published energy figures"),
    Verb(name="fidelity", module="fidelity", does="write how far the cost models are off"),
    Verb(name="profile", module="profile", does="measure a device's operators"),
    Verb(name="train_policy", module="train_policy", does="train the learned optimizer"),
    Verb(name="solve", module="solve", does="solve a table problem in the contest's format"),
    Verb(name="devices", module="devices", does="list accelerators, their shapes and numbers"),
)

VERBS = tuple(v for v in _ALL if importlib.util.find_spec(f"{__package__}.{v.module}"))
"""Those whose module is part of this installation."""


_ON_DEVICES = frozenset(["launch", "profile", "train_policy"])
"""Verbs that use the accelerators of the machine they run on; the others only plan for some."""


def main(argv: list[str] | None = None) -> int:
    """Runs one verb and returns the exit status: 0 only where the work was done."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    show_traceback = "--traceback" in arguments or os.environ.get("MESHWRIGHT_TRACEBACK") == "1"
    arguments = [a for a in arguments if a != "--traceback"]
    try:
        return _run(arguments)
    except MeshwrightError as error:
        if show_traceback:
            raise
        return _fail(_one_line(error))
    except SystemExit as leaving:
        # argparse leaves so after --help, and where a verb's own parser refuses its arguments.
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except KeyboardInterrupt:
        return _fail("interrupted", status=130)
    except BrokenPipeError:
        # The reader of our output went away (``| head``): nothing left to say, nor to flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if show_traceback:
            raise
        place = f" {str(error.filename)!r}" if error.filename else ""
        return _fail(f"the system refused{place}: {error.strerror or _one_line(error)}")
    except Exception as error:
        if show_traceback:
            raise
        return _fail(
            f"unexpected {type(error).__name__}: {_one_line(error)} "
            "(run again with --traceback to see where)"
        )


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"meshwright {version('meshwright')}")
        return 0
    return int(find_verb(arguments[0])(arguments[1:]) or 0)


def find_verb(name: str):
    """The ``main`` of a verb; an unknown name is an error that suggests the nearest."""
    verb = next((v for v in VERBS if name in (v.name, v.name.replace("_", "-"))), None)
    if verb is None:
        near = difflib.get_close_matches(name, [v.name for v in VERBS], n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise MeshwrightError(
            f"unknown verb {name!r}: {hint}choose one of {', '.join(v.name for v in VERBS)}"
        )
    if verb.name not in _ON_DEVICES:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # JAX would take libtpu from the compiler
    return importlib.import_module(f"{__package__}.{verb.module}").main


def usage() -> str:
    width = max(len(v.name) for v in VERBS)
    lines = [f"  {v.name:<{width}}  {v.does}" for v in VERBS]
    return "\n".join(
        [
            (__doc__ or "").strip(),
            "",
            "verbs:",
            *lines,
            "",
            "An error is one sentence; --traceback (or MESHWRIGHT_TRACEBACK=1) shows where.",
        ]
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _fail(sentence: str, *, status: int = 1) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
