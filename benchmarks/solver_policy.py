"""The learned start of the solver: trained, and measured with and without it.

    python benchmarks/solver_policy.py train [--steps 1500] [--out placement/solver]
    python benchmarks/solver_policy.py exports [--seconds 0.1,0.3,1]
    python benchmarks/solver_policy.py instances DIR [--fraction 0.1] [--seeds 3] [--only A,G]

With --processor-clock the limits count this process's processor seconds, of two threads where the
engine uses two, so that other load on the machine changes nothing.

``train`` draws exported train steps of TRAINED (none of them in ``benchmarks/solver.py``) at random
limits of memory, and random instances. ``exports`` solves the problems of ``benchmarks/solver.py``
with each start at equal seconds; ``instances`` those of a folder of the contest. Each prints costs
over the best cost known for the problem.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from cost_model import iopddl
from cost_model.problem import Problem
from placement import solver
from placement.solver import engine, policy
from placement.solver.core import Reduced, reduce

TRAINED = (
    ("llama2_7b", "v5e:16x16", {"data": 16, "model": 16}),
    ("qwen3_8b", "v5e:16x16", {"data": 32, "model": 8}),
    ("olmo2_7b", "v5e:8x8", {"data": 16, "model": 4}),
    ("gpt3_13b", "v5p:8x8x8", {"data": 64, "model": 8}),
    ("mistral_7b", "v5e:8x8", {"data": 8, "model": 8}),
    ("phi3_mini", "v5e:4x4", {"data": 4, "model": 4}),
    ("qwen3_30b_a3b", "v5e:16x16", {"data": 32, "model": 8}),
    ("gemma3_4b", "v5e:8x8", {"data": 16, "model": 4}),
    ("falcon_180b", "v5p:8x8x8", {"data": 32, "model": 16}),
    ("bloom_176b", "v5p:8x8x16", {"data": 64, "model": 16}),
    ("palm_540b", "v5p:8x8x16", {"data": 64, "model": 16}),
    ("gpt_oss_20b", "v5e:16x16", {"data": 16, "model": 16}),
)
SIZES = (
    (2048, 256, 768, 48_000, 4096, 256),
    (6144, 512, 1024, 450_000, 12_288, 512),
)
"""States, nodes, edges, cells, usages and times that training problems are padded to."""
NO_LIMIT = float(2**62)


def random_problem(rng: np.random.Generator) -> Problem:
    """Chains with skips; strategies have kinds, and edges cost where the kinds of two ends differ.

    Sizes are log-normal; a strategy that splits more uses less memory and computes faster.
    """
    n = int(rng.integers(40, 200))
    k = rng.integers(2, 14, n)
    offsets = np.concatenate([[0], np.cumsum(k)])
    kinds = rng.integers(0, int(rng.integers(3, 8)), offsets[-1])
    ways = 2.0 ** rng.integers(0, 5, offsets[-1])
    size = np.exp(rng.normal(0.0, 1.5, n))
    rows = np.repeat(np.arange(n), k)
    work = np.exp(rng.normal(0.0, 1.0, n))
    node_costs = work[rows] / ways + rng.exponential(0.1, offsets[-1])
    pairs = {(i, i + 1) for i in range(n - 1) if rng.random() < 0.95}
    for i in rng.integers(0, n, n // 2):
        j = min(n - 1, i + int(rng.geometric(0.1)))
        pairs |= {(int(i), j)} if j > i else set()
    apart = rng.random((8, 8)) * (1 - np.eye(8))
    tables = []
    ends = sorted(pairs)
    for i, j in ends:
        a, b = (slice(offsets[x], offsets[x + 1]) for x in (i, j))
        spread = apart[np.ix_(kinds[a], kinds[b])] + 0.2 * (ways[a][:, None] != ways[b][None])
        tables.append((size[i] * float(rng.choice([0.3, 1.0, 3.0])) * spread).ravel())
    starts = np.arange(n)
    return Problem(
        name="random",
        strategy_offsets=offsets,
        node_costs=node_costs,
        edge_nodes=np.array(ends, np.int32).reshape(-1, 2),
        edge_offsets=np.concatenate([[0], np.cumsum([len(t) for t in tables])]).astype(np.int64),
        edge_costs=np.concatenate(tables),
        usage_nodes=np.arange(n, dtype=np.int32),
        usage_intervals=np.stack([starts, starts + 1 + rng.geometric(0.05, n)], axis=1),
        usage_offsets=offsets,
        usages=(size[rows] / ways) * float(10.0 ** rng.uniform(0, 6)),
        usage_limit=float("inf"),
    )


def with_limit(problem: Problem, rng: np.random.Generator) -> Problem:
    """A limit between what is least possible at the worst time and what the cheapest states use."""
    free = dataclasses.replace(problem, usage_limit=NO_LIMIT)
    rows = np.repeat(np.arange(problem.n_nodes), problem.n_strategies())
    cheapest = np.array([int(problem.node_costs[rows == i].argmin()) for i in range(rows[-1] + 1)])
    thrifty = np.zeros(problem.n_nodes, np.int64)
    for u, i in enumerate(problem.usage_nodes):
        a, b = problem.usage_offsets[u : u + 2]
        thrifty[i] = int(problem.usages[a:b].argmin())
    low, high = sorted((free.peak_usage(thrifty), free.peak_usage(cheapest)))
    return dataclasses.replace(free, usage_limit=float(low + rng.uniform(0.02, 1.2) * (high - low)))


def padded(reduced: Reduced) -> dict[str, np.ndarray] | None:
    """Index arrays for jax; None where the problem is larger than the padding."""
    core, found = reduced.core, policy.static(reduced)
    n, s = len(found.scale), len(found.node)
    k = np.diff(core.offsets)
    owner = np.repeat(np.arange(n), np.diff(core.edge_start))
    sizes = k[owner] * k[core.neighbour]
    entries = np.repeat(np.arange(n), np.diff(core.use_start))
    uses = k[entries]
    sizes_of = (s, n, len(owner), int(sizes.sum()), int(uses.sum()), len(core.fixed))
    fitting = [x for x in SIZES if all(a < b for a, b in zip(sizes_of, x))]
    if not fitting or not s:
        return None
    n_states, n_nodes, n_edges, n_cells, n_uses, n_times = fitting[0]
    edge = np.repeat(np.arange(len(owner)), sizes)
    within = np.arange(len(edge)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    own, other = within % k[owner[edge]], within // k[owner[edge]]
    unit = float(found.scale.mean())
    entry = np.repeat(np.arange(len(entries)), uses)
    state = np.arange(len(entry)) - np.repeat(np.cumsum(uses) - uses, uses)
    limit = max(core.limit, 1e-300)

    def pad(values: Any, length: int, fill: Any, dtype: Any) -> np.ndarray:
        values = np.asarray(values)
        out = np.full((length, *values.shape[1:]), fill, dtype)
        out[: len(values)] = values
        return out

    return {
        "node": pad(found.node, n_states, n_nodes - 1, np.int32),
        "real": pad(np.ones(s), n_states, 0.0, np.float32),
        "theta": pad(core.unary / unit, n_states, 0.0, np.float32),
        "scale": pad(found.scale / unit, n_nodes, 1.0, np.float32),
        "features": pad(found.features, n_states, 0.0, np.float32),
        "owner": pad(owner, n_edges, n_nodes - 1, np.int32),
        "neighbour": pad(core.neighbour, n_edges, n_nodes - 1, np.int32),
        "degree": pad(np.maximum(np.diff(core.edge_start), 1), n_nodes, 1, np.float32),
        "cell_own": pad(core.offsets[owner[edge]] + own, n_cells, n_states - 1, np.int32),
        "cell_other": pad(
            core.offsets[core.neighbour[edge]] + other, n_cells, n_states - 1, np.int32
        ),
        "cell": pad(
            np.minimum(core.cells[core.table[edge] + within], reduced.forbidden) / unit,
            n_cells,
            0.0,
            np.float32,
        ),
        "use_state": pad(core.offsets[entries[entry]] + state, n_uses, n_states - 1, np.int32),
        "use_from": pad(core.use_from[entry], n_uses, 0, np.int32),
        "use_to": pad(core.use_to[entry], n_uses, 0, np.int32),
        "use": pad(core.amounts[core.use_value[entry] + state] / limit, n_uses, 0.0, np.float32),
        "fixed": pad(core.fixed / limit, n_times, 0.0, np.float32),
    }


class JaxMessages:
    """policy.Messages of a padded problem."""

    def __init__(self, arrays: dict[str, Any]) -> None:
        import jax

        self.a, self.jax = arrays, jax
        self.node, self.theta, self.scale = arrays["node"], arrays["theta"], arrays["scale"]
        self.features = arrays["features"]
        self.sum = jax.ops.segment_sum
        self.states, self.nodes = len(self.node), len(self.scale)
        self.times = len(arrays["fixed"])

    def expected(self, p):
        a = self.a
        return self.sum(a["cell"] * p[a["cell_other"]], a["cell_own"], self.states)

    def over(self, p):
        a, np_ = self.a, self.jax.numpy
        amount = a["use"] * p[a["use_state"]]
        change = (
            np_.zeros(self.times + 1).at[a["use_from"]].add(amount).at[a["use_to"]].add(-amount)
        )
        return np_.maximum(np_.cumsum(change)[:-1] + a["fixed"] - 1.0, 0.0)

    def pressure(self, p):
        a, np_ = self.a, self.jax.numpy
        over = self.over(p)
        sums = np_.concatenate([np_.zeros(1), np_.cumsum(over)])
        held = a["use"] * (sums[a["use_to"]] - sums[a["use_from"]])
        held = self.sum(held, a["use_state"], self.states)
        mean = held.sum() / a["real"].sum()
        return held / np_.maximum(mean, 1e-12) * np_.minimum(over.max(), 1.0)

    def around(self, p, h):
        a = self.a
        mean = self.sum(p[:, None] * h, a["node"], self.nodes)
        return self.sum(mean[a["neighbour"]], a["owner"], self.nodes) / a["degree"][:, None]

    def least(self, values):
        return self.jax.ops.segment_min(values, self.a["node"], self.nodes)

    def softmax(self, logits):
        np_ = self.jax.numpy
        node = self.a["node"]
        top = self.jax.ops.segment_max(logits, node, self.nodes)
        e = np_.exp(logits - self.jax.lax.stop_gradient(top)[node]) * self.a["real"] + 1e-20
        return e / self.sum(e, node, self.nodes)[node] * self.a["real"]


def loss(params: dict[str, Any], arrays: dict[str, Any]) -> Any:
    """Expected cost over that of even beliefs, plus overfilling; later rounds count more."""
    import jax.numpy as jnp

    seen = JaxMessages(arrays)

    def energy(p):
        return (p * (seen.theta + 0.5 * seen.expected(p))).sum()

    even = energy(seen.softmax(jnp.zeros(seen.states)))
    total, weights = 0.0, 0.0
    for t, p in enumerate(policy.forward(params, seen, jnp)):
        over = seen.over(p)
        value = jnp.log(energy(p) / even + 1e-6) + 4.0 * over.max() + 2.0 * over.mean()
        total, weights = total + (t + 1) * value, weights + t + 1
    return total / weights


def train(steps: int, exports: pathlib.Path, out: pathlib.Path, seed: int, minutes: float) -> int:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax
    import optax
    from safetensors.numpy import save

    rng = np.random.default_rng(seed)
    exported = [iopddl.read(p) for p in sorted(exported_files(exports))]
    schedule = optax.cosine_decay_schedule(3e-3, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    params = policy.initial(seed)
    state = optimizer.init(params)

    @jax.jit
    def update(params, state, arrays):
        value, grads = jax.value_and_grad(loss)(params, arrays)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    held_out = [a for a in (draw(exported, rng) for _ in range(8)) if a is not None]
    evaluate = jax.jit(loss)
    began, recent = time.monotonic(), []
    for step in range(steps):
        arrays = None
        while arrays is None:
            arrays = draw(exported, rng)
        params, state, value = update(params, state, arrays)
        recent.append(float(value))
        if step % 50 == 49 or step == 0:
            fixed = np.mean([float(evaluate(params, a)) for a in held_out])
            print(
                f"step {step + 1}  loss {np.mean(recent[-50:]):.4f}  eight fixed problems "
                f"{fixed:.4f}  {time.monotonic() - began:.0f} s",
                flush=True,
            )
            out.mkdir(parents=True, exist_ok=True)
            kept = {name: np.asarray(x) for name, x in params.items()}
            content = save(kept, {"steps": str(step + 1), "seed": str(seed)})
            (out / policy.WEIGHTS).write_bytes(content)
        if time.monotonic() - began > 60 * minutes:
            break
    return 0


def draw(exported: list[Problem], rng: np.random.Generator) -> dict[str, np.ndarray] | None:
    """A problem at a random limit, as arrays; half of them exported, half random."""
    chosen = exported[rng.integers(len(exported))] if rng.random() < 0.5 else random_problem(rng)
    return padded(reduce(with_limit(chosen, rng)))


def exported_files(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """The problems of TRAINED in the contest's format, made where they are not there yet."""
    sys.path.insert(0, str(pathlib.Path(__file__).parent))
    from solver import table_problem

    folder.mkdir(parents=True, exist_ok=True)
    for model, cluster, mesh in TRAINED:
        path = folder / f"{model}.json.gz"
        if not path.exists():
            problem = dataclasses.replace(table_problem(model, cluster, mesh), usage_limit=NO_LIMIT)
            iopddl.write(dataclasses.replace(problem, name=model), path)
        yield path


def closed_form(reduced: Reduced) -> np.ndarray:
    """The start without learning: each node's best by its own cost and the least of its edges."""
    core, found = reduced.core, policy.static(reduced)
    hopeful = found.features[:, 1]
    return np.array(
        [int(hopeful[a:b].argmin()) for a, b in zip(core.offsets[:-1], core.offsets[1:])], np.int32
    )


STARTS: dict[str, Callable[[Reduced], np.ndarray] | None] = {
    "none": None,
    "closed form": closed_form,
    "policy": policy.propose,
}


def count_processor_seconds(problem: Problem) -> None:
    """Makes the clock that limits go by stand still while this process does not run."""
    size = 2 * len(problem.edge_costs) + 20 * len(problem.usage_intervals)
    threads = 2 if size >= engine._LARGE_CELLS else 1
    time.monotonic = lambda: time.process_time() / threads


def compare(
    problems: list[Problem], seconds: list[float], seeds: int, starts: list[str], processor: bool
) -> int:
    """Prints cost over the best cost of all runs, by start and time: mean and worst."""
    solver.prepare()
    chosen = {name: STARTS[name] for name in starts}
    for problem in problems:  # compiled loops are loaded
        for propose in chosen.values():
            solver.solve(problem, time_limit_s=0.0, propose=propose, patient=True)
        break
    costs: dict[tuple[str, float, str], list[float]] = {}
    for problem in problems:
        if processor:
            count_processor_seconds(problem)
        for limit in seconds:
            for seed in range(seeds):
                for name, propose in chosen.items():
                    found = solver.solve(
                        problem, time_limit_s=limit, seed=seed, propose=propose, patient=True
                    )
                    cost = found.cost if found.feasible else np.inf
                    costs.setdefault((name, limit, problem.name), []).append(cost)
            line = {n: statistics.median(costs[n, limit, problem.name]) for n in chosen}
            print(f"{problem.name} {limit:g} s", line, flush=True)
    best = {
        p.name: min(min(v) for (_, _, name), v in costs.items() if name == p.name) for p in problems
    }
    for limit in seconds:
        for name in chosen:
            ratios = np.array(
                [c / best[p.name] for p in problems for c in costs[name, limit, p.name]]
            )
            fine = ratios[np.isfinite(ratios)]
            said = (
                f"mean {fine.mean():.5f}, worst {fine.max():.5f} of the best" if len(fine) else ""
            )
            print(f"{limit:g} s, start {name}: {len(fine)} of {len(ratios)} feasible, {said}")
    return 0


def instances(folder: pathlib.Path, given: argparse.Namespace) -> int:
    wanted, fraction = given.only.split(",") if given.only else None, given.fraction
    with open(folder / "reference.csv", encoding="utf-8", newline="") as file:
        limits = {r["instance"]: float(r["timeout_s"]) * fraction for r in csv.DictReader(file)}
    for name, limit in limits.items():
        path = folder / f"{name}.json.gz"
        if path.exists() and (wanted is None or name in wanted):
            compare([iopddl.read(path)], [limit], given.seeds, given.starts, given.processor_clock)
    return 0


def kept(folder: pathlib.Path | None, make: Callable[[], Iterator[Problem]]) -> Iterator[Problem]:
    """The problems, from a folder where one is named and holds them."""
    found = sorted(folder.glob("*.json.gz")) if folder else []
    if found:
        yield from (iopddl.read(path) for path in found)
        return
    for n, problem in enumerate(make()):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            iopddl.write(problem, folder / f"{n:02}.json.gz")
        yield problem


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    training = verbs.add_parser("train")
    training.add_argument("--steps", type=int, default=1500)
    training.add_argument("--minutes", type=float, default=60.0)
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--exports", type=pathlib.Path, default="out/solver_policy")
    training.add_argument("--out", type=pathlib.Path, default="placement/solver")
    exports = verbs.add_parser("exports")
    exports.add_argument("--seconds", default="0.1,0.3,1")
    exports.add_argument("--problems", type=pathlib.Path, help="a folder of them, made if empty")
    exports.add_argument("--seeds", type=int, default=1)
    contest = verbs.add_parser("instances")
    contest.add_argument("dir", type=pathlib.Path)
    contest.add_argument("--fraction", type=float, default=0.1)
    contest.add_argument("--seeds", type=int, default=3)
    contest.add_argument("--only", help="names of instances, joined by commas")
    for verb in (exports, contest):
        verb.add_argument("--starts", type=lambda text: text.split(","), default=list(STARTS))
        verb.add_argument("--processor-clock", action="store_true")
    given = parser.parse_args()
    if given.verb == "train":
        return train(given.steps, given.exports, given.out, given.seed, given.minutes)
    if given.verb == "instances":
        return instances(given.dir, given)
    sys.path.insert(0, str(pathlib.Path(__file__).parent))
    from solver import exported

    limits = [float(s) for s in given.seconds.split(",")]
    problems = list(kept(given.problems, exported))
    return compare(problems, limits, given.seeds, given.starts, given.processor_clock)


if __name__ == "__main__":
    raise SystemExit(main())
