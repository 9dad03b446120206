"""The KL-regularised step: max_π E[R] − β·KL(π ‖ π_ref), whole sequences, nothing clipped.

Two losses with the interface of `training.make_update`, each a function of numbers [B, K]: a
transformed reward R = Φ(C) and the reference's log-probability of every response. Neither knows
where they come from, nor what a response is: `log_probs` maps (params, prompts, responses) to
log π(y | x) [B, K].

Both have the same optimum, π ∝ π_ref·e^{R/β}, where R − β·log(π/π_ref) = β·log Z for every y.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp

from infalign_jax.batches import Array, Rollouts
from infalign_jax.training import Loss, Metrics

Params = Any
LogProbs = Callable[[Params, Any, Any], Array]
Baseline = Literal["partition", "leave_one_out"]


class Batch(NamedTuple):
    """Rollouts with their transformed rewards.

    >>> Batch._fields
    ('rollouts', 'rewards', 'reference_log_probs', 'quantiles', 'raw_rewards')
    """

    rollouts: Rollouts
    rewards: Array  # float32[B, K], Φ of the quantile
    reference_log_probs: Array  # float32[B, K], log π_ref(y | x)
    quantiles: Array  # float32[B, K], for the metrics alone
    raw_rewards: Array  # float32[B, K], for the metrics alone


def policy_gradient(
    log_probs: LogProbs, beta: float, log_partition: float, baseline: Baseline
) -> Loss:
    """A loss whose gradient is an unbiased estimate of −∇(E[R] − β·KL)/β on fresh rollouts.

    The score-function estimator with the advantage R − β·log(π/π_ref) − b. The baseline b is
    β·log Z, exact for a calibrated reward (the advantage vanishes for every response at the
    optimum), or the mean of R − β·log(π/π_ref) over the other K − 1 responses. Dividing by β
    gives gradients one scale for every β and Φ.

    >>> policy_gradient(lambda params, prompts, responses: params, 0.1, 0.0, "mean")
    Traceback (most recent call last):
    ValueError: baseline: expected partition or leave_one_out, got mean
    """
    if baseline not in ("partition", "leave_one_out"):
        raise ValueError(f"baseline: expected partition or leave_one_out, got {baseline}")

    def loss(params: Params, batch: Batch) -> tuple[Array, Metrics]:
        log_pi = _log_pi(log_probs, params, batch)
        log_ratio = jax.lax.stop_gradient(log_pi) - batch.reference_log_probs
        value = batch.rewards / beta - log_ratio
        if baseline == "partition":
            advantage = value - log_partition
        else:
            k = value.shape[1]
            if k < 2:
                raise ValueError(f"leave_one_out: expected at least 2 responses a prompt, got {k}")
            others = (value.sum(axis=1, keepdims=True) - value) / (k - 1)
            advantage = value - others
        return -(advantage * log_pi).mean(), _metrics(batch, log_ratio, advantage)

    return loss


def regression(log_probs: LogProbs, beta: float, log_partition: float) -> Loss:
    """½·(R/β − log(π/π_ref) − log Z)², averaged: an offline loss on any responses.

    Zero at the optimum whichever responses it sees, so the stored reference responses will do
    (QRPO, arXiv 2507.08068, here with log Z exact for every Φ).

    At the optimum log π = log π_ref + R/β − log Z; with β = ½ and log Z = 0:

    >>> from infalign_jax.batches import Responses
    >>> rewards, log_ref = jnp.array([[0.5, -0.5]]), jnp.array([[-2.0, -1.0]])
    >>> responses = Responses(None, jnp.ones((1, 2, 3), bool))
    >>> rollouts = Rollouts(None, responses, log_ref)
    >>> batch = Batch(rollouts, rewards, log_ref, rewards, rewards)
    >>> loss = regression(lambda log_pi, x, y: log_pi, 0.5, 0.0)
    >>> float(loss(jnp.array([[-1.0, -2.0]]), batch)[0])
    0.0
    >>> float(loss(jnp.array([[-1.0, -1.0]]), batch)[0])
    0.25
    """

    def loss(params: Params, batch: Batch) -> tuple[Array, Metrics]:
        log_pi = _log_pi(log_probs, params, batch)
        log_ratio = log_pi - batch.reference_log_probs
        residual = batch.rewards / beta - log_ratio - log_partition
        metrics = _metrics(batch, *jax.lax.stop_gradient((log_ratio, residual)))
        return 0.5 * (residual**2).mean(), metrics

    return loss


def _log_pi(log_probs: LogProbs, params: Params, batch: Batch) -> Array:
    """log π(y | x) [B, K]; refuses numbers of another shape, which would broadcast in silence."""
    log_pi = log_probs(params, batch.rollouts.prompts, batch.rollouts.responses)
    chex.assert_equal_shape([log_pi, batch.rewards, batch.reference_log_probs])
    return log_pi


def _metrics(batch: Batch, log_ratio: Array, advantage: Array) -> Metrics:
    return {
        "kl": log_ratio.mean(),
        "quantile": batch.quantiles.mean(),
        "reward": batch.raw_rewards.mean(),
        "transformed_reward": batch.rewards.mean(),
        "advantage_deviation": advantage.std(),
        "length": batch.rollouts.responses.mask.sum(axis=-1, dtype=jnp.float32).mean(),
    }
