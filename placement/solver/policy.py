r"""A learned start for table problems, which say nothing of operators: only costs and structure.

A graph network over the states of all nodes whose messages are the problem's own tables. p_i(a) is
the belief that node i takes state a; in every round each state sees

    e_i(a) = theta_i(a) + sum_j sum_b p_j(b) theta_ij(a, b)     what it costs if all others keep p,
    q_i(a) = sum of its usage at the time points that p overfills, weighted by how much,

both made relative to their node, so that units and sizes do not matter, with a hidden vector and
the mean one of its neighbours; then

    h <- norm(h + relu([h, mean of neighbours' h, features, e, q, log p] W_t + b_t)),
    p <- softmax over the node of (-softplus(beta_t) e - softplus(gamma_t) q + h v_t).

Without h this is mean-field annealing (Peterson and Anderson, Complex Systems 1, 1987) with learned
temperatures. It is trained without answers, on the expected cost and the overfilling of p itself
(Karalias and Loukas, NeurIPS 2020, arXiv:2006.10643), by ``benchmarks/solver_policy.py``.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
from typing import Any, Protocol

import numba
import numpy as np

from placement.solver.core import Core, Reduced

ROUNDS, HIDDEN, FEATURES = 6, 16, 9
_SEEN_EACH_ROUND = 3
_TINY = 1e-9
WEIGHTS = "policy.safetensors"


class Messages(Protocol):
    """What a round takes from a problem; in numpy here, in jax where the weights are trained."""

    node: Any
    """[S] node of each state."""
    theta: Any
    """[S] own cost."""
    scale: Any
    """[N] how much is at stake at a node."""
    features: Any
    """[S, FEATURES]."""

    def expected(self, p: Any) -> Any:
        """[S] sum over edges of the expected pairwise cost."""

    def pressure(self, p: Any) -> Any:
        """[S] usage at overfilled time points, 0 where there are none."""

    def around(self, p: Any, h: Any) -> Any:
        """[N, HIDDEN] mean over neighbours of their expected hidden vector."""

    def least(self, values: Any) -> Any:
        """[N] least of a node's states."""

    def softmax(self, logits: Any) -> Any:
        """[S] over the states of each node."""


def forward(params: dict[str, Any], seen: Messages, xp: Any) -> list[Any]:
    """[S] beliefs after each round."""

    def softplus(x: Any) -> Any:
        return xp.log1p(xp.exp(x))

    logits = -softplus(params["start"]) @ seen.features[:, :2].T
    p = seen.softmax(logits)
    h = xp.zeros((len(seen.theta), HIDDEN), xp.float32)
    beliefs = []
    for t in range(ROUNDS):
        energy = seen.theta + seen.expected(p)
        e = (energy - seen.least(energy)[seen.node]) / seen.scale[seen.node]
        q = seen.pressure(p)
        own = xp.stack([xp.log1p(e), q, xp.log(p + 1e-6) / 8.0], axis=1)
        x = xp.concatenate([h, seen.around(p, h)[seen.node], seen.features, own], axis=1)
        h = h + xp.maximum(x @ params[f"w_{t}"] + params[f"b_{t}"], 0.0)
        h = h / xp.sqrt((h * h).mean(-1, keepdims=True) + 1e-2)
        beta, gamma = softplus(params["beta"][t]), softplus(params["gamma"][t])
        p = seen.softmax(-beta * e - gamma * q + h @ params[f"v_{t}"])
        beliefs.append(p)
    return beliefs


def initial(seed: int) -> dict[str, np.ndarray]:
    """Annealing alone: the part of h is small."""
    rng = np.random.default_rng(seed)
    n_in = 2 * HIDDEN + FEATURES + _SEEN_EACH_ROUND
    params = {
        "start": np.array([2.0, 2.0], np.float32),
        "beta": np.linspace(1.0, 12.0, ROUNDS, dtype=np.float32),
        "gamma": np.full(ROUNDS, 1.0, np.float32),
    }
    for t in range(ROUNDS):
        spread = np.sqrt(2.0 / n_in)
        params[f"w_{t}"] = (rng.standard_normal((n_in, HIDDEN)) * spread).astype(np.float32)
        params[f"b_{t}"] = np.zeros(HIDDEN, np.float32)
        params[f"v_{t}"] = (rng.standard_normal(HIDDEN) * 0.01).astype(np.float32)
    return params


def load() -> dict[str, np.ndarray]:
    """The shipped weights."""
    from safetensors.numpy import load as parse

    return parse((importlib.resources.files("placement.solver") / WEIGHTS).read_bytes())


def propose(reduced: Reduced, params: dict[str, np.ndarray] | None = None) -> np.ndarray:
    """[N] int32: the state of each core node that the policy believes in most."""
    if not len(reduced.core.unary):
        return np.zeros(0, np.int32)
    seen = CoreMessages(reduced)
    belief = forward(load() if params is None else params, seen, np)[-1]
    return _best(reduced.core.offsets, belief.astype(np.float64))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Static:
    """What a core says before any belief."""

    node: np.ndarray
    scale: np.ndarray
    features: np.ndarray


def static(reduced: Reduced) -> Static:
    """Features of all states, each relative to its node or free of units.

    Own cost; least and mean cost of edges; usage; number of states; number of edges; how much the
    node matters; whether own cost with the least of edges is the node's best; how tight memory is.
    """
    core = reduced.core
    k = np.diff(core.offsets)
    node = np.repeat(np.arange(len(k)), k)
    least, mean = _edge_costs(core, reduced.forbidden)
    usage = _usage(core)

    def relative(values: np.ndarray) -> np.ndarray:
        return values - np.minimum.reduceat(values, core.offsets[:-1])[node]

    own, together = relative(core.unary), relative(core.unary + mean)
    scale = np.maximum.reduceat(together, core.offsets[:-1])
    scale = np.maximum(scale, max(_TINY * float(scale.max(initial=0.0)), 1e-300))
    per = scale[node]
    most_used = np.maximum.reduceat(usage, core.offsets[:-1])[node]
    hopeful = relative(core.unary + least)
    degree = np.diff(core.edge_start)
    uniform = _time_use(core, 1.0 / k[node])
    room = core.limit - core.fixed
    tight = float(np.max(uniform / np.maximum(room, _TINY * core.limit + 1e-300), initial=0.0))
    columns = (
        np.log1p(own / per),
        np.log1p(hopeful / per),
        np.log1p(relative(mean) / per),
        usage / np.maximum(most_used, 1e-300),
        np.log(k)[node] / 5.0,
        np.log1p(degree)[node] / 3.0,
        np.log(per / scale.mean() + 1e-6) / 5.0,
        (hopeful <= 0.0),
        np.full(len(node), np.log1p(tight)),
    )
    features = np.stack([np.asarray(c, np.float32) for c in columns], axis=1)
    return Static(node=node, scale=scale, features=features)


class CoreMessages:
    """Messages over a Core by compiled loops."""

    def __init__(self, reduced: Reduced) -> None:
        found, core = static(reduced), reduced.core
        self.core, self.node, self.scale = core, found.node, found.scale
        self.features, self.theta = found.features, core.unary

    def expected(self, p: np.ndarray) -> np.ndarray:
        return _expected(self.core, p.astype(np.float64))

    def pressure(self, p: np.ndarray) -> np.ndarray:
        over = _time_use(self.core, p.astype(np.float64)) + self.core.fixed
        over = np.maximum(over / max(self.core.limit, 1e-300) - 1.0, 0.0)
        worst = float(over.max(initial=0.0))
        if worst <= 0.0:
            return np.zeros(len(p), np.float32)
        sums = np.concatenate([[0.0], np.cumsum(over)])
        held = _held(self.core, sums)
        return (held / max(float(held.mean()), 1e-300) * min(worst, 1.0)).astype(np.float32)

    def around(self, p: np.ndarray, h: np.ndarray) -> np.ndarray:
        core = self.core
        mean = np.add.reduceat(p[:, None] * h, core.offsets[:-1], axis=0)
        owner = np.repeat(np.arange(len(self.scale)), np.diff(core.edge_start))
        out = np.zeros_like(mean)
        for c in range(HIDDEN):
            out[:, c] = np.bincount(owner, mean[core.neighbour, c], len(out))
        return out / np.maximum(np.diff(core.edge_start), 1)[:, None]

    def least(self, values: np.ndarray) -> np.ndarray:
        return np.minimum.reduceat(values, self.core.offsets[:-1])

    def softmax(self, logits: np.ndarray) -> np.ndarray:
        starts = self.core.offsets[:-1]
        e = np.exp(logits - np.maximum.reduceat(logits, starts)[self.node])
        return (e / np.add.reduceat(e, starts)[self.node]).astype(np.float32)


_compile = numba.njit(cache=True, nogil=True, error_model="numpy")


@_compile
def _edge_costs(core, forbidden):
    """[S] sums over edges of the least and of the mean allowed pairwise cost of each state."""
    least, mean = np.zeros(len(core.unary)), np.zeros(len(core.unary))
    for i in range(len(core.offsets) - 1):
        at, k = core.offsets[i], core.offsets[i + 1] - core.offsets[i]
        for d in range(core.edge_start[i], core.edge_start[i + 1]):
            j = core.neighbour[d]
            n = core.offsets[j + 1] - core.offsets[j]
            for a in range(k):
                low, total, allowed = forbidden, 0.0, 0
                for b in range(n):
                    cost = core.cells[core.table[d] + b * k + a]
                    if cost < 0.5 * forbidden:
                        low = min(low, cost)
                        total += cost
                        allowed += 1
                least[at + a] += low
                mean[at + a] += total / max(allowed, 1)
    return least, mean


@_compile
def _expected(core, p):
    """[S] sums over edges of pairwise costs under p."""
    out = np.zeros(len(core.unary))
    for i in range(len(core.offsets) - 1):
        at, k = core.offsets[i], core.offsets[i + 1] - core.offsets[i]
        for d in range(core.edge_start[i], core.edge_start[i + 1]):
            j = core.neighbour[d]
            for b in range(core.offsets[j + 1] - core.offsets[j]):
                weight = p[core.offsets[j] + b]
                if weight > 1e-7:
                    row = core.table[d] + b * k
                    for a in range(k):
                        out[at + a] += weight * core.cells[row + a]
    return out


@_compile
def _held(core, sums):
    """[S] usage of each state times what ``sums`` (prefix sums over time) grows over its life."""
    out = np.zeros(len(core.unary))
    for i in range(len(core.offsets) - 1):
        for u in range(core.use_start[i], core.use_start[i + 1]):
            weight = sums[core.use_to[u]] - sums[core.use_from[u]]
            for a in range(core.offsets[i + 1] - core.offsets[i]):
                out[core.offsets[i] + a] += weight * core.amounts[core.use_value[u] + a]
    return out


def _usage(core: Core) -> np.ndarray:
    """[S] usage summed over time."""
    return _held(core, np.arange(len(core.fixed) + 1, dtype=np.float64))


@_compile
def _time_use(core, p):
    """[T] expected usage under p, on top of what is fixed."""
    change = np.zeros(len(core.fixed) + 1)
    for i in range(len(core.offsets) - 1):
        for u in range(core.use_start[i], core.use_start[i + 1]):
            amount = 0.0
            for a in range(core.offsets[i + 1] - core.offsets[i]):
                amount += p[core.offsets[i] + a] * core.amounts[core.use_value[u] + a]
            change[core.use_from[u]] += amount
            change[core.use_to[u]] -= amount
    return np.cumsum(change)[:-1]


@_compile
def _best(offsets, values):
    out = np.zeros(len(offsets) - 1, np.int32)
    for i in range(len(out)):
        for s in range(offsets[i], offsets[i + 1]):
            if values[s] > values[offsets[i] + out[i]]:
                out[i] = s - offsets[i]
    return out
