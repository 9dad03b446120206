"""Predictions against the analytic frontier, against exact ties, and by a judge of another mind."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infalign_jax import frontier, prediction, quadrature, transformations
from infalign_jax.procedures import best_of_n, standard, worst_of_n

SHARP = transformations.exponential(10.0)
PHIS = [transformations.identity, transformations.log, SHARP]
PROCEDURES = [standard(), best_of_n(4), worst_of_n(4)]
NAMES = {"ids": ["standard", "best", "worst"]}


@functools.cache
def beta_at(phi, kl=0.5):
    return float(frontier.beta_for_kl(phi, kl))


def judged_truth(phi, beta, procedure, agreement):
    """The judged win rate where judge and reward are normal with this correlation, exactly.

    Responses of quantiles u and v then win with probability Φ(ρ(z(u) − z(v))/√(2(1 − ρ²))).
    """
    u, weights = quadrature.grid()
    law = quadrature.tilt(phi(u) / beta)
    served = weights * procedure.density(law.cdf) * jnp.exp(law.log_density)
    met = weights * procedure.density(u)
    z = jnp.clip(jax.scipy.special.ndtri(u), -9, 9)
    apart = agreement * (z[:, None] - z[None, :]) / np.sqrt(2 * (1 - agreement**2))
    return float(served @ jax.scipy.special.ndtr(apart) @ met)


def rewards_and_judge(generator, prompts, k, agreement):
    reward, noise = generator.normal(size=(2, prompts, k))
    return reward, agreement * reward + np.sqrt(1 - agreement**2) * noise


@pytest.mark.parametrize("phi", PHIS, ids=["identity", "log", "exponential"])
@pytest.mark.parametrize("procedure", PROCEDURES, **NAMES)
def test_without_ties_it_nears_the_frontier_as_one_over_k_squared(phi, procedure, precision):
    beta = beta_at(phi)
    kl, win_rate = frontier.curve(phi, procedure, beta)
    for k in (32, 64, 128, 256, 512):
        rewards = np.random.default_rng(k).normal(size=(3, k))
        found = prediction.predict(rewards, phi, beta, procedure)
        assert abs(found.win_rate.mean - win_rate) < 0.04 * (32 / k) ** 2 + 2e-6
        assert abs(found.kl - kl) < 0.065 * (32 / k) ** 2 + 2e-6
        assert found.win_rate.standard_error < 1e-12  # a constant of K, Φ, β and the procedure
        assert found.kl_standard_error < 1e-12


def test_another_procedure_may_decode_the_reference():
    beta = beta_at(SHARP)
    rewards = np.random.default_rng(0).normal(size=(1, 256))
    for procedure, reference in ((best_of_n(4), standard()), (standard(), worst_of_n(4))):
        _, win_rate = frontier.curve(SHARP, procedure, beta, reference)
        found = prediction.predict(
            rewards, SHARP, beta, procedure, reference_procedure=reference
        ).win_rate
        assert abs(found.mean - win_rate) < 0.001


@pytest.mark.parametrize("procedure", PROCEDURES, **NAMES)
def test_only_the_order_of_rewards_counts(procedure):
    generator = np.random.default_rng(1)
    rewards, judge = rewards_and_judge(generator, 20, 64, 0.5)
    beta = beta_at(SHARP)
    found = prediction.predict(rewards, SHARP, beta, procedure, judge=judge)
    moved = prediction.predict(np.exp(rewards), SHARP, beta, procedure, judge=judge**3)
    np.testing.assert_array_equal(found.judged.per_prompt, moved.judged.per_prompt)


def test_a_judge_that_agrees_sees_the_whole_gain_and_one_that_tosses_coins_none():
    generator = np.random.default_rng(2)
    rewards, coins = rewards_and_judge(generator, 2000, 64, 0.0)
    beta = beta_at(SHARP)
    agrees = prediction.predict(rewards, SHARP, beta, best_of_n(2), judge=2 * rewards)
    np.testing.assert_allclose(agrees.judged.per_prompt, agrees.win_rate.per_prompt, rtol=1e-12)
    tosses = prediction.predict(rewards, SHARP, beta, best_of_n(2), judge=coins)
    assert abs(tosses.judged.mean - 0.5) < 4 * tosses.judged.standard_error
    assert tosses.judged.standard_error < 0.005
    assert prediction.predict(rewards, SHARP, beta, best_of_n(2)).judged is None


@pytest.mark.parametrize(
    ("procedure", "k", "bias"),
    [
        (standard(), 64, 0.003),
        (standard(), 128, 0.002),
        (standard(), 256, 0.001),
        (best_of_n(4), 64, 0.005),
        (best_of_n(4), 128, 0.003),
        (best_of_n(4), 256, 0.001),
    ],
)
def test_a_judge_that_half_agrees_is_foretold_within_the_stated_bias(procedure, k, bias):
    """Counting halves matters: without, best-of-4 would be 2.2 points low at K = 64."""
    beta = beta_at(SHARP)
    truth = judged_truth(SHARP, beta, procedure, agreement=0.7)
    rewards, judge = rewards_and_judge(np.random.default_rng(k), 4000, k, 0.7)
    judged = prediction.predict(rewards, SHARP, beta, procedure, judge=judge).judged
    assert abs(judged.mean - truth) < bias + 3 * judged.standard_error
    assert judged.standard_error < 0.0025


def exact_with_ties(masses, phi, beta, procedure):
    """KL and win rate where rewards take a few values: sums over levels, worst first."""
    ends = np.cumsum(masses)
    weights = masses * np.exp(np.asarray(phi(jnp.asarray(ends - masses / 2))) / beta)
    weights /= weights.sum()
    kl = np.sum(weights * np.log(weights / masses))
    served = np.diff(procedure.cdf(np.concatenate([[0], np.cumsum(weights)])))
    met = procedure.cdf(np.concatenate([[0], ends]))
    return kl, np.sum(served * (met[1:] + met[:-1]) / 2)


@pytest.mark.parametrize("procedure", PROCEDURES, **NAMES)
def test_ties_are_levels_of_their_own(procedure):
    masses = np.array([0.3, *[0.1] * 5, *[0.02] * 10])
    beta = beta_at(transformations.identity)
    kl, win_rate = exact_with_ties(masses, transformations.identity, beta, procedure)
    rewards = np.random.default_rng(3).choice(masses.size, (4000, 128), p=masses)
    found = prediction.predict(rewards, transformations.identity, beta, procedure)
    assert abs(found.win_rate.mean - win_rate) < 3 * found.win_rate.standard_error + 5e-4
    assert abs(found.kl - kl) < 3 * found.kl_standard_error + 5e-4


def test_where_all_is_equal_there_is_nothing_to_gain():
    found = prediction.predict(np.zeros((2, 9)), SHARP, 1.0, best_of_n(4), judge=np.ones((2, 9)))
    np.testing.assert_allclose([found.kl, found.win_rate.mean], [0, 0.5], atol=1e-6)
    np.testing.assert_allclose([found.judged.mean, found.effective_sample_size], [0.5, 9])


def test_too_few_samples_are_said_to_be_too_few():
    beta = beta_at(SHARP, 1.0)
    rewards = np.random.default_rng(4).normal(size=(5, 256))
    few = prediction.predict(rewards[:, :32], SHARP, beta, standard())
    assert 5 < few.effective_sample_size < 6
    assert "at least 6, got 5.7: sample more reference responses" in few.warning
    # Worst-of-4 spreads what it serves, but the policy's weights are as few.
    assert prediction.predict(rewards[:, :32], SHARP, beta, worst_of_n(4)).warning
    assert prediction.predict(rewards[:, :64], SHARP, beta, standard()).warning is None
    assert prediction.predict(rewards[:, :64], SHARP, beta, best_of_n(4)).warning
    assert prediction.predict(rewards, SHARP, beta, best_of_n(4)).warning is None


@pytest.mark.parametrize(
    ("rewards", "beta", "judge", "message"),
    [
        (np.zeros((2, 8)), 0.0, None, "positive beta, got 0.0"),
        (np.zeros((2, 3)), 1.0, None, "at least 4 responses a prompt, got 3"),
        (np.zeros((2, 8)), 1.0, np.zeros((2, 7)), r"shape \(2, 8\), got \(2, 7\)"),
        (np.full((2, 8), np.nan), 1.0, None, "finite reference rewards, got nan"),
        (np.zeros((2, 8)), 1.0, np.full((2, 8), np.inf), "finite judge rewards, got inf"),
    ],
)
def test_input_that_does_not_fit_is_refused(rewards, beta, judge, message):
    with pytest.raises(ValueError, match=message):
        prediction.predict(rewards, transformations.identity, beta, standard(), judge=judge)
