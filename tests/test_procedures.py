"""One contract for every procedure, and the laws that a reader can check by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infalign_jax import procedures

FAMILY = {
    "standard": procedures.standard(),
    "best of 2": procedures.best_of_n(2),
    "best of 4": procedures.best_of_n(4),
    "best of 64": procedures.best_of_n(64),
    "worst of 2": procedures.worst_of_n(2),
    "worst of 4": procedures.worst_of_n(4),
    "worst of 64": procedures.worst_of_n(64),
}
family = pytest.mark.parametrize("procedure", FAMILY.values(), ids=FAMILY.keys())


@family
def test_cdf_rises_from_0_to_1_in_the_type_it_was_given(procedure, precision):
    law = procedure.cdf(jnp.linspace(0, 1, 101, dtype=precision))
    assert law.dtype == precision
    assert law[0] == 0
    assert law[-1] == 1
    assert jnp.all(jnp.diff(law) >= 0)


@family
def test_density_is_the_derivative_of_the_cdf_even_at_the_ends(procedure, precision):
    grid = jnp.linspace(0, 1, 101, dtype=precision)
    slope = jax.jit(jax.vmap(jax.grad(procedure.cdf)))(grid)
    np.testing.assert_allclose(slope, procedure.density(grid), rtol=1e-5, atol=1e-5)


@family
def test_selection_reproduces_the_law_on_uniform_samples(procedure, precision):
    n = 80
    weights = procedure.selection(n)
    assert weights.shape == (n,)
    assert weights.dtype == precision
    assert jnp.all(weights >= 0)
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-6)
    # The i-th smallest of n uniform numbers has mean i/(n+1); the served law's is 1 − ∫G.
    nodes, quadrature = np.polynomial.legendre.leggauss(64)
    law = procedure.cdf(jnp.asarray((nodes + 1) / 2, precision))
    served = 1 - np.sum(quadrature / 2 * np.asarray(law))
    mean = np.sum(np.asarray(weights) * np.arange(1, n + 1) / (n + 1))
    np.testing.assert_allclose(mean, served, rtol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_selection_counts_every_subset_once(n):
    samples = 5
    subsets = list(itertools.combinations(range(samples), n))
    best = np.bincount([max(s) for s in subsets], minlength=samples) / len(subsets)
    worst = np.bincount([min(s) for s in subsets], minlength=samples) / len(subsets)
    np.testing.assert_allclose(procedures.best_of_n(n).selection(samples), best, rtol=1e-6)
    np.testing.assert_allclose(procedures.worst_of_n(n).selection(samples), worst, rtol=1e-6)


def test_selection_stays_exact_where_binomials_overflow_floats():
    weights = procedures.best_of_n(1024).selection(4096)
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-5)
    np.testing.assert_allclose(weights[-1], 0.25, rtol=1e-6)


def test_a_procedure_asked_for_twice_does_not_recompile():
    count = 0

    def served(procedure, q):
        nonlocal count
        count += 1
        return procedure.cdf(q)

    jitted = jax.jit(served, static_argnums=0)
    for _ in range(2):
        jitted(procedures.worst_of_n(3), jnp.array(0.5))
    assert count == 1


@pytest.mark.parametrize("n", [0, -1, 2.0, True])
def test_a_count_that_is_no_positive_integer_is_refused(n):
    for make in (procedures.best_of_n, procedures.worst_of_n):
        with pytest.raises(ValueError, match="positive integer"):
            make(n)


def test_too_few_samples_are_refused():
    for procedure in (procedures.best_of_n(4), procedures.worst_of_n(4)):
        with pytest.raises(ValueError, match="at least 4 samples to choose from, got 3"):
            procedure.selection(3)
