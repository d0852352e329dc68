"""meshwright train_policy [KEY=VALUE …]: train the policy of optimizer=learned.

Records what candidates of the training and validation problems are worth (once; it is kept), then
trains: imitation, then reinforcement learning. Leaves metrics.jsonl, curves.png, checkpoints/ and
policy.safetensors in out=; the same command again goes on from the last checkpoint.

examples:
  meshwright train_policy out=out/policy
  meshwright train_policy policy=no_edges out=out/no_edges
  meshwright train_policy policy.seed=1 out=out/seed_1
  meshwright train_policy distributed=true coordinator=localhost:9912 processes=2 process=0
"""

from __future__ import annotations

from typing import Any

from placement.experiments import _devices, _hydra


def main(argv: list[str]) -> int:
    if _hydra.wants_help(argv):
        print(_hydra.help_text(__doc__, "train_policy"))
        return 0
    config = _hydra.compose("train_policy", argv)
    _devices.join(_devices.processes_of(config))
    import jax

    from placement.learned import outcomes, run
    from placement.learned.dataset import load_examples

    settings = _hydra.instantiate(config.policy)
    first = jax.process_index() == 0
    if config.record and first:
        outcomes.main(["split=train", "split=validation"])

    def show(row: dict[str, Any]) -> None:
        if first:
            print(_line(row, settings.epochs), flush=True)

    rows = run.run(
        settings,
        load_examples("train"),
        load_examples("validation"),
        str(config.out),
        on_row=show,
    )
    if first:
        print(f"wrote {config.out}/{run.WEIGHTS} after {rows[-1]['step']} epochs")
    return 0


def _line(row: dict[str, Any], epochs: int) -> str:
    return (
        f"{row['step']}/{epochs} {row['stage']}: loss {row['loss']:.3f}, regret {row['regret']:.1%} "
        f"(of three {row['regret_3']:.1%}), first choice does not fit {row['missed']:.1%}, "
        f"recall of what does not fit {row['infeasible_recall']:.1%}, "
        f"value error {row['value_error']:.3f}; {row['seconds']:.1f} s"
    )
