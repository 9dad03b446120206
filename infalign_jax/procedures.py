"""Inference-time procedures: what is done with a model's samples before one of them is served.

A procedure that looks at nothing but the order of rewards acts on a policy's law of quantiles
alone: where the policy's quantiles have CDF F, what it serves has CDF G(F) (method: Balashankar
et al., *InfAlign*, arXiv 2412.19792). On n samples in hand it chooses the i-th smallest with a
known probability. A procedure is these functions and nothing else, so a new one is a few lines:

>>> import jax.numpy as jnp
>>> median_of_3 = Procedure(
...     cdf=lambda q: q * q * (3 - 2 * q),
...     density=lambda q: 6 * q * (1 - q),
...     selection=lambda n: jnp.array([i * (n - 1 - i) for i in range(n)]) / math.comb(n, 3),
... )
>>> [round(float(weight), 2) for weight in median_of_3.selection(5)]
[0.0, 0.3, 0.4, 0.3, 0.0]
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Procedure(NamedTuple):
    """The law of an inference-time procedure and its choice among samples.

    >>> best_of_n(2).cdf(0.5)
    0.25
    """

    cdf: Callable[[Array], Array]  # G: [0, 1] -> [0, 1], elementwise, increasing
    density: Callable[[Array], Array]  # g = G', elementwise
    selection: Callable[[int], Array]  # n -> float[n]: probability of the i-th smallest of n


# Cached, so that a procedure equals itself when asked for again and jit does not recompile;
# typed, so that True is not taken for 1.
@functools.lru_cache(typed=True)
def standard() -> Procedure:
    """One sample, served as it is: G(q) = q.

    >>> [float(weight) for weight in standard().selection(4)]
    [0.25, 0.25, 0.25, 0.25]
    """
    return best_of_n(1)


@functools.lru_cache(typed=True)
def best_of_n(n: int) -> Procedure:
    """The sample of highest reward among ``n``: G(q) = q^n.

    Among more samples than ``n`` the choice is averaged over all subsets of size ``n``, drawn
    without replacement: the i-th smallest of m is the best of its subset with probability
    C(i−1, n−1)/C(m, n) (derived: the other n−1 members lie below it).

    Raises ValueError where ``n`` is no positive integer, and on selection from fewer than ``n``.

    >>> [round(float(weight), 3) for weight in best_of_n(2).selection(4)]
    [0.0, 0.167, 0.333, 0.5]
    """
    _check_count(n)

    def selection(samples: int) -> Array:
        _check_samples(samples, n)
        subsets = math.comb(samples, n)
        return _floats([math.comb(below, n - 1) / subsets for below in range(samples)])

    return Procedure(
        cdf=lambda q: q**n,
        density=lambda q: n * q ** (n - 1),
        selection=selection,
    )


@functools.lru_cache(typed=True)
def worst_of_n(n: int) -> Procedure:
    """The sample of lowest reward among ``n``: G(q) = 1 − (1−q)^n, an attacker's "best of n".

    Raises ValueError where ``n`` is no positive integer, and on selection from fewer than ``n``.

    >>> [round(float(weight), 3) for weight in worst_of_n(2).selection(4)]
    [0.5, 0.333, 0.167, 0.0]
    """
    _check_count(n)
    return Procedure(
        cdf=lambda q: 1 - (1 - q) ** n,
        density=lambda q: n * (1 - q) ** (n - 1),
        selection=lambda samples: best_of_n(n).selection(samples)[::-1],
    )


def _floats(values: list[float]) -> Array:
    return jnp.asarray(values, dtype=jnp.result_type(float))


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
