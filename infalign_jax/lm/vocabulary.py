"""Log-probabilities and divergences over the vocabulary, a piece of it at a time.

Hidden states [..., D] meet the tied embedding [V, D] in chunks of rows, `size` logits at most in
one: no array [tokens, V] is ever whole, neither forward nor backward, where each chunk's logits are
computed again. The gradients are written down (softmax minus what was chosen), so that nothing of
that size is kept in between.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from infalign_jax.batches import Array
from infalign_jax.runtime import mesh as meshes
from infalign_jax.runtime import shards

WHOLE = PartitionSpec()


def chunks(rows: int, vocabulary: int, size: int) -> tuple[int, int]:
    """How many chunks of how many rows hold at most `size` logits each, all of one length.

    >>> chunks(4096, 32_000, 2**23)
    (16, 256)
    >>> chunks(100, 512, 2**23)
    (1, 100)
    """
    most = max(size // vocabulary, 1)
    count = -(-rows // most)
    return count, -(-rows // count)


def _in_chunks(size: int, vocabulary: int, rows: Any) -> tuple[Any, int]:
    """Arrays [n, ...] as [count, rows of a chunk, ...], filled up with zeros, and n."""
    n = len(jax.tree.leaves(rows)[0])
    count, each = chunks(n, vocabulary, size)

    def split(x: Array) -> Array:
        filled = jnp.pad(x, [(0, count * each - n)] + [(0, 0)] * (x.ndim - 1))
        return filled.reshape(count, each, *x.shape[1:])

    return jax.tree.map(split, rows), n


def _rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


def _logits(hidden: Array, table: Array, wide: jnp.dtype) -> Array:
    return jnp.einsum("nd,vd->nv", hidden, table, preferred_element_type=wide)


def embed(table: Array, tokens: Array, dtype: jnp.dtype) -> Array:
    """Rows [B, ..., D] of the table [V, D] at tokens[B, ...], in `dtype`.

    Where `fsdp` divides the table along D, each device looks its part of a row up for all tokens of
    its group, and they exchange what they found: the table stays where it is, and so does its
    gradient.

    >>> embed(jnp.eye(3), jnp.array([[2, 0]]), jnp.dtype("float32")).tolist()
    [[[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]]
    """
    if not shards.divides(len(tokens)):
        return table[tokens].astype(dtype)
    rows = shards.rows(len(tokens))

    def own(table: Array, tokens: Array) -> Array:
        group = jax.lax.all_gather(tokens, "fsdp", tiled=True)
        part = table[group].astype(dtype)
        return jax.lax.all_to_all(part, "fsdp", 0, part.ndim - 1, tiled=True)

    parts = PartitionSpec(None, "fsdp"), rows
    return shards.by_shards(own, parts, rows, meshes.BATCH)(table, tokens)


def log_probs(hidden: Array, table: Array, tokens: Array, wide: jnp.dtype, size: int) -> Array:
    """log softmax(hidden · tableᵀ) [...] at `tokens`, in `wide`.

    The table is multiplied in the hidden states' type; its gradient is summed over shards in its
    own.

    >>> hidden, table = jnp.zeros((2, 3, 4)), jnp.ones((10, 4))
    >>> tokens = jnp.zeros((2, 3), jnp.int32)
    >>> bool(jnp.allclose(log_probs(hidden, table, tokens, jnp.float32, 20), -jnp.log(10.0)))
    True
    """
    rows = shards.rows(len(hidden))

    def own(hidden: Array, table: Array, tokens: Array) -> Array:
        return _log_probs(wide, size, hidden, table.astype(hidden.dtype), tokens)

    return shards.by_shards(own, (rows, WHOLE, rows), rows, meshes.BATCH)(hidden, table, tokens)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _log_probs(wide: jnp.dtype, size: int, hidden: Array, table: Array, tokens: Array) -> Array:
    return _log_probs_kept(wide, size, hidden, table, tokens)[0]


def _log_probs_kept(
    wide: jnp.dtype, size: int, hidden: Array, table: Array, tokens: Array
) -> tuple[Array, Any]:
    def chunk(rows: tuple[Array, Array]) -> tuple[Array, Array]:
        h, token = rows
        total = jax.nn.logsumexp(_logits(h, table, wide), axis=-1)
        own = jnp.einsum("nd,nd->n", h, table[token], preferred_element_type=wide)
        return own - total, total

    rows, n = _in_chunks(size, len(table), (_rows(hidden), tokens.reshape(-1)))
    found, total = (x.reshape(-1)[:n].reshape(tokens.shape) for x in _map(chunk, rows))
    return found, (hidden, table, tokens, total)


def _log_probs_back(wide: jnp.dtype, size: int, kept: Any, g: Array) -> tuple[Any, ...]:
    hidden, table, tokens, total = kept
    places = jnp.arange(len(table), dtype=jnp.int32)[None]

    def to_logits(rows: tuple[Array, ...]) -> Array:
        h, token, total, g = rows
        law = jnp.exp(_logits(h, table, wide) - total[:, None])
        return (jnp.where(places == token[:, None], 1.0, 0.0).astype(wide) - law) * g[:, None]

    rest = (x.reshape(-1) for x in (tokens, total, g))
    return *_pull(to_logits, hidden, table, wide, size, (_rows(hidden), *rest)), None


_log_probs.defvjp(_log_probs_kept, _log_probs_back)


def divergence(
    fixed: Array, fixed_table: Array, hidden: Array, table: Array, wide: jnp.dtype, size: int
) -> Array:
    """KL(softmax(fixed · fixed_tableᵀ) ‖ softmax(hidden · tableᵀ)) [...] in nats, in `wide`.

    Exact over the vocabulary; no gradient reaches the first law.

    >>> rows, table = jnp.array([[1.0, 0.0]]), jnp.eye(2)
    >>> float(divergence(rows, table, rows, table, jnp.float32, 20)[0])
    0.0
    """
    rows = shards.rows(len(hidden))

    def own(fixed: Array, fixed_table: Array, hidden: Array, table: Array) -> Array:
        fixed_table, table = (x.astype(hidden.dtype) for x in (fixed_table, table))
        return _divergence(wide, size, fixed, fixed_table, hidden, table)

    divided = shards.by_shards(own, (rows, WHOLE, rows, WHOLE), rows, meshes.BATCH)
    return divided(fixed, fixed_table, hidden, table)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _divergence(
    wide: jnp.dtype, size: int, fixed: Array, fixed_table: Array, hidden: Array, table: Array
) -> Array:
    return _divergence_kept(wide, size, fixed, fixed_table, hidden, table)[0]


def _divergence_kept(
    wide: jnp.dtype, size: int, fixed: Array, fixed_table: Array, hidden: Array, table: Array
) -> tuple[Array, Any]:
    def chunk(rows: tuple[Array, Array]) -> Array:
        law = jax.nn.log_softmax(_logits(rows[0], fixed_table, wide), axis=-1)
        own = jax.nn.log_softmax(_logits(rows[1], table, wide), axis=-1)
        return (jnp.exp(law) * (law - own)).sum(axis=-1)

    rows, n = _in_chunks(size, 2 * len(table), (_rows(fixed), _rows(hidden)))
    found = _map(chunk, rows).reshape(-1)[:n].reshape(hidden.shape[:-1])
    return found, (fixed, fixed_table, hidden, table)


def _divergence_back(wide: jnp.dtype, size: int, kept: Any, g: Array) -> tuple[Any, ...]:
    fixed, fixed_table, hidden, table = kept

    def to_logits(rows: tuple[Array, ...]) -> Array:
        h, before, g = rows
        law = jax.nn.softmax(_logits(before, fixed_table, wide), axis=-1)
        return (jax.nn.softmax(_logits(h, table, wide), axis=-1) - law) * g[:, None]

    rows = (_rows(hidden), _rows(fixed), g.reshape(-1))
    back = _pull(to_logits, hidden, table, wide, size // 2, rows)
    return jnp.zeros_like(fixed), jnp.zeros_like(fixed_table), *back


_divergence.defvjp(_divergence_kept, _divergence_back)


def _map(chunk: Any, rows: Any) -> Any:
    """A function of every chunk; where there is one, without a loop."""
    if len(jax.tree.leaves(rows)[0]) == 1:
        return jax.tree.map(lambda x: x[None], chunk(jax.tree.map(lambda x: x[0], rows)))
    return jax.lax.map(chunk, rows)


def _pull(
    to_logits: Any, hidden: Array, table: Array, wide: jnp.dtype, size: int, rows: Any
) -> tuple[Array, Array]:
    """Gradients of hidden and table, where `to_logits` gives those of a chunk's logits.

    The table's is summed as [D, V]: to write it as [V, D] XLA on CPU would transpose the logits.
    """
    rows, n = _in_chunks(size, len(table), rows)
    dot = partial(jnp.einsum, preferred_element_type=wide)

    def step(so_far: Array, rows: tuple[Array, ...]) -> tuple[Array, Array]:
        g = to_logits(rows).astype(table.dtype)
        return so_far + dot("nd,nv->dv", rows[0], g), dot("nv,vd->nd", g, table)

    start = jnp.zeros(table.shape[::-1], wide)
    if len(rows[0]) == 1:
        to_table, to_hidden = step(start, jax.tree.map(lambda x: x[0], rows))
    else:
        to_table, to_hidden = jax.lax.scan(step, start, rows)
    to_hidden = to_hidden.reshape(-1, hidden.shape[-1])[:n].reshape(hidden.shape)
    return to_hidden.astype(hidden.dtype), to_table.T.astype(table.dtype)
