"""E[Φ(u) | rank]: exact moments, what calibration really gives, and the table as a Φ."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tracing import traced

from infalign_jax import calibration, posterior, transformations


def moment(k_ref, power):
    """E[u^power] of Beta(m + 1, K − m + 1), for every m."""
    m = np.arange(k_ref + 1.0)
    return np.prod([(m + 1 + i) / (k_ref + 2 + i) for i in range(power)], axis=0)


def exponential_moment(k_ref, t):
    """E[e^{tu}]: the confluent hypergeometric function 1F1(m + 1; K + 2; t) by its series."""
    series, factorial = np.zeros(k_ref + 1), 1.0
    for power in range(90):
        series += moment(k_ref, power) * t**power / factorial
        factorial *= power + 1
    return series


@pytest.mark.parametrize("k_ref", [1, 8, 512])
def test_means_are_the_exact_ones(k_ref, precision):
    exact = {
        "u": (transformations.identity, moment(k_ref, 1)),
        "u⁷": (lambda u: u**7, moment(k_ref, 7)),
        "e^{10u}": (transformations.exponential(10), exponential_moment(k_ref, 10)),
        "−e^{−10u}": (
            transformations.exponential(-10),
            -np.exp(-10) * exponential_moment(k_ref, 10)[::-1],
        ),
        # −(1/(m+1) + … + 1/(K+1)), from the derivative of the beta function
        "log u": (transformations.log, -np.cumsum(1 / np.arange(k_ref + 1, 0.0, -1))[::-1]),
    }
    tables = jax.jit(lambda: [posterior.mean(phi, k_ref) for phi, _ in exact.values()])()
    for (name, (_, expected)), table in zip(exact.items(), tables, strict=True):
        assert table.dtype == precision
        assert table.shape == (k_ref + 1,)
        # Only u⁷ is held to absolute error: it is 1e-18 where nothing lies below.
        scale = np.abs(expected) if name != "u⁷" else np.ones(1)
        tolerance = 2e-7 if precision == jnp.float64 else 4e-5
        assert np.max(np.abs(table - expected) / scale) < tolerance, name


def test_it_is_the_mean_of_what_calibration_sees(x64):
    """Draw u and the reference, calibrate, and average Φ(u) by count: within four errors of it."""
    rng, k_ref, draws = np.random.default_rng(0), 6, 50_000
    reference = calibration.sorted_reference(rng.uniform(size=(draws, k_ref)))
    u = rng.uniform(size=(draws, 1))
    quantiles = np.asarray(jax.jit(calibration.calibrate)(u, reference))
    count = np.rint(quantiles[:, 0] * (k_ref + 1) - 0.5).astype(int)
    table = posterior.mean(transformations.exponential(5), k_ref)
    for m in range(k_ref + 1):
        seen = np.exp(5 * u[count == m, 0])
        assert abs(seen.mean() - table[m]) < 4 * seen.std() / np.sqrt(seen.size)


def test_a_transformation_passes_through_jit_to_its_table(x64):
    made = jax.jit(posterior.mean, static_argnums=1)
    for t in (3.0, 6.0):
        table = made(transformations.exponential(t), 5)
        assert np.all(np.diff(table) > 0)
        # Every count is as likely as every other, and so their mean is that over u.
        np.testing.assert_allclose(np.mean(table), np.expm1(t) / t, rtol=1e-7)


@pytest.mark.parametrize("k_ref", [1, 4, 1000])
def test_a_table_is_read_at_its_counts(k_ref, precision):
    table = np.random.default_rng(1).normal(size=k_ref + 1).astype(precision)
    read = jax.jit(posterior.tabulated(jnp.asarray(table)))
    count, exact = np.arange(k_ref + 1), 1e-3 if precision == jnp.float32 else 1e-11
    at_counts = read(((count + 0.5) / (k_ref + 1)).astype(precision))
    assert at_counts.dtype == precision
    np.testing.assert_allclose(at_counts, table, atol=exact)
    # A tie with one reference reward stands half-way between two counts.
    middle = ((count[:-1] + 1) / (k_ref + 1)).astype(precision)
    np.testing.assert_allclose(read(middle), (table[1:] + table[:-1]) / 2, atol=exact)


def test_a_response_left_out_is_looked_up_among_the_others():
    rewards = np.array([[4.0, 1.0, 3.0, 2.0]], np.float32)
    quantiles = calibration.calibrate(
        rewards, calibration.sorted_reference(rewards), leave_one_out=True
    )
    read = posterior.tabulated(jnp.array([0.0, 10.0, 20.0, 30.0]))(quantiles)
    np.testing.assert_allclose(read, [[30, 0, 20, 10]], atol=1e-4)


def test_quantiles_beyond_the_counts_take_the_ends():
    read = posterior.tabulated(jnp.array([3.0, 5.0, 9.0]))(jnp.array([0.0, 1e-9, 0.99, 1.0]))
    assert read.tolist() == [3, 3, 9, 9]


def test_another_table_does_not_recompile():
    reward, traces = traced()
    tables = jnp.array([[0.0, 1.0], [2.0, 4.0]])
    read = [float(reward(posterior.tabulated(table), jnp.array(0.5))) for table in tables]
    assert read == [0.5, 3]
    assert len(traces) == 1


@pytest.mark.parametrize("k_ref", [0, -1, 2.0, True])
def test_a_count_without_meaning_is_refused(k_ref):
    with pytest.raises(ValueError, match="expected a positive number of reference rewards"):
        posterior.mean(transformations.identity, k_ref)
