"""Win rates against enumeration over every pair of subsets, and what is refused."""

import itertools

import jax
import numpy as np
import pytest

from infalign_jax import evaluation
from infalign_jax.evaluation import WinRate
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


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("procedure", "counted"),
    [(standard(), (1, max)), (best_of_n(2), (2, max)), (worst_of_n(3), (3, min))],
    ids=["standard", "best", "worst"],
)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "apart"])
def test_win_rate_is_the_mean_over_all_subsets(procedure, counted, seed, tied):
    generator = np.random.default_rng(seed)
    draw = (lambda shape: generator.integers(0, 4, shape)) if tied else generator.standard_normal
    policy, policy_judge = draw((2, 2, 5))
    reference, reference_judge = draw((2, 2, 6))
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
    policy, reference = generator.uniform(size=(2, 2000, 8))
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


def rate(values):
    values = np.array(values, float)
    return WinRate(*evaluation.mean_and_standard_error(values), values)


def test_a_paired_difference_is_of_the_same_prompts():
    difference = evaluation.paired_difference(rate([0.2, 0.9, 0.4]), rate([0.1, 0.9, 0.1]))
    np.testing.assert_allclose(difference.per_prompt, [0.1, 0.0, 0.3])
    np.testing.assert_allclose(difference.mean, 0.4 / 3)
    # Variance of 0.1, 0, 0.3 over 3: (0.1 − 0.16/3)/2/3.
    np.testing.assert_allclose(difference.standard_error, np.sqrt((0.1 - 0.16 / 3) / 6))
    with pytest.raises(ValueError, match="same prompts, got 3 and 2"):
        evaluation.paired_difference(rate([0.2, 0.9, 0.4]), rate([0.1, 0.9]))


def test_pairing_takes_away_what_prompts_and_reference_samples_do_to_both():
    generator = np.random.default_rng(5)
    harder = generator.normal(size=(400, 1))
    rewards = generator.normal(size=(3, 400, 8)) - [[[0.0]], [[1.0]], [[1.2]]] * harder
    reference, *policies = rewards
    results = [evaluation.win_rate(policy, reference, standard()) for policy in policies]
    paired = evaluation.paired_difference(*results)
    apart = np.hypot(results[0].standard_error, results[1].standard_error)
    assert paired.standard_error < 0.75 * apart


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 30, 127, 1000])
def test_students_quantile_has_its_probability(degrees):
    for level in (0.5, 0.95, 0.999):
        t = evaluation.student_quantile(level, degrees)
        beyond = jax.scipy.special.betainc(degrees / 2, 0.5, degrees / (degrees + t * t))
        np.testing.assert_allclose(1 - beyond, level, rtol=1e-9)


def test_an_interval_is_students_around_the_mean():
    low, high = evaluation.confidence_interval(rate([0.4, 0.5, 0.9]))
    reach = 4.302653 * np.sqrt(0.07 / 3)  # t of 2 degrees, from tables
    np.testing.assert_allclose([low, high], [0.6 - reach, 0.6 + reach], rtol=1e-6)
    assert np.isnan(evaluation.confidence_interval(rate([0.4]))).all()
    with pytest.raises(ValueError, match="level between 0 and 1, got 95"):
        evaluation.confidence_interval(rate([0.4, 0.5]), 95)


@pytest.mark.parametrize("procedure", [standard(), best_of_n(4)], ids=["standard", "best"])
@pytest.mark.parametrize("prompts", [16, 64])
def test_intervals_hold_the_truth_95_times_in_100(procedure, prompts):
    """2,000 experiments on prompts with policies of unlike strength.

    Quantiles v^(1/a) of uniform v: after best-of-N on both sides such a policy wins a/(1 + a).
    """
    generator = np.random.default_rng(prompts)
    strengths, experiments = np.array([1.0, 2.0, 8.0]), 2000
    a = generator.choice(strengths, (experiments * prompts, 1))
    quantiles = generator.uniform(size=(experiments * prompts, 8)) ** (1 / a)
    reference = generator.uniform(size=quantiles.shape)
    per_prompt = evaluation.win_rate(quantiles, reference, procedure).per_prompt
    intervals = [
        evaluation.confidence_interval(rate(values))
        for values in per_prompt.reshape(experiments, prompts)
    ]
    truth = np.mean(strengths / (1 + strengths))
    held = np.mean([low <= truth <= high for low, high in intervals])
    assert 0.93 <= held <= 0.97


def test_the_bootstrap_agrees_with_the_closed_form():
    values = np.random.default_rng(1).uniform(size=40) ** 2
    mean, error = evaluation.mean_and_standard_error(values)
    means = evaluation.bootstrap(values, np.random.default_rng(2), draws=20_000)
    # A standard deviation from 20,000 draws is within 2 % with four of its standard errors.
    np.testing.assert_allclose(means.std(), error * np.sqrt(39 / 40), rtol=0.02)
    assert abs(means.mean() - mean) < 4 * error / np.sqrt(20_000)
    again = evaluation.bootstrap(values, np.random.default_rng(2), draws=20_000)
    np.testing.assert_array_equal(means, again)


@pytest.mark.parametrize(("values", "draws"), [([], 10), ([[1.0]], 10), ([1.0], 0)])
def test_a_bootstrap_of_nothing_is_refused(values, draws):
    with pytest.raises(ValueError, match=r"values of shape \[B\] and at least 1 draw"):
        evaluation.bootstrap(values, np.random.default_rng(0), draws)


@pytest.mark.parametrize(
    ("arguments", "judges", "message"),
    [
        ((np.zeros((2, 3)), np.zeros((2, 8)), best_of_n(4)), {}, "at least 4 samples.*got 3"),
        ((np.zeros((2, 4)), np.zeros((3, 4)), best_of_n(4)), {}, "as many prompts on both sides"),
        ((np.zeros(4), np.zeros((1, 4)), best_of_n(4)), {}, r"policy rewards of shape \[B, n\]"),
        ((np.zeros((1, 2)), [[0, np.inf]], standard()), {}, "finite reference rewards, got inf"),
        (
            (np.zeros((1, 2)), np.zeros((1, 2)), standard()),
            {"policy_judge": [[0, np.nan]], "reference_judge": np.zeros((1, 2))},
            "finite policy_judge rewards, got nan at prompt 0, sample 1",
        ),
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
