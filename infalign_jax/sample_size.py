"""How many reference responses a prompt needs, and how many prompts.

Calibration knows the quantile u of a response by its rank alone among K reference rewards. They cut
[0, 1] into K + 1 cells of u, whose widths are Dirichlet(1, …, 1), and a mid-rank gives one reward,
Φ((m + ½)/(K + 1)), to all of cell m. So a perfect solver's density is constant in each cell,
f = e^{Φ/β}/Z with that prompt's own Z, and its KL and win rate are integrals of polynomials
(derived; `experiments/finite_k.py` has the same for other estimators and for ties). Random are only
the widths: they are drawn, the same whenever K is, so that two Φ meet the same prompts.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from infalign_jax.procedures import Procedure
from infalign_jax.transformations import Transformation

_CELLS, _FEWEST = 200_000, 200  # prompts times K, but so many prompts at least
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(8)  # exact to degree 15 in a cell


class FiniteK(NamedTuple):
    """What a perfect solver reaches that sees mid-ranks among K, on average over prompts.

    >>> FiniteK._fields
    ('beta', 'win_rate', 'standard_error')
    """

    beta: float  # at which the mean KL over prompts is what was asked for
    win_rate: float  # after the procedures
    standard_error: float  # of the simulated cells, at that KL


class Spread(NamedTuple):
    """Where the variance of a prompt's figure comes from.

    >>> round(standard_error(Spread(between=0.03, within=0.06), 100), 3)  # √(0.09/100)
    0.03
    """

    between: float  # prompts that differ: more prompts alone help
    within: float  # the responses drawn for each: more responses help too


def at_k(
    transformation: Transformation,
    kl: float,
    procedure: Procedure,
    k: int,
    *,
    reference_procedure: Procedure | None = None,
) -> FiniteK:
    """The win rate of a perfect solver that knows responses by their mid-ranks among ``k``.

    Compare it with ``frontier.curve`` at this KL: the difference is what finite K costs. No two
    rewards tie; Φ and the procedures are evaluated in JAX's default float type.

    Args:
      transformation: Φ; of an optimum, the one that is solved for K → ∞.
      kl: its mean over prompts, in nats; one β serves them all.
      procedure: of the policy, and of the reference unless ``reference_procedure`` is given.
      k: the number of reference responses a prompt, at least 1.

    Raises ValueError where Φ of ranks among ``k`` reaches no such KL: under 1 + ½ + … + 1/k, which
    serving nothing but the highest cell has.

    >>> from infalign_jax import procedures, transformations
    >>> found = at_k(transformations.identity, 0.5, procedures.best_of_n(4), 16)
    >>> round(found.win_rate, 2), found.standard_error < 0.0005  # 0.80 for K → ∞
    (0.79, True)
    """
    widths = np.random.default_rng(k).exponential(size=(max(_FEWEST, _CELLS // k), k + 1))
    widths /= widths.sum(axis=1, keepdims=True)
    middles = jnp.asarray((np.arange(k + 1) + 0.5) / (k + 1), jnp.result_type(float))
    values = np.asarray(transformation(middles), np.float64)
    rewards = values - values.max()
    beta = _beta_for_kl(widths, rewards, kl)
    laws = procedure, reference_procedure or procedure

    def outcome(beta: float) -> tuple[np.ndarray, np.ndarray]:
        density, kls = _tilt(widths, rewards / beta)
        return kls, 1 - _loss(widths, density, *laws)

    # Prompts differ in KL: each is led back to the mean along dW/dKL, as β is set by them all.
    (kls, wins), (kls_near, wins_near) = outcome(beta), outcome(1.001 * beta)
    slope = np.mean(wins_near - wins) / np.mean(kls_near - kls)
    wins = wins - slope * (kls - kl)
    return FiniteK(beta, float(wins.mean()), float(wins.std(ddof=1) / np.sqrt(len(wins))))


def _tilt(widths: np.ndarray, exponents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """f in each cell, float64[n, K + 1], and KL, float64[n]; exponents [K + 1], at most 0."""
    grown = np.exp(exponents)
    z = widths @ grown
    return grown / z[:, None], (widths @ (grown * np.maximum(exponents, -800))) / z - np.log(z)


def _beta_for_kl(widths: np.ndarray, rewards: np.ndarray, kl: float) -> float:
    """The β at which the mean KL over prompts is ``kl``, by bisection of its logarithm."""
    low, high = (np.log(scale * np.ptp(rewards)) for scale in (1e-6, 1e4))

    def mean_kl(log_beta: float) -> float:
        return float(np.mean(_tilt(widths, rewards / np.exp(log_beta))[1]))

    if not mean_kl(high) < kl < mean_kl(low):
        raise ValueError(
            f"expected a KL that ranks among {widths.shape[1] - 1} can lead to (above 0, below "
            f"{mean_kl(low):.2f}), got {kl:g}: ask for less, or score more reference responses"
        )
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_kl(middle) > kl else (low, middle)
    return float(np.exp((low + high) / 2))


def _loss(
    widths: np.ndarray, density: np.ndarray, procedure: Procedure, reference: Procedure
) -> np.ndarray:
    """1 − W = ∫ G(F(u)) g(u) du, float64[n], by a quadrature in each cell, where F is linear."""
    mass = widths * density
    before, start = np.cumsum(mass, axis=1) - mass, np.cumsum(widths, axis=1) - widths
    lost = np.zeros(len(widths))
    for x, weight in zip((_NODES + 1) / 2, _WEIGHTS / 2, strict=True):
        cdf = procedure.cdf(_default(before + x * mass))
        met = reference.density(_default(start + x * widths))
        lost += weight * np.sum(widths * np.asarray(cdf * met, np.float64), axis=1)
    return lost


def _default(values: np.ndarray) -> jnp.ndarray:
    return jnp.asarray(np.clip(values, 0, 1), jnp.result_type(float))


def spread(figures: ArrayLike, one_half: ArrayLike, other_half: ArrayLike) -> Spread:
    """What part of the variance over prompts comes from the responses drawn for each of them.

    The same figure of each prompt, float[B], from all K of its responses and from each half of
    them. Halves are independent given the prompt, so that ½·E(a − b)² is the variance within at
    K/2, and half of that is it at K (derived, as far as it falls as 1/K); the rest is between.

    Raises ValueError where they are not of one shape [B] with B at least 2.

    >>> rng = np.random.default_rng(0)
    >>> prompts, drawn = rng.normal(size=(1, 4000)), rng.normal(size=(2, 4000))
    >>> one, other = prompts + drawn
    >>> found = spread((one + other) / 2, one, other)
    >>> round(found.between, 1), round(found.within, 1)  # 1 and ½
    (1.0, 0.5)
    """
    whole, one, other = (np.asarray(x, np.float64) for x in (figures, one_half, other_half))
    if not (whole.ndim == 1 and whole.size > 1 and whole.shape == one.shape == other.shape):
        raise ValueError(
            f"expected three figures of shape [B] with B at least 2, got {whole.shape}, "
            f"{one.shape} and {other.shape}: give one number a prompt"
        )
    total = float(np.var(whole, ddof=1))
    within = min(float(np.mean((one - other) ** 2)) / 4, total)
    return Spread(total - within, within)


def standard_error(parts: Spread, prompts: int, samples_factor: float = 1.0) -> float:
    """The standard error of the mean over so many prompts, K being multiplied by the factor.

    >>> standard_error(Spread(0.0, 0.04), 100), standard_error(Spread(0.0, 0.04), 100, 4)
    (0.02, 0.01)
    """
    return float(np.sqrt((parts.between + parts.within / samples_factor) / prompts))
