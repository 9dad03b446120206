"""Attention of K responses to themselves and to the prompt that they share.

G key-value heads serve H = G·R query heads of size d. The prompt's keys and values stand once per
prompt; the softmax runs over both parts without their ever being joined, so that no prompt is
copied K times. Softmax is computed in `wide`, at least float32.
"""

from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from infalign_jax.batches import Array

MASKED = -1e30


class KeyValues(NamedTuple):
    """Keys and values of one layer (or, stacked in front, of all)."""

    keys: Array  # [B, G, P, d] of prompts, [B, G, K, T, d] of responses
    values: Array


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def attend(
    q: Array, own: KeyValues, own_mask: Array, prefix: KeyValues | None, prefix_mask: Array | None,
    wide: jnp.dtype,
) -> Array:  # fmt: skip
    """Softmax attention [B, G, K, R, Q, d] of q[B, G, K, R, Q, d] to its stream and the prompt's.

    `own_mask` is bool[B or 1, K or 1, Q, T], `prefix_mask` bool[B, P]; every query must be allowed
    at least one key. Of the weights nothing is kept for the gradient, which computes them again
    from the logarithm of their sum (FlashAttention, arXiv 2205.14135).

    >>> q, own = jnp.ones((1, 1, 1, 1, 2, 2)), jnp.array([[1.0, 3.0], [5.0, 7.0]])[None, None, None]
    >>> mask = jnp.array([[True, False], [True, True]])[None, None]
    >>> mixed = attend(q, KeyValues(0 * own, own), mask, None, None, jnp.dtype("float32"))
    >>> mixed[0, 0, 0, 0].tolist()
    [[1.0, 3.0], [3.0, 5.0]]
    """
    return _forward(q, own, own_mask, prefix, prefix_mask, wide)[0]


def _scores(
    q: Array, own: KeyValues, own_mask: Array, prefix: KeyValues | None, prefix_mask: Array | None,
    wide: jnp.dtype,
) -> list[Array]:  # fmt: skip
    """Masked scores [B, G, K, R, Q, T] and, with a prefix, [B, G, K, R, Q, P]."""
    dot = partial(jnp.einsum, preferred_element_type=wide)
    q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    here = dot("bgkrqd,bgktd->bgkrqt", q, own.keys)
    found = [jnp.where(own_mask[:, None, :, None], here, MASKED)]
    if prefix is not None and prefix_mask is not None:
        there = dot("bgkrqd,bgpd->bgkrqp", q, prefix.keys)
        found.append(jnp.where(prefix_mask[:, None, None, None, None], there, MASKED))
    return found


def _forward(*operands: Any) -> tuple[Array, Any]:
    q, own, _, prefix, _, wide = operands
    dot = partial(jnp.einsum, preferred_element_type=wide)
    scores = _scores(*operands)
    peak = reduce(jnp.maximum, (part.max(axis=-1, keepdims=True) for part in scores))
    weights = [jnp.exp(part - peak) for part in scores]
    total = sum(part.sum(axis=-1, keepdims=True) for part in weights)
    # Without the barrier XLA on CPU sums the weights again for each of the d numbers of a head.
    peak, total = jax.lax.optimization_barrier((peak, total))
    mixed = dot("bgkrqt,bgktd->bgkrqd", weights[0].astype(q.dtype), own.values)
    if prefix is not None:
        mixed += dot("bgkrqp,bgpd->bgkrqd", weights[1].astype(q.dtype), prefix.values)
    mixed = (mixed / total).astype(q.dtype)
    return mixed, (*operands[:-1], mixed, peak + jnp.log(total))


def _backward(wide: jnp.dtype, kept: Any, g: Array) -> tuple[Any, ...]:
    """Gradients of q and of both parts' keys and values.

    Those of keys and values are products over the queries, written so that the factor which XLA on
    CPU transposes is the one with d columns.
    """
    q, own, own_mask, prefix, prefix_mask, mixed, log_total = kept
    dot = partial(jnp.einsum, preferred_element_type=wide)
    scores = _scores(q, own, own_mask, prefix, prefix_mask, wide)
    mean = (g.astype(wide) * mixed.astype(wide)).sum(axis=-1, keepdims=True)
    scale = jnp.asarray(q.shape[-1] ** -0.5, q.dtype)

    def part(score: Array, values: KeyValues, spec: str) -> tuple[Array, KeyValues]:
        weight = jnp.exp(score - log_total)
        to_score = weight * (dot(f"bgkrqd,{spec}->bgkrqt", g, values.values) - mean)
        to_score, weight = to_score.astype(q.dtype), weight.astype(q.dtype)
        to_q = dot(f"bgkrqt,{spec}->bgkrqd", to_score, values.keys).astype(q.dtype) * scale
        back = f"bgkrqd,bgkrqt->{spec[:-2]}dt"
        to_keys = dot(back, q * scale, to_score).swapaxes(-1, -2)
        to_values = dot(back, g, weight).swapaxes(-1, -2)
        return to_q, KeyValues(to_keys.astype(q.dtype), to_values.astype(q.dtype))

    to_q, to_own = part(scores[0], own, "bgktd")
    if prefix is None:
        return to_q, to_own, None, None, None
    more, to_prefix = part(scores[1], prefix, "bgtd")
    return to_q + more, to_own, None, to_prefix, None


attend.defvjp(_forward, _backward)
