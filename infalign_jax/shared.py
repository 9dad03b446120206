"""An N that policy and reference share, but that training does not know.

Where both sides are decoded alike, by one of several procedures, what counts is Σ wᵢWᵢ of the win
rates after each: R′(u) = Σ wᵢ·gᵢ(F(u))·gᵢ(u) (derived), which is no mixture's, for that has cross
terms such as best-of-2 against best-of-8. Without weights to believe in there is the robust choice:
the policy whose largest shortfall from the procedures' own frontiers at its KL is the least.

Its weights are found from the dual (derived). With sᵢ(π) = Wᵢ* − Wᵢ(π), over policies of that KL

    min_π max_i sᵢ(π) ≥ max_w min_π Σ wᵢsᵢ(π),   w ≥ 0, Σw = 1,

with equality where every Wᵢ is concave in F (best-of-N); the inner minimum is an optimum for some
weights, its sᵢ the slope in w of the right-hand side, which is concave. Worst-of-N is not concave:
there the gap between the sides may stay open, and the best policy of several starts is returned.
"""

import functools
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from infalign_jax import frontier, optimum
from infalign_jax.objective import duel, mean
from infalign_jax.optimum import Optimum
from infalign_jax.procedures import Procedure

Array = jax.Array

_STEPS = 8  # of Newton's method on the weights, from each start


class Robust(NamedTuple):
    """The policy whose largest shortfall is least.

    >>> Robust._fields
    ('optimum', 'beta', 'weights', 'win_rates', 'shortfalls', 'gap')
    """

    optimum: Optimum  # for the weights; its win rate is their mean
    beta: float
    weights: np.ndarray  # float64[procedures]
    win_rates: np.ndarray  # float64[procedures]
    shortfalls: np.ndarray  # float64[procedures], under each procedure's own frontier at that KL
    gap: float  # at most so much less could the largest shortfall be


def optimal(procedures: Sequence[Procedure], weights: ArrayLike, beta: float | Array) -> Optimum:
    """The policy of highest Σ wᵢWᵢ − β·KL, with weights float[procedures] that sum to 1.

    Raises ValueError where there is not one weight a procedure, one is negative or they do not sum
    to 1, or β is not positive.

    >>> from infalign_jax.procedures import best_of_n
    >>> best = optimal([best_of_n(2), best_of_n(8)], [0.5, 0.5], 0.25)
    >>> round(float(best.kl), 3), bool(best.converged)
    (0.414, True)
    """
    weights = np.asarray(weights, np.float64)
    fine = weights.shape == (len(procedures),) and np.all(weights >= 0)
    if not fine or abs(np.sum(weights) - 1) > 1e-6:
        raise ValueError(
            f"expected {len(procedures)} weights of at least 0 that sum to 1, got "
            f"{weights.tolist()}: give one for each procedure"
        )
    beta = optimum.positive("beta", beta)
    return _optimal(tuple(procedures), jnp.asarray(weights, beta.dtype), beta)


def robust(procedures: Sequence[Procedure], kl: float) -> Robust:
    """The policy of this KL, in nats, that falls least short of the procedures' own frontiers.

    Starts from equal weights and, where the gap stays open, from each procedure; seconds, on the
    host, most of them for the compiler.

    Raises ValueError on fewer than two procedures or a KL that is not positive.

    >>> from infalign_jax.procedures import best_of_n
    >>> found = robust([best_of_n(2), best_of_n(16)], 0.5)
    >>> found.shortfalls.round(3).tolist(), bool(found.gap < 1e-3)
    ([0.021, 0.021], True)
    """
    if len(procedures) < 2 or not kl > 0:
        raise ValueError(
            f"expected at least 2 procedures and a positive KL, got {len(procedures)} and {kl!r}: "
            "a single procedure has `frontier.optimal_at_kl`"
        )
    count = len(procedures)
    limits = np.array([_limit(tuple(procedures), alone, kl) for alone in np.eye(count)])
    ascent = functools.partial(_climb, tuple(procedures), kl, limits)
    found, bound = ascent(np.full(count, 1 / count))
    for start in np.eye(count):
        if found.gap < _close():
            break
        other, lower = ascent(0.8 * start + 0.2 / count)
        bound = max(bound, lower)
        found = min(found, other, key=lambda one: one.shortfalls.max())
        found = found._replace(gap=float(found.shortfalls.max() - bound))
    return found


def _limit(procedures: tuple[Procedure, ...], weights: np.ndarray, kl: float) -> float:
    """The highest Σ wᵢWᵢ of any policy of this KL: the tangent of the optimum next to it."""
    dtype = jnp.result_type(float)
    beta, best, _ = _at_kl(procedures, jnp.asarray(weights, dtype), jnp.asarray(kl, dtype))
    return float(best.win_rate + beta * (kl - best.kl))


def _climb(
    procedures: tuple[Procedure, ...], kl: float, limits: np.ndarray, weights: np.ndarray
) -> tuple[Robust, float]:
    """The best policy met on the way up to the weights' maximum, and the highest bound met."""

    def at(weights: np.ndarray) -> Robust:
        dtype = jnp.result_type(float)
        arguments = jnp.asarray(weights, dtype), jnp.asarray(kl, dtype)
        beta, best, rates = jax.device_get(_at_kl(procedures, *arguments))
        rates = np.asarray(rates, np.float64)
        shortfalls = limits - rates
        # What the policy has of KL beyond or under `kl` is worth β.
        bound = float(weights @ shortfalls - beta * (kl - best.kl))
        return Robust(best, float(beta), weights, rates, shortfalls, bound)

    here = best = at(weights)
    bound = here.gap
    reach = 1e-3 if _close() < 1e-4 else 1e-2  # of a difference quotient, in weights
    for _ in range(_STEPS):
        towards = np.eye(len(weights)) - here.weights
        ends = [at(here.weights + reach * direction) for direction in towards]
        turns = np.array([(end.shortfalls - here.shortfalls) / reach for end in ends])
        target = _highest(here.shortfalls, turns @ towards.T)
        tried = at(target)
        share = 1.0
        while tried.gap < here.gap and share > 0.1:
            share /= 3
            tried = at(here.weights + share * (target - here.weights))
        here = max(here, tried, key=lambda one: one.gap)
        best = min(best, tried, key=lambda one: one.shortfalls.max())
        bound = max(bound, here.gap)
        if here is not tried or best.shortfalls.max() - bound < _close():
            break
    return best._replace(gap=float(best.shortfalls.max() - bound)), bound


def _close() -> float:
    """A gap in win rate that is not worth another step."""
    return 1e-5 if jnp.result_type(float) == jnp.float64 else 1e-4


def _highest(slope: np.ndarray, curvature: np.ndarray) -> np.ndarray:
    """The weights v ≥ 0, Σv = 1, of the highest slope·v + ½·v·curvature·v: over every support."""
    curvature = (curvature + curvature.T) / 2

    def height(v: np.ndarray) -> float:
        return float(slope @ v + v @ curvature @ v / 2)

    candidates = list(np.eye(len(slope)))
    for size in range(2, len(slope) + 1):
        for support in map(list, combinations(range(len(slope)), size)):
            ones = np.ones((size, 1))
            system = np.block([[curvature[np.ix_(support, support)], ones], [ones.T, 0]])
            solution = np.linalg.lstsq(system, np.append(-slope[support], 1), rcond=None)[0][:size]
            if np.all(solution >= 0):
                v = np.zeros(len(slope))
                v[support] = solution / solution.sum()
                candidates.append(v)
    return max(candidates, key=height)


@functools.partial(jax.jit, static_argnames="procedures")
def _optimal(procedures: tuple[Procedure, ...], weights: Array, beta: Array) -> Optimum:
    return optimum.solve(mean([duel(each, each) for each in procedures], weights), beta)


@functools.partial(jax.jit, static_argnames="procedures")
def _at_kl(
    procedures: tuple[Procedure, ...], weights: Array, kl: Array
) -> tuple[Array, Optimum, Array]:
    beta, best = optimum.at_kl(mean([duel(each, each) for each in procedures], weights), kl)
    rates = [frontier.curve(best.transformation, each, beta)[1] for each in procedures]
    return beta, best, jnp.stack(rates)
