"""Integrals over quantiles in (0, 1), resolved at both ends, where aligned policies put their mass.

In τ = log(u/(1−u)) everything of interest has a scale near one, however close to an end it lies:
Gauss–Legendre panels over τ, with du = u(1−u)dτ.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

_PANELS = 64
_ORDER = 16  # nodes a panel
_REACH = 40.0  # |τ| up to here: e^-40 of the mass is left out on either side


class Law(NamedTuple):
    """A policy's law of quantiles at the quadrature's nodes.

    >>> Law._fields
    ('log_density', 'cdf')
    """

    log_density: Array  # float[nodes], log f
    cdf: Array  # float[nodes], F


class Grid(NamedTuple):
    """Nodes u in (0, 1), ascending, and weights with Σ weights·values = ∫₀¹.

    >>> u, weights = grid()
    >>> round(float(jnp.sum(weights * u**2)), 5)
    0.33333
    """

    u: Array  # float[nodes]
    weights: Array  # float[nodes]


def grid() -> Grid:
    """The nodes and weights, in JAX's default float type.

    >>> grid().u.shape
    (1024,)
    """
    dtype = jnp.result_type(float)
    tau, weights, _ = _panels()
    u = jax.nn.sigmoid(jnp.asarray(tau, dtype))
    return Grid(u, jnp.asarray(weights, dtype))


def cumulate(values: Array) -> Array:
    """∫₀^u of ``values``, float[nodes] -> float[nodes], as exact as the quadrature itself.

    >>> u, _ = grid()
    >>> bool(jnp.allclose(cumulate(2 * u), u**2, atol=1e-6))
    True
    """
    tau, weights, running = _panels()
    slopes = np.reshape(_sigmoid(tau) * _sigmoid(-tau), (_PANELS, _ORDER))
    masses = values.reshape(_PANELS, _ORDER)
    inside = (masses * jnp.asarray(slopes, values.dtype)) @ jnp.asarray(running, values.dtype)
    whole = jnp.sum(masses * jnp.asarray(weights.reshape(_PANELS, _ORDER), values.dtype), axis=1)
    before = jnp.cumsum(whole) - whole
    return (inside + before[:, None]).reshape(-1)


def tilt(exponents: Array) -> Law:
    """The law f = e^exponents/Z, float[nodes] at the nodes.

    >>> u, _ = grid()
    >>> bool(jnp.allclose(tilt(3 * jnp.log(u)).cdf, u**4, atol=1e-6))
    True
    """
    log_density = exponents - log_mean_exp(exponents)
    return Law(log_density, cumulate(jnp.exp(log_density)))


def log_mean_exp(values: Array) -> Array:
    """log ∫₀¹ e^values du, float[nodes] -> float[], finite wherever the values are.

    >>> round(float(log_mean_exp(0 * grid().u + 3)), 4)
    3.0
    """
    largest = jnp.max(values)
    _, weights = grid()
    return largest + jnp.log(jnp.sum(weights * jnp.exp(values - largest)))


def kl_integral(log_density: Array) -> Array:
    """∫₀¹ f log f du = ∫₀¹ (f log f − f + 1) du, float[nodes] -> float[], for f of mass one.

    >>> bool(kl_integral(0 * grid().u) == 0)
    True
    """
    _, weights = grid()
    return jnp.sum(weights * kl_terms(log_density))


def kl_terms(log_ratio: Array) -> Array:
    """f log f − f + 1 of log f, elementwise: its mean under the reference is the KL.

    No negative parts cancel in that mean, so that it survives float32 where f is nearly 1
    (large β); near log f = 0 the series x²·Σ_{k≥2} (k−1)/k!·x^{k−2} is summed.

    >>> round(float(kl_terms(jnp.log(2.0))), 4)  # 2 log 2 − 1
    0.3863
    """
    x = log_ratio
    small = jnp.where(jnp.abs(x) < 0.3, x, jnp.zeros_like(x))
    series = jnp.zeros_like(x)
    factorial = np.cumprod(np.arange(1.0, 13.0))
    for k in range(12, 1, -1):
        series = series * small + (k - 1) / float(factorial[k - 1])
    # f log f is 0, not 0·∞, where f underflows.
    plain = jnp.where(x > -80, x, 0) * jnp.exp(x) - jnp.expm1(x)
    return jnp.where(jnp.abs(x) < 0.3, series * small**2, plain)


@functools.cache
def _panels() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nodes τ[nodes], weights in u[nodes], and the matrix that integrates within a panel."""
    nodes, weights = np.polynomial.legendre.leggauss(_ORDER)
    half = _REACH / _PANELS
    centres = -_REACH + half * (2 * np.arange(_PANELS) + 1)
    tau = (centres[:, None] + half * nodes).reshape(-1)
    du = (half * np.tile(weights, _PANELS)) * _sigmoid(tau) * _sigmoid(-tau)
    # running[j, i] = ∫_{-1}^{x_i} of the Lagrange polynomial that is 1 at x_j.
    lagrange = np.linalg.inv(np.vander(nodes, increasing=True))
    powers = np.arange(1, _ORDER + 1)
    moments = (nodes[:, None] ** powers - (-1.0) ** powers) / powers
    return tau, du, half * (moments @ lagrange).T


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))
