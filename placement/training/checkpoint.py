"""Checkpoints of a training run: parameters, optimizer state and the position in the text.

Each is a folder that orbax writes beside its final name and renames when whole, so that a run
killed at any moment finds the last whole one. Saving waits for the disk: what ``save`` returned
from is never lost. Restoring takes the shardings that it is given, whatever they were at saving.
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import re
from typing import Any

from graphs.errors import MeshwrightError

_REASON = re.compile(r"((?:No space|Read-only|Disk quota|Permission|File too large)[\w ]*)")
"""What the system said, in the middle of what the libraries say."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run is, in numbers that do not depend on the plan."""

    step: int
    """steps taken."""
    windows: int
    """windows of the text taken."""
    seed: int
    seq_len: int
    text: str
    """fingerprint of the text."""
    model: str


class Checkpoints:
    """The checkpoints in one folder. A context manager."""

    def __init__(self, folder: str | pathlib.Path, *, keep: int = 2) -> None:
        try:
            import orbax.checkpoint as ocp
        except ImportError:
            raise MeshwrightError(
                "checkpoints need the package orbax-checkpoint: install meshwright[train]"
            ) from None
        # Its errors are raised as well; shown too, they would be many lines for one.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self._ocp = ocp
        self.folder = pathlib.Path(folder).absolute()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MeshwrightError(
                f"{str(self.folder)!r} cannot be written ({error.strerror}); give another out="
            ) from error
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, enable_async_checkpointing=False
            ),
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def latest(self) -> Position | None:
        """Where the last whole checkpoint is; None where there is none."""
        step = self._manager.latest_step()
        if step is None:
            return None
        args = self._ocp.args
        found = self._restore(step, args.Composite(position=args.JsonRestore()))["position"]
        try:
            return Position(**found)
        except TypeError:
            raise MeshwrightError(
                f"the checkpoints in {str(self.folder)!r} were written by another program; "
                "give another out="
            ) from None

    def save(self, state: Any, position: Position) -> None:
        """Writes (params, opt_state) and the position; returns when they are on disk."""
        args = self._ocp.args
        try:
            self._manager.save(
                position.step,
                args=args.Composite(
                    state=args.StandardSave(state),
                    position=args.JsonSave(dataclasses.asdict(position)),
                ),
            )
        except (OSError, ValueError) as error:  # a full disk is a ValueError of tensorstore
            said = " ".join(str(error).split())
            reason = _REASON.search(said)
            raise MeshwrightError(
                f"the checkpoint of step {position.step} cannot be written to "
                f"{str(self.folder)!r} ({reason[1] if reason else said[:200]}); the earlier ones "
                "are whole: make room and launch again"
            ) from error

    def restore(self, step: int, abstract_state: Any, shardings: Any) -> Any:
        """The state of a step, laid out by ``shardings``.

        abstract_state: pytree of jax.ShapeDtypeStruct; shardings: the same tree of them.
        Raises MeshwrightError where the checkpoint is of another model.
        """
        import jax

        target = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            abstract_state,
            shardings,
        )
        args = self._ocp.args
        return self._restore(step, args.Composite(state=args.StandardRestore(target)))["state"]

    def _restore(self, step: int, args: Any) -> Any:
        try:
            return self._manager.restore(step, args=args)
        except (ValueError, KeyError, TypeError, OSError) as error:
            first = " ".join(str(error).split())[:200]
            raise MeshwrightError(
                f"the checkpoint of step {step} in {str(self.folder)!r} cannot be restored for "
                f"this model and optimizer ({first}); give another out= or the run's own settings"
            ) from error
