"""Win rates against enumeration over every pair of subsets, and what is refused."""

import itertools

import numpy as np
import pytest

from infalign_jax import evaluation
from infalign_jax.procedures import best_of_n, standard, worst_of_n


def enumerated(policy, reference, procedure, reference_procedure, policy_judge, reference_judge):
    """W of one prompt over all subsets, each tie within a subset broken evenly."""

    def served(rewards, judged, count, choose):
        for subset in itertools.combinations(range(len(rewards)), count):
            chosen = choose(rewards[i] for i in subset)
            tied = [i for i in subset if rewards[i] == chosen]
            for i in tied:
                yield judged[i], 1 / len(tied)

    total = weight = 0.0
    for value, p in served(policy, policy_judge, *procedure):
        for other, q in served(reference, reference_judge, *reference_procedure):
            total += p * q * ((value > other) + (value == other) / 2)
            weight += p * q
    return total / weight


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("procedure", "counted"),
    [(standard(), (1, max)), (best_of_n(2), (2, max)), (worst_of_n(3), (3, min))],
    ids=["standard", "best", "worst"],
)
def test_win_rate_is_the_mean_over_all_subsets(procedure, counted, seed):
    generator = np.random.default_rng(seed)
    policy, policy_judge = generator.integers(0, 4, (2, 2, 5))
    reference, reference_judge = generator.integers(0, 4, (2, 2, 6))
    same = evaluation.win_rate(policy, reference, procedure)
    judged = evaluation.win_rate(
        policy,
        reference,
        procedure,
        reference_procedure=best_of_n(4),
        policy_judge=policy_judge,
        reference_judge=reference_judge,
    )
    for row in range(2):
        x, y = policy[row], reference[row]
        expected = enumerated(x, y, counted, counted, x, y)
        np.testing.assert_allclose(same.per_prompt[row], expected, rtol=1e-12)
        expected = enumerated(x, y, counted, (4, max), policy_judge[row], reference_judge[row])
        np.testing.assert_allclose(judged.per_prompt[row], expected, rtol=1e-12)


def test_equal_policies_draw_on_average():
    rewards = np.random.default_rng(0).normal(size=(4000, 2, 4))
    for procedure in (standard(), best_of_n(4), worst_of_n(2)):
        result = evaluation.win_rate(rewards[:, 0], rewards[:, 1], procedure)
        assert abs(result.mean - 0.5) < 4 * result.standard_error
        assert 0 < result.standard_error < 0.01


def test_one_value_for_all_is_exactly_a_draw():
    result = evaluation.win_rate(np.zeros((3, 5)), np.zeros((3, 9)), best_of_n(4))
    np.testing.assert_allclose(result.per_prompt, 0.5, rtol=1e-6)


def test_best_of_n_against_one_sample_has_its_known_win_rate():
    generator = np.random.default_rng(3)
    policy, reference = generator.uniform(size=(2000, 8)), generator.uniform(size=(2000, 16))
    result = evaluation.win_rate(policy, reference, best_of_n(4), reference_procedure=standard())
    assert abs(result.mean - 4 / 5) < 4 * result.standard_error


def test_selection_weights_share_ties_and_keep_the_order_of_samples():
    weights = evaluation.selection_weights([[2.0, 0.0, 2.0, 1.0]], best_of_n(2))
    np.testing.assert_allclose(weights, [[5 / 12, 0, 5 / 12, 1 / 6]], rtol=1e-6)
    weights = evaluation.selection_weights([[2.0, 0.0, 2.0, 0.0]], worst_of_n(1))
    np.testing.assert_allclose(weights, 0.25, rtol=1e-6)


def test_mean_and_standard_error_over_prompts():
    mean, error = evaluation.mean_and_standard_error([1.0, 2.0, 3.0, 6.0])
    assert mean == 3
    np.testing.assert_allclose(error, np.sqrt(14 / 3 / 4))
    assert np.isnan(evaluation.mean_and_standard_error([1.0])[1])


@pytest.mark.parametrize(
    ("arguments", "judges", "message"),
    [
        ((np.zeros((2, 3)), np.zeros((2, 8)), best_of_n(4)), {}, "at least 4 samples.*got 3"),
        ((np.zeros((2, 4)), np.zeros((3, 4)), best_of_n(4)), {}, "as many prompts on both sides"),
        ((np.zeros(4), np.zeros((1, 4)), best_of_n(4)), {}, r"policy rewards of shape \[B, n\]"),
        ((np.zeros((1, 2)), [[0, np.inf]], standard()), {}, "finite reference rewards, got inf"),
        (
            (np.zeros((1, 2)), np.zeros((1, 2)), standard()),
            {"policy_judge": np.zeros((1, 2))},
            "of both sides or of neither",
        ),
        (
            (np.zeros((1, 2)), np.zeros((1, 2)), standard()),
            {"policy_judge": np.zeros((1, 2)), "reference_judge": np.zeros((1, 3))},
            "judge every sample",
        ),
    ],
)
def test_input_that_does_not_fit_is_refused(arguments, judges, message):
    with pytest.raises(ValueError, match=message):
        evaluation.win_rate(*arguments, **judges)
