"""One token more for every response: the layers again, reading caches in place of what was seen.

Lanes decode responses side by side: [B, K] of them, K lanes to each prompt in hand, which read that
prompt's keys and values once. A lane's own keys and values stand in a ring of places, which all
lanes write at the same place, however long their responses are by now: a response has at most T
tokens, so of T places none is wanted twice, and writing needs no scatter; with fewer a ring must
grow before it is full. Keys keep their positions' rotation, so the order of places means nothing.

On CPU two things count: a cache is an array of its own for each layer (a stack of layers would be
copied whole at every token), and keys lie with their places last, values with their places before
last, the order in which each is multiplied fastest.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from infalign_jax.batches import Array
from infalign_jax.lm import layers
from infalign_jax.lm.attention import MASKED, KeyValues
from infalign_jax.lm.layers import TransformerConfig, Weights


class Decoder(NamedTuple):
    """The parameters as decoding reads them, prepared once for many tokens."""

    layers: tuple[Weights, ...]
    embedding: Array  # [V, D], in the compute type
    norm: Array  # [D], in `config.wide`


class Places(NamedTuple):
    """Where the lanes stand at one step."""

    turns: Array  # [2, B, K, d / 2], of the position of each lane's newest token
    own_mask: Array  # bool[B, K, T], the places that hold the lane's own response so far
    prefix_mask: Array  # bool[B, P]
    write: Array  # int32[], the place that is written now


def empty_cache(
    config: TransformerConfig, prompts: int, lanes: int, length: int
) -> tuple[KeyValues, ...]:
    """A ring of `length` places for every lane and layer: keys [B, G, K, d, T].

    >>> empty_cache(TransformerConfig(), 2, 3, 5)[0].keys.shape
    (2, 2, 3, 16, 5)
    """
    front = (prompts, config.kv_heads, lanes)
    keys = jnp.zeros((*front, config.head_size, length), config.dtype)
    values = jnp.zeros((*front, length, config.head_size), config.dtype)
    return tuple(KeyValues(keys, values) for _ in range(config.layers))


def grown(cache: tuple[KeyValues, ...], length: int) -> tuple[KeyValues, ...]:
    """The rings with `length` places, of which the first hold what they held.

    A ring may grow only before it is written for the second time around.

    >>> grown(empty_cache(TransformerConfig(), 2, 3, 5), 9)[0].values.shape
    (2, 2, 3, 9, 16)
    """

    def longer(x: Array, axis: int) -> Array:
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, length - x.shape[axis])
        return jnp.pad(x, padding)

    return tuple(KeyValues(longer(ring.keys, 4), longer(ring.values, 3)) for ring in cache)


def advance(
    config: TransformerConfig, decoder: Decoder, prefix: tuple[KeyValues, ...],
    cache: tuple[KeyValues, ...], tokens: Array, places: Places,
) -> tuple[Array, tuple[KeyValues, ...]]:  # fmt: skip
    """Hidden states [B, K, D] after tokens[B, K], and the caches with those tokens in them.

    >>> config = TransformerConfig(width=8, layers=1, heads=4, kv_heads=2, mlp_width=3)
    >>> w = Weights(jnp.ones(8), jnp.ones((8, 2, 4, 2)), jnp.ones((8, 8)), jnp.ones(8),
    ...     jnp.ones((8, 2, 3)), jnp.ones((3, 8)))
    >>> decoder = Decoder((w,), jnp.ones((12, 8)), jnp.ones(8))
    >>> prefix = (KeyValues(jnp.ones((1, 2, 6, 2)), jnp.ones((1, 2, 6, 2))),)
    >>> turned = layers.turns(config, jnp.full((1, 3), 6))
    >>> places = Places(turned, jnp.arange(5)[None, None] <= 0, jnp.ones((1, 6), bool), 0)
    >>> cache, tokens = empty_cache(config, 1, 3, 5), jnp.array([[1, 2, 3]])
    >>> step = jax.jit(advance, static_argnums=0)
    >>> hidden, cache = step(config, decoder, prefix, cache, tokens, places)
    >>> hidden.shape, (cache[0].values[0, 0, 0, :, 0] > 0).tolist()  # the first place is written
    ((1, 3, 8), [True, False, False, False, False])
    """
    x = decoder.embedding[tokens][:, :, None] * jnp.asarray(config.width**0.5, config.dtype)
    kept = []
    for w, before, ring in zip(decoder.layers, prefix, cache, strict=True):
        q, new = layers.queries_keys_values(config, w, x, places.turns[:, :, :, None])
        write = partial(jax.lax.dynamic_update_index_in_dim, index=places.write)
        ring = KeyValues(
            write(ring.keys, new.keys[..., 0, :], axis=4),
            write(ring.values, new.values[..., 0, :], axis=3),
        )
        mixed = _attend(q[..., 0, :], ring, before, places, config.wide)
        x = layers.finish(config, w, x, mixed[..., None, :])
        kept.append(ring)
    return layers.rms_norm(x[:, :, 0], decoder.norm), tuple(kept)


def _attend(q: Array, ring: KeyValues, prefix: KeyValues, places: Places, wide: jnp.dtype) -> Array:
    """Attention [B, G, K, R, d] of one query a lane, q[B, G, K, R, d]: `attention.attend`'s."""
    dot = partial(jnp.einsum, preferred_element_type=wide)
    q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    here = dot("bgkrd,bgkdt->bgkrt", q, ring.keys)
    here = jnp.where(places.own_mask[:, None, :, None], here, MASKED)
    there = dot("bgkrd,bgpd->bgkrp", q, prefix.keys)
    there = jnp.where(places.prefix_mask[:, None, None, None], there, MASKED)
    peak = jnp.maximum(here.max(axis=-1, keepdims=True), there.max(axis=-1, keepdims=True))
    here, there = jnp.exp(here - peak), jnp.exp(there - peak)
    total = here.sum(axis=-1, keepdims=True) + there.sum(axis=-1, keepdims=True)
    mixed = dot("bgkrt,bgktd->bgkrd", here.astype(q.dtype), ring.values)
    mixed += dot("bgkrp,bgpd->bgkrd", there.astype(q.dtype), prefix.values)
    return (mixed / total).astype(q.dtype)
