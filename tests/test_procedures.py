"""One contract for every procedure, and the laws that a reader can check by hand."""

import itertools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infalign_jax import procedures

best_of_n, worst_of_n = procedures.best_of_n, procedures.worst_of_n
order_statistic, mixture = procedures.order_statistic, procedures.mixture
best_of_poisson, compose = procedures.best_of_poisson, procedures.compose
MEDIAN = procedures.Procedure(
    cdf=lambda q: q * q * (3 - 2 * q),
    density=lambda q: 6 * q * (1 - q),
    selection=lambda n: np.array([i * (n - 1 - i) for i in range(n)]) / math.comb(n, 3),
    samples=3,
)
UNKNOWN_N = mixture([best_of_n(2), best_of_n(8)], [0.25, 0.75])
FAMILY = {
    "standard": procedures.standard(),
    "best of 2": best_of_n(2),
    "best of 64": best_of_n(64),
    "worst of 2": worst_of_n(2),
    "worst of 64": worst_of_n(64),
    "smallest of 5": order_statistic(1, 5),
    "17th of 64": order_statistic(17, 64),
    "largest of 5": order_statistic(5, 5),
    "best of Poisson": best_of_poisson(3.0),
    "best of one": best_of_poisson(0.0),
    "unknown N": UNKNOWN_N,
    "worst of Poissons": mixture([worst_of_n(4), best_of_poisson(1.5)], [0.5, 0.5]),
    "worst of 8 bests of 8": compose(worst_of_n(8), best_of_n(8)),
    "median of mixtures": compose(order_statistic(2, 3), UNKNOWN_N),
    "worst of 2 bests of Poisson": compose(worst_of_n(2), best_of_poisson(1.5)),
    "best of Poisson worsts of 2": compose(best_of_poisson(1.5), worst_of_n(2)),
    "three deep": compose(worst_of_n(2), compose(best_of_n(2), worst_of_n(3))),
    "one's own": MEDIAN,
}
family = pytest.mark.parametrize("procedure", FAMILY.values(), ids=FAMILY.keys())


@family
def test_cdf_rises_from_0_to_1_in_the_type_it_was_given(procedure, precision):
    law = procedure.cdf(jnp.linspace(0, 1, 101, dtype=precision))
    assert law.dtype == precision
    assert law[0] == 0
    np.testing.assert_allclose(law[-1], 1, rtol=2e-7)
    assert jnp.all(jnp.diff(law) >= 0)


@family
def test_density_is_the_derivative_of_the_cdf_even_at_the_ends(procedure, precision):
    grid = jnp.linspace(0, 1, 101, dtype=precision)
    slope = jax.jit(jax.vmap(jax.grad(procedure.cdf)))(grid)
    density = procedure.density(grid)
    assert density.dtype == precision
    exact = 1e-10 if precision == jnp.float64 else 1e-5
    np.testing.assert_allclose(slope, density, rtol=exact, atol=exact)
    rise = jax.vmap(jax.grad(procedure.density))(grid[1:-1])
    step = 1e-3
    away = [procedure.density(grid[1:-1] + way) for way in (step, -step)]
    np.testing.assert_allclose(rise, (away[0] - away[1]) / (2 * step), rtol=0.02, atol=0.3)


@family
def test_selection_reproduces_the_law_on_uniform_samples(procedure):
    n = 80
    weights = procedure.selection(n)
    assert weights.shape == (n,)
    assert weights.dtype == np.float64
    assert np.all(weights >= 0)
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-12)
    # Choosing rank i of n uniform numbers has the law P(Binomial(n, q) ≥ i).
    q = np.linspace(0, 1, 23)
    ranks = np.arange(n + 1)
    ways = np.array([math.comb(n, k) for k in range(n + 1)], float)
    binomial = ways * q[:, None] ** ranks * (1 - q[:, None]) ** (n - ranks)
    served = binomial @ np.concatenate([[0], np.cumsum(weights)])
    with jax.enable_x64(True):
        law = np.asarray(procedure.cdf(jnp.asarray(q)))
    assert np.all(np.abs(served - law) <= procedure.bias(n) + 1e-12)
    assert procedure.bias(n) < 1e-5


@family
def test_a_procedure_compiles_once(procedure):
    traces = 0

    @jax.jit
    def law(q):
        nonlocal traces
        traces += 1
        return procedure.cdf(q), procedure.density(q)

    for q in (0.25, 0.75):
        law(jnp.array([q]))
    assert traces == 1


@family
def test_the_fewest_samples_are_enough_and_one_fewer_is_refused(procedure):
    assert procedure.selection(procedure.samples).shape == (procedure.samples,)
    if procedure.samples > 1 and procedure is not MEDIAN:
        with pytest.raises(ValueError, match="samples to choose from, got"):
            procedure.selection(procedure.samples - 1)


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


@pytest.mark.parametrize("rank", [0, 4, 1.0, True])
def test_a_rank_outside_its_count_is_refused(rank):
    with pytest.raises(ValueError, match="expected a rank from 1 to 3"):
        order_statistic(rank, 3)


@pytest.mark.parametrize("mean", [-0.5, math.inf, math.nan])
def test_a_mean_that_no_count_has_is_refused(mean):
    with pytest.raises(ValueError, match="expected a finite mean"):
        best_of_poisson(mean)


@pytest.mark.parametrize("weights", [[1.0], [0.5, 0.6], [1.5, -0.5], [1.0, 0.0]])
def test_weights_that_are_no_chances_are_refused(weights):
    with pytest.raises(ValueError, match="expected"):
        mixture([best_of_n(2), best_of_n(4)], weights)


@pytest.mark.parametrize(
    ("outer", "inner"), [((1, 2), (2, 2)), ((2, 3), (1, 2)), ((2, 2), (2, 3)), ((1, 2), (3, 4))]
)
def test_a_composition_deals_the_samples_to_its_batches(outer, inner):
    (rank, batches), (place, size) = outer, inner
    counts = np.zeros(batches * size)
    for dealt in itertools.permutations(range(batches * size)):
        hands = [sorted(dealt[i * size : (i + 1) * size]) for i in range(batches)]
        counts[sorted(hand[place - 1] for hand in hands)[rank - 1]] += 1
    found = compose(order_statistic(*outer), order_statistic(*inner)).selection(batches * size)
    np.testing.assert_allclose(found, counts / counts.sum(), atol=1e-14)


@pytest.mark.parametrize("n", [8, 64, 300])
def test_worst_of_bests_has_its_closed_form(n):
    reach = np.cumsum(compose(worst_of_n(4), best_of_n(2)).selection(n))
    exact = [
        1
        - sum(
            (-1) ** j * Fraction(math.comb(4, j) * math.comb(k, 2 * j), math.comb(n, 2 * j))
            for j in range(5)
        )
        for k in range(1, n + 1)
    ]
    np.testing.assert_allclose(reach, np.array(exact, float), atol=1e-13)


@pytest.mark.parametrize("m", [1, 2, 512, 1023, 1024])
def test_an_order_statistic_of_many_survives_single_precision(m):
    q = np.concatenate([[0, 1e-6, 1e-3], np.linspace(0, 1, 1001), [1]])
    law = order_statistic(m, 1024)

    def at(q, dtype):
        with jax.enable_x64(dtype == np.float64):
            values = jnp.asarray(q.astype(np.float32).astype(dtype))
            return [np.asarray(part(values)) for part in (law.density, law.cdf)]

    exact, found = at(q, np.float64), at(q, np.float32)
    np.testing.assert_allclose(found[0], exact[0], atol=3e-6 * exact[0].max())
    np.testing.assert_allclose(found[1], exact[1], atol=3e-6)
    assert found[0][0] == (1024 if m == 1 else 0)
    assert found[0][-1] == (1024 if m == 1024 else 0)


def test_poisson_draws_what_a_poisson_count_would():
    generator = np.random.default_rng(0)
    n, draws = 6, 200_000
    counts = np.minimum(1 + generator.poisson(2.0, draws), n)
    ranks = generator.permuted(np.tile(np.arange(n), (draws, 1)), axis=1)
    best = np.max(np.where(np.arange(n) < counts[:, None], ranks, -1), axis=1)
    seen = np.bincount(best, minlength=n) / draws
    np.testing.assert_allclose(best_of_poisson(2.0).selection(n), seen, atol=0.005)
    np.testing.assert_allclose(best_of_poisson(2.0).bias(n), 0.016564, atol=1e-6)


def test_too_few_samples_are_refused():
    for procedure in (procedures.best_of_n(4), procedures.worst_of_n(4)):
        with pytest.raises(ValueError, match="at least 4 samples to choose from, got 3"):
            procedure.selection(3)
