"""Rewards of few values: the optimum against grids of policies, and its limits."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infalign_jax import calibration, levels, transformations
from infalign_jax.procedures import Procedure, best_of_n, worst_of_n

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
    (BEST_OR_WORST_OF_8, BEST_OR_WORST_OF_8),
    (WORST_OF_4_BESTS_OF_4, WORST_OF_4_BESTS_OF_4),
]


def outcomes(procedure, reference, p, q):
    """KL and win rate of policies q[..., L] by their definition, in NumPy."""
    served, met = (
        np.diff(np.asarray(side.cdf(jnp.asarray(np.minimum(np.cumsum(law, -1), 1)))), prepend=0)
        for side, law in ((procedure, q), (reference, p))
    )
    kl = np.sum(np.where(q > 0, q * np.log(np.where(q > 0, q, 1) / np.where(p > 0, p, 1)), 0), -1)
    return kl, served @ (np.cumsum(met) - met / 2)


def grid():
    """Policies over three levels, and over the outer two alone, dense at the simplex's edges."""
    ends = np.concatenate([[0], np.geomspace(1e-9, 0.02, 40)])
    share = np.concatenate([ends, np.linspace(0.02, 0.98, 200), 1 - ends])
    lowest, split = np.meshgrid(share, share)
    three = np.stack([lowest, (1 - lowest) * split, (1 - lowest) * (1 - split)], -1)
    ends = np.geomspace(1e-12, 0.02, 4001)
    share = np.concatenate([[0, 1], ends, np.linspace(0.02, 0.98, 4001), 1 - ends])
    return three.reshape(-1, 3), np.stack([1 - share, 0 * share, share], -1)


@pytest.mark.parametrize(("procedure", "reference"), PAIRS)
@pytest.mark.usefixtures("x64")
def test_no_policy_on_a_grid_is_better_and_the_best_is_as_good(procedure, reference):
    generator = np.random.default_rng(0)
    for beta, (candidates, slack) in itertools.product(
        np.geomspace(0.01, 1, 8), zip(grid(), (1e-3, 1e-6), strict=True)
    ):
        p = (generator.dirichlet(np.full(3, 0.7)) + 1e-6) * (np.max(candidates, axis=0) > 0)
        p /= p.sum()
        found = levels.optimal(procedure, jnp.asarray(p), float(beta), reference)
        assert found.converged
        kl, win_rate = outcomes(procedure, reference, p, candidates)
        highest = np.max(win_rate - beta * kl)
        assert highest - 1e-12 <= found.win_rate - beta * found.kl <= highest + slack
        recounted = outcomes(procedure, reference, p, np.asarray(found.policy))
        np.testing.assert_allclose(recounted, (found.kl, found.win_rate), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("procedure", "reference"), PAIRS)
@pytest.mark.usefixtures("x64")
def test_a_hundred_problems_are_solved_to_the_last_digits(procedure, reference):
    generator = np.random.default_rng(1)
    for beta in np.geomspace(3e-3, 3, 100):
        p = generator.dirichlet(np.full(3, 0.7))
        found = levels.optimal(procedure, jnp.asarray(p), float(beta), reference)
        assert found.residual <= 1e-12


@pytest.mark.parametrize(("procedure", "reference"), PAIRS)
@pytest.mark.usefixtures("x64")
def test_rewards_are_the_gradient_of_the_win_rate_and_make_the_policy(procedure, reference):
    p, beta, h = np.array([0.5, 0.3, 0.2]), 0.2, 1e-5
    best = levels.optimal(procedure, jnp.asarray(p), beta, reference)
    for level in (1, 2):
        moved = np.zeros(3)
        moved[[0, level]] = -h, h
        around = np.asarray(best.policy) + np.stack([moved, -moved])
        rise, fall = outcomes(procedure, reference, p, around)[1]
        np.testing.assert_allclose(best.rewards[level], (rise - fall) / (2 * h), atol=1e-7)
    tilted = p * np.exp(best.rewards / beta)
    np.testing.assert_allclose(best.policy, tilted / tilted.sum(), rtol=1e-12)


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


@pytest.mark.usefixtures("x64")
def test_many_equal_levels_are_the_problem_without_atoms():
    p = [jnp.repeat(jnp.array([1 / n, 0]), jnp.array([n, 128 - n])) for n in (64, 128)]
    coarse, fine = (levels.optimal(best_of_n(4), row, 0.25) for row in p)
    assert coarse.converged
    assert fine.converged
    # Ties cost O(1/L²): of the distance a doubling leaves a quarter, by which it is extrapolated.
    for far, near, limit in (
        (coarse.kl, fine.kl, 0.44008),
        (coarse.win_rate, fine.win_rate, 0.85931),
    ):
        np.testing.assert_allclose((limit - far) / (limit - near), 4, atol=0.5)
        np.testing.assert_allclose(near + (near - far) / 3, limit, atol=5e-4)


@pytest.mark.usefixtures("x64")
def test_worst_of_4_has_two_summits_where_levels_are_few_and_the_higher_is_returned():
    p, logit = jnp.array([0.9, 0.1]), np.linspace(-3, 25, 100_000)
    for beta, near_one in ((0.1, True), (0.19, True), (0.23, False)):
        # By hand: logit q = logit p + ½·4q³/β.
        excess = logit + np.log(9) - 2 / (1 + np.exp(-logit)) ** 3 / beta
        roots = 1 / (1 + np.exp(-logit[1:][np.diff(np.sign(excess)) != 0]))
        assert roots.size == 3
        found = levels.optimal(worst_of_n(4), p, beta).policy[1]
        np.testing.assert_allclose(found, roots[2] if near_one else roots[0], atol=1e-4)


@pytest.mark.parametrize(
    ("procedure", "betas"),
    [(best_of_n(4), [1e-3, 0.1, 1e3]), (worst_of_n(4), [1e-3, 0.1, 1e3])],
)
def test_single_precision_agrees_with_double(procedure, betas):
    p = [0.6, 0.25, 0.15]
    for beta in betas:
        with jax.enable_x64(True):
            exact = levels.optimal(procedure, jnp.array(p), beta)
        with jax.enable_x64(False):
            best = levels.optimal(procedure, jnp.array(p), beta)
        assert best.kl.dtype == jnp.float32
        assert best.converged
        assert best.residual <= 1e-5
        np.testing.assert_allclose(best.kl, exact.kl, rtol=1e-4)
        np.testing.assert_allclose(best.win_rate, exact.win_rate, rtol=1e-5)


def test_a_problem_beyond_single_precision_is_not_called_solved():
    with jax.enable_x64(False):
        best = levels.optimal(best_of_n(4), jnp.full(40, 1 / 40), 1e-6)
        assert best.residual > 1e-4
        assert not best.converged


@pytest.mark.usefixtures("x64")
def test_prompts_and_betas_in_one_call_and_levels_that_are_never_reached():
    p, betas = np.array([0.3, 0.5, 0.2]), jnp.array([0.05, 0.3])
    places = np.array([[0, 2, 3], [2, 3, 4], [0, 1, 2]])
    spread = np.zeros((3, 5))
    np.put_along_axis(spread, places, p[None], axis=1)
    many = jax.vmap(
        lambda p: jax.vmap(lambda beta: levels.optimal(worst_of_n(4), p, beta, best_of_n(4)))(betas)
    )(jnp.asarray(spread))
    assert jnp.all(many.converged)
    for column, beta in enumerate(betas):
        one = levels.optimal(worst_of_n(4), jnp.asarray(p), beta, best_of_n(4))
        np.testing.assert_allclose(many.kl[:, column], one.kl, rtol=1e-10)
        np.testing.assert_allclose(many.win_rate[:, column], one.win_rate, rtol=1e-12)
        policy = np.zeros((3, 5))
        np.put_along_axis(policy, places, np.asarray(one.policy)[None], axis=1)
        np.testing.assert_allclose(many.policy[:, column], policy, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_the_frontier_is_the_optimum_where_there_is_one_and_concave_across_a_jump():
    # Worst-of-4 on two levels jumps from near p to near 1: between, the frontier is the chord.
    procedure, p = worst_of_n(4), np.array([0.9, 0.1])
    best = levels.optimal(procedure, jnp.asarray(p), 0.5)
    kl = np.array([0, 0.5, 1, 1.5, 2, 2.2, -np.log(0.1), 9, -1, best.kl])
    share = np.linspace(0, 1, 13)
    spent, won = outcomes(procedure, procedure, p, np.stack([1 - share, share], -1))
    targets = jnp.asarray(np.concatenate([kl, spent]))
    envelope = np.asarray(levels.frontier_win_rate(procedure, jnp.asarray(p), targets))
    slopes = np.diff(envelope[:7]) / np.diff(kl[:7])
    np.testing.assert_allclose(slopes[1:4], slopes[1], rtol=1e-6)
    assert np.all(np.diff(slopes) < 1e-9)
    assert slopes[5] < slopes[1] - 1e-3
    # All mass on top is tied where the reference serves the top too: once in 10⁴.
    np.testing.assert_allclose(envelope[6:8], 1 - 1e-4 / 2, atol=1e-6)
    np.testing.assert_allclose(envelope[[0, 8]], 0.5, atol=1e-6)
    np.testing.assert_allclose(envelope[9], best.win_rate, atol=1e-9)
    assert np.all(won <= envelope[10:] + 1e-6)


@pytest.mark.usefixtures("x64")
def test_on_two_levels_every_increasing_transformation_traces_the_same_curve():
    p, betas = jnp.array([0.7, 0.3]), jnp.geomspace(0.05, 20, 7)
    u = levels.quantiles(p)
    traced = []
    for shape in (transformations.identity, transformations.log, transformations.exponential(3)):
        rise = jnp.diff(shape(u)) / betas
        kl, win_rate = levels.curve(shape(u), best_of_n(4), p, betas)
        traced.append((0.3 / (0.3 + 0.7 * jnp.exp(-rise)), kl, win_rate))
    for beta in (0.01, 0.1, 1.0):
        best = levels.optimal(best_of_n(4), p, beta)
        traced.append((best.policy[1], best.kl, best.win_rate))
    for q, kl, win_rate in traced:
        np.testing.assert_allclose(levels.success_rate(0.3, kl), q, atol=1e-7)
        gain = levels.pass_at_k(q, 4) - levels.pass_at_k(0.3, 4)
        np.testing.assert_allclose(win_rate, 0.5 + gain / 2, atol=1e-12)


def test_a_success_rate_ends_at_one(precision):
    q = levels.success_rate(jnp.array([0.2, 0.2, 1, 0]), jnp.array([0, 1.7, 0.5, 0.5]))
    assert q.dtype == precision
    np.testing.assert_allclose(q, [0.2, 1, 1, 0], atol=1e-6)


@pytest.mark.usefixtures("x64")
def test_the_optimum_at_half_beta_is_best_for_pass_at_k():
    p, beta, k = 0.05, 0.3, 4
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
        ([0.5, 0.5], 0, "expected a positive betas?, got 0"),
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
