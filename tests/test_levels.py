"""Rewards of few values: the optimum against grids of policies, and its limits."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infalign_jax import calibration, frontier, levels, transformations
from infalign_jax.procedures import Procedure, best_of_n, standard, worst_of_n

MEDIAN_OF_3 = Procedure(
    cdf=lambda q: q * q * (3 - 2 * q),
    density=lambda q: 6 * q * (1 - q),
    selection=lambda n: jnp.ones(n) / n,
)
BEST_OR_WORST_OF_8 = Procedure(
    cdf=lambda q: (q**8 + 1 - (1 - q) ** 8) / 2,
    density=lambda q: 4 * (q**7 + (1 - q) ** 7),
    selection=lambda n: jnp.ones(n) / n,
)
WORST_OF_4_BESTS_OF_4 = Procedure(
    cdf=lambda q: 1 - (1 - q**4) ** 4,
    density=lambda q: 16 * q**3 * (1 - q**4) ** 3,
    selection=lambda n: jnp.ones(n) / n,
)
PAIRS = [
    (best_of_n(4), best_of_n(4)),
    (worst_of_n(4), worst_of_n(4)),
    (worst_of_n(4), best_of_n(4)),
    (MEDIAN_OF_3, standard()),
    (BEST_OR_WORST_OF_8, BEST_OR_WORST_OF_8),
    (WORST_OF_4_BESTS_OF_4, WORST_OF_4_BESTS_OF_4),
]


def outcomes(procedure, reference, p, q):
    """KL and win rate of policies q[..., L] by their definition, in NumPy."""
    served, met = (
        np.diff(np.asarray(side.cdf(jnp.asarray(np.minimum(np.cumsum(law, -1), 1)))), prepend=0)
        for side, law in ((procedure, q), (reference, p))
    )
    kl = np.sum(np.where(q > 0, q * np.log(np.where(q > 0, q, 1) / p), 0), -1)
    return kl, served @ (np.cumsum(met) - met / 2)


def grid(count):
    """Policies over ``count`` levels, dense at the simplex's edges too."""
    ends = np.concatenate([[0], np.geomspace(1e-9, 0.02, 40)])
    if count == 2:
        share = np.concatenate([ends, np.linspace(0.02, 0.98, 4001), 1 - ends])
        return np.stack([1 - share, share], -1)
    share = np.concatenate([ends, np.linspace(0.02, 0.98, 200), 1 - ends])
    lowest, split = np.meshgrid(share, share)
    return np.stack([lowest, (1 - lowest) * split, (1 - lowest) * (1 - split)], -1)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(("procedure", "reference"), PAIRS)
@pytest.mark.usefixtures("x64")
def test_no_policy_on_a_grid_is_better_and_the_best_is_as_good(procedure, reference, count):
    generator = np.random.default_rng(count)
    p = generator.dirichlet(np.full(count, 0.7), 12) + 1e-6
    p /= p.sum(axis=1, keepdims=True)
    beta = np.geomspace(0.01, 1, 12)
    found = jax.vmap(lambda p, beta: levels.optimal(procedure, p, beta, reference))(
        jnp.asarray(p), jnp.asarray(beta)
    )
    assert jnp.all(found.converged)
    candidates = grid(count)
    for row in range(12):
        kl, win_rate = outcomes(procedure, reference, p[row], candidates)
        best = np.max(win_rate - beta[row] * kl)
        value = found.win_rate[row] - beta[row] * found.kl[row]
        assert best - 1e-12 <= value <= best + (1e-6 if count == 2 else 1e-3)
        recounted = outcomes(procedure, reference, p[row], np.asarray(found.policy[row]))
        np.testing.assert_allclose(
            recounted, (found.kl[row], found.win_rate[row]), rtol=1e-9, atol=1e-12
        )


@pytest.mark.usefixtures("x64")
def test_the_win_rate_is_that_of_every_draw_counted():
    p, q = np.array([0.2, 0.5, 0.3]), np.array([0.1, 0.2, 0.7])
    expected = 0.0
    for draw in itertools.product(range(3), repeat=5):  # best of 2 against worst of 3
        mine, others = max(draw[:2]), min(draw[2:])
        chance = np.prod(q[list(draw[:2])]) * np.prod(p[list(draw[2:])])
        expected += chance * ((mine > others) + (mine == others) / 2)
    kl, win_rate = levels.curve(np.log(q / p), best_of_n(2), jnp.asarray(p), 1.0, worst_of_n(3))
    np.testing.assert_allclose(win_rate, expected, rtol=1e-12)
    np.testing.assert_allclose(kl, np.sum(q * np.log(q / p)), rtol=1e-12)


@pytest.mark.parametrize(("procedure", "reference"), PAIRS[:3])
@pytest.mark.usefixtures("x64")
def test_rewards_are_the_gradient_of_the_win_rate_and_make_the_policy(procedure, reference):
    p, beta = jnp.array([0.3, 0.15, 0.25, 0.2, 0.1]), 0.2
    best = levels.optimal(procedure, p, beta, reference)

    def win_rate(q):
        served = jnp.diff(procedure.cdf(jnp.cumsum(q)), prepend=0.0)
        met = jnp.diff(reference.cdf(jnp.cumsum(p)), prepend=0.0)
        return served @ (jnp.cumsum(met) - met / 2)

    gradient = jax.grad(win_rate)(best.policy)
    np.testing.assert_allclose(best.rewards, gradient - gradient[0], atol=1e-10)
    tilted = p * jnp.exp(best.rewards / beta)
    np.testing.assert_allclose(best.policy, tilted / tilted.sum(), rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_many_equal_levels_are_the_problem_without_atoms():
    procedure, beta = best_of_n(4), 0.25
    counts = (32, 64, 128)
    found = [levels.optimal(procedure, jnp.full(count, 1 / count), beta) for count in counts]
    assert all(best.converged for best in found)
    kl = np.array([best.kl for best in found])
    win_rate = np.array([best.win_rate for best in found])
    # Ties cost O(1/L): each doubling halves the distance, and two of them are extrapolated.
    for values, limit in ((kl, 0.44008), (win_rate, 0.85931)):
        np.testing.assert_allclose((limit - values[:-1]) / (limit - values[1:]), 2, atol=0.3)
        halved = 2 * values[1:] - values[:-1]
        np.testing.assert_allclose((4 * halved[1] - halved[0]) / 3, limit, atol=2e-4)
    u, best = (jnp.arange(128) + 0.5) / 128, frontier.optimal(procedure, beta)
    density = found[-1].policy * 128
    np.testing.assert_allclose(density, frontier.density(best.transformation, beta, u), rtol=0.05)


@pytest.mark.usefixtures("x64")
def test_worst_of_4_has_two_summits_where_levels_are_few_and_the_higher_is_returned():
    p, q = jnp.array([0.9, 0.1]), np.linspace(0.05, 0.9999, 10_000)
    for beta, near_one in ((0.1, True), (0.19, True), (0.23, False)):
        # By hand: logit q = logit p + ½·4q³/β.
        excess = np.log(q / (1 - q)) + np.log(9) - 2 * q**3 / beta
        roots = q[1:][np.diff(np.sign(excess)) != 0]
        assert roots.size == 3
        found = levels.optimal(worst_of_n(4), p, beta).policy[1]
        np.testing.assert_allclose(found, roots[2] if near_one else roots[0], atol=1e-4)


@pytest.mark.parametrize(
    ("procedure", "betas"),
    [(best_of_n(16), [0.05, 1, 1e3]), (worst_of_n(4), [0.02, 1, 1e3])],
)
def test_single_precision_agrees_with_double(procedure, betas):
    p = [0.4, 0.3, 0.1, 0.15, 0.05]
    for beta in betas:
        with jax.enable_x64(True):
            exact = levels.optimal(procedure, jnp.array(p), beta)
        with jax.enable_x64(False):
            best = levels.optimal(procedure, jnp.array(p), beta)
        assert best.kl.dtype == jnp.float32
        assert best.converged
        assert exact.converged
        np.testing.assert_allclose(best.kl, exact.kl, rtol=1e-4)
        np.testing.assert_allclose(best.win_rate, exact.win_rate, rtol=1e-5)


def test_a_problem_beyond_single_precision_is_not_called_solved():
    with jax.enable_x64(False):
        best = levels.optimal(best_of_n(4), jnp.full(40, 1 / 40), 1e-6)
        assert best.residual > 1e-4
        assert not best.converged


@pytest.mark.usefixtures("x64")
def test_prompts_and_betas_in_one_call_and_levels_that_are_never_reached():
    p = np.array([[0.3, 0, 0.5, 0.2, 0], [0, 0.6, 0, 0, 0.4], [0.1, 0.2, 0.3, 0.3, 0.1]])
    betas = jnp.array([0.05, 0.3])
    many = jax.vmap(
        lambda p: jax.vmap(lambda beta: levels.optimal(worst_of_n(4), p, beta, best_of_n(2)))(betas)
    )(jnp.asarray(p))
    assert many.policy.shape == (3, 2, 5)
    assert jnp.all(many.converged)
    for row, column in itertools.product(range(3), range(2)):
        reached = p[row] > 0
        one = levels.optimal(
            worst_of_n(4), jnp.asarray(p[row, reached]), float(betas[column]), best_of_n(2)
        )
        np.testing.assert_allclose(many.policy[row, column, reached], one.policy, atol=1e-12)
        np.testing.assert_array_equal(many.policy[row, column, ~reached], 0)
        np.testing.assert_allclose(many.kl[row, column], one.kl, rtol=1e-10)
        np.testing.assert_allclose(many.win_rate[row, column], one.win_rate, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_the_frontier_is_the_optimum_where_there_is_one_and_concave_across_a_jump():
    p = jnp.array([0.5, 0.2, 0.2, 0.1])
    best = levels.optimal(best_of_n(4), p, 0.1)
    win_rate = levels.frontier_win_rate(best_of_n(4), p, best.kl)
    np.testing.assert_allclose(win_rate, best.win_rate, atol=1e-9)
    # Worst-of-4 on two levels jumps from near p to near 1: between, the chord.
    p, kl = np.array([0.9, 0.1]), np.array([-1, 0, 0.5, 1, 1.5, 2, 2.2, -np.log(0.1), 9.0])
    envelope = levels.frontier_win_rate(worst_of_n(4), jnp.asarray(p), jnp.asarray(kl))
    slopes = np.diff(envelope[1:8]) / np.diff(kl[1:8])
    np.testing.assert_allclose(slopes[1:5], slopes[1], rtol=1e-6)
    assert slopes[0] > slopes[1] + 1e-4
    assert slopes[5] < slopes[1] - 1e-3
    np.testing.assert_allclose(envelope[:2], 0.5, atol=1e-6)
    # With all mass on top, tied where the reference serves the top too: once in 10⁴.
    np.testing.assert_allclose(envelope[7:], 1 - 1e-4 / 2, atol=1e-4)
    spent, won = outcomes(worst_of_n(4), worst_of_n(4), p, grid(2))
    bound = levels.frontier_win_rate(worst_of_n(4), jnp.asarray(p), jnp.asarray(spent[::40]))
    assert np.all(won[::40] <= bound + 1e-9)


@pytest.mark.usefixtures("x64")
def test_on_two_levels_every_increasing_transformation_traces_the_same_curve():
    p, betas = jnp.array([0.7, 0.3]), jnp.geomspace(0.05, 20, 7)
    u = levels.quantiles(p)
    best = jax.vmap(lambda beta: levels.optimal(best_of_n(4), p, beta))(betas / 20)
    shapes = (transformations.identity, transformations.log, transformations.exponential(3))
    traced = [levels.curve(shape(u), best_of_n(4), p, betas) for shape in shapes]
    for kl, win_rate in (*traced, (best.kl, best.win_rate)):
        q = levels.success_rate(0.3, kl)
        gain = levels.pass_at_k(q, 4) - levels.pass_at_k(0.3, 4)
        np.testing.assert_allclose(win_rate, 0.5 + gain / 2, atol=1e-7)
        np.testing.assert_allclose(
            q * np.log(q / 0.3) + (1 - q) * np.log((1 - q) / 0.7), kl, atol=1e-9
        )


def test_a_success_rate_ends_at_one(precision):
    q = levels.success_rate(jnp.array([0.2, 0.2, 1.0]), jnp.array([0, 1.7, 0.5]))
    assert q.dtype == precision
    np.testing.assert_allclose(q, [0.2, 1, 1], atol=1e-6)


@pytest.mark.usefixtures("x64")
def test_the_optimum_at_half_beta_is_best_for_pass_at_k():
    p, beta, k = 0.05, 0.3, 8
    q = np.linspace(1e-6, 1 - 1e-6, 200_001)
    kl = q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))
    expected = q[np.argmax(levels.pass_at_k(q, k) - beta * kl)]
    best = levels.optimal(best_of_n(k), jnp.array([1 - p, p]), beta / 2)
    np.testing.assert_allclose(best.policy[1], expected, atol=1e-5)


def test_mid_ranks_are_what_calibration_tends_to():
    p, k = jnp.array([[0.25, 0.5, 0.25], [0.5, 0.25, 0.25]]), 4096
    rewards = np.stack([np.repeat([1.0, 2.0, 5.0], np.asarray(row * k, int)) for row in p])
    levels_seen = jnp.broadcast_to(jnp.array([1.0, 2.0, 5.0]), (2, 3))
    calibrated = calibration.calibrate(levels_seen, jnp.asarray(rewards, jnp.float32))
    np.testing.assert_allclose(levels.quantiles(p), calibrated, atol=1 / k)
    np.testing.assert_allclose(levels.quantiles(p)[0], [0.125, 0.5, 0.875], atol=1e-7)


@pytest.mark.parametrize(
    ("p", "beta", "message"),
    [
        ([3, 1], 0.1, "sum to 1.*divide counts"),
        ([1.2, -0.2], 0.1, "a least of -0.2"),
        ([1.0], 0.1, r"two levels or more, got shape \(1,\)"),
        ([[0.5, 0.5]], 0.1, r"got shape \(1, 2\).*jax.vmap"),
        ([0.5, float("nan")], 0.1, "sum to 1"),
        ([0.5, 0.5], 0, "expected a positive beta, got 0"),
    ],
)
def test_a_problem_without_meaning_is_refused(p, beta, message):
    with pytest.raises(ValueError, match=message):
        levels.optimal(best_of_n(4), jnp.array(p), beta)
    with pytest.raises(ValueError, match=message):
        levels.curve(jnp.zeros(len(p)), best_of_n(4), jnp.array(p), beta)


def test_values_of_other_levels_are_refused():
    with pytest.raises(ValueError, match=r"values of shape \(2,\), got \(3,\)"):
        levels.curve(jnp.zeros(3), best_of_n(4), jnp.array([0.5, 0.5]), 0.1)
