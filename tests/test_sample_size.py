"""What finite K costs, against policies simulated prompt by prompt; where variance comes from."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from infalign_jax import frontier, prediction, procedures, sample_size, transformations
from infalign_jax.procedures import Procedure
from infalign_jax.transformations import Transformation


def simulated(
    phi: Transformation, beta: float, laws: tuple[Procedure, Procedure], k: int, prompts: int
) -> tuple[np.ndarray, np.ndarray]:
    """KL and win rate of e^{Φ(û)/β}/Z, float64[prompts] each, û ranked among K uniform draws.

    By 2,000 equally likely responses of each prompt: F and the procedures' laws are sums over them.
    """
    rng, n = np.random.default_rng(1), 2000
    reference = np.sort(rng.uniform(size=(prompts, k)), axis=1)
    u = (np.arange(n) + 0.5) / n
    below = np.array([np.searchsorted(row, u) for row in reference])
    rewards = np.asarray(phi(jnp.asarray((below + 0.5) / (k + 1))), np.float64)
    f = np.exp((rewards - rewards.max(axis=1, keepdims=True)) / beta)
    f /= f.mean(axis=1, keepdims=True)
    middle = (np.cumsum(f, axis=1) - f / 2) / n
    lost = np.asarray(laws[0].cdf(jnp.asarray(middle)) * laws[1].density(jnp.asarray(u))[None, :])
    return np.mean(f * np.log(np.maximum(f, 1e-300)), axis=1), 1 - lost.mean(axis=1)


@pytest.mark.parametrize("k", [4, 32])
@pytest.mark.parametrize(
    ("phi", "policy", "reference"),
    [
        (transformations.identity, procedures.best_of_n(4), None),
        (transformations.exponential(10.0), procedures.best_of_n(4), None),
        (transformations.exponential(-10.0), procedures.worst_of_n(4), procedures.standard()),
    ],
)
def test_a_simulated_policy_reaches_it(
    phi: Transformation, policy: Procedure, reference: Procedure | None, k: int, x64: None
) -> None:
    found = sample_size.at_k(phi, 0.5, policy, k, reference_procedure=reference)
    kl, wins = simulated(phi, found.beta, (policy, reference or policy), k, 3000)
    assert abs(kl.mean() - 0.5) < 4 * kl.std() / np.sqrt(3000) + 0.002
    # Led back to KL 0.5, as what both sets of prompts have by chance is not of interest.
    near = simulated(phi, 1.001 * found.beta, (policy, reference or policy), k, 3000)
    slope = (near[1] - wins).mean() / (near[0] - kl).mean()
    wins = wins - slope * (kl - 0.5)
    error = np.hypot(wins.std() / np.sqrt(3000), found.standard_error)
    assert abs(wins.mean() - found.win_rate) < 3.5 * error + 2e-4
    assert error < 0.003


def test_more_responses_cost_less_down_to_the_theory(x64: None) -> None:
    law, phi = procedures.best_of_n(4), transformations.exponential(10.0)
    limit = float(frontier.curve(phi, law, frontier.beta_for_kl(phi, 0.5))[1])
    lost = [limit - sample_size.at_k(phi, 0.5, law, k).win_rate for k in (8, 32, 128, 512)]
    assert lost == pytest.approx([0.0629, 0.0223, 0.0066, 0.0020], abs=0.0012)  # finite_k.py
    assert all(more > less for more, less in itertools.pairwise(lost))


def test_the_same_prompts_for_every_transformation(precision: jnp.dtype) -> None:
    """A shift and a scale of Φ, which β takes up, change nothing but β."""
    law = procedures.best_of_n(4)
    one = sample_size.at_k(transformations.identity, 0.5, law, 16)
    other = sample_size.at_k(lambda u: 3 * u - 1, 0.5, law, 16)
    assert other.beta == pytest.approx(3 * one.beta, rel=1e-5)
    assert other.win_rate == pytest.approx(one.win_rate, abs=1e-5)


def test_a_kl_out_of_reach_of_ranks() -> None:
    with pytest.raises(ValueError, match=r"ranks among 4 .*below 2\.0\d\), got 3: ask for less"):
        sample_size.at_k(transformations.log, 3.0, procedures.standard(), 4)


def draws(prompts: int, k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rewards and a judge that agrees with them more on some prompts than on others."""
    rng = np.random.default_rng(seed)
    rewards = rng.normal(size=(prompts, k))
    weight = rng.uniform(-0.5, 1, size=(prompts, 1))
    return rewards, weight * rewards + rng.normal(size=rewards.shape)


def test_the_spread_foretells_the_standard_error_at_more_responses(x64: None) -> None:
    law, phi, beta = procedures.standard(), transformations.log, 0.5

    def judged(rewards: np.ndarray, judge: np.ndarray) -> np.ndarray:
        found = prediction.predict(rewards, phi, beta, law, judge=judge).judged
        assert found is not None
        return found.per_prompt

    rewards, judge = draws(3000, 32, 0)
    halves = [judged(rewards[:, i::2], judge[:, i::2]) for i in range(2)]
    parts = sample_size.spread(judged(rewards, judge), *halves)
    for factor in (1, 2, 8):
        truth = judged(*draws(3000, 32 * factor, factor)).std(ddof=1) / np.sqrt(3000)
        foretold = sample_size.standard_error(parts, 3000, factor)
        assert foretold == pytest.approx(truth, rel=0.08)
    assert parts.within > 0.2 * parts.between > 0  # else nothing was asked


def test_all_variance_may_be_within() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 50))
    parts = sample_size.spread((one + other) / 2, one, other)
    assert parts.between >= 0
    assert parts.between + parts.within == pytest.approx(np.var((one + other) / 2, ddof=1))


@pytest.mark.parametrize("shapes", [(3, 3, 2), (1, 1, 1)])
def test_figures_of_one_shape_are_expected(shapes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="three figures of shape"):
        sample_size.spread(*(np.zeros(n) for n in shapes))
