"""Foresight: before RL, the trunk learns to foresee the quantile from every prefix.

A policy-gradient step first learns what needs no memory, an additive tilt of token scores, and
with it every Φ gives nearly the same policy. The optimum for a sharp Φ ("as the reference, or
else from its top tenth") needs choices that depend on the choices before: a trunk that knows, at
every position, where the response stands among the reference's. So the trunk is first trained on
the stored reference responses, which calibration has sampled and ranked already:

- to predict, from the hidden state of every prefix, the final quantile û, whose mean given the
  prefix is what a choice can still change;
- to predict the running reward, standardised by its prompt's mean and deviation under π_ref: a
  label without noise at every position, with which the same accuracy takes half the steps;
- while the exact KL over the vocabulary holds the next-token law to the reference's, so that the
  policy starts where it should and RL's KL is measured to π_ref itself.

Both heads read one hidden state and are thrown away; RL starts from the trunk. Neither target
depends on Φ or β: one stage serves every policy.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from infalign_jax.batches import Array, Prompts, Responses
from infalign_jax.lm import transformer, vocabulary
from infalign_jax.lm.transformer import Params, TransformerConfig

QUANTILE_VARIANCE = 1 / 12  # of a uniform variable: both errors count in units of a variance


class Batch(NamedTuple):
    """Stored reference responses with what they have earned.

    >>> Batch._fields
    ('prompts', 'responses', 'quantiles', 'running')
    """

    prompts: Prompts
    responses: Responses  # [B, K, T]
    quantiles: Array  # float32[B, K], leave-one-out
    running: Array  # float32[B, K, T], standardised (see `standardise`)


def standardise(running: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Running rewards [n, K, T] in deviations from what the prompt's responses earn on average.

    A response of length L is expected to have earned t/L of its prompt's mean reward by its
    t-th token; the deviation is that of the prompt's final rewards.

    >>> running = np.array([[[1.0, 2.0], [0.0, 4.0]]])
    >>> standardise(running, np.ones((1, 2, 2), bool)).tolist()
    [[[-0.5, -1.0], [-1.5, 1.0]]]
    """
    final = running[..., -1]
    mean, deviation = final.mean(axis=1), np.maximum(final.std(axis=1), 1e-6)
    progress = np.cumsum(mask, axis=-1) / np.maximum(mask.sum(axis=-1, keepdims=True), 1)
    away = running - mean[:, None, None] * progress
    return (away / deviation[:, None, None]).astype(running.dtype)


def with_head(config: TransformerConfig, trunk: Params) -> dict[str, Any]:
    """Parameters of trunk (boxed or not) and its two heads, which start at 0.

    >>> with_head(TransformerConfig(), {})["head"].value.shape
    (64, 2)
    """
    head = jnp.zeros((config.width, 2), jnp.float32)
    return {"trunk": trunk, "head": nn.LogicallyPartitioned(head, ("width", None))}


def loss(
    config: TransformerConfig, hold: float, params: Params, given: tuple[Params, Batch]
) -> tuple[Array, dict[str, Array]]:
    """Squared errors of both predictions at every prefix + hold·KL(π_ref ‖ π), a response.

    Given are the parameters of π_ref, an operand so that they stay divided, and a batch.
    Metrics: `quantile_loss` and `running_loss`, a prefix, in units of the variance of the final
    quantile and reward; `final_error`, mean |prediction − û| once the whole response is seen;
    `hold_kl` in nats a response.

    >>> config, key = TransformerConfig(), jax.random.key(0)
    >>> trunk = jax.eval_shape(lambda: transformer.initial_params(config, key))
    >>> trunk = nn.unbox(jax.tree.map(lambda leaf: jnp.ones(leaf.shape), trunk))
    >>> x = Prompts(jnp.ones((1, 3), int), jnp.ones((1, 3), bool), jnp.arange(1))
    >>> y = Responses(jnp.array([[[7, 2], [8, 2]]]), jnp.ones((1, 2, 2), bool))
    >>> batch = Batch(x, y, jnp.array([[0.25, 0.75]]), jnp.zeros((1, 2, 2)))
    >>> params, measured = nn.unbox(with_head(config, trunk)), jax.jit(loss, static_argnums=(0, 1))
    >>> value, metrics = measured(config, 1.0, params, (trunk, batch))
    >>> round(float(value), 3), float(metrics["final_error"])  # guesses 1/2: 3 · 12 · (1/4)²
    (2.25, 0.25)
    """
    reference, batch = given
    prompts, responses = batch.prompts, batch.responses
    hidden = transformer.hidden_states(config, params["trunk"], prompts, responses)
    heads = hidden.astype(config.wide) @ params["head"].astype(config.wide)
    seen = jnp.pad(responses.mask, ((0, 0), (0, 0), (1, 0)), constant_values=True)
    guess = jax.nn.sigmoid(heads[..., 0])
    miss = guess - batch.quantiles.astype(config.wide)[..., None]
    surprise = jnp.where(seen, miss**2, 0.0).sum(axis=-1).mean() / QUANTILE_VARIANCE
    off = heads[:, :, 1:, 1] - batch.running.astype(config.wide)
    drift = jnp.where(responses.mask, off**2, 0.0).sum(axis=-1).mean()
    held = _kl_to_reference(config, reference, params["trunk"], hidden[:, :, :-1], batch)

    length = responses.mask.sum(axis=-1, dtype=jnp.int32)
    final = jnp.take_along_axis(miss, length[..., None], axis=-1)[..., 0]
    tokens = responses.mask.sum(axis=-1, dtype=config.wide).mean()
    metrics = {
        "quantile_loss": surprise / (tokens + 1),
        "running_loss": drift / tokens,
        "final_error": jnp.abs(final).mean(),
        "hold_kl": held,
    }
    return surprise + drift + hold * held, metrics


def _kl_to_reference(
    config: TransformerConfig, reference: Params, trunk: Params, hidden: Array, batch: Batch
) -> Array:
    """KL(π_ref ‖ π), exact over the vocabulary at the stored prefixes, in nats a response."""
    known = transformer.hidden_states(config, reference, batch.prompts, batch.responses)
    before, now = (params["embedding"] for params in (reference, trunk))
    divergence = vocabulary.divergence(
        known[:, :, :-1], before, hidden, now, config.wide, config.logits_at_once
    )
    return jnp.where(batch.responses.mask, divergence, 0.0).sum(axis=-1).mean()
