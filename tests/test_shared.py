"""An N that both sides share: its optimum against others, the robust choice against its bound."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infalign_jax import frontier, shared
from infalign_jax.procedures import best_of_n, mixture, standard


@pytest.mark.usefixtures("x64")
def test_with_one_procedure_it_is_that_one_s_optimum():
    best = frontier.optimal(best_of_n(8), 0.25)
    alone = shared.optimal([standard(), best_of_n(8)], [0.0, 1.0], 0.25)
    np.testing.assert_allclose([alone.kl, alone.win_rate], [best.kl, best.win_rate], rtol=1e-9)


@pytest.mark.usefixtures("x64")
def test_it_beats_what_is_best_for_the_mixture_of_laws():
    procedures, weights, beta = [standard(), best_of_n(8)], [0.5, 0.5], 0.2
    best = shared.optimal(procedures, weights, beta)
    assert best.converged

    def gain(transformation):
        pairs = [frontier.curve(transformation, each, beta) for each in procedures]
        rates = jnp.stack([win_rate for _, win_rate in pairs])
        return float(np.asarray(weights) @ rates - beta * pairs[0][0])

    highest = gain(best.transformation)
    np.testing.assert_allclose(highest, best.win_rate - beta * best.kl, rtol=1e-9)
    drawn_apart = frontier.optimal(mixture(procedures, weights), beta).transformation
    assert highest > gain(drawn_apart) + 1e-3
    generator = np.random.default_rng(0)
    for scale in (1e-3, 0.1):
        phase, size = generator.uniform(0, 6), generator.normal(0, scale)
        assert highest > gain(
            lambda u, p=phase, s=size: best.transformation(u) + s * jnp.sin(7 * u + p)
        )


@pytest.mark.slow
def test_the_robust_policy_falls_short_of_all_alike_and_of_none_by_more_than_it_must():
    procedures, kl = [best_of_n(2), best_of_n(8)], 0.5
    with jax.enable_x64(True):
        found = shared.robust(procedures, kl)
    assert found.optimum.converged
    assert abs(found.optimum.kl - kl) < 1e-6
    assert abs(found.weights.sum() - 1) < 1e-9
    assert found.weights.min() > 0.1
    assert np.ptp(found.shortfalls) < 1e-4
    assert 0 <= found.gap < 1e-5
    # Each procedure's own optimum falls shorter of the other's frontier.
    with jax.enable_x64(True):
        for own, other in (procedures, procedures[::-1]):
            beta, best = frontier.optimal_at_kl(own, kl)
            missed = frontier.frontier_win_rate(other, kl)
            missed -= frontier.curve(best.transformation, other, beta)[1]
            assert float(missed) > found.shortfalls.max() + 1e-3


@pytest.mark.parametrize("weights", [[1.0], [0.5, 0.6], [1.5, -0.5]])
def test_weights_without_meaning_are_refused(weights):
    with pytest.raises(ValueError, match="expected 2 weights of at least 0 that sum to 1"):
        shared.optimal([standard(), best_of_n(2)], weights, 0.5)


@pytest.mark.parametrize(("procedures", "kl"), [([standard()], 0.5), ([standard()] * 2, 0.0)])
def test_a_robust_choice_among_one_or_of_no_kl_is_refused(procedures, kl):
    with pytest.raises(ValueError, match="expected at least 2 procedures and a positive KL"):
        shared.robust(procedures, kl)
