"""How good first choices are on recorded candidates, for policies side by side.

    python benchmarks/policy_validation.py name=WEIGHTS ... [split=validation] [out=FILE.csv]

``closed_form`` ranks by the closed form alone, ``untrained`` is the network before training; both
are always in the table.
"""

from __future__ import annotations

import csv
import io
import pathlib
import sys

import numpy as np

from placement.compile_cache import write_atomically
from placement.learned import forward
from placement.learned.blinding import blinded
from placement.learned.dataset import batches, load_examples
from placement.learned.policy import load_policy
from placement.learned.scoring import report


def heads_of(policy, example):
    arrays = blinded(example.arrays, edges=policy.edges, mesh=policy.mesh)
    found = policy.heads(arrays)
    return [x[example.index] for x in (found.preference, found.fit, found.value)]


def closed_form(example):
    a = example.arrays
    return [x[example.index] for x in (-3.0 * a.estimate, -3.0 * a.pressure, a.estimate)]


def row(name, say, examples):
    pairs = []
    for e in examples:
        (batch,) = batches([e], 1)
        width = batch.recorded.shape[1]
        said = [np.pad(x, (0, width - len(x)))[None] for x in say(e)]
        pairs.append((batch, forward.Heads(preference=said[0], fit=said[1], value=said[2])))
    return {"policy": name} | {k: round(v, 4) for k, v in report(pairs).items()}


def main(argv):
    given = dict(a.split("=", 1) for a in argv)
    out, split = given.pop("out", None), given.pop("split", "validation")
    examples = load_examples(split)
    rows = [row("closed_form", closed_form, examples)]
    for name in ("untrained", *given):
        policy = load_policy(given.get(name, name))
        rows.append(row(name, lambda e, p=policy: heads_of(p, e), examples))
    text = io.StringIO()
    table = csv.DictWriter(text, rows[0], lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    print(text.getvalue(), end="")
    if out:
        write_atomically(pathlib.Path(out), text.getvalue().encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
