"""meshwright import FILE --from TARGET: read another framework's flags back as a layout.

The layout is printed as JSON, or written to --out; ``meshwright export`` writes the file.

example:
  meshwright import job.sh --from megatron
"""

from __future__ import annotations

import sys

from placement.experiments import _arguments


def main(argv: list[str]) -> int:
    from placement import export

    parser = _arguments.parser("import", __doc__)
    parser.add_argument("file", help="what meshwright export, or an engineer, wrote")
    parser.add_argument(
        "--from", dest="source", required=True, help=", ".join(export.target_names())
    )
    parser.add_argument("--out", help="file to write; standard output without it")
    given = parser.parse_args(argv)
    source = export.target(given.source)
    with open(given.file, encoding="utf-8") as opened:
        layout = source.read(opened.read())
    text = export.target("json").write(layout)
    if given.out:
        _arguments.write_text(given.out, text)
        print(f"wrote {given.out}")
    else:
        sys.stdout.write(text)
    return 0
