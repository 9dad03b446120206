"""Inference-time procedures: what is done with a model's samples before one of them is served.

A procedure that looks at nothing but the order of rewards acts on a policy's law of quantiles
alone: where the policy's quantiles have CDF F, what it serves has CDF G(F) (method: Balashankar
et al., *InfAlign*, arXiv 2412.19792). On n samples in hand it chooses the i-th smallest with a
known probability. A procedure is these functions and nothing else, so a new one is a few lines:

>>> median_of_3 = Procedure(
...     cdf=lambda q: q * q * (3 - 2 * q),
...     density=lambda q: 6 * q * (1 - q),
...     selection=lambda n: np.array([i * (n - 1 - i) for i in range(n)]) / math.comb(n, 3),
...     samples=3,
... )
>>> median_of_3.selection(5).round(2).tolist()
[0.0, 0.3, 0.4, 0.3, 0.0]

Why ``selection`` knows no law but its own (derived): choosing rank i of n with probability p_i has
the law Σ_k b_{k,n}(q)·Σ_{i≤k} p_i with b Bernstein's polynomials, so that a law which is a
polynomial of degree ≤ n has exactly one selection, and another law has none.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from infalign_jax import subsets

Array = jax.Array


class Procedure(NamedTuple):
    """The law of an inference-time procedure and its choice among samples.

    >>> best_of_n(2).cdf(0.5)
    0.25
    """

    cdf: Callable[[Array], Array]  # G: [0, 1] -> [0, 1], elementwise, increasing
    density: Callable[[Array], Array]  # g = G', elementwise
    selection: Callable[[int], np.ndarray]  # n -> float64[n]: probability of the i-th smallest
    samples: int = 1  # the fewest that selection can choose from
    # n -> how far choosing among n samples can move a win rate from the law's, on average.
    bias: Callable[[int], float] = lambda n: 0.0


# Cached, so that a procedure equals itself when asked for again and jit does not recompile;
# typed, so that True is not taken for 1.
@functools.lru_cache(typed=True)
def standard() -> Procedure:
    """One sample, served as it is: G(q) = q.

    >>> standard().selection(4).tolist()
    [0.25, 0.25, 0.25, 0.25]
    """
    return best_of_n(1)


@functools.lru_cache(typed=True)
def best_of_n(n: int) -> Procedure:
    """The sample of highest reward among ``n``: G(q) = q^n.

    Raises ValueError where ``n`` is no positive integer, and on selection from fewer than ``n``.

    >>> best_of_n(2).selection(4).round(3).tolist()
    [0.0, 0.167, 0.333, 0.5]
    """
    return order_statistic(n, n)._replace(
        cdf=lambda q: q**n,
        density=lambda q: n * q ** (n - 1),
    )


@functools.lru_cache(typed=True)
def worst_of_n(n: int) -> Procedure:
    """The sample of lowest reward among ``n``: G(q) = 1 − (1−q)^n, an attacker's "best of n".

    Raises ValueError where ``n`` is no positive integer, and on selection from fewer than ``n``.

    >>> worst_of_n(2).selection(4).round(3).tolist()
    [0.5, 0.333, 0.167, 0.0]
    """
    return order_statistic(1, n)._replace(
        cdf=lambda q: 1 - (1 - q) ** n,
        density=lambda q: n * (1 - q) ** (n - 1),
    )


@functools.lru_cache(typed=True)
def order_statistic(m: int, n: int) -> Procedure:
    """The m-th smallest reward among ``n``: G(q) = I_q(m, n−m+1), a regularised beta function.

    Among more samples than ``n`` the choice is averaged over all subsets of size ``n``, drawn
    without replacement: the i-th smallest of s is the m-th of its subset with probability
    C(i−1, m−1)·C(s−i, n−m)/C(s, n) (derived: m−1 of the other members lie below it).

    Raises ValueError where not 1 ≤ m ≤ n or one is no integer, and on selection from fewer than n.

    >>> median = order_statistic(2, 3)
    >>> round(float(median.cdf(jnp.array(0.25))), 5)  # q²(3 − 2q)
    0.15625
    >>> median.selection(5).round(3).tolist()
    [0.0, 0.3, 0.4, 0.3, 0.0]
    """
    _check_count(n)
    if not isinstance(m, int) or isinstance(m, bool) or not 1 <= m <= n:
        raise ValueError(
            f"expected a rank from 1 to {n}, got {m!r}: 1 is the smallest of {n}, {n} the largest"
        )

    def selection(samples: int) -> np.ndarray:
        _check_samples(samples, n)
        whole = math.comb(samples, n)
        return np.array(
            [
                math.comb(below, m - 1) * math.comb(samples - 1 - below, n - m) / whole
                for below in range(samples)
            ]
        )

    return Procedure(
        cdf=functools.partial(subsets.at_least, m, n),
        density=lambda q: n * subsets.exactly(m - 1, n - 1, q),
        selection=selection,
        samples=n,
    )


@functools.lru_cache
def best_of_poisson(mu: float) -> Procedure:
    """The best of 1 + Poisson(μ) samples: G(q) = q·e^{μ(q−1)}.

    The law is no polynomial, so that n samples can serve it only up to n: where more are drawn
    for, the best of all n is served. ``bias(n)`` = P(1 + Poisson(μ) > n), the share of draws that
    this touches, bounds what a side's win rate moves by.

    Raises ValueError where ``mu`` is not finite or below 0.

    >>> best_of_poisson(3.0).selection(4).round(3).tolist()
    [0.012, 0.037, 0.118, 0.832]
    >>> round(best_of_poisson(3.0).bias(12), 5)
    7e-05
    """
    if not (math.isfinite(mu) and mu >= 0):
        raise ValueError(f"expected a finite mean of at least 0, got {mu!r}: 3 serves best of 4")

    def selection(samples: int) -> np.ndarray:
        _check_samples(samples, 1)
        chance = _poisson(mu, samples)
        chance[-1] += tail(samples)
        ranks, share = np.arange(samples + 1.0), np.ones(samples + 1)
        reach = np.zeros(samples + 1)  # P(rank ≤ k): Σ_j P(N = j)·C(k, j)/C(samples, j)
        for j in range(samples):
            share = share * np.maximum(ranks - j, 0) / (samples - j)
            reach += chance[j] * share
        return np.diff(reach)

    def tail(samples: int) -> float:
        far = samples + int(mu + 40 * math.sqrt(mu + 1)) + 40
        return float(np.sum(_poisson(mu, far)[samples:]))

    return Procedure(
        cdf=lambda q: q * jnp.exp(mu * (q - 1)),
        density=lambda q: (1 + mu * q) * jnp.exp(mu * (q - 1)),
        selection=selection,
        bias=tail,
    )


def mixture(procedures: Sequence[Procedure], weights: Sequence[float]) -> Procedure:
    """One of the procedures, drawn anew by each side for each prompt: G = Σ w_i·G_i.

    An N that both sides share is another thing, with no law of its own: see ``shared.optimal``.

    Raises ValueError where there is not one positive weight a procedure or they do not sum to 1.

    >>> both = mixture([best_of_n(1), best_of_n(3)], [0.5, 0.5])
    >>> float(both.cdf(0.5)), both.selection(3).round(3).tolist()
    (0.3125, [0.167, 0.167, 0.667])
    """
    return _mixture(tuple(procedures), tuple(float(weight) for weight in weights))


@functools.lru_cache
def _mixture(parts: tuple[Procedure, ...], weights: tuple[float, ...]) -> Procedure:
    if len(parts) != len(weights) or not parts:
        raise ValueError(
            f"expected a weight for each procedure, got {len(weights)} for {len(parts)}"
        )
    if not all(weight > 0 for weight in weights) or abs(sum(weights) - 1) > 1e-6:
        raise ValueError(f"expected positive weights that sum to 1, got {list(weights)}")
    pairs = list(zip(weights, parts, strict=True))
    return Procedure(
        cdf=lambda q: functools.reduce(jnp.add, [w * part.cdf(q) for w, part in pairs]),
        density=lambda q: functools.reduce(jnp.add, [w * part.density(q) for w, part in pairs]),
        selection=lambda n: np.sum([w * part.selection(n) for w, part in pairs], axis=0),
        samples=max(part.samples for part in parts),
        bias=lambda n: sum(w * part.bias(n) for w, part in pairs),
    )


@functools.lru_cache
def compose(outer: Procedure, inner: Procedure) -> Procedure:
    """``outer`` among what ``inner`` serves from batches of its own: G = G_outer(G_inner).

    Laws compose; selections do not, for the batches are drawn from the same n samples without
    replacement. With M batches of N, the served one is among the k smallest of M·N with the
    probability that follows from dealing k low ones to the batches (derived; ``subsets.dealt``).
    A part whose law is no polynomial takes as many samples as are left to it.

    >>> attacked = compose(worst_of_n(2), best_of_n(2))  # an attacker against best of 2
    >>> attacked.cdf(0.5)
    0.4375
    >>> attacked.selection(4).round(3).tolist()  # a random pairing of four
    [0.0, 0.333, 0.667, 0.0]
    """

    def split(n: int) -> tuple[int, int]:
        batches, size = outer.samples, inner.samples
        _check_samples(n, batches * size)
        longer = inner.bias(size) > 0
        if outer.bias(batches) > 0:
            batches = max(batches, min(n // size, math.isqrt(n) if longer else n))
        return batches, n // batches if longer else size

    def selection(n: int) -> np.ndarray:
        batches, size = split(n)
        dealt = subsets.dealt(outer.selection(batches), inner.selection(size))
        return subsets.lift(dealt, n)

    def bias(n: int) -> float:
        batches, size = split(n)
        return outer.bias(batches) + batches * inner.bias(size)

    return Procedure(
        cdf=lambda q: outer.cdf(inner.cdf(q)),
        density=lambda q: outer.density(inner.cdf(q)) * inner.density(q),
        selection=selection,
        samples=outer.samples * inner.samples,
        bias=bias,
    )


def _poisson(mu: float, count: int) -> np.ndarray:
    """P(Poisson(μ) = 0 … count − 1), float64[count]."""
    if mu == 0:
        return np.eye(1, count)[0]
    k = np.arange(count)
    return np.exp(k * math.log(mu) - mu - subsets.log_factorials(count - 1))


def _check_count(n: int) -> None:
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ValueError(
            f"expected a sample count of at least 1, got {n!r}: give a positive integer"
        )


def _check_samples(samples: int, n: int) -> None:
    if samples < n:
        raise ValueError(
            f"expected at least {n} samples to choose from, got {samples}: "
            f"draw more, or take a procedure of fewer than {n}"
        )
