"""The best policy for an objective: by β, by KL, and the highest win rate that a KL can buy.

For a β, ``shooting`` finds every stationary policy, ``collocation`` makes each exact, and that of
highest W − β·KL is the optimum. Its KL falls as β grows, and may jump where two are equally good:
over the jump the frontier is a mixture of the two over prompts (derived).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from infalign_jax import collocation, quadrature, shooting
from infalign_jax.objective import Objective
from infalign_jax.panels import widths
from infalign_jax.transformations import Transformation

Array = jax.Array

_TRIES = 8  # optima on the way from a rough β to the one of a KL
_STRIDE = 0.03  # of log β, to the other side of that KL


class Optimum(NamedTuple):
    """The best policy for a procedure and a β, and how exactly it was found.

    >>> Optimum._fields
    ('transformation', 'kl', 'win_rate', 'residual', 'converged')
    """

    transformation: Transformation  # Φ = R, with R(0) = 0; a pytree of arrays: passes through jit
    kl: Array  # float[], in nats
    win_rate: Array  # float[], after the procedures
    residual: Array  # float[], max |F − F[R(F)]|, checked by a quadrature of its own
    converged: Array  # bool[]: residual at most 1e-8 in float64, 1e-5 in float32


def solve(objective: Objective, beta: Array) -> Optimum:
    """The policy of highest W − β·KL; β is float[].

    >>> from infalign_jax.objective import duel
    >>> from infalign_jax.procedures import standard
    >>> best = jax.jit(lambda beta: solve(duel(standard(), standard()), beta))(jnp.array(1.0))
    >>> round(float(best.win_rate), 4)  # of f = e^u/(e − 1): 1/(e − 1)
    0.582
    """
    paths = shooting.solve(objective, beta)

    def polish(i: Array) -> Optimum:
        found = collocation.solve(objective, beta, paths.tau, paths.cdf[i], paths.log_density[i])
        residual = collocation.residual(found, objective, beta)
        return Optimum(
            collocation.transformation(found, beta),
            *collocation.outcome(found, objective),
            residual,
            residual <= (1e-8 if residual.dtype == jnp.float64 else 1e-5),
        )

    def better(i: Array, best: Optimum) -> Optimum:
        found = polish(i)
        gains = [one.win_rate - beta * one.kl for one in (found, best)]
        ahead = (i == 0) | (gains[0] > gains[1])
        return jax.tree.map(lambda new, old: jnp.where(ahead, new, old), found, best)

    return jax.lax.fori_loop(0, jnp.maximum(paths.found, 1), better, _blank(polish, jnp.int32(0)))


def _blank(function: Callable[..., Any], *arguments: Any) -> Any:
    """Zeros in the shape of what the function gives, for a loop to start from."""
    shapes = jax.eval_shape(function, *arguments)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def _rough(objective: Objective, beta: Array) -> Array:
    """The KL of the best policy, float[], to some three digits."""
    paths = shooting.solve(objective, beta)
    u = jnp.broadcast_to(jax.nn.sigmoid(paths.tau), paths.cdf.shape)

    def integral(values: Array, steps: Array) -> Array:
        return jnp.sum((values[:, 1:] + values[:, :-1]) / 2 * steps, axis=1)

    du = widths(paths.tau)[None]
    terms, ratio = quadrature.kl_terms(paths.log_density), jnp.exp(-paths.log_density)
    # Over u where there is little of the policy, over F where there is much: smooth on either.
    much = paths.log_density > 0
    kl = integral(jnp.where(much, 0, terms), du)
    kl += integral(jnp.where(much, terms * ratio, 0), jnp.diff(paths.cdf, axis=1))
    gain = 1 - integral(objective.loss(paths.cdf, u), du) - beta * kl
    # What is not a number is no solution, and a maximum passes over it.
    return kl[jnp.argmax(jnp.where(jnp.isfinite(gain), gain, -jnp.inf))]


def at_kl(objective: Objective, kl: Array) -> tuple[Array, Optimum]:
    """The β at which the optimum has this KL, and that optimum; KL is float[], in nats.

    Where the optimum jumps over the KL, the nearer side of the jump.

    >>> from infalign_jax.objective import duel
    >>> from infalign_jax.procedures import standard
    >>> found = jax.jit(lambda kl: at_kl(duel(standard(), standard()), kl))
    >>> beta, best = found(jnp.array(0.04065))
    >>> round(float(beta), 2)
    1.0
    """
    more, less = _bracket(objective, kl)
    nearer = less.beta == 0
    nearer |= (more.beta > 0) & (jnp.abs(more.best.kl - kl) < jnp.abs(less.best.kl - kl))
    return jax.tree.map(lambda one, other: jnp.where(nearer, one, other), more, less)


def frontier(objective: Objective, kl: Array) -> Array:
    """The highest win rate of any policy of this KL, float[] in nats; infinite, no bound, where
    no optimum near it was found.

    It is min_β max_π (W − β·KL) + β·kl: the tangent of the optima that lie next to this KL.

    >>> from infalign_jax.objective import duel
    >>> from infalign_jax.procedures import standard
    >>> highest = jax.jit(lambda kl: frontier(duel(standard(), standard()), kl))
    >>> round(float(highest(jnp.array(0.04065))), 4)  # 1/(e − 1), at β = 1
    0.582
    """

    def tangent(side: _Side) -> Array:
        value = side.best.win_rate + side.beta * (kl - side.best.kl)
        return jnp.where((side.beta > 0) & (side.best.residual < 1e-3), value, jnp.inf)

    return jnp.minimum(*map(tangent, _bracket(objective, kl)))


class _Side(NamedTuple):
    """An optimum on one side of a KL."""

    beta: Array  # float[], 0 where there is none yet
    best: Optimum


def _bracket(objective: Objective, kl: Array) -> tuple[_Side, _Side]:
    """Optima of more KL than this and of no more, closer than matters to their tangents there.

    Their β is interpolated, KL being smooth in it, and in turn taken from where the tangents meet,
    which over a jump is the β of the jump.
    """
    kl = jnp.maximum(kl, jnp.finfo(kl.dtype).tiny)
    ends = 1e-12 * objective.steepest, 1e4 * objective.steepest
    start = jnp.log(bisect(lambda beta: _rough(objective, beta), kl, *ends, 18))

    def narrow(i: Array, sides: tuple[_Side, _Side]) -> tuple[_Side, _Side]:
        (low, more), (high, less) = sides
        between = jnp.log(more.kl / kl) / jnp.log(more.kl / less.kl) * jnp.log(high / low)
        meeting = (more.win_rate - less.win_rate) / (more.kl - less.kl)
        x = jnp.where(i % 2 == 0, jnp.log(low) + between, jnp.log(meeting))
        x = jnp.clip(x, jnp.log(low), jnp.log(high))
        x = jnp.where(jnp.isfinite(x), x, jnp.log(high))
        stride = _STRIDE * 2.0**i
        x = jnp.where(low == 0, jnp.log(high) - stride, x)
        x = jnp.where(high == 0, jnp.log(low) + stride, x)
        beta = jnp.clip(jnp.exp(jnp.where(i == 0, start, x)), *ends)
        found = _Side(beta, solve(objective, beta))
        over = found.best.kl > kl

        def kept(replace: Array, old: _Side) -> _Side:
            return jax.tree.map(lambda new, old: jnp.where(replace, new, old), found, old)

        return kept(over, sides[0]), kept(~over, sides[1])

    blank = _blank(lambda: _Side(start, solve(objective, start)))
    return jax.lax.fori_loop(0, _TRIES, narrow, (blank, blank))


def bisect(
    falling: Callable[[Array], Array],
    target: Array,
    low: Array,
    high: Array,
    steps: int | None = None,
) -> Array:
    """The x in [low, high] with falling(x) = target: float[] each, log x to 2^-steps of its range.

    To the last digits of log x, but for a few, unless ``steps`` are given.

    >>> round(float(bisect(lambda x: 1 / x, jnp.array(4.0), jnp.array(0.1), jnp.array(1.0))), 4)
    0.25
    """
    if steps is None:
        steps = 42 if target.dtype == jnp.float64 else 26

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        below, above = bounds
        middle = (below + above) / 2
        far = falling(jnp.exp(middle)) > target
        return jnp.where(far, middle, below), jnp.where(far, above, middle)

    below, above = jax.lax.fori_loop(0, steps, halve, (jnp.log(low), jnp.log(high)))
    return jnp.exp((below + above) / 2)


def positive(name: str, value: float | Array) -> Array:
    """A β, or several, in JAX's default float type.

    Raises ValueError where it is a number that is not positive; an array's values may be unknown.

    >>> positive("beta", 0.0)
    Traceback (most recent call last):
    ValueError: expected a positive beta, got 0.0: β weighs the KL penalty
    """
    if isinstance(value, int | float) and not value > 0:
        raise ValueError(f"expected a positive {name}, got {value!r}: β weighs the KL penalty")
    return jnp.asarray(value, jnp.result_type(float))
