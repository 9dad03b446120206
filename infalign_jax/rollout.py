"""What one on-policy step learns from: prompts -> y -> r -> C -> Φ, with log π_ref beside it."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
from jax.profiler import TraceAnnotation
from jax.sharding import Mesh

from infalign_jax import calibration, learner
from infalign_jax.batches import Array, Prompts, Responses, Rollouts
from infalign_jax.lm.transformer import Params
from infalign_jax.programs import Sample
from infalign_jax.runtime import mesh as meshes
from infalign_jax.transformations import Transformation

Rank = Callable[[Rollouts, Array, Array, Array], learner.Batch]


class Parts(NamedTuple):
    """The four programs of a step before its update. Rewards may come from anywhere, once a step.

    >>> Parts._fields
    ('sample', 'score', 'reference', 'rank')
    """

    sample: Sample  # (params, prompts, key) -> rollouts, by `programs.make_sample`
    score: Callable[[Prompts, Responses], Array]  # -> r(x, y) [B, K]
    reference: Callable[[Prompts, Responses], Array]  # -> log π_ref(y | x) [B, K]
    rank: Rank  # by `make_rank`


def make_rank(mesh: Mesh, phi: Transformation) -> Rank:
    """(rollouts, rewards [B, K], sorted reference rewards [B, K_ref], log π_ref [B, K]) -> batch.

    >>> import jax.numpy as jnp
    >>> mesh = meshes.make(meshes.MeshConfig(), jax.devices()[:1])
    >>> rank = make_rank(mesh, lambda u: 2.0 * u)
    >>> log_ref, table = jnp.zeros((1, 2)), jnp.array([[0.0, 1.0, 2.0]])
    >>> batch = rank(Rollouts(None, None, log_ref), jnp.array([[1.0, 9.0]]), table, log_ref)
    >>> batch.quantiles.tolist(), batch.rewards.tolist()
    ([[0.5, 0.875]], [[1.0, 1.75]])
    """
    divided = meshes.batch_sharding(mesh)

    @partial(jax.jit, in_shardings=divided, out_shardings=divided)
    def rank(rollouts: Rollouts, rewards: Array, table: Array, log_ref: Array) -> learner.Batch:
        with jax.named_scope("calibrate"):
            quantiles = calibration.calibrate(rewards, table)
            return learner.Batch(rollouts, phi(quantiles), log_ref, quantiles, rewards)

    return rank


def batch(
    parts: Parts, params: Params, prompts: Prompts, table: Array, key: Array
) -> learner.Batch:
    """An on-policy batch: responses of the policy `params`, scored, ranked and transformed.

    `table` has the sorted rewards of π_ref's responses to the same prompts, [B, K_ref].

    >>> import jax.numpy as jnp
    >>> mesh, one = meshes.make(meshes.MeshConfig(), jax.devices()[:1]), jnp.ones((1, 1))
    >>> rollouts = Rollouts(None, Responses(None, None), one)
    >>> parts = Parts(
    ...     sample=lambda params, prompts, key: rollouts, score=lambda prompts, responses: 5 * one,
    ...     reference=lambda prompts, responses: -one, rank=make_rank(mesh, lambda u: u),
    ... )
    >>> made = batch(parts, None, None, jnp.array([[0.0, 1.0]]), None)
    >>> made.raw_rewards.item(), made.reference_log_probs.item(), round(made.quantiles.item(), 3)
    (5.0, -1.0, 0.833)
    """
    with TraceAnnotation("sample"):
        rollouts = parts.sample(params, prompts, key)
        if next(iter(rollouts.log_probs.devices())).platform == "cpu":
            # There the update's collectives give up on a shard that still draws after 40 s.
            jax.block_until_ready(rollouts)
    with TraceAnnotation("score"):
        rewards = parts.score(prompts, rollouts.responses)
    with TraceAnnotation("reference"):
        log_ref = parts.reference(prompts, rollouts.responses)
    with TraceAnnotation("calibrate"):
        return parts.rank(rollouts, rewards, table, log_ref)
