"""meshwright train_policy [KEY=VALUE …]: train the policy of optimizer=learned.

Records what candidates of the training and validation problems are worth, trains a first policy and
adds what it visits (each once; it is kept), then trains: imitation, then reinforcement learning.
Leaves metrics.jsonl, curves.png, checkpoints/ and policy.safetensors in out=; the same command again
goes on from the last checkpoint.

With compiled=FOLDER the shipped weights go on instead, and XLA's schedules are the reward: candidates
of small programs are compiled (FOLDER/records), the policy is trained on them, and the plans that it
and the shipped one lead to on other programs are compiled and compared (FOLDER/compiler.json,
compiler.png).

examples:
  meshwright train_policy out=out/policy
  meshwright train_policy policy=no_edges out=out/no_edges
  meshwright train_policy policy.seed=1 out=out/seed_1
  meshwright train_policy policy=compiler compiled=out/compiled out=out/compiled/policy
  meshwright train_policy distributed=true coordinator=localhost:9912 processes=2 process=0
"""

from __future__ import annotations

import pathlib
from typing import Any

from graphs.errors import MeshwrightError
from placement.experiments import _devices, _hydra

_SPLITS = ("train", "validation")


def main(argv: list[str]) -> int:
    if _hydra.wants_help(argv):
        print(_hydra.help_text(__doc__, "train_policy"))
        return 0
    config = _hydra.compose("train_policy", argv)
    processes = _devices.processes_of(config)
    if processes is not None and (config.record or config.visit):
        raise MeshwrightError(
            "several processes train on what is recorded: run once with one process, then add "
            "record=false visit=0"
        )
    _devices.join(processes)
    from placement.learned import collect, outcomes
    from placement.learned.run import WEIGHTS

    out = pathlib.Path(str(config.out))
    if config.compiled:
        return _on_schedules(config, pathlib.Path(str(config.compiled)), out)
    if config.record:
        outcomes.main([f"split={s}" for s in _SPLITS])
    if config.visit and not all(collect.visited(s, "explorer") for s in _SPLITS):
        _train(config.explorer, out / "explorer", visited=False)
        weights = out / "explorer" / WEIGHTS
        for split in _SPLITS:
            collect.main([f"policy={weights}", f"evaluations={config.visit}", f"split={split}"])
    _train(config.policy, out, visited=True)
    return 0


def _on_schedules(config: Any, folder: pathlib.Path, out: pathlib.Path) -> int:
    """The second stage: train on compiled candidates, and compare compiled plans."""
    from placement.learned import compiled_outcomes, compiled_report
    from placement.learned.policy import load_policy
    from placement.learned.problems import COMPILED
    from placement.learned.run import WEIGHTS

    if config.record:
        for split in COMPILED:
            compiled_outcomes.main([f"split={split}", f"out={folder}"])
    examples = [compiled_outcomes.load_examples(folder, s) for s in list(COMPILED)[:2]]
    _fit(config.policy, out, *examples)
    start = str(config.policy.start) or "learned"
    policies = {"before": load_policy(start), "after": load_policy(str(out / WEIGHTS))}
    for line in compiled_report.lines(compiled_report.write(folder, policies, config.judged)):
        print(line)
    return 0


def _train(node: Any, out: pathlib.Path, *, visited: bool) -> None:
    from placement.learned.dataset import load_examples

    _fit(node, out, *(load_examples(s, visited=visited) for s in _SPLITS))


def _fit(node: Any, out: pathlib.Path, training: Any, validation: Any) -> None:
    import jax

    from placement.learned.run import WEIGHTS, run

    settings = _hydra.instantiate(node)
    shown = jax.process_index() == 0

    def show(row: dict[str, Any]) -> None:
        if shown:
            print(_line(row, settings.epochs), flush=True)

    rows = run(settings, training, validation, out, on_row=show)
    if shown:
        print(f"wrote {out / WEIGHTS} after {rows[-1]['step']} epochs")


def _line(row: dict[str, Any], epochs: int) -> str:
    return (
        f"member {row['member']}, {row['step']}/{epochs} {row['stage']}: loss {row['loss']:.3f}, "
        f"regret {row['regret']:.1%} (of three {row['regret_3']:.1%}), "
        f"first choice does not fit {row['missed']:.1%}, "
        f"recall of what does not fit {row['infeasible_recall']:.1%}, "
        f"value error {row['value_error']:.3f}; {row['seconds']:.1f} s"
    )
