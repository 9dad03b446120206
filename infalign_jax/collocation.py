"""A stationary policy to the last digits: Newton's method on panels that follow the solution.

With ℓ = log f, and in τ = log(u/(1−u)),

    dF/dτ = e^ℓ·u(1−u)      dℓ/dτ = slope(F, u)·u(1−u)/β      F(u=0) = 0, F(u=1) = 1

are two equations with one condition at either end (derived: f = e^{R/β}/Z). They are solved at
Gauss points of panels that are narrow wherever the solution turns (worst-of-N turns away from both
ends, an order statistic in the middle), from what ``shooting`` has found.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from infalign_jax import quadrature
from infalign_jax.objective import Objective
from infalign_jax.panels import (
    ORDER,
    PANELS,
    REACH,
    cumulate,
    fitted,
    half,
    halved,
    jacobian,
    nodes,
    read,
    rule,
)
from infalign_jax.transformations import Transformation

Array = jax.Array

_MESHES = 2  # times that the panels are fitted to the solution
_STEPS = 40  # of Newton's method on each, shortened ones counted
_LONGEST = 1.0  # step, in nats of ℓ where f is at least 1, and in F


class Solution(NamedTuple):
    """F and ℓ = log f of a stationary policy on S panels of Q nodes.

    >>> Solution._fields
    ('edges', 'cdf', 'log_density')
    """

    edges: Array  # float[S + 1], τ
    cdf: Array  # float[S, Q + 1], F at a panel's left edge and its nodes
    log_density: Array  # float[S, Q + 1]


def solve(
    objective: Objective, beta: Array, tau: Array, cdf: Array, log_density: Array
) -> Solution:
    """The stationary policy nearest to a path, float[points] each in ascending order of τ.

    β is float[].

    >>> from infalign_jax.objective import duel
    >>> from infalign_jax.procedures import standard
    >>> tau = jnp.linspace(-REACH, REACH, 200)
    >>> objective, cdf = duel(standard(), standard()), jax.nn.sigmoid(tau)
    >>> found = solve(objective, jnp.array(1.0), tau, cdf, 0 * tau)
    >>> round(float(found.log_density[0, 0]), 4)  # f(0) = 1/(e − 1)
    -0.5413
    """

    def refine(_: int, before: Solution) -> Solution:
        tau, *path = (values.reshape(-1) for values in (_places(before.edges), *before[1:]))
        return _newton(objective, beta, _read(fitted(PANELS, tau, *path), tau, *path))

    tau = jnp.clip(tau, -REACH, REACH)
    first = _read(fitted(PANELS, tau, cdf, log_density), tau, cdf, log_density)
    return jax.lax.fori_loop(0, _MESHES, refine, first)


def _places(edges: Array) -> Array:
    """The panels' left edges and nodes τ, float[S, Q + 1]."""
    return jnp.concatenate([edges[:-1, None], nodes(edges)], axis=1)


def _read(edges: Array, tau: Array, cdf: Array, log_density: Array) -> Solution:
    """A path known at some τ, on other panels."""
    paths = jnp.stack([cdf, log_density])
    return Solution(edges, *jax.vmap(lambda y: jnp.interp(_places(edges), tau, y))(paths))


def outcome(solution: Solution, objective: Objective) -> tuple[Array, Array]:
    """KL in nats and win rate, float[] each.

    >>> from infalign_jax.objective import duel
    >>> from infalign_jax.procedures import best_of_n
    >>> edges = jnp.linspace(-REACH, REACH, PANELS + 1)
    >>> cdf = jax.nn.sigmoid(_places(edges))
    >>> as_reference = Solution(edges, cdf, 0 * cdf)
    >>> [round(float(x), 4) for x in outcome(as_reference, duel(best_of_n(4), best_of_n(4)))]
    [0.0, 0.5]
    """
    tau = nodes(solution.edges)
    weights = jnp.asarray(rule().weights, tau.dtype)[None] * half(solution.edges) * jacobian(tau)
    cdf, log_density = solution.cdf[:, 1:], solution.log_density[:, 1:]
    loss = jnp.sum(weights * objective.loss(cdf, jax.nn.sigmoid(tau)))
    return jnp.sum(weights * quadrature.kl_terms(log_density)), 1 - loss


def residual(solution: Solution, objective: Objective, beta: Array) -> Array:
    """max |F − F[R(F)]|, float[], at nodes and by panels that the solution was not found on.

    Infinite where anything is not a number.

    >>> from infalign_jax.objective import duel
    >>> from infalign_jax.procedures import standard
    >>> edges = jnp.linspace(-REACH, REACH, PANELS + 1)
    >>> cdf = jax.nn.sigmoid(_places(edges))
    >>> as_reference = Solution(edges, cdf, 0 * cdf)
    >>> objective, beta = duel(standard(), standard()), jnp.array(1.0)
    >>> round(float(residual(as_reference, objective, beta)), 4)  # max of u − (e^u − 1)/(e − 1)
    0.1233
    """
    edges, cdf = halved(solution.edges, solution.cdf[:, 1:])
    cdf = jnp.clip(cdf, 0, 1)
    tau = nodes(edges)
    scale = half(edges) * jacobian(tau)
    _, again = cumulate(objective.slope(cdf, jax.nn.sigmoid(tau)) * scale / beta)
    ends, running = cumulate(jnp.exp(again - jnp.max(again)) * scale)
    errors = jnp.abs(running / ends[-1] - cdf)
    return jnp.max(jnp.where(jnp.isfinite(errors), errors, jnp.inf))


def transformation(solution: Solution, beta: Array) -> Transformation:
    """Φ = R = β·(ℓ − ℓ(0)): a pytree of arrays, a function of quantiles of any shape.

    >>> edges = jnp.linspace(-REACH, REACH, PANELS + 1)
    >>> flat = Solution(edges, jnp.zeros((PANELS, ORDER + 1)), jnp.zeros((PANELS, ORDER + 1)))
    >>> float(transformation(flat, jnp.array(1.0))(jnp.array(0.3)))
    0.0
    """
    rewards = beta * (solution.log_density[:, 1:] - solution.log_density[0, 0])
    return jax.tree_util.Partial(_reward, solution.edges, rewards)


def _reward(edges: Array, rewards: Array, u: Array) -> Array:
    edges, rewards = edges.astype(u.dtype), rewards.astype(u.dtype)
    u = jnp.clip(u, jnp.finfo(u.dtype).tiny, 1 - jnp.finfo(u.dtype).epsneg)
    return read(edges, rewards, jnp.log(u) - jnp.log1p(-u))


def _newton(objective: Objective, beta: Array, start: Solution) -> Solution:
    """Newton's method, by whose steps no log-density that matters changes by more than _LONGEST.

    It falls by a factor e a step where there is too much, which no defect shows; so a step is not
    refused for what it misses, only kept short (derived).
    """
    close = 1e-6 if beta.dtype == jnp.float64 else 1e-3

    def step(state: tuple[Array, Array, Solution]) -> tuple[Array, Array, Solution]:
        count, _, solution = state
        change = _direction(_defects(objective, beta, solution), solution)
        matters = jnp.exp(jnp.minimum(solution.log_density, 0))
        size = jnp.max(jnp.maximum(jnp.abs(change.cdf), matters * jnp.abs(change.log_density)))
        share = jnp.minimum(_LONGEST / size, 1)
        moved = jax.tree.map(lambda x, dx: x + share * dx, solution, change)
        return count + 1, size, moved

    def goes_on(state: tuple[Array, Array, Solution]) -> Array:
        count, size, _ = state
        return (count < _STEPS) & (size > close)

    return jax.lax.while_loop(goes_on, step, (jnp.int32(0), jnp.full_like(beta, jnp.inf), start))[2]


class _Defects(NamedTuple):
    """By how much a path misses the equations, and how they change with it."""

    cdf: Array  # float[S, Q + 1]: at the nodes, and at the panel's end against the next one
    log_density: Array  # float[S, Q + 1]
    mass: Array  # float[S, Q], e^ℓ du a unit of t: the slope of F
    turn: Array  # float[S, Q], d(slope of ℓ)/dF


def _defects(objective: Objective, beta: Array, solution: Solution) -> _Defects:
    edges, cdf, log_density = solution
    integrals = jnp.concatenate(
        [jnp.asarray(rule().running, beta.dtype), jnp.asarray(rule().weights[None], beta.dtype)]
    )
    tau = nodes(edges)
    u, du = jax.nn.sigmoid(tau), half(edges) * jacobian(tau)
    inside = jnp.clip(cdf[:, 1:], 0, 1)
    slope, turn = jax.jvp(lambda q: objective.slope(q, u), (inside,), (jnp.ones_like(inside),))
    slope, turn = slope * du / beta, turn * du / beta
    mass = jnp.exp(log_density[:, 1:]) * du
    # At u = 1, F is 1 and ℓ is whatever it comes to.
    rise = cdf[:, :1] + mass @ integrals.T
    climb = log_density[:, :1] + slope @ integrals.T
    ends = jnp.append(cdf[1:, 0], 1), jnp.append(log_density[1:, 0], climb[-1, -1])
    return _Defects(
        rise - jnp.concatenate([cdf[:, 1:], ends[0][:, None]], axis=1),
        climb - jnp.concatenate([log_density[:, 1:], ends[1][:, None]], axis=1),
        mass,
        turn,
    )


def _direction(defects: _Defects, solution: Solution) -> Solution:
    """The change, its edges 0, that undoes the defects to first order.

    Within a panel it hangs on that at its left edge alone, so that only the edges are solved for
    together. The last axis below: what the defects call for, and what a unit of δF and of δℓ at
    the left edge adds.
    """
    dtype = defects.mass.dtype
    running = jnp.asarray(rule().running, dtype)[None]
    weights = jnp.asarray(rule().weights, dtype)[None]
    one = jnp.ones_like(defects.mass)
    carry = running * defects.mass[:, None, :]
    turn = running * defects.turn[:, None, :]
    plain = jnp.stack([defects.cdf[:, :-1], one, 0 * one], axis=-1)
    through = jnp.stack([defects.log_density[:, :-1], 0 * one, one], axis=-1)
    cdf = jnp.linalg.solve(
        jnp.eye(ORDER, dtype=dtype)[None] - carry @ turn, plain + carry @ through
    )
    log_density = through + turn @ cdf

    unit = jnp.eye(3, dtype=dtype)[:, None]
    end_cdf = unit[1] + jnp.einsum("sq,sqr->sr", weights * defects.mass, log_density)
    end_log = unit[2] + jnp.einsum("sq,sqr->sr", weights * defects.turn, cdf)
    end_cdf += defects.cdf[:, -1:] * unit[0]
    end_log += defects.log_density[:, -1:] * unit[0]
    edges = _edges(end_cdf, end_log, solution.cdf[0, 0])
    left = jnp.concatenate([jnp.ones_like(edges[:, :1]), edges], axis=1)
    inner = (jnp.einsum("sqr,sr->sq", part, left) for part in (cdf, log_density))
    whole = [jnp.concatenate([edges[:, i : i + 1], part], 1) for i, part in enumerate(inner)]
    return Solution(jnp.zeros_like(solution.edges), *whole)


def _edges(end_cdf: Array, end_log: Array, first: Array) -> Array:
    """δF and δℓ at the panels' left edges, float[S, 2], from what comes out at their right ones.

    2S equations: F is 0 at u = 0; at a panel's right edge F is the next one's or 1, and ℓ, but for
    the last panel's, the next one's.
    """
    here = jnp.eye(PANELS, dtype=first.dtype)
    following = jnp.eye(PANELS, k=1, dtype=first.dtype)

    def rows(ends: Array, side: int) -> Array:
        unit = jnp.eye(2, dtype=first.dtype)[side]
        parts = here[:, :, None] * ends[:, None, 1:] - following[:, :, None] * unit[None, None]
        return parts.reshape(PANELS, 2 * PANELS)

    start = jnp.eye(1, 2 * PANELS, dtype=first.dtype)
    system = jnp.concatenate([start, rows(end_cdf, 0), rows(end_log, 1)[:-1]])
    right = -jnp.concatenate([first[None], end_cdf[:, 0], end_log[:-1, 0]])
    return jnp.linalg.solve(system, right).reshape(PANELS, 2)
