"""A whole plan as a short list of decisions, for optimizers that change or cross plans.

What an evolutionary search calls a genome: the outer decisions by index, and the short plan of
:mod:`placement.learned.encoding`. ``n_options`` and ``genome_of_path`` read it as a path down a tree of
decisions instead.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from placement.learned.encoding import (
    CHOICES_OF_AXIS,
    FSDP,
    MAX_AXES,
    MEMORY_PRICES,
    SCOPES,
    ShortPlan,
)
from placement.learned.instance import Instance
from placement.whole import REMAT

_WHOLE_PLAN = {"scope": len(SCOPES), "binding": 2, "memory_price": len(MEMORY_PRICES)}
"""Options of decisions that concern all axes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Genome:
    """A whole plan in short: indices into the instance's options."""

    remat: int
    microbatches: int
    layout: int
    plan: ShortPlan


def genome_of(instance: Instance, index: int, plan: ShortPlan) -> Genome:
    """A short plan on the outer candidate of this index."""
    rest, layout = divmod(index, len(instance.layouts))
    remat, microbatches = divmod(rest, len(instance.microbatches))
    return Genome(remat=remat, microbatches=microbatches, layout=layout, plan=plan)


def index_of(instance: Instance, g: Genome) -> int:
    """The outer candidate that a genome is a plan of."""
    return (g.remat * len(instance.microbatches) + g.microbatches) * len(
        instance.layouts
    ) + g.layout


def fully_sharded(instance: Instance) -> Genome:
    """Fully sharded data parallelism on the most even mesh of two axes."""
    layouts = instance.layouts
    two = [n for n, x in enumerate(layouts) if len(x.mesh.axis_sizes) == 2] or [0]
    layout = min(two, key=lambda n: max(layouts[n].mesh.axis_sizes))
    return Genome(remat=0, microbatches=0, layout=layout, plan=FSDP)


def changed(instance: Instance, rng: np.random.Generator, g: Genome) -> Genome:
    """One decision drawn anew: an outer one half of the time."""
    if rng.random() < 0.5:
        options = {
            "remat": len(REMAT),
            "microbatches": len(instance.microbatches),
            "layout": len(instance.layouts),
        }
        free = [k for k, n in options.items() if n > 1]
        name = free[int(rng.choice(len(free), p=_weights([options[k] for k in free])))]
        return dataclasses.replace(g, **{name: int(rng.integers(options[name]))})
    if rng.random() < 0.3:
        name = ("memory_price", "scope", "binding")[int(rng.integers(3))]
        value = int(rng.integers(_WHOLE_PLAN[name]))
        return dataclasses.replace(g, plan=dataclasses.replace(g.plan, **{name: value}))
    n_axes = len(instance.layouts[g.layout].mesh.axis_sizes)
    axis, field = int(rng.integers(n_axes)), int(rng.choice(3, p=[0.45, 0.4, 0.15]))
    name = ("activations", "states", "gathered")[field]
    values = list(getattr(g.plan, name))
    values[axis] = int(rng.integers(CHOICES_OF_AXIS[field]))
    return dataclasses.replace(g, plan=dataclasses.replace(g.plan, **{name: tuple(values)}))


def _weights(sizes: list[int]) -> np.ndarray:
    logs = np.log(np.array(sizes, float))
    return logs / logs.sum()


def crossed(rng: np.random.Generator, a: Genome, b: Genome) -> Genome:
    """Each outer decision and each axis from either parent."""
    take = rng.random(6 + MAX_AXES) < 0.5

    def mix(x, y):
        return tuple(p if take[6 + n] else q for n, (p, q) in enumerate(zip(x, y)))

    plan = ShortPlan(
        activations=mix(a.plan.activations, b.plan.activations),
        states=mix(a.plan.states, b.plan.states),
        gathered=mix(a.plan.gathered, b.plan.gathered),
        memory_price=(a if take[3] else b).plan.memory_price,
        scope=(a if take[4] else b).plan.scope,
        binding=(a if take[5] else b).plan.binding,
    )
    return Genome(
        remat=(a if take[0] else b).remat,
        microbatches=(a if take[1] else b).microbatches,
        layout=(a if take[2] else b).layout,
        plan=plan,
    )


def n_options(instance: Instance, path: tuple[int, ...]) -> int | None:
    """Options of the next decision of a path, None at its end."""
    n_meshes = len(instance.layouts)
    first = (len(REMAT), len(instance.microbatches), n_meshes, *_WHOLE_PLAN.values())
    if len(path) < len(first):
        return first[len(path)]
    step = len(path) - len(first)
    n_axes = len(instance.layouts[path[2]].mesh.axis_sizes)
    return CHOICES_OF_AXIS[step % 3] if step < 3 * n_axes else None


def genome_of_path(instance: Instance, path: tuple[int, ...]) -> Genome:
    """The plan at the end of a path: remat, microbatches, layout, scope, binding, price, axes."""
    remat, microbatches, layout, scope, binding, price, *inner = path
    pad = (0,) * (MAX_AXES - len(inner) // 3)
    plan = ShortPlan(
        activations=(*inner[0::3], *pad),
        states=(*inner[1::3], *pad),
        gathered=(*inner[2::3], *pad),
        memory_price=price,
        scope=scope,
        binding=binding,
    )
    return Genome(remat=remat, microbatches=microbatches, layout=layout, plan=plan)
