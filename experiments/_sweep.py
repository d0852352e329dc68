"""Several launches at once: ``meshwright launch --multirun optimizer=fsdp,zero1 out=out/sweep``.

Hydra expands the values and hands each job to its launcher: one after another here (``basic``),
side by side (``hydra/launcher=parallel``) or to SLURM (``hydra/launcher=slurm``). A job is a
process of its own, because the number of devices is settled once in a process. Its folder is named
after the values that vary, so that the same command again leaves alone what is finished, goes on
with what was cut short and starts what is missing.
"""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from placement.experiments import _arguments, _hydra

FLAGS = ("--multirun", "-m")
RESULT = "result.json"
_QUIET = ("hydra/job_logging=none", "hydra/hydra_logging=none")
"""Jobs keep logs of their own; Hydra setting up logging anew would close other handlers' streams."""
_UNNAMED = "all"
"""The folder of a job where nothing varies."""


def wanted(argv: Sequence[str]) -> bool:
    return any(text in FLAGS for text in argv)


def run(argv: list[str]) -> int:
    """Runs every combination; 0 where all of them are finished."""
    overrides = _hydra.sweep_overrides([text for text in argv if text not in FLAGS])
    out = _out_of(overrides)
    fixed, names = _combinations(overrides)
    _call_hydra(
        [*overrides, *_QUIET, f"hydra.job.config.override_dirname.exclude_keys={_listed(fixed)}"]
    )
    rows = [{"name": name} | (read_result(out / name) or {}) for name in names]
    from placement.experiments import _summary

    _summary.console().print(table(rows))
    return 0 if all("loss" in row for row in rows) else 1


def job(config: Any) -> int:
    """One combination, as Hydra's launcher calls it: here, or on a node of a cluster."""
    from hydra.core.hydra_config import HydraConfig

    known = HydraConfig.get()
    folder = pathlib.Path(config.out).absolute() / folder_name(known.job.override_dirname)
    given = [t for t in known.overrides.task if t.lstrip("+").split("=")[0] != "out"]
    if finished(folder, given):
        print(f"{folder.name}: finished before", flush=True)
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{folder.name}: running, see {folder / 'log.txt'}", flush=True)
    command = [sys.executable, "-m", "placement.experiments.cli", "launch", *given]
    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        status = subprocess.run(
            [*command, f'out="{folder}"'], stdout=log, stderr=subprocess.STDOUT, check=False
        ).returncode
    print(f"{folder.name}: {'finished' if status == 0 else 'failed'}", flush=True)
    return status


def folder_name(varied: str) -> str:
    """``optimizer=fsdp,seed=1`` without what shells and file systems mind."""
    short = varied.replace("cluster.notation=", "cluster=")
    return re.sub(r"[^A-Za-z0-9=,.:_+-]", "", short.replace("*", "x")) or _UNNAMED


def finished(folder: pathlib.Path, overrides: Sequence[str]) -> bool:
    """Whether the folder holds the result of just these overrides."""
    result = read_result(folder)
    return result is not None and result.get("overrides") == list(overrides)


def read_result(folder: pathlib.Path) -> dict[str, Any] | None:
    """What a finished launch left; None where there is nothing whole."""
    try:
        content = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def table(rows: Sequence[dict[str, Any]]) -> Any:
    """The jobs of a sweep, the lowest held-out loss first."""
    from rich.table import Table

    from placement.report import words

    shown = Table(title="the sweep", title_justify="left")
    shown.add_column("run", no_wrap=True)
    for head in ("steps", "loss", "held-out", "step time", "predicted", "tokens/s"):
        shown.add_column(head, justify="right")
    for row in sorted(rows, key=lambda r: r.get("eval_loss", float("inf"))):
        if "loss" not in row:
            shown.add_row(row["name"], "failed or cut short: see its log.txt")
            continue
        shown.add_row(
            row["name"],
            str(row["steps"]),
            f"{row['loss']:.4f}",
            f"{row['eval_loss']:.4f}",
            words.seconds(row["step_time_s"]),
            words.seconds(row["predicted_step_time_s"]),
            f"{row['tokens_per_s']:,.0f}",
        )
    return shown


def _combinations(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """(keys that have one value, folder names of all combinations of the others)."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    fixed, varied = ["out"], []
    for text in OverridesParser.create().parse_overrides(overrides=list(overrides)):
        key = text.get_key_element().lstrip("+~")
        if key.startswith("hydra"):
            continue
        if text.is_discrete_sweep():
            varied.append([f"{key}={value}" for value in text.sweep_string_iterator()])
        else:
            fixed.append(key)
    names = [folder_name(",".join(sorted(values))) for values in itertools.product(*varied)]
    return fixed, names


def _listed(keys: Sequence[str]) -> str:
    return f"[{','.join(json.dumps(key) for key in keys)}]"


def _out_of(overrides: Sequence[str]) -> pathlib.Path:
    """Where the sweep writes; made here, so that a folder that cannot be is one sentence."""
    given = [text for text in overrides if text.startswith("out=")]
    return _arguments.writable_folder(_hydra.compose("launch", given).out)


def _call_hydra(overrides: list[str]) -> None:
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    decorated = hydra.main(
        config_path=f"pkg://{_hydra.CONFIGS}", config_name="launch", version_base="1.3"
    )(job)
    arguments, full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = ["meshwright launch", "--multirun", *overrides]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors are raised here, where they become a sentence
    try:
        with _hydra.sentences("launch"):
            decorated()
    finally:
        sys.argv = arguments
        if full is None:
            del os.environ["HYDRA_FULL_ERROR"]
