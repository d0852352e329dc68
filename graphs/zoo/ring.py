"""Attention over a sequence that a mesh axis splits: keys and values go round a ring.

Each of the c devices of the ``context`` axis keeps its queries. At c steps it attends to the block of
keys and values that it holds and passes the block to its neighbour (Liu et al., arXiv:2310.01889), so
that no device holds the whole sequence. Softmax is online and in float32: with s the scores of a block,

    m' = max(m, max_t s_t)    l' = l e^(m - m') + sum_t e^(s_t - m')
    o' = o e^(m - m') + sum_t e^(s_t - m') v_t    out = o / l    lse = m + log l

The backward pass is a ring too and keeps only q, k, v, out and lse (Dao, arXiv:2307.08691, section 3.1):

    p = e^(s - lse)    ds = p (dout . v - sum(dout out) + dlse)    dq += ds k    dk += ds q    dv += p dout

where dk and dv travel in float32 with the keys' block. Within a step, blocks of queries meet blocks of
keys; those that the mask hides from each other are skipped.

Causal masks leave the device of the first contiguous block idle while that of the last one works, and
all wait for it: a step takes nearly twice the mean. In *zig-zag* order device i holds blocks i and
2c - 1 - i of 2c and all have equal work at every step (after Brandon et al., arXiv:2311.09431, whose
stripes are single tokens; blocks keep windows and skipped blocks contiguous). The order is that of the
whole program's sequence (:func:`sequence_order`), so that nothing is moved for it but token numbers.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, PartitionSpec

from graphs.errors import MeshwrightError

CONTEXT = "context"
"""Name of the mesh axis that splits the sequence."""
MASKED = -1e30
_KEY_BLOCK = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ring:
    """What a ring computes, and where."""

    mesh: AbstractMesh
    zigzag: bool
    """See the module docstring; else device i holds the i-th of c contiguous blocks."""
    query_block: int
    """Largest number of queries that meet keys at once."""
    causal: bool
    window: int | None
    """Keys this far behind the query, or farther, are hidden (causal only)."""
    scale: float
    softcap: float | None
    slopes: tuple[float, ...] | None
    """Linear bias per head (ALiBi)."""

    @property
    def ways(self) -> int:
        return self.mesh.shape[CONTEXT]


def sequence_order(seq_len: int, ways: int, *, zigzag: bool) -> np.ndarray:
    """int32 [S]: the position in the sequence of every slot of a program, c contiguous shares.

    Raises MeshwrightError where the sequence cannot be split so.
    """
    blocks = 2 * ways if zigzag else ways
    if seq_len % blocks:
        raise MeshwrightError(
            f"a sequence of {seq_len} tokens does not divide into {blocks} blocks for a ring of "
            f"{ways} devices; give a multiple of {blocks}"
        )
    positions = np.arange(seq_len, dtype=np.int32)
    if not zigzag:
        return positions
    first = np.arange(ways)
    order = np.stack([first, blocks - 1 - first], axis=1).reshape(-1)
    return positions.reshape(blocks, -1)[order].reshape(-1)


def ring_mesh(mesh_shape: tuple[tuple[str, int], ...]) -> AbstractMesh:
    """The mesh of the enclosing shard_map, or one of these axes.

    Raises MeshwrightError where it has no context axis.
    """
    found = jax.sharding.get_abstract_mesh()
    if found.empty and mesh_shape:
        names, sizes = zip(*mesh_shape)
        found = AbstractMesh(sizes, names)
    if found.empty or CONTEXT not in found.axis_names:
        raise MeshwrightError(
            f"attention=ring needs a mesh with an axis {CONTEXT!r}, this one has "
            f"{list(found.axis_names)}; give mesh_shape with that axis or another attention"
        )
    return found


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def ring_attention(
    ring: Ring, q: jax.Array, k: jax.Array, v: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(out [B, S, K, G, vd], logsumexp of the scores float32 [B, S, K, G]).

    q [B, S, K, G, hd], k [B, T, K, hd], v [B, T, K, vd], S and T in the order of
    :func:`sequence_order`; causal masks take S = T. The other mesh axes are the partitioner's.
    """
    return _mapped(ring, functools.partial(_forward, ring), 3, 2)(q, k, v)


def _save(ring, q, k, v):
    out, lse = ring_attention(ring, q, k, v)
    return (out, lse), (q, k, v, out, lse)


def _pull(ring, saved, cotangents):
    return _mapped(ring, functools.partial(_backward, ring), 7, 3)(*saved, *cotangents)


ring_attention.defvjp(_save, _pull)


def _mapped(ring: Ring, local, n_in: int, n_out: int):
    """`local` with the device's place in the ring before its share of each sequence."""
    along, place = PartitionSpec(None, CONTEXT), PartitionSpec(CONTEXT)
    mapped = jax.shard_map(
        local,
        mesh=ring.mesh,
        in_specs=(place, *(along,) * n_in),
        out_specs=(along,) * n_out,
        axis_names={CONTEXT},
        check_vma=False,
    )
    # a sharded operand: XLA does not partition axis_index beside automatic axes
    return functools.partial(mapped, jnp.arange(ring.ways, dtype=jnp.int32))


def _forward(ring: Ring, place, q, k, v):
    blocks = _Blocks(ring, q.shape[1], k.shape[1])
    q = blocks.of_queries(q)
    n, b, s, kv, group, _ = q.shape
    start = (
        jnp.zeros((n, b, s, kv, group, v.shape[-1]), jnp.float32),
        jnp.full((n, b, kv, group, s), MASKED, jnp.float32),
        jnp.zeros((n, b, kv, group, s), jnp.float32),
    )

    def attend(state, held, source):
        positions = blocks.key_positions(source)

        def one(_, xs):
            query, q, *state = xs

            def fold(state, ys):
                return blocks.meeting(_fold, ring, query, q, *ys, state=tuple(state)), None

            return None, jax.lax.scan(fold, tuple(state), (positions, *held))[0]

        return jax.lax.scan(one, None, (blocks.query_positions(place[0]), q, *state))[1]

    def step(carry, hop):
        state, held = carry
        arriving = _pass_on(ring, held)  # beside the computation, which does not need it
        return (attend(state, held, place[0] - hop), arriving), None

    held = (blocks.of_keys(k), blocks.of_keys(v))
    (state, held), _ = jax.lax.scan(step, (start, held), jnp.arange(ring.ways - 1))
    out, peak, total = attend(state, held, place[0] + 1)
    lse = peak + jnp.log(total)
    out = out / jnp.moveaxis(total, -1, 2)[..., None]
    return blocks.joined(out.astype(v.dtype)), blocks.joined(jnp.moveaxis(lse, -1, 2))


def _backward(ring: Ring, place, q, k, v, out, lse, d_out, d_lse):
    blocks = _Blocks(ring, q.shape[1], k.shape[1])
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - d_lse
    rows = tuple(jnp.moveaxis(blocks.of_queries(x), 2, -1) for x in (lse, delta))
    fixed = (
        blocks.query_positions(place[0]),
        blocks.of_queries(q),
        blocks.of_queries(d_out),
        *rows,
    )

    def gather(d_q, held, sums, source):
        positions = blocks.key_positions(source)

        def one(sums, xs):
            d_q, query, q, d_out, lse, delta = xs

            def meet(d_q, ys):
                key, k, v, *sums = ys
                state = (d_q, *sums)
                state = blocks.meeting(
                    _gradients, ring, query, q, key, k, v, d_out, lse, delta, state=state
                )
                return state[0], state[1:]

            d_q, sums = jax.lax.scan(meet, d_q, (positions, *held, *sums))
            return sums, d_q

        sums, d_q = jax.lax.scan(one, sums, (d_q, *fixed))
        return d_q, sums

    def zeros(x):
        return jnp.zeros(x.shape, jnp.float32)

    held = (blocks.of_keys(k), blocks.of_keys(v))
    nothing = tuple(zeros(x) for x in held)

    def meet_all(d_q, held, sums, source):
        # sums are of the block held before: they follow it beside the computation
        sums = _pass_on(ring, sums)
        d_q, more = gather(d_q, held, nothing, source)
        return d_q, jax.tree.map(jnp.add, sums, more)

    def step(carry, hop):
        d_q, held, sums = carry
        arriving = _pass_on(ring, held)
        d_q, sums = meet_all(d_q, held, sums, place[0] - hop)
        return (d_q, arriving, sums), None

    carry = (zeros(fixed[1]), held, nothing)
    (d_q, held, sums), _ = jax.lax.scan(step, carry, jnp.arange(ring.ways - 1))
    d_q, sums = meet_all(d_q, held, sums, place[0] + 1)
    d_k, d_v = _pass_on(ring, sums)  # home
    return (
        blocks.joined(d_q).astype(q.dtype),
        blocks.joined(d_k).astype(k.dtype),
        blocks.joined(d_v).astype(v.dtype),
    )


def _pass_on(ring: Ring, held: Any) -> Any:
    """To the next device of the ring."""
    pairs = [(i, (i + 1) % ring.ways) for i in range(ring.ways)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, CONTEXT, pairs), held)


def _scores(ring: Ring, query, q, key, k) -> tuple[jax.Array, jax.Array]:
    """Scores [B, K, G, s, t] float32, and what a softcap multiplies their gradients by."""
    scores = jnp.einsum("bskgh,btkh->bkgst", q, k, preferred_element_type=jnp.float32) * ring.scale
    slope = jnp.float32(1.0)
    if ring.softcap is not None:
        bent = jnp.tanh(scores / ring.softcap)
        scores, slope = ring.softcap * bent, 1.0 - bent * bent
    distance = key[None, :] - query[:, None]
    if ring.slopes is not None:
        slopes = jnp.asarray(ring.slopes, jnp.float32).reshape(*q.shape[2:4], 1, 1)
        scores = scores + slopes * distance.astype(jnp.float32)
    if ring.causal:
        visible = distance <= 0
        if ring.window is not None:
            visible = visible & (distance > -ring.window)
        scores = jnp.where(visible, scores, MASKED)
    return scores, slope


def _fold(ring: Ring, query, q, key, k, v, *, state):
    """(o [B, s, K, G, vd], m [B, K, G, s], l [B, K, G, s]) with one more block of keys."""
    out, peak, total = state
    scores, _ = _scores(ring, query, q, key, k)
    higher = jnp.maximum(peak, jnp.max(scores, axis=-1))
    weights = jnp.exp(scores - higher[..., None])
    shrink = jnp.exp(peak - higher)
    more = jnp.einsum(
        "bkgst,btkh->bskgh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    out = out * jnp.moveaxis(shrink, -1, 1)[..., None] + more
    return out, higher, total * shrink + jnp.sum(weights, axis=-1)


def _gradients(ring: Ring, query, q, key, k, v, d_out, lse, delta, *, state):
    """(dq [B, s, K, G, hd], dk [B, t, K, hd], dv [B, t, K, vd]), float32, with one more meeting."""
    d_q, d_k, d_v = state
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores, slope = _scores(ring, query, q, key, k)
    weights = jnp.exp(scores - lse[..., None])
    d_weights = product("bskgh,btkh->bkgst", d_out, v)
    d_scores = weights * (d_weights - delta[..., None]) * slope * ring.scale
    d_scores = d_scores.astype(k.dtype)
    return (
        d_q + product("bkgst,btkh->bskgh", d_scores, k),
        d_k + product("bkgst,bskgh->btkh", d_scores, q),
        d_v + product("bkgst,bskgh->btkh", weights.astype(d_out.dtype), d_out),
    )


class _Blocks:
    """A device's share of a sequence cut into blocks of equal size, the blocks first."""

    def __init__(self, ring: Ring, n_queries: int, n_keys: int) -> None:
        self.ring = ring
        self.lengths = (n_queries, n_keys)
        pieces = 2 if ring.zigzag else 1
        self.query_block = _divisor(n_queries // pieces, ring.query_block)
        self.key_block = _divisor(n_keys // pieces, _KEY_BLOCK)

    def of_queries(self, x: jax.Array) -> jax.Array:
        """[B, S, ...] -> [n, B, S / n, ...]."""
        return _cut(x, self.query_block)

    def of_keys(self, x: jax.Array) -> jax.Array:
        return _cut(x, self.key_block)

    def joined(self, x: jax.Array) -> jax.Array:
        """The inverse."""
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    def query_positions(self, place: jax.Array) -> jax.Array:
        """int32 [n, S / n] positions in the sequence of the share of device `place` of the ring."""
        return self._positions(place, self.lengths[0]).reshape(-1, self.query_block)

    def key_positions(self, place: jax.Array) -> jax.Array:
        return self._positions(place, self.lengths[1]).reshape(-1, self.key_block)

    def _positions(self, place: jax.Array, length: int) -> jax.Array:
        ways = self.ring.ways
        place = place % ways
        within = jnp.arange(length, dtype=jnp.int32)
        if not self.ring.zigzag:
            return place * length + within
        half = length // 2
        later = (2 * ways - 1 - place) * half + within - half
        return jnp.where(within < half, place * half + within, later)

    def meeting(self, work, ring: Ring, query, q, key, *rest, state):
        """`work` where some query sees some key, else the state as it is."""
        if not ring.causal:
            return work(ring, query, q, key, *rest, state=state)
        meets = key[0] <= query[-1]
        if ring.window is not None:
            meets = meets & (key[-1] > query[0] - ring.window)
        return jax.lax.cond(
            meets,
            lambda state, *xs: work(ring, *xs, state=state),
            lambda state, *xs: state,
            state,
            query,
            q,
            key,
            *rest,
        )


def _cut(x: jax.Array, block: int) -> jax.Array:
    b, s = x.shape[:2]
    return jnp.moveaxis(x.reshape(b, s // block, block, *x.shape[2:]), 1, 0)


def _divisor(n: int, most: int) -> int:
    """The largest divisor of n that is not above `most`."""
    return next(d for d in range(min(n, most), 0, -1) if n % d == 0)
