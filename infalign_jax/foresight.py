"""Foresight: before RL, the trunk learns to foresee the quantile from every prefix.

A policy-gradient step first learns what needs no memory, an additive tilt of token scores, and
with it every Φ gives nearly the same policy. The optimum for a sharp Φ ("as the reference, or
else from its top tenth") needs choices that depend on the choices before: a trunk that knows, at
every position, where the response stands among the reference's. So the trunk is first trained on
the stored reference responses, which calibration has sampled and ranked already, with two losses:

- a head predicts the bin of the final quantile û from the hidden state of every prefix, by
  cross-entropy: the distribution of û given the prefix, from which E[e^{Φ/β} | prefix] follows for
  every Φ and β, so that one stage serves all policies;
- the policy's next-token law is held to the reference's by the exact KL over the vocabulary, so
  that the policy starts where it should and RL's KL is measured against π_ref itself.

The head is thrown away: RL starts from the trunk.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from infalign_jax.batches import Array, Prompts, Responses
from infalign_jax.lm import transformer
from infalign_jax.lm.transformer import Params, TransformerConfig

BINS = 16


class Batch(NamedTuple):
    """Stored reference responses with their leave-one-out quantiles.

    >>> Batch._fields
    ('prompts', 'responses', 'quantiles')
    """

    prompts: Prompts
    responses: Responses  # [B, K, T]
    quantiles: Array  # float32[B, K]


def with_head(config: TransformerConfig, trunk: Params) -> dict[str, Any]:
    """Parameters of trunk (boxed or not) and head; the head starts at 0.

    >>> with_head(TransformerConfig(), {})["head"].value.shape
    (64, 16)
    """
    head = jnp.zeros((config.width, BINS), jnp.float32)
    return {"trunk": trunk, "head": nn.LogicallyPartitioned(head, ("width", None))}


def loss(
    config: TransformerConfig, hold: float, reference: Params, params: Params, batch: Batch
) -> tuple[Array, dict[str, Array]]:
    """Cross-entropy of the quantile's bin at every prefix + hold·KL(π_ref ‖ π) a response.

    Metrics: `foresight`, the cross-entropy in nats (log 16 knows nothing); `final_error`, mean
    |E û − û| once the whole response is seen; `hold_kl` in nats a response.

    >>> loss.__name__
    'loss'
    """
    prompts, responses = batch.prompts, batch.responses
    hidden = transformer.hidden_states(config, params["trunk"], prompts, responses)
    seen = jnp.pad(responses.mask, ((0, 0), (0, 0), (1, 0)), constant_values=True)
    guess = jax.nn.log_softmax(hidden.astype(jnp.float32) @ params["head"], axis=-1)
    target = jnp.clip((batch.quantiles * BINS).astype(jnp.int32), 0, BINS - 1)
    here = jax.nn.one_hot(target, BINS, dtype=jnp.float32)[:, :, None]
    surprise = -(guess * here).sum(axis=-1)
    foresight = jnp.where(seen, surprise, 0.0).sum() / seen.sum(dtype=jnp.float32)
    held = _kl_to_reference(config, reference, params["trunk"], hidden[:, :, :-1], batch)

    middles = (jnp.arange(BINS, dtype=jnp.float32) + 0.5) / BINS
    expected = jnp.exp(guess) @ middles
    length = responses.mask.sum(axis=-1, dtype=jnp.int32)
    final = jnp.take_along_axis(expected, length[..., None], axis=-1)[..., 0]
    error = jnp.abs(final - batch.quantiles).mean()
    metrics = {"foresight": foresight, "final_error": error, "hold_kl": held}
    return foresight + hold * held, metrics


def _kl_to_reference(
    config: TransformerConfig, reference: Params, trunk: Params, hidden: Array, batch: Batch
) -> Array:
    """KL(π_ref ‖ π), exact over the vocabulary at the stored prefixes, in nats a response."""
    known = transformer.hidden_states(config, reference, batch.prompts, batch.responses)
    logits = transformer.next_token_logits(config, reference, known[:, :, :-1])
    law = jax.lax.stop_gradient(jax.nn.log_softmax(logits, axis=-1))
    own = jax.nn.log_softmax(transformer.next_token_logits(config, trunk, hidden), axis=-1)
    divergence = (jnp.exp(law) * (law - own)).sum(axis=-1)
    return jnp.where(batch.responses.mask, divergence, 0.0).sum(axis=-1).mean()
