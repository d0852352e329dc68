"""meshwright solve FILE[.gz] --timeout SECONDS: solve a table problem in the contest's format.

Prints progress (cost, lower bound, gap) and, as its last line, the chosen strategy of every node as
a list, or [] after a line with the reason. The timeout counts from the start of the program.

examples:
  meshwright solve instance.json.gz --timeout 60
  meshwright solve instance.json --timeout 10 --optimizer exact
"""

from __future__ import annotations

import functools

from placement.experiments import _arguments
from placement.solver import contest


def main(argv: list[str]) -> int:
    parser = _arguments.parser("solve", __doc__)
    parser.add_argument("file", help="instance, .json or .json.gz")
    parser.add_argument("--timeout", type=float, required=True, metavar="SECONDS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--optimizer", default="search", help=f"one of {', '.join(contest.OPTIMIZERS)}"
    )
    given = parser.parse_args(argv)
    return contest.solve_file(
        given.file,
        timeout_s=given.timeout,
        seed=given.seed,
        optimizer=given.optimizer,
        say=functools.partial(print, flush=True),
    )
