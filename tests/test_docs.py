"""Every code block of the documentation runs."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

import pytest
from run_document import blocks

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCUMENTS = sorted((ROOT / "docs").glob("*.md"))
RUN = [d for d in DOCUMENTS if any(b.language in ("python", "sh") for b in blocks(d))]


@pytest.mark.parametrize("document", RUN, ids=lambda d: d.stem)
def test_its_code_runs(document, tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "run_document.py"), str(document)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.parametrize("document", [ROOT / "README.md", *DOCUMENTS], ids=lambda d: d.name)
def test_its_links_lead_somewhere(document):
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)\)", text):
        if "://" not in target:
            assert (document.parent / target).exists(), f"{document.name}: {target}"


@pytest.mark.parametrize("document", [ROOT / "README.md", *DOCUMENTS], ids=lambda d: d.name)
def test_code_blocks_say_what_they_are(document):
    """A block without a language would be skipped in silence."""
    fences = re.findall(r"^```(\S*)", document.read_text(encoding="utf-8"), re.MULTILINE)
    opening = fences[::2]
    assert all(f in ("python", "sh", "text", "") for f in opening), opening
    if document.name != "architecture.md":
        assert "" not in opening
