"""A plan executed beside the unsharded program: how far their losses and parameters differ.

Both start from the same parameters and take the same steps on random tokens. A third run, unsharded,
starts from parameters changed by one rounding: how far it strays is the yardstick of what the program
itself allows (Adam turns a gradient that is only rounding noise into a full step).
"""

from __future__ import annotations

import collections
import dataclasses
import re
from typing import Any

import numpy as np

from graphs.zoo.config import ModelConfig
from placement.plan import Plan

_COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
_ROUNDING = {"float32": 2.0**-23, "bfloat16": 2.0**-8}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Differences:
    """Between a planned and an unsharded run, after some steps."""

    losses: tuple[float, ...]
    """of the unsharded steps."""
    loss_difference: float
    """largest |planned - unsharded| / |unsharded|."""
    parameter_difference: float
    """largest over arrays of max |planned - unsharded| / max |unsharded|."""
    rounding_difference: float
    """the same of the unsharded run whose first parameters were rounded."""
    collectives: dict[str, int]
    """instructions of each kind in the planned program as this machine's compiler left it."""


def compare(plan: Plan, model: ModelConfig, *, steps: int = 3, seed: int = 0) -> Differences:
    """Run a plan made by optimize_model (or `pipelined_plan`) on this machine's devices.

    Raises MeshwrightError where the plan is for another number of devices.
    """
    import jax

    from graphs.zoo import build_train_step, init_state
    from placement.whole import build

    program = dict(plan.program)
    state = {
        k: program[k]
        for k in ("optimizer", "optimizer_state_dtype", "learning_rate", "clip_norm")
        if k in program
    }
    pipelined = "stage" in plan.mesh_shape
    dropped = ("mesh_shape", "schedule", "chunks", "layers", "activation_spec", "zero_stage")
    plain = {k: v for k, v in program.items() if not pipelined or k not in dropped}
    if plain.get("attention") == "ring":  # the unsharded step has no ring to go round
        plain = {k: v for k, v in plain.items() if k not in ("attention", "zigzag", "mesh_shape")}
    unsharded, args, _ = build_train_step(model, **plain)
    step, planned_args, donated = build(plan, model)
    if plan.trees is None:
        plan = plan.bind(step, *planned_args)
    arrange, restore = _orders(plan, model) if pipelined else (lambda x: x, lambda x: x)
    mesh = plan.mesh()
    shardings = plan.in_shardings(mesh)
    planned = jax.jit(
        plan.apply(step),
        in_shardings=shardings,
        out_shardings=plan.out_shardings(mesh),
        donate_argnums=donated,
    )
    first = init_state(model, jax.random.key(seed), **state)
    near = (_rounded(first[0], _ROUNDING[program.get("compute_dtype", "bfloat16")]), first[1])
    ours = jax.device_put((arrange(first[0]), arrange(first[1])), shardings[:2])
    first_batch = jax.device_put(_tokens(args[2], model.vocab_size, seed=seed), shardings[2])
    planned = planned.lower(*ours, first_batch).compile()
    run = jax.jit(unsharded)
    theirs, losses, loss_difference = first, [], 0.0
    for number in range(steps):
        batch = _tokens(args[2], model.vocab_size, seed=seed + number)
        *theirs, metrics = run(*theirs, batch)
        *near, _ = run(*near, batch)
        *ours, found = planned(*ours, jax.device_put(batch, shardings[2]))
        losses.append(float(metrics["loss"]))
        change = abs(float(found["loss"]) - losses[-1]) / abs(losses[-1])
        loss_difference = max(loss_difference, change)
    return Differences(
        losses=tuple(losses),
        loss_difference=loss_difference,
        parameter_difference=_largest(theirs[0], restore(ours[0])),
        rounding_difference=_largest(theirs[0], near[0]),
        collectives=dict(collections.Counter(_COLLECTIVE.findall(planned.as_text() or ""))),
    )


def _orders(plan: Plan, model: ModelConfig):
    from placement.pipeline.stages import map_layers, pipelined_segment, uneven

    segment, program = pipelined_segment(model), plan.program
    stages = plan.mesh_shape["stage"]
    layout = uneven(segment.repeats, stages, program["chunks"], program["layers"])
    return (
        lambda tree: map_layers(layout.arrange, tree, segment.name),
        lambda tree: map_layers(layout.restore, tree, segment.name),
    )


def _tokens(batch: Any, vocab_size: int, *, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {k: rng.integers(0, vocab_size, v.shape, np.int32) for k, v in batch.items()}


def _rounded(tree: Any, relative: float) -> Any:
    import jax

    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: x * (1 + relative * rng.uniform(-1, 1, x.shape)).astype(x.dtype), tree
    )


def _largest(expected: Any, found: Any) -> float:
    import jax

    pairs = zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True)
    worst = 0.0
    for a, b in pairs:
        a, b = (np.asarray(x).astype(np.float64) for x in (a, b))
        worst = max(worst, float(np.abs(a - b).max(initial=0) / max(np.abs(a).max(), 1e-12)))
    return worst
