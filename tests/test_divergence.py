"""KL estimators against enumeration of every sequence, and procedures against their formulas."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infalign_jax import divergence, quadrature
from infalign_jax.procedures import Procedure, best_of_n, standard, worst_of_n

per_token = jax.jit(divergence.per_token)

END, VOCABULARY, LENGTH = 0, 3, 4


def table(seed, sharpness=1.5):
    """A policy: log-probabilities of the next token after every prefix."""
    generator = np.random.default_rng(seed)
    prefixes = itertools.chain.from_iterable(
        itertools.product(range(VOCABULARY), repeat=t) for t in range(LENGTH)
    )
    logits = {y: sharpness * generator.normal(size=VOCABULARY) for y in prefixes}
    return {y: x - np.log(np.exp(x).sum()) for y, x in logits.items()}


def sequences():
    """Every response: up to its end-of-sequence token, which counts, or of full length."""
    for y in itertools.product(range(VOCABULARY), repeat=LENGTH):
        length = y.index(END) + 1 if END in y else LENGTH
        if not any(y[length:]):  # beyond the end, padding alone
            yield y, length


def arrays(policy):
    """Per sequence: laws at its prefixes [S, T, V], mask [S, T], log π(y) [S]."""
    laws, masks, totals = [], [], []
    for y, length in sequences():
        laws.append([policy[y[:t]] for t in range(LENGTH)])
        masks.append(np.arange(LENGTH) < length)
        totals.append(sum(policy[y[:t]][y[t]] for t in range(length)))
    return np.array(laws), np.array(masks), np.array(totals)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("seed", range(3))
def test_both_estimators_average_to_the_exact_kl(seed):
    laws, mask, log_pi = arrays(table(seed))
    reference_laws, _, log_ref = arrays(table(100 + seed))
    pi, ref = np.exp(log_pi), np.exp(log_ref)
    np.testing.assert_allclose([pi.sum(), ref.sum()], 1)
    exact = np.sum(pi * np.log(pi / ref))
    tokens = per_token(laws, reference_laws, mask)
    np.testing.assert_allclose(pi @ tokens, exact, rtol=1e-12)
    np.testing.assert_allclose(pi @ divergence.log_ratio(log_pi, log_ref), exact, rtol=1e-12)
    assert np.min(divergence.log_ratio(log_pi, log_ref)) < 0  # and that is how it must be
    assert np.ptp(tokens) > 0.1  # it varies: the average was no accident


def test_tokens_beyond_the_end_count_nothing(precision):
    laws, mask, _ = arrays(table(0))
    reference_laws, _, _ = arrays(table(1))
    laws, reference_laws = (jnp.asarray(x, precision) for x in (laws, reference_laws))
    whole = per_token(laws, reference_laws, jnp.asarray(mask))
    spoilt = jnp.where(mask[..., None], laws, jnp.log(jnp.asarray([0.5, 0.5, 0.0], precision)))
    np.testing.assert_array_equal(per_token(spoilt, reference_laws, mask), whole)
    assert whole.dtype == precision


def test_float32_sees_the_kl_of_policies_that_are_close():
    """8,192 words, KL 6e-6: summed as p·log(p/q) it would be .1 % off or, from logits, 2 %."""
    generator = np.random.default_rng(0)
    logits = 2 * generator.normal(size=(3, 8192))
    moved = logits + 0.002 * generator.normal(size=logits.shape)
    laws = [x - np.log(np.exp(x).sum(axis=-1, keepdims=True)) for x in (moved, logits)]
    exact = np.sum(np.exp(laws[0]) * (laws[0] - laws[1]), axis=-1).sum()
    assert 1e-6 < exact < 1e-5
    found = per_token(*(jnp.asarray(x, jnp.float32) for x in laws), jnp.full(3, True))
    np.testing.assert_allclose(found, exact, rtol=1e-4)


def test_words_of_probability_zero(precision):
    def of(p, q):
        laws = [jnp.log(jnp.asarray([row], precision)) for row in (p, q)]
        return per_token(*laws, jnp.array([True]))

    np.testing.assert_allclose(of([1, 0, 0], [0.5, 0.5, 0]), np.log(2), rtol=1e-6)
    assert of([0.5, 0.5], [1, 0]) == np.inf
    far = per_token(
        jnp.asarray([[0.0, -200.0]], precision), jnp.asarray([[-200.0, 0.0]], precision),
        jnp.array([True]),
    )  # fmt: skip
    np.testing.assert_allclose(far, 200, rtol=1e-6)  # p/q overflows, KL does not


@pytest.mark.parametrize("scale", [1, 400])  # at 400 p/q overflows in either precision
def test_the_gradient_is_that_of_kl(scale, precision):
    logits = scale * jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 5)), precision)

    def kl(policy, reference, plain):
        p, q = jax.nn.log_softmax(policy), jax.nn.log_softmax(reference)
        if plain:
            return jnp.sum(jnp.exp(p) * (p - q))
        return per_token(p, q, jnp.array([True]))

    for side in (0, 1):
        found, expected = (jax.grad(kl, side)(*logits, plain) for plain in (False, True))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 4, 32])
def test_best_and_worst_of_n_have_their_kl(n, precision):
    expected = np.log(n) - (n - 1) / n
    tolerance = 1e-9 if precision == jnp.float64 else 1e-5
    for procedure in (best_of_n(n), worst_of_n(n)):
        found = divergence.of_procedure(procedure)
        assert found.dtype == precision
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("x64")
def test_any_procedure_has_its_kl():
    """The median of 3: g = 6q(1 − q), ∫ g log g = log 6 − 5/3."""
    median = Procedure(lambda q: q * q * (3 - 2 * q), lambda q: 6 * q * (1 - q), lambda n: None)
    np.testing.assert_allclose(divergence.of_procedure(median), np.log(6) - 5 / 3, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_ties_lessen_what_a_procedure_costs():
    generator = np.random.default_rng(0)
    masses = generator.dirichlet(np.full(6, 0.5), 50)
    masses[0] = [0, 0.5, 0, 0.5, 0, 0]
    for procedure in (best_of_n(4), worst_of_n(3)):
        found = divergence.of_procedure_over_levels(procedure, masses)
        # Two levels, by hand.
        (s,) = np.diff(procedure.cdf(np.array([0, 0.5])))
        expected = s * np.log(2 * s) + (1 - s) * np.log(2 * (1 - s))
        np.testing.assert_allclose(found[0], expected)
        limit = divergence.of_procedure(procedure)
        assert np.all((found >= 0) & (found < limit))
        # Levels cut ever finer: the limit of rewards without ties.
        fine = divergence.of_procedure_over_levels(procedure, np.full(2**16, 2.0**-16))
        np.testing.assert_allclose(fine, limit, rtol=1e-6)
    np.testing.assert_allclose(
        divergence.of_procedure_over_levels(standard(), masses), 0, atol=1e-12
    )


def test_the_kl_of_samples_is_that_of_their_levels():
    rewards = np.array([[3.0, 1.0, 3.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    found = divergence.of_procedure_from_samples(best_of_n(3), rewards)
    levels = [[0.25, 0.25, 0.5], [1.0, 0.0, 0.0]]
    expected = divergence.of_procedure_over_levels(best_of_n(3), levels)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_the_kl_of_samples_nears_the_truth_from_below():
    def short(k):
        found = divergence.of_procedure_from_samples(best_of_n(4), np.arange(k)[None])
        return np.log(4) - 3 / 4 - found[0]

    assert 0 < short(64) < short(16) / 3.5 < 0.001


def test_the_excess_is_that_of_its_definition(precision):
    ratios = jnp.asarray([1e-3, 0.5, 0.74, 0.75, 1.0, 1.34, 1.36, 20.0], precision)
    expected = np.asarray(ratios, np.float64)
    expected = expected * np.log(expected) - expected + 1
    found = jax.jit(quadrature.kl_terms)(jnp.log(ratios))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-12)
