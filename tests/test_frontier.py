"""The problem on [0, 1]: published and derived values, certificates, and no silent non-solution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tracing import traced

from infalign_jax import frontier, transformations
from infalign_jax.procedures import best_of_n, standard, worst_of_n


@pytest.mark.parametrize(
    ("procedure", "beta", "kl", "win_rate"),
    [
        (best_of_n(4), 0.25, 0.44008, 0.85931),
        (best_of_n(4), 0.1, 0.89086, 0.93117),
        pytest.param(best_of_n(8), 0.25, 0.38262, 0.90569, marks=pytest.mark.slow),
        (best_of_n(16), 0.1, 0.49806, 0.97153),
        (worst_of_n(4), 0.5, 0.28158, 0.87515),
        pytest.param(worst_of_n(2), 0.1, 1.01361, 0.95000, marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("x64")
def test_the_optimum_has_its_known_kl_and_win_rate_to_five_digits(procedure, beta, kl, win_rate):
    best = frontier.optimal(procedure, beta)
    assert best.converged
    assert best.residual <= 1e-8
    np.testing.assert_allclose([best.kl, best.win_rate], [kl, win_rate], atol=5.1e-6)


@pytest.mark.parametrize("beta", [0.02, 0.5, 100.0])
@pytest.mark.usefixtures("x64")
def test_certificates_of_best_and_worst_of_n(beta):
    # W = β(f(1) − 1)/N for best of N, 1 − W = β(1 − f(0))/N for worst of N: other integrals.
    best, worst = (frontier.optimal(family(4), beta) for family in (best_of_n, worst_of_n))
    top = jnp.exp((best.transformation(jnp.array(1.0)) - _level(best, beta)) / beta)
    np.testing.assert_allclose(best.win_rate, beta * (top - 1) / 4, rtol=1e-9)
    bottom = jnp.exp((worst.transformation(jnp.array(0.0)) - _level(worst, beta)) / beta)
    np.testing.assert_allclose(1 - worst.win_rate, beta * (1 - bottom) / 4, rtol=1e-9)


def _level(best, beta):
    """β·log Z, the R where f = 1, by a quadrature that the solver does not use."""
    return beta * frontier.log_partition(best.transformation, beta)


@pytest.mark.parametrize(
    ("procedure", "betas"), [(best_of_n(16), [0.16, 1, 1e3]), (worst_of_n(4), [0.04, 1, 1e3])]
)
def test_single_precision_agrees_with_double(procedure, betas):
    for beta in betas:
        with jax.enable_x64(True):
            exact = frontier.optimal(procedure, beta)
        with jax.enable_x64(False):
            best = frontier.optimal(procedure, beta)
        assert best.kl.dtype == jnp.float32
        assert best.converged
        assert best.residual <= 1e-5
        np.testing.assert_allclose(best.kl, exact.kl, rtol=1e-4)
        np.testing.assert_allclose(best.win_rate, exact.win_rate, rtol=1e-5)


@pytest.mark.parametrize(
    ("beta", "kl", "win_rate"), [(0.3, 1.806, 0.621), (0.334, 1.547, 0.539), (0.336, 0.030, 0.030)]
)
@pytest.mark.usefixtures("x64")
def test_of_three_solutions_the_best_is_returned_on_both_sides_of_the_jump(beta, kl, win_rate):
    best = frontier.optimal(worst_of_n(4), beta, best_of_n(4))
    assert best.converged
    np.testing.assert_allclose([best.kl, best.win_rate], [kl, win_rate], atol=6e-4)


def test_a_problem_beyond_single_precision_is_not_called_solved():
    with jax.enable_x64(False):
        best = frontier.optimal(worst_of_n(4), 1e-5)
        assert best.residual > 1e-5
        assert not best.converged


def test_a_law_that_is_no_number_is_not_called_solved():
    broken = best_of_n(2)._replace(density=lambda q: jnp.where(q > 0.5, jnp.nan, 1.0) * q)
    with jax.debug_nans(False):
        best = frontier.optimal(broken, 0.5)
    assert best.residual == jnp.inf
    assert not best.converged


@pytest.mark.usefixtures("x64")
def test_identity_is_optimal_for_the_standard_win_rate():
    u = jnp.array([1e-6, 0.1, 0.5, 0.9, 1 - 1e-6])
    found = frontier.optimal(standard(), 0.3).transformation(u)
    np.testing.assert_allclose(found, u, atol=1e-5)


@pytest.mark.usefixtures("x64")
def test_small_beta_limit_of_worst_of_n():
    win_rate = frontier.optimal(worst_of_n(4), 1e-3).win_rate
    np.testing.assert_allclose(win_rate, 1 - 1e-3 / 4, atol=1e-8)


@pytest.mark.usefixtures("x64")
def test_no_policy_of_a_thousand_beats_the_optimum_at_its_own_kl():
    procedure, beta = best_of_n(4), 0.25
    best = frontier.optimal(procedure, beta)
    generator = np.random.default_rng(0)
    for scale in (0.02, 0.3):
        phases, weights = generator.uniform(0, 6, (500, 5)), generator.normal(0, scale, (500, 5))

        def outcome(phase, weight):
            def rival(u):
                waves = jnp.outer(jnp.arange(1.0, 6.0) * jnp.pi, u) + phase[:, None]
                return best.transformation(u) + weight @ jnp.sin(waves)

            kl, win_rate = frontier.curve(rival, procedure, frontier.beta_for_kl(rival, best.kl))
            return kl, win_rate

        kl, win_rate = jax.jit(jax.vmap(outcome))(jnp.asarray(phases), jnp.asarray(weights))
        np.testing.assert_allclose(kl, best.kl, rtol=1e-8)
        assert jnp.all(win_rate < best.win_rate)


def test_equal_kl_gains_of_the_paper_transformations():
    shapes = [
        transformations.identity,
        transformations.log,
        transformations.exponential(5),
        transformations.exponential(10),
        transformations.exponential(-5),
        transformations.exponential(-10),
    ]

    def at_half_a_nat(shape, procedure):
        return float(frontier.curve(shape, procedure, frontier.beta_for_kl(shape, 0.5))[1])

    best = [at_half_a_nat(shape, best_of_n(4)) for shape in shapes[:4]]
    worst = [at_half_a_nat(shape, worst_of_n(4)) for shape in shapes[:2] + shapes[4:]]
    np.testing.assert_allclose(best, [0.800, 0.768, 0.857, 0.872], atol=6e-4)
    np.testing.assert_allclose(worst, [0.886, 0.927, 0.944, 0.948], atol=6e-4)


@pytest.mark.parametrize("n", [2, 4, 32])
@pytest.mark.usefixtures("precision")
def test_log_at_one_over_n_minus_one_is_best_of_n(n):
    beta = 1 / (n - 1)
    grid = jnp.array([0.01, 0.5, 0.99])
    np.testing.assert_allclose(
        frontier.density(transformations.log, beta, grid), n * grid ** (n - 1), rtol=2e-5
    )
    kl, win_rate = frontier.curve(transformations.log, standard(), beta)
    np.testing.assert_allclose(kl, np.log(n) - (n - 1) / n, rtol=1e-5)
    np.testing.assert_allclose(win_rate, n / (n + 1), rtol=1e-5)


@pytest.mark.parametrize("t", [10.0, -10.0])
@pytest.mark.parametrize("beta", [1e-4, 1e-2, 1.0, 100.0, 1e6])
def test_log_partition_is_exact_and_finite_at_every_beta(t, beta, precision):
    shape = transformations.exponential(t)
    # An independent sum in double precision, dense where the mass is: towards u = 1.
    x = np.concatenate([[0], np.geomspace(1e-14, 1, 400_000)])
    exponents = np.sign(t) * (np.exp(t * (1 - x)) - np.exp(t)) / beta
    expected = np.sign(t) * np.exp(t) / beta + np.log(np.trapezoid(np.exp(exponents), x))
    found = frontier.log_partition(shape, beta)
    assert found.dtype == precision
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=2e-6)


def test_kl_survives_single_precision_at_large_beta():
    with jax.enable_x64(False):
        kl, win_rate = frontier.curve(transformations.identity, standard(), jnp.array([10.0, 1e5]))
    np.testing.assert_allclose(kl, [1 / 2400, 1 / 24e10], rtol=1e-3)  # Var(u)/2β²
    np.testing.assert_allclose(win_rate, [0.5 + 1 / 120, 0.5 + 1 / 12e5], rtol=5e-6)


@pytest.mark.parametrize("kl", [1e-3, 0.1, 0.5, 2.0])
@pytest.mark.usefixtures("precision")
def test_beta_for_kl_inverts_the_curve(kl):
    for shape in (transformations.log, transformations.exponential(10)):
        beta = frontier.beta_for_kl(shape, kl)
        np.testing.assert_allclose(frontier.curve(shape, standard(), beta)[0], kl, rtol=1e-4)


def test_worst_of_4_at_half_a_nat():
    assert abs(frontier.frontier_win_rate(worst_of_n(4), 0.5) - 0.948) < 6e-4


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_the_frontier_is_the_optimum_where_there_is_one_and_concave_across_a_jump():
    best = frontier.optimal(best_of_n(4), 0.25)
    win_rate = frontier.frontier_win_rate(best_of_n(4), best.kl)
    np.testing.assert_allclose(win_rate, best.win_rate, atol=2e-6)
    kl = jnp.array([-0.01, 0.02, 0.3, 0.5, 0.8, 1.8])
    envelope = np.asarray(frontier.frontier_win_rate(worst_of_n(4), kl, best_of_n(4)))
    # Worst-of-4 against best-of-4 at no KL: P(min of 4 > max of 4) = 1/C(8, 4).
    np.testing.assert_allclose(envelope[0], 1 / 70, atol=1e-6)
    slopes = np.diff(envelope) / np.diff(np.maximum(kl, 0))
    assert np.all(np.diff(slopes) < 1e-9)
    np.testing.assert_allclose(slopes[2], slopes[3], rtol=1e-9)
    # The chord across the jump, whose slope is the β at which the optimum jumps.
    np.testing.assert_allclose(slopes[2], 0.3356, atol=1e-4)


def test_an_optimal_transformation_is_one_function_inside_and_outside_jit():
    best = frontier.optimal(best_of_n(16), 0.1)
    quantiles = jnp.array([[1e-7, 0.3], [0.9, 1 - 2**-23]], jnp.float32)
    rewards, traces = traced()
    inside = rewards(best.transformation, quantiles)
    assert inside.dtype == jnp.float32
    np.testing.assert_allclose(inside, best.transformation(quantiles), rtol=1e-6)
    rewards(frontier.optimal(best_of_n(16), 0.5).transformation, quantiles)
    assert len(traces) == 1
    # R′(1) = N²: the slope survives two roundings away from the end.
    rise = jax.grad(best.transformation)(jnp.array(1 - 2**-23, jnp.float32))
    np.testing.assert_allclose(rise, 256, rtol=2e-2)


@pytest.mark.usefixtures("x64")
def test_optima_over_many_betas_in_one_call():
    betas = jnp.array([0.1, 0.25, 1.0])
    many = jax.vmap(lambda beta: frontier.optimal(worst_of_n(4), beta))(betas)
    for i, beta in enumerate(betas):
        one = frontier.optimal(worst_of_n(4), beta)
        np.testing.assert_allclose(many.kl[i], one.kl, rtol=1e-4)
        np.testing.assert_allclose(many.win_rate[i], one.win_rate, rtol=1e-5)


@pytest.mark.parametrize("beta", [0, -1.0, float("nan")])
def test_a_beta_without_meaning_is_refused(beta):
    for call in (
        lambda: frontier.optimal(best_of_n(4), beta),
        lambda: frontier.curve(transformations.log, best_of_n(4), beta),
        lambda: frontier.log_partition(transformations.log, beta),
    ):
        with pytest.raises(ValueError, match="expected a positive beta"):
            call()
