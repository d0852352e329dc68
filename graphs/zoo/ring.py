"""Attention over a sequence that a mesh axis splits: keys and values go round a ring.

Each of the c devices of the ``context`` axis keeps its queries. At c steps it attends to the block of
keys and values that it holds and passes the block to its neighbour (Liu et al., arXiv:2310.01889), so
that no device holds the whole sequence. Softmax is online and in float32: with s the scores of a block,

    m' = max(m, max_t s_t)    l' = l e^(m - m') + sum_t e^(s_t - m')
    o' = o e^(m - m') + sum_t e^(s_t - m') v_t    out = o / l    lse = m + log l

The backward pass is a ring too and keeps q, k, v, out and lse (Dao, arXiv:2307.08691, section 3.1):

    p = e^(s - lse)    ds = p (dout . v - sum(dout out) + dlse)
    dq += ds k    dk += ds q    dv += p dout

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
ALONG = PartitionSpec(None, CONTEXT)
"""Of an array [B, S, ...]."""
LAST = PartitionSpec(None, None, None, CONTEXT)
"""Of an array [B, K, G, S]."""
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
        sizes = dict(mesh_shape)
        found = AbstractMesh(tuple(sizes.values()), tuple(sizes))
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
    """(out [B, S, K, G, vd], logsumexp of the scores float32 [B, K, G, S]).

    q [B, S, K, G, hd], k [B, T, K, hd], v [B, T, K, vd], S and T in the order of
    :func:`sequence_order`; causal masks take S = T. The other mesh axes are the partitioner's.
    """
    return _mapped(ring, ring_forward, (ALONG, ALONG, ALONG), (ALONG, LAST))(q, k, v)


def _save(ring, q, k, v):
    found: Any = ring_attention(ring, q, k, v)
    out, lse = found
    return (out, lse), (q, k, v, out, lse)


def _pull(ring, saved, cotangents):
    given = (ALONG, ALONG, ALONG, ALONG, LAST, ALONG, LAST)
    return _mapped(ring, ring_backward, given, (ALONG, ALONG, ALONG))(*saved, *cotangents)


ring_attention.defvjp(_save, _pull)


def _mapped(ring: Ring, local, in_specs, out_specs):
    """`local` on every device's share of sequences, with the positions of its queries and keys."""
    place = PartitionSpec(CONTEXT)
    mapped = jax.shard_map(
        functools.partial(local, ring),
        mesh=ring.mesh,
        in_specs=(place, place, *in_specs),
        out_specs=out_specs,
        axis_names={CONTEXT},
        check_vma=False,
    )

    def call(q, k, *rest):
        # Positions are sharded operands: XLA does not partition axis_index beside automatic axes. They
        # are tied to q, as a scan over layers takes out of the map what does not depend on the layer.
        order = [
            jnp.asarray(sequence_order(x.shape[1], ring.ways, zigzag=ring.zigzag)) for x in (q, k)
        ]
        queries, keys, q = jax.lax.optimization_barrier((*order, q))
        return mapped(queries, keys, q, k, *rest)

    return call


def ring_forward(ring: Ring, queries, keys, q, k, v):
    """(out, lse) of a device's queries; shapes as :func:`ring_attention`, S and T its shares."""
    blocks = _Blocks(ring, queries, keys)
    q = blocks.of_queries(q)
    rows = q.shape[:-1]

    def attend(state, held):
        def one(_, xs):
            query, q, *state = xs

            def fold(state, block):
                return _meet(_fold, ring, query, q, *block, state=state), None

            return None, jax.lax.scan(fold, tuple(state), held)[0]

        return jax.lax.scan(one, None, (blocks.queries, q, *state))[1]

    def step(carry, _):
        state, held = carry
        arriving = _pass_on(ring, held)  # beside the computation, which does not need it
        return (attend(state, held), arriving), None

    state = (
        blocks.full((*rows, v.shape[-1]), 0.0),
        blocks.full(rows, MASKED),
        blocks.full(rows, 0.0),
    )
    held = (blocks.keys, blocks.of_keys(k), blocks.of_keys(v))
    (state, held), _ = jax.lax.scan(step, (state, held), length=ring.ways - 1)
    out, peak, total = attend(state, held)
    out = (out / total[..., None]).astype(v.dtype)
    return blocks.joined(out), blocks.joined_rows(peak + jnp.log(total))


def ring_backward(ring: Ring, queries, keys, q, k, v, out, lse, d_out, d_lse):
    """Cotangents of q, k and v of a device's shares."""
    blocks = _Blocks(ring, queries, keys)
    types = (q.dtype, k.dtype, v.dtype)
    q, out, d_out = blocks.of_queries(q), blocks.of_queries(out), blocks.of_queries(d_out)
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    delta = delta - blocks.of_rows(d_lse)
    fixed = (blocks.queries, q, d_out, blocks.of_rows(lse), delta)

    def attend(d_q, held):
        # one block of keys meets all queries before the next: only its sums begin at nothing, and a
        # meeting reads and writes a block of d_q, which is shorter than one of keys
        def one(d_q, block):
            def meet(sums, xs):
                d_q, query, *given = xs
                d_q, *sums = _meet(
                    _gradients, ring, query, tuple(given), *block, state=(d_q, *sums)
                )
                return tuple(sums), d_q

            nothing = tuple(blocks.full(x.shape, 0.0) for x in block[1:])
            sums, d_q = jax.lax.scan(meet, nothing, (d_q, *fixed))
            return d_q, sums

        return jax.lax.scan(one, d_q, held)

    held = (blocks.keys, blocks.of_keys(k), blocks.of_keys(v))
    nothing = tuple(blocks.full(x.shape, 0.0) for x in held[1:])

    def follow(d_q, held, sums):
        # sums are of the block held before: they follow it beside the computation
        sums = _pass_on(ring, sums)
        d_q, more = attend(d_q, held)
        return d_q, jax.tree.map(jnp.add, sums, more)

    def step(carry, _):
        d_q, held, sums = carry
        arriving = _pass_on(ring, held)
        d_q, sums = follow(d_q, held, sums)
        return (d_q, arriving, sums), None

    carry = (blocks.full(q.shape, 0.0), held, nothing)
    (d_q, held, sums), _ = jax.lax.scan(step, carry, length=ring.ways - 1)
    d_q, sums = follow(d_q, held, sums)
    home = _pass_on(ring, sums)
    return tuple(blocks.joined(x).astype(kind) for x, kind in zip((d_q, *home), types))


def _pass_on(ring: Ring, held: Any) -> Any:
    """To the next device of the ring."""
    pairs = [(i, (i + 1) % ring.ways) for i in range(ring.ways)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, CONTEXT, pairs), held)


def _scores(ring: Ring, query, q, key, k) -> tuple[jax.Array, jax.Array]:
    """Scores [B, K, G, s, t] float32, and what a softcap multiplies their gradients by."""
    scores = jnp.einsum("bkgsh,bkth->bkgst", q, k, preferred_element_type=jnp.float32) * ring.scale
    slope = jnp.float32(1.0)
    if ring.softcap is not None:
        bent = jnp.tanh(scores / ring.softcap)
        scores, slope = ring.softcap * bent, 1.0 - bent * bent
    distance = key[None, :] - query[:, None]
    if ring.slopes is not None:
        slopes = jnp.asarray(ring.slopes, jnp.float32).reshape(*q.shape[1:3], 1, 1)
        scores = scores + slopes * distance.astype(jnp.float32)
    if ring.causal:
        visible = distance <= 0
        if ring.window is not None:
            visible = visible & (distance > -ring.window)
        scores = jnp.where(visible, scores, MASKED)
    return scores, slope


def _fold(ring: Ring, query, q, key, k, v, *, state):
    """(o [B, K, G, s, vd], m [B, K, G, s], l [B, K, G, s]) with one more block of keys."""
    out, peak, total = state
    scores, _ = _scores(ring, query, q, key, k)
    higher = jnp.maximum(peak, jnp.max(scores, axis=-1))
    weights = jnp.exp(scores - higher[..., None])
    shrink = jnp.exp(peak - higher)
    more = jnp.einsum(
        "bkgst,bkth->bkgsh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return out * shrink[..., None] + more, higher, total * shrink + jnp.sum(weights, axis=-1)


def _gradients(ring: Ring, query, given, key, k, v, *, state):
    """(dq [B, K, G, s, hd], dk [B, K, t, hd], dv [B, K, t, vd]), float32, with one more meeting."""
    q, d_out, lse, delta = given
    d_q, d_k, d_v = state
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores, slope = _scores(ring, query, q, key, k)
    weights = jnp.exp(scores - lse[..., None])
    d_weights = product("bkgsh,bkth->bkgst", d_out, v)
    d_scores = weights * (d_weights - delta[..., None]) * slope * ring.scale
    d_scores = d_scores.astype(k.dtype)
    return (
        d_q + product("bkgst,bkth->bkgsh", d_scores, k),
        d_k + product("bkgst,bkgsh->bkth", d_scores, q),
        d_v + product("bkgst,bkgsh->bkth", weights.astype(d_out.dtype), d_out),
    )


def _meet(work, ring: Ring, query, q, key, k, v, *, state):
    """`work` on a block of queries and one of keys where some query sees some key, else the state."""
    if not ring.causal:
        return work(ring, query, q, key, k, v, state=state)
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
        k,
        v,
    )


class _Blocks:
    """A device's shares of sequences cut into blocks of contiguous positions, the blocks first."""

    def __init__(self, ring: Ring, queries: jax.Array, keys: jax.Array) -> None:
        pieces = 2 if ring.zigzag else 1
        self.query_block = _divisor(len(queries) // pieces, ring.query_block)
        self.key_block = _divisor(len(keys) // pieces, _KEY_BLOCK)
        self.queries = queries.reshape(-1, self.query_block)
        """int32 [n, S / n] positions in the sequence."""
        self.keys = keys.reshape(-1, self.key_block)

    def full(self, shape: tuple[int, ...], value: float) -> jax.Array:
        """A float32 constant that a scan over layers leaves in the map (see :func:`_mapped`)."""
        nought = (self.queries[0, 0] * 0).astype(jnp.float32)
        return jnp.broadcast_to(nought + value, shape)

    def of_queries(self, x: jax.Array) -> jax.Array:
        """[B, S, K, G, h] -> [n, B, K, G, S / n, h]."""
        return _cut(x, self.query_block)

    def of_keys(self, x: jax.Array) -> jax.Array:
        """[B, T, K, h] -> [n, B, K, T / n, h]."""
        return _cut(x, self.key_block)

    def joined(self, x: jax.Array) -> jax.Array:
        """The inverse of both."""
        x = jnp.moveaxis(jnp.moveaxis(x, -2, 2), 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    def of_rows(self, x: jax.Array) -> jax.Array:
        """[B, K, G, S] -> [n, B, K, G, S / n]."""
        return jnp.moveaxis(x.reshape(*x.shape[:-1], -1, self.query_block), -2, 0)

    def joined_rows(self, x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, -2)
        return x.reshape(*x.shape[:-2], -1)


def _cut(x: jax.Array, block: int) -> jax.Array:
    """[B, S, ..., h] -> [n, B, ..., S / n, h]."""
    b, s = x.shape[:2]
    x = x.reshape(b, s // block, block, *x.shape[2:])
    return jnp.moveaxis(jnp.moveaxis(x, 1, 0), 2, -2)


def _divisor(n: int, most: int) -> int:
    """The largest divisor of n that is not above `most`."""
    return next(d for d in range(min(n, most), 0, -1) if n % d == 0)
