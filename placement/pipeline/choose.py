"""Whether stages pay: the whole-job search asked twice, by one model.

The job model (`placement.jobs`) searches the jobs that one SPMD program can be, and those that a
pipelined step can be. Only these two are compared: seconds of one model. Where the best pipelined
job is faster, or nothing else fits, its plan is made.

What a pipelined step can be (`placement.pipeline.step`): stages of whole repeats, ZeRO-1, experts over
data ranks, every layer computed again in the backward pass, and a mesh that the cluster composes.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from cost_model.cluster import parse_cluster
from cost_model.estimate import Estimate
from cost_model.jobs import constants as constants_module
from cost_model.jobs.columns import CONTEXT_FORMS, GATHERED, RING, SCHEDULES, Jobs
from cost_model.jobs.memory import memory
from cost_model.jobs.step import step_time
from cost_model.layout import layout_for
from graphs.errors import InfeasibleError, MeshwrightError
from graphs.zoo.config import ModelConfig
from placement.jobs.describe import describe_job, shape_of
from placement.jobs.infeasible import changes, sentence
from placement.jobs.search import Infeasible, JobPlan, plan_job
from placement.jobs.space import Groups
from placement.jobs.timeline import job_timeline
from placement.pipeline.schedule import ZERO_BUBBLE
from placement.pipeline.stages import pipelined_segment

_EXECUTED = tuple(SCHEDULES.index(name) for name in ("1f1b", ZERO_BUBBLE))
"""Schedules that are searched; interleaved is 1F1B with chunks, and GPipe is never better."""
_SPMD_REMAT = {"full": "full", "attention": "attention", "dots": "pointwise", "none": "none"}
"""The zoo's policies and the job model's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """The best jobs of either kind."""

    job: Jobs
    """What was searched, before any degrees."""
    one_program: JobPlan | Infeasible
    staged: JobPlan | Infeasible

    @property
    def stages_pay(self) -> bool:
        if isinstance(self.staged, Infeasible):
            return False
        if isinstance(self.one_program, Infeasible):
            return True
        return self.staged.step_time_s < self.one_program.step_time_s

    def sentence(self) -> str:
        """The comparison in words."""

        def words(found: JobPlan | Infeasible) -> str:
            if isinstance(found, Infeasible):
                return f"does not fit ({found.least_bytes / 2**30:.1f} GiB at least)"
            return f"takes {found.step_time_s:.4g} s"

        return (
            f"by the job model the best pipelined job {words(self.staged)} and the best without "
            f"stages {words(self.one_program)}"
        )

    @property
    def lower_bound_s(self) -> float:
        """No job of either kind is faster under the job model."""
        found = (self.one_program, self.staged)
        return min(f.lower_bound_s for f in found if isinstance(f, JobPlan))

    def what_would_fit(self) -> str:
        """Where neither kind fits: the limit that binds and the changes that the search confirms."""
        failed = self.one_program
        if isinstance(failed, JobPlan):
            return ""
        return sentence(failed, changes(self.job, remats=tuple(_SPMD_REMAT.values())))


def choose(
    config: ModelConfig,
    *,
    cluster: str,
    global_batch: int,
    seq_len: int,
    remat: str | None = None,
    microbatches: int | None = None,
    stages: int | None = None,
    optimizer_state: str = "float32",
    attention: str | None = None,
    time_limit_s: float = 4.0,
) -> Choice:
    """Search both kinds of job.

    attention: the train step's where it is pinned; a ring is one of its forms
    (`graphs.zoo.options.ATTENTION_FORMS`).

    Raises MeshwrightError where the model cannot have stages or the job model does not know the
    device.
    """
    main = pipelined_segment(config)
    unit = len(main.kinds)
    layers = main.repeats * unit
    job = describe_job(
        shape_of(config),
        cluster=cluster,
        global_batch=global_batch,
        seq_len=seq_len,
        optimizer_state=optimizer_state,
    )
    pinned = [_SPMD_REMAT[remat]] if remat else list(_SPMD_REMAT.values())

    def counted(g: Groups) -> np.ndarray:
        m = global_batch / (g.dp * g.micro_batch)
        return np.ones(g.n_groups, bool) if microbatches is None else m == microbatches

    def staged(g: Groups) -> np.ndarray:
        mask = counted(g) & (g.dp % g.ep == 0) & (g.zero_stage == 1)
        mask &= np.isin(g.schedule, _EXECUTED)
        mask &= g.pp > 1 if stages is None else g.pp == stages
        # the loss is spread over all stages, so that none is better off with fewer layers
        mask &= g.first_layers < 0
        mask &= (np.mod(layers, g.pp * g.vpp * unit) == 0) | (unit == 1)
        if config.n_experts:
            mask &= g.cp == 1
        if attention == "ring":
            mask &= (g.cp > 1) & (g.context_form == RING)
        elif attention is not None:
            mask &= (g.cp == 1) | (g.context_form == GATHERED)
        for i in np.flatnonzero(mask):
            mask[i] = _composable(cluster, *mesh_of({k: getattr(g, k)[i] for k in _AXES}).values())
        return mask

    return Choice(
        job=job,
        one_program=plan_job(
            job,
            allowed=lambda g: counted(g) & (g.pp == 1),
            remats=pinned,
            time_limit_s=time_limit_s / 2,
        ),
        staged=plan_job(
            job.replace(lockstep=1.0, entry_layers=job.n_layers - layers),
            allowed=staged,
            remats=("full",) if remat in (None, "full") else (),  # else nothing may be chosen
            time_limit_s=time_limit_s / 2,
        ),
    )


def layers_of(n_layers: int, degrees: dict[str, float]) -> tuple[int, ...] | None:
    """Layers of each virtual stage, first to last; None for as even as can be."""
    virtual = int(degrees["pp"] * degrees["vpp"])
    if n_layers >= virtual:
        return None
    return (*[1] * n_layers, *[0] * (virtual - n_layers))


_AXES = ("pp", "dp", "ep", "cp", "tp")


def mesh_of(degrees: dict[str, float]) -> dict[str, int]:
    """Axis name -> size of a pipelined job's mesh, slowest first, axes of size 1 left out."""
    sizes = {
        "stage": degrees["pp"],
        "data": degrees["dp"] / degrees["ep"],
        "expert": degrees["ep"],
        "context": degrees["cp"],
        "model": degrees["tp"],
    }
    return {name: int(size) for name, size in sizes.items() if size > 1}


@functools.lru_cache(maxsize=4096)
def _composable(cluster: str, *sizes: int) -> bool:
    try:
        layout_for(parse_cluster(cluster), {f"axis_{i}": n for i, n in enumerate(sizes)})
    except MeshwrightError:
        return False
    return True


def staged_plan(config: ModelConfig, choice: Choice, *, cluster: str, **fixed: Any):
    """The Plan of the best pipelined job; `fixed` as `placement.pipeline.plan.pipelined_plan`.

    Raises InfeasibleError where none fits.
    """
    from placement.pipeline.plan import pipelined_plan

    found = choice.staged
    if isinstance(found, Infeasible):
        raise InfeasibleError(
            f"no pipelined plan fits: the least takes {found.least_bytes / 2**30:.1f} GiB of "
            f"{found.capacity_bytes / 2**30:.1f} GiB, most of it {found.binding}; use more devices, "
            "a smaller batch, or no stages"
        )
    d, main = found.degrees, pipelined_segment(config)
    if found.context == "ring":
        fixed = {**fixed, "attention": "ring"}
    count = int(fixed["global_batch"] / (d["dp"] * d["micro_batch"]))
    chunks = int(d["vpp"])
    plan = pipelined_plan(
        config,
        cluster=cluster,
        mesh_shape=mesh_of(d),
        microbatches=count,
        schedule=found.schedule,
        chunks=chunks,
        layers=layers_of(main.repeats * len(main.kinds), d),
        estimate=estimate_of(found),
        lower_bound_s=choice.lower_bound_s,
        remat="full",
        **fixed,
    )
    schedule = f"{int(d['pp'])} stages, {plan.program['schedule']}, {count} microbatches"
    if chunks > 1:
        schedule += f", {chunks} chunks a stage"
    drawn = job_timeline(found)
    if drawn.drawn_microbatches < count:
        schedule += f" (the timeline draws {drawn.drawn_microbatches} of them)"
    return dataclasses.replace(
        plan,
        timeline=tuple((x.lane, x.name, x.kind, x.start_s, x.end_s) for x in drawn.stretches),
        evaluations=found.evaluations,
        reasons=(
            f"{schedule}; {choice.sentence()}.",
            f"at most {found.step_time_s / choice.lower_bound_s - 1:.1%} above the bound of all jobs "
            "that a step can be built for.",
            *_about_context(found),
            *plan.reasons,
        ),
    )


def _about_context(found: JobPlan) -> tuple[str, ...]:
    """How keys and values of a split sequence meet the queries, and what the other way would take."""
    if not found.context:
        return ()
    ways = int(found.degrees["cp"])
    words = {
        "ring": f"keys and values go round a ring of {ways} devices",
        "gathered": f"keys and values are gathered from {ways} devices",
    }
    other = "gathered" if found.context == "ring" else "ring"
    changed = found.job.replace(context_form=CONTEXT_FORMS.index(other))
    seconds = float(step_time(changed, constants_module.load()).step_time_s[0])
    change = seconds / found.step_time_s - 1
    return (f"{words[found.context]}; where {words[other]} the step takes {change:+.2%}.",)


def estimate_of(found: JobPlan) -> Estimate:
    """The job model's figures of one job as an Estimate."""
    from cost_model.jobs import bands

    constants = constants_module.load()
    time, held = step_time(found.job, constants), memory(found.job, constants)
    low, high = bands.load().of(found.job)

    def s(name: str) -> float:
        return float(getattr(time, f"{name}_s")[0])

    compute = s("compute") + s("remat") + s("optimizer")
    traffic = {
        "tensor parallelism": s("tensor"),
        "context parallelism": s("context"),
        "expert all-to-all": s("expert"),
        "gathers of sharded weights": s("sharded"),
        "gradient reduction": s("gradient"),
        "pipeline bubble and sends": s("bubble"),
    }
    total = float(time.step_time_s[0])
    power = float(found.job.device.max_power_w[0])
    return Estimate(
        step_time_s=total,
        compute_time_s=compute,
        exposed_comm_time_s=max(total - compute, 0.0),
        comm_time_s=sum(traffic.values()),
        peak_memory_bytes=found.memory_bytes,
        energy_j=None if np.isnan(power) else _energy(found, time),
        table_cost_s=0.0,
        compute_by_class_s={
            "forward and backward": s("compute"),
            "recomputation": s("remat"),
            "optimizer": s("optimizer"),
        },
        collectives={},
        comm_by_purpose_s={k: v for k, v in traffic.items() if v > 0},
        memory_by_class_bytes={
            "weights, gradients and optimizer state": float(held.states_bytes[0]),
            "saved activations": float(held.activations_bytes[0]),
        },
        p10_s=total * float(low[0]),
        p90_s=total * float(high[0]),
    )


def _energy(found: JobPlan, time: Any) -> float:
    from placement.jobs.pareto import step_energy_j

    return float(step_energy_j(found.job, time)[0])
