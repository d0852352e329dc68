"""Real text that every machine with Python has, as bytes: documents in a fixed order, split.

``documentation`` is the language reference that ``help()`` reads (pydoc_data.topics); ``sources``
is the standard library's own top-level modules; anything else is the path of a text file. Every
tenth document (of a file: the last tenth) is kept for evaluation. Topics quote each other at length,
so a paragraph counts only where it comes first: else half of what is kept would be trained on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import sysconfig

import numpy as np

from graphs.errors import MeshwrightError

VOCABULARY = 256
"""A token is a byte."""
_HELD_OUT_EVERY = 10
_BETWEEN = b"\n\n"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """Bytes to train on and bytes to evaluate on."""

    train: np.ndarray
    """[n] uint8."""
    validation: np.ndarray
    """[m] uint8, of documents that are not in train."""
    fingerprint: str
    """of both; the same text has the same one."""


def load_corpus(name: str) -> Corpus:
    """The corpus of that name, or of the text file at that path.

    Raises MeshwrightError where there is no such text.
    """
    if name == "documentation":
        from pydoc_data.topics import topics

        train, validation = _split(_without_quotes([topics[key] for key in sorted(topics)]))
    elif name == "sources":
        folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
        train, validation = _split([path.read_bytes() for path in sorted(folder.glob("*.py"))])
    else:
        path = pathlib.Path(name)
        if not path.is_file():
            raise MeshwrightError(
                f"text={name!r} is no file: use documentation, sources or the path of a text file"
            )
        content = path.read_bytes()
        cut = len(content) - len(content) // _HELD_OUT_EVERY
        train, validation = content[:cut], content[cut:]
    if not train or not validation:
        raise MeshwrightError(f"text={name!r} holds no text to split; name a longer text")
    digest = hashlib.sha256(train + b"\0" + validation).hexdigest()[:16]
    return Corpus(
        train=np.frombuffer(train, np.uint8),
        validation=np.frombuffer(validation, np.uint8),
        fingerprint=digest,
    )


def _without_quotes(documents: list[str]) -> list[bytes]:
    """The documents without the paragraphs of earlier ones."""
    seen: set[str] = set()
    kept = []
    for document in documents:
        new = [p for p in dict.fromkeys(document.split("\n\n")) if p.strip() not in seen]
        seen.update(p.strip() for p in new)
        if new:
            kept.append("\n\n".join(new).encode())
    return kept


def _split(documents: list[bytes]) -> tuple[bytes, bytes]:
    held_out = documents[_HELD_OUT_EVERY - 1 :: _HELD_OUT_EVERY]
    kept = [d for i, d in enumerate(documents) if i % _HELD_OUT_EVERY != _HELD_OUT_EVERY - 1]
    return _BETWEEN.join(kept), _BETWEEN.join(held_out)
