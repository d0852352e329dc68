"""The layout as it is, in JSON: loses nothing."""

from __future__ import annotations

from placement.export.layout import JobLayout, from_json, to_json
from placement.export.target import Target


class JsonLayout(Target):
    name = "json"
    suffix = ".json"

    def write(self, layout: JobLayout) -> str:
        return to_json(layout)

    def parse(self, text: str) -> JobLayout:
        return from_json(text)
