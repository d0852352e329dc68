"""Plan a model rather than a function: the program's own options are decided too.

Rematerialisation and microbatches are written into a train step when it is built, so they cannot be
changed from outside. Here the step is built for each promising combination and planned, and the
simulation judges all of them:

1. With full rematerialisation and one microbatch the search runs over all meshes.
2. On the best meshes found, lighter rematerialisation is tried (it saves recomputation where memory
   allows) and, where nothing fits yet, more microbatches (they divide the live activations).

With ``optimizer="learned"`` the trained policy says instead in which order the combinations are tried.

Whether stages pay is asked of the whole-job model (:mod:`placement.pipeline.choose`), which scores the
best pipelined job and the best one without stages by the same rules; where the pipelined one wins, or
nothing else fits, the plan has a ``stage`` axis, and :func:`build` makes its pipelined step. Seconds of
the two models are never compared.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from graphs.errors import InfeasibleError, MeshwrightError
from placement.mesh_search import MEMORY_RESERVE
from placement.trials import Trials, best_meshes, fits

REMAT = ("full", "attention", "dots", "none")
"""Policies of the zoo's train steps, least memory first."""
MICROBATCHES = (1, 2, 4, 8, 16)
_ADVISED = 5
"""Combinations tried on the policy's advice."""


def optimize_model(
    model: Any,
    *,
    cluster: str,
    global_batch_tokens: int | None = None,
    global_batch: int | None = None,
    seq_len: int | None = None,
    remat: str | None = None,
    microbatches: int | None = None,
    stages: int | bool | None = None,
    time_limit_s: float = 30.0,
    throw: bool = True,
    step_options: dict[str, Any] | None = None,
    **options: Any,
):
    """Plan a zoo model with its rematerialisation and microbatches.

    Args:
      model: a ``graphs.zoo.ModelConfig`` or the name of a shipped one.
      cluster: notation.
      global_batch_tokens: tokens of one optimizer step; or give ``global_batch`` in sequences.
      seq_len: tokens of a sequence; the model's own by default.
      remat: pins the policy, one of REMAT.
      microbatches: pins their number.
      stages: False for none, True or a number for a pipelined plan; None lets the job model say.
      time_limit_s: seconds for all of it.
      throw: raise InfeasibleError where nothing fits.
      step_options: further arguments of ``graphs.zoo.build_train_step``.
      options: further arguments of :func:`placement.optimize`.

    Returns:
      A Plan; ``plan.program`` holds the build options, and :func:`build` makes the train step.

    Raises:
      MeshwrightError: for arguments that cannot be planned, in one sentence.
    """
    from graphs.zoo import load_model_config

    start = time.monotonic()
    config = load_model_config(model) if isinstance(model, str) else model
    length = seq_len or config.seq_len
    batch = _sequences(global_batch, global_batch_tokens, length)
    if remat is not None and remat not in REMAT:
        raise MeshwrightError(f"unknown remat {remat!r}; use one of {', '.join(REMAT)}")
    counts = [microbatches] if microbatches else [m for m in MICROBATCHES if batch % m == 0]
    if any(batch % m for m in counts):
        raise MeshwrightError(
            f"{microbatches} microbatches do not divide a batch of {batch} sequences; "
            "give a divisor"
        )
    fixed = dict(step_options or {}, global_batch=batch, seq_len=length)
    choice = _choice(config, cluster, fixed, remat, microbatches, stages, options)
    if choice is not None and (stages is not None or choice.stages_pay):
        from placement.pipeline.choose import staged_plan

        plan = staged_plan(config, choice, cluster=cluster, **fixed)
        return dataclasses.replace(plan, planning_time_s=time.monotonic() - start)
    trial = _Models(
        config=config,
        fixed=fixed,
        cluster=cluster,
        options=options,
        trials=Trials(deadline=start + time_limit_s, objective=options.get("objective", "time")),
    )
    policies = (remat,) if remat else REMAT
    if not (options.get("optimizer") == "learned" and trial.as_advised(policies, counts)):
        trial.by_hand(policies, counts)
    best = trial.trials.best()
    if not fits(best) and choice is not None and (would := choice.what_would_fit()):
        best = dataclasses.replace(best, status=f"{best.status}; by the job model {would}")
    if throw and not fits(best):
        raise InfeasibleError(best.status)
    return trial.trials.together(best, start)


def build(plan, model: Any):
    """(train_step, abstract_args, donate_argnums) of a plan made by :func:`optimize_model`."""
    from graphs.zoo import build_train_step, load_model_config

    if not plan.program:
        raise MeshwrightError(
            "the plan was not made by optimize_model and does not say how its program is built; "
            "build the train step that was planned"
        )
    config = load_model_config(model) if isinstance(model, str) else model
    if "stage" in plan.mesh_shape:
        from placement.pipeline.plan import build_program

        return build_program(config, plan.program)
    return build_train_step(config, **plan.program)


def _sequences(batch: int | None, tokens: int | None, length: int) -> int:
    if (batch is None) == (tokens is None):
        raise MeshwrightError("give either global_batch or global_batch_tokens")
    found = batch if batch is not None else (tokens or 0) // length
    if found < 1:
        raise MeshwrightError(
            f"a batch of {tokens} tokens holds no sequence of {length}; give at least one sequence"
        )
    return found


def _choice(config, cluster, fixed, remat, microbatches, stages, options):
    """The job model's word on stages; None where they are not wanted or cannot be."""
    from placement.pipeline.choose import choose

    pinned = {k for k, v in options.items() if v is not None} & {"mesh_shape", "optimizer"}
    if stages is False or (stages is None and pinned):
        return None
    state = fixed.get("optimizer_state_dtype", "float32")
    try:
        return choose(
            config,
            cluster=cluster,
            global_batch=fixed["global_batch"],
            seq_len=fixed["seq_len"],
            remat=remat,
            microbatches=microbatches,
            stages=None if stages is None or stages is True else int(stages),
            attention=fixed.get("attention"),
            optimizer_state="adafactor" if fixed.get("optimizer") == "adafactor" else state,
        )
    except MeshwrightError:
        if stages is None:
            return None  # a model without stages, or a device that the job model does not know
        raise


@dataclasses.dataclass(kw_only=True)
class _Models:
    """Plans of one model under different build options."""

    config: Any
    fixed: dict[str, Any]
    cluster: str
    options: dict[str, Any]
    trials: Trials

    def plan(self, remat: str, count: int, *, share: float, mesh_shape=None, layers: float = 1.0):
        """Plan one program; ``layers`` is the share of them that remat applies to."""
        from graphs.zoo import build_train_step
        from placement.api import optimize

        program = dict(self.fixed, remat=remat, microbatches=count)
        if layers < 1.0:
            program["remat_layers"] = layers
        step, args, donated = build_train_step(self.config, **program)
        options = dict(self.options)
        if mesh_shape is not None:
            options["mesh_shape"] = mesh_shape
        plan = optimize(
            step,
            *args,
            cluster=self.cluster,
            donate_argnums=donated,
            time_limit_s=self.trials.slice(share),
            throw=False,
            **options,
        )
        label = f"remat {remat}{_of_layers(layers)}, {count} microbatches"
        return self.trials.add(label, dataclasses.replace(plan, program=program))

    def by_hand(self, policies, counts) -> None:
        """Least memory first, then lighter rematerialisation on the best meshes."""
        for count in counts:
            plan = self.plan(policies[0], count, share=0.5)
            if fits(plan):
                break
        meshes = best_meshes(plan) if self.options.get("mesh_shape") is None else [None]
        if fits(plan):
            for policy in policies[1:]:
                for shape in meshes:
                    if not self.trials.over():
                        self.plan(policy, count, share=0.2, mesh_shape=shape)

        self.of_some_layers(policies, count)

    def of_some_layers(self, policies, count: int) -> None:
        """Where full rematerialisation fits and saving every layer's matmuls does not: of the least
        share of layers that fits if memory grows evenly with the others."""
        from graphs.zoo.options import REMAT_SHARES

        plans = {p.program["remat"]: p for p in reversed(self.trials.plans)}
        if len(policies) == 1 or not {"full", "dots"} <= set(plans):
            return
        full, dots = plans["full"], plans["dots"]
        if not fits(full) or fits(dots):
            return
        low, high = (p.estimate.peak_memory_bytes for p in (full, dots))
        room = full.layout().cluster.device.hbm_available_bytes * (1.0 - MEMORY_RESERVE)
        shares = [s for s in REMAT_SHARES[:-1] if s * low + (1.0 - s) * high <= room]
        if shares and not self.trials.over() and self._divides(shares[0]):
            pinned = self.options.get("mesh_shape")
            shape = None if pinned else self.trials.best().mesh_shape
            self.plan("full", count, share=0.2, mesh_shape=shape, layers=shares[0])

    def _divides(self, share: float) -> bool:
        """Whether the repeated layers of every kind can be divided so."""
        from graphs.zoo.options import layers_of_share

        by, config = layers_of_share(share), self.config
        repeats = [s.repeats for s in config.segments()]
        repeats += [config.encoder_layers] if config.encoder_layers else []
        return "remat_layers" not in self.fixed and all(n % by == 0 for n in repeats)

    def as_advised(self, policies, counts) -> bool:
        """The combinations that the trained policy prefers: the first on all meshes, the others on
        what it thinks their best mesh and on the best one found; whether anything that fits was
        found (without weights nothing is tried)."""
        from graphs.zoo import build_train_step
        from placement.learned.advice import advised_variants

        step, args, donated = build_train_step(
            self.config, **dict(self.fixed, remat=REMAT[0], microbatches=1)
        )
        variants = [(policy, count) for policy in policies for count in counts]
        advised = advised_variants(
            (step, args, donated), self.cluster, variants, self.options.get("mesh_shape"),
            self.options.get("max_axes", 2),
        )  # fmt: skip
        for n, variant in enumerate(advised[:_ADVISED]):
            known = self.trials.best().mesh_shape if self.trials.plans else None
            shapes = [variant.mesh_shape]
            if known not in shapes and known is not None:
                shapes.append(known)
            for shape in shapes if n else [None]:  # the first on all meshes
                if self.trials.plans and self.trials.over():
                    break
                share = 0.2 if n else 0.5
                self.plan(variant.remat, variant.microbatches, share=share, mesh_shape=shape)
        return any(map(fits, self.trials.plans))


def _of_layers(share: float) -> str:
    return "" if share == 1.0 else f" of {share:.0%} of the layers"
