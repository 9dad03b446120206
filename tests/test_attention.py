"""Attention in two parts against one softmax over both: values, gradients, groups, decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infalign_jax.batches import Array
from infalign_jax.lm import attention
from infalign_jax.lm.attention import KeyValues

WIDE = jnp.dtype("float32")
B, G, K, R, T, P, d = 2, 2, 3, 2, 5, 6, 4


def operands(seed: int = 0) -> tuple[Array, KeyValues, Array, KeyValues, Array]:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Array:
        return jnp.asarray(rng.standard_normal(shape), WIDE)

    own = KeyValues(normal(B, G, K, T, d), normal(B, G, K, T, d))
    prefix = KeyValues(normal(B, G, P, d), normal(B, G, P, d))
    causal = jnp.tril(jnp.ones((T, T), bool))[None, None]
    real = jnp.arange(P)[None] >= jnp.array([[0], [3]])
    return normal(B, G, K, R, T, d), own, causal, prefix, real


def plain(
    q: Array, own: KeyValues, own_mask: Array, prefix: KeyValues | None, prefix_mask: Array
) -> Array:
    """One softmax over keys that are copied for every response and joined."""
    keys, values = own
    mask = jnp.broadcast_to(own_mask, (B, K, T, T))
    if prefix is not None:
        keys, values = (
            jnp.concatenate([jnp.broadcast_to(a[:, :, None], (B, G, K, P, d)), b], axis=3)
            for a, b in zip(prefix, own, strict=True)
        )
        before = jnp.broadcast_to(prefix_mask[:, None, None], (B, K, T, P))
        mask = jnp.concatenate([before, mask], axis=-1)
    scores = jnp.einsum("bgkrqd,bgksd->bgkrqs", q, keys) / d**0.5
    weights = jax.nn.softmax(jnp.where(mask[:, None, :, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bgkrqs,bgksd->bgkrqd", weights, values)


@pytest.mark.parametrize("shared", [True, False])
def test_two_parts_are_one_softmax(shared: bool) -> None:
    q, own, own_mask, prefix, prefix_mask = operands()
    before = prefix if shared else None
    real = prefix_mask if shared else None

    def found(q: Array, own: KeyValues, before: KeyValues | None) -> Array:
        return attention.attend(q, own, own_mask, before, real, WIDE)

    def wanted(q: Array, own: KeyValues, before: KeyValues | None) -> Array:
        return plain(q, own, own_mask, before, prefix_mask)

    np.testing.assert_allclose(found(q, own, before), wanted(q, own, before), atol=1e-6)
    g = operands(1)[0]
    pulls = [jax.jit(jax.vjp(f, q, own, before)[1])(g) for f in (found, wanted)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *pulls)


def test_grouped_queries_are_repeated_heads() -> None:
    q, own, own_mask, prefix, prefix_mask = operands()
    grouped = attention.attend(q, own, own_mask, prefix, prefix_mask, WIDE)
    own, prefix = (KeyValues(*(jnp.repeat(x, R, axis=1) for x in pair)) for pair in (own, prefix))
    alone = jnp.moveaxis(q, 3, 2).reshape(B, G * R, K, 1, T, d)
    repeated = attention.attend(alone, own, own_mask, prefix, prefix_mask, WIDE)
    repeated = jnp.moveaxis(repeated.reshape(B, G, R, K, T, d), 2, 3)
    np.testing.assert_allclose(grouped, repeated, atol=1e-6)


def test_no_weights_are_kept_for_the_gradient() -> None:
    q, own, own_mask, prefix, prefix_mask = operands()
    kept = jax.vjp(lambda q: attention.attend(q, own, own_mask, prefix, prefix_mask, WIDE), q)[1]
    assert max(leaf.size for leaf in jax.tree.leaves(kept)) <= max(q.size, own.keys.size)
