"""Functions on panels: Gauss–Legendre nodes in τ = log(u/(1−u)), between edges put anywhere.

``quadrature`` has one grid for every smooth law; here the edges follow the solution, so that a law
that turns within a thousandth of u is integrated and read as exactly as a smooth one.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

PANELS = 96  # S
ORDER = 12  # Q, nodes a panel
REACH = 40.0  # |τ| up to here, as in ``quadrature``


class Rule(NamedTuple):
    """Gauss–Legendre on [−1, 1], with what integrates and interpolates polynomials there.

    >>> float(rule().weights.sum().round(6))
    2.0
    """

    nodes: np.ndarray  # [Q]
    weights: np.ndarray  # [Q]
    running: np.ndarray  # [Q, Q], values at the nodes -> ∫ from −1 to each node
    coefficients: np.ndarray  # [Q, Q], values at the nodes -> coefficients of Legendre's P_k


@functools.cache
def rule() -> Rule:
    """The panels' rule.

    >>> float((rule().running @ rule().nodes ** 2).round(3)[-1])  # ∫_{−1}^{.98} x² dx
    0.649
    """
    nodes, weights = np.polynomial.legendre.leggauss(ORDER)
    coefficients = np.linalg.inv(np.polynomial.legendre.legvander(nodes, ORDER - 1))
    integrals = np.polynomial.legendre.legint(np.eye(ORDER), lbnd=-1)
    running = np.polynomial.legendre.legval(nodes, integrals @ coefficients).T
    return Rule(nodes, weights, running, coefficients)


def fitted(count: int, tau: Array, cdf: Array, log_density: Array) -> Array:
    """Edges between which a policy changes equally: float[count + 1], from −REACH to REACH.

    ``tau`` is float[points] and ascending; F and ℓ = log f are float[points], or float[k, points]
    for edges that suit k policies. What counts as change are logits of u, of F and of R = β·ℓ, and
    ℓ itself. All rise with u, so that their sum measures it; what is below ``floor`` of the whole,
    and ℓ where f is nothing beside its peak, does not count.

    >>> tau = jnp.linspace(-REACH, REACH, 1000)
    >>> cdf, log_density = jax.nn.sigmoid(tau + 20), 10 * jax.nn.sigmoid(tau + 20)
    >>> edges = fitted(10, tau, cdf, log_density)  # everything happens at τ = −20
    >>> int(jnp.sum(jnp.abs(edges + 20) < 10))
    7
    """
    floor = 1e-10 if tau.dtype == jnp.float64 else 3e-5

    def logit(p: Array, rest: Array) -> Array:
        return jnp.log(p + floor) - jnp.log(rest + floor)

    def change(cdf: Array, log_density: Array) -> Array:
        cdf = jnp.clip(cdf, 0, 1)
        rise = log_density[-1] - log_density[0]
        reward = jnp.clip((log_density - log_density[0]) / jnp.where(rise > 0, rise, 1), 0, 1)
        # F counts most: through g(F) it may turn the slope of R within a unit or two of its logit.
        total = 4 * logit(cdf, 1 - cdf) + 2 * logit(reward, 1 - reward)
        total += (logit(jax.nn.sigmoid(tau), jax.nn.sigmoid(-tau)) + tau) / 2
        return total + jnp.maximum(log_density - jnp.max(log_density), -REACH)

    rows = (values.reshape(-1, tau.size) for values in (cdf, log_density))
    total = jnp.mean(jax.vmap(change)(*rows), axis=0)
    equal = jnp.linspace(0, 1, count + 1, dtype=tau.dtype)
    edges = jnp.interp(total[0] + (total[-1] - total[0]) * equal, total, tau)
    return jnp.sort(edges).at[0].set(-REACH).at[-1].set(REACH)


def read(edges: Array, values: Array, tau: Array) -> Array:
    """The polynomials through ``values``, float[S, Q] at the nodes, at τ of any shape.

    >>> edges = jnp.linspace(-REACH, REACH, PANELS + 1)
    >>> round(float(read(edges, nodes(edges) ** 3, jnp.array(1.5))), 3)
    3.375
    """
    panel = jnp.clip(jnp.searchsorted(edges, tau, side="right") - 1, 0, edges.size - 2)
    low, high = edges[panel], edges[panel + 1]
    t = jnp.clip((2 * tau - low - high) / (high - low), -1, 1)
    coefficients = values @ jnp.asarray(rule().coefficients, values.dtype).T

    def add(k: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        before, now, total = state
        order = k.astype(t.dtype)
        after = ((2 * order - 1) * t * now - (order - 1) * before) / order
        return now, after, total + coefficients[panel, k] * after

    # A loop, for XLA's fusion writes the recurrence out anew for every use.
    state = (jnp.ones_like(t), t, coefficients[panel, 0] + coefficients[panel, 1] * t)
    total = jax.lax.fori_loop(2, ORDER, add, state)[2]
    return total


def cumulate(values: Array) -> tuple[Array, Array]:
    """∫ of ``values``, float[S, Q]: up to the panels' right edges, and to every node.

    >>> edges = jnp.linspace(-REACH, REACH, PANELS + 1)
    >>> ends, _ = cumulate(jacobian(nodes(edges)) * half(edges))
    >>> round(float(ends[-1]), 5)
    1.0
    """
    integrals = jnp.asarray(rule().running, values.dtype)
    whole = jnp.cumsum(values @ jnp.asarray(rule().weights, values.dtype))
    before = jnp.concatenate([jnp.zeros_like(whole[:1]), whole[:-1]])
    return whole, before[:, None] + values @ integrals.T


def halved(edges: Array, values: Array) -> tuple[Array, Array]:
    """Panels cut in two, and the polynomials through ``values``, float[S, Q], at the nodes of both.

    >>> edges = jnp.array([-1.0, 1.0])
    >>> finer, values = halved(edges, nodes(edges) ** 3)
    >>> bool(jnp.allclose(values, nodes(finer) ** 3, atol=1e-6)), values.shape
    (True, (2, 12))
    """
    points = np.concatenate([(rule().nodes - 1) / 2, (rule().nodes + 1) / 2])
    between = np.polynomial.legendre.legvander(points, ORDER - 1) @ rule().coefficients
    middles = (edges[1:] + edges[:-1]) / 2
    finer = jnp.append(jnp.stack([edges[:-1], middles], axis=1).reshape(-1), edges[-1])
    return finer, (values @ jnp.asarray(between.T, values.dtype)).reshape(-1, ORDER)


def nodes(edges: Array) -> Array:
    """The panels' nodes τ, float[S + 1] -> float[S, Q].

    >>> nodes(jnp.array([-1.0, 1.0])).shape
    (1, 12)
    """
    middles = (edges[1:] + edges[:-1]) / 2
    return middles[:, None] + half(edges) * jnp.asarray(rule().nodes, edges.dtype)[None]


def widths(tau: Array) -> Array:
    """Δu between neighbours, float[points] -> float[points − 1], exact near u = 1 too.

    >>> f"{float(widths(jnp.array([20.0, 40.0]))[0]):.4e}"  # e^−20
    '2.0612e-09'
    """
    u, rest = jax.nn.sigmoid(tau), jax.nn.sigmoid(-tau)
    return jnp.where(tau[1:] > 0, rest[:-1] - rest[1:], u[1:] - u[:-1])


def half(edges: Array) -> Array:
    """dτ/dt, half the panels' widths, float[S + 1] -> float[S, 1].

    >>> half(jnp.array([0.0, 1.0, 4.0])).tolist()
    [[0.5], [1.5]]
    """
    return ((edges[1:] - edges[:-1]) / 2)[:, None]


def jacobian(tau: Array) -> Array:
    """du/dτ = u(1−u), elementwise.

    >>> float(jacobian(jnp.array(0.0)))
    0.25
    """
    return jax.nn.sigmoid(tau) * jax.nn.sigmoid(-tau)
