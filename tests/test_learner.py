"""The learner's gradients against the exact objective of a policy that can be enumerated.

Two prompts; a response is up to two tokens of {a, b, end}: y₁, then y₂ unless y₁ is the end.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infalign_jax import learner
from infalign_jax.batches import Prompts, Responses, Rollouts

END = 2
EVERY = np.array([[END, 0], *([y1, y2] for y1 in (0, 1) for y2 in (0, 1, END))])  # [7, 2]
MASK = np.array([[True, y1 != END] for y1, _ in EVERY])
BETA, LOG_Z = 0.3, 0.7

Params = Any


def params(seed: int) -> Params:
    rng = np.random.default_rng(seed)
    return {
        "first": jnp.asarray(rng.standard_normal((2, 3))),  # by prompt
        "second": jnp.asarray(rng.standard_normal((2, 3, 3))),  # by prompt and first token
    }


def log_probs(params: Params, prompts: Prompts, responses: Responses) -> jax.Array:
    y1, y2 = responses.tokens[..., 0], responses.tokens[..., 1]
    x = jnp.broadcast_to(prompts.index[:, None], y1.shape)
    first = jax.nn.log_softmax(params["first"])[x, y1]
    second = jax.nn.log_softmax(params["second"])[x, y1, y2]
    return first + jnp.where(responses.mask[..., 1], second, 0.0)


def batch(choice: jax.Array, reference: Params) -> learner.Batch:
    """The batch of responses EVERY[choice[B, K]], their rewards by table."""
    index = jnp.arange(2, dtype=jnp.int32)
    prompts = Prompts(jnp.zeros((2, 1), jnp.int32), jnp.ones((2, 1), bool), index)
    responses = Responses(jnp.asarray(EVERY, jnp.int32)[choice], jnp.asarray(MASK)[choice])
    rewards = table()[index[:, None], choice]
    log_ref = log_probs(reference, prompts, responses)
    rollouts = Rollouts(prompts, responses, log_ref)
    return learner.Batch(rollouts, rewards, log_ref, rewards * 2, rewards * 3)


def table() -> jax.Array:
    return jnp.asarray(np.random.default_rng(9).uniform(0, 2, (2, 7)))


def whole() -> jax.Array:
    return jnp.tile(jnp.arange(7), (2, 1))


def law(params: Params) -> jax.Array:
    every = batch(whole(), params)
    return log_probs(params, every.rollouts.prompts, every.rollouts.responses)


def objective(params: Params, reference: Params) -> jax.Array:
    """E[R] − β·KL(π ‖ π_ref), exact, averaged over the two prompts."""
    log_pi = law(params)
    gain = table() - BETA * (log_pi - law(reference))
    return (jnp.exp(log_pi) * gain).sum(axis=1).mean()


def expected_gradient(loss: Callable[..., Any], at: Params, reference: Params) -> Params:
    """E over K = 2 responses a prompt, drawn from the policy, of the loss's gradient."""
    pairs = jnp.stack(jnp.meshgrid(jnp.arange(7), jnp.arange(7)), axis=-1).reshape(49, 2)
    chance = jnp.exp(law(at))
    gradient = jax.grad(lambda p, rows: loss(p, rows)[0])

    def weighted(pair: jax.Array) -> Params:
        """The same pair for both prompts, whose gradients do not meet: each has its chance."""
        weight = chance[:, pair].prod(axis=1)
        found = gradient(at, batch(jnp.tile(pair, (2, 1)), reference))
        return {k: v * weight.reshape(2, *[1] * (v.ndim - 1)) for k, v in found.items()}

    return jax.tree.map(lambda leaf: leaf.sum(axis=0), jax.vmap(weighted)(pairs))


def losses() -> dict[str, Any]:
    return {
        "partition": learner.policy_gradient(log_probs, BETA, LOG_Z, "partition"),
        "leave_one_out": learner.policy_gradient(log_probs, BETA, LOG_Z, "leave_one_out"),
        "regression": learner.regression(log_probs, BETA, LOG_Z),
    }


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["partition", "leave_one_out", "regression"])
def test_the_gradient_is_that_of_the_exact_objective(name: str) -> None:
    """Of all three in expectation over the policy's own responses: −∇(E[R] − β·KL)/β."""
    at, reference = params(0), params(1)
    exact = jax.grad(objective)(at, reference)
    found = jax.jit(lambda p: expected_gradient(losses()[name], p, reference))(at)
    for leaf in ("first", "second"):
        np.testing.assert_allclose(found[leaf], -exact[leaf] / BETA, rtol=1e-5, atol=1e-9)
        assert np.abs(exact[leaf]).max() > 0.01


@pytest.mark.usefixtures("x64")
def test_the_regression_is_the_squared_residual_of_any_responses() -> None:
    at, reference = params(0), params(1)
    rows = batch(jnp.array([[0, 3, 6], [1, 1, 5]]), reference)

    def exact(p: Params) -> jax.Array:
        log_pi = log_probs(p, rows.rollouts.prompts, rows.rollouts.responses)
        residual = table()[jnp.arange(2)[:, None], jnp.array([[0, 3, 6], [1, 1, 5]])] / BETA
        return 0.5 * ((residual - (log_pi - rows.reference_log_probs) - LOG_Z) ** 2).mean()

    value, gradient = jax.value_and_grad(lambda p: losses()["regression"](p, rows)[0])(at)
    truth, expected = jax.value_and_grad(exact)(at)
    np.testing.assert_allclose(value, truth, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), gradient, expected)


def optimum(reference: Params) -> tuple[Params, jax.Array]:
    """π_ref·e^{R/β}/Z as a tabular policy, and log Z of each prompt."""
    log_star = law(reference) + table() / BETA
    log_z = jax.nn.logsumexp(log_star, axis=1)
    log_star = log_star - log_z[:, None]
    second = log_star[:, 1:].reshape(2, 2, 3)
    first = jnp.concatenate([jax.nn.logsumexp(second, axis=2), log_star[:, :1]], axis=1)
    return {"first": first, "second": jnp.pad(second, ((0, 0), (0, 1), (0, 0)))}, log_z


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["partition", "leave_one_out", "regression"])
def test_at_the_optimum_no_sample_moves_the_policy(name: str) -> None:
    """Not in the mean alone: the advantage of every single response is 0."""
    reference = params(1)
    star, log_z = optimum(reference)
    rows = batch(jnp.array([[0, 3, 6], [1, 1, 5]]), reference)
    rows = rows._replace(rewards=rows.rewards + BETA * (LOG_Z - log_z[:, None]))
    (_, metrics), gradient = jax.value_and_grad(losses()[name], has_aux=True)(star, rows)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) < 1e-9
    assert float(metrics["advantage_deviation"]) < 1e-9
    away = jax.grad(lambda p: losses()[name](p, rows)[0])(reference)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(away)) > 1e-3


def test_metrics_say_what_the_rollouts_are(precision: jnp.dtype) -> None:
    at, reference = params(0), params(1)
    rows = batch(jnp.array([[0, 3], [1, 5]]), reference)
    for loss in losses().values():
        metrics = loss(at, rows)[1]
        log_pi = log_probs(at, rows.rollouts.prompts, rows.rollouts.responses)
        expected = {
            "kl": (log_pi - rows.reference_log_probs).mean(),
            "transformed_reward": rows.rewards.mean(),
            "quantile": 2 * rows.rewards.mean(),
            "reward": 3 * rows.rewards.mean(),
            "length": 1.75,
        }
        assert rows.rewards.dtype == precision
        for name, value in expected.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-6)


def test_leaving_one_out_needs_two() -> None:
    rows = batch(jnp.array([[0], [1]]), params(1))
    with pytest.raises(ValueError, match="at least 2 responses a prompt, got 1"):
        losses()["leave_one_out"](params(0), rows)
