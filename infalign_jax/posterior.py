"""What a rank says about Φ(u): its mean, given how many of K reference rewards lie below.

Calibration knows a response by its rank alone, not by its quantile u. Φ of the mid-rank is one
estimate of Φ(u); the mean of Φ under what the rank leaves open is another. Win rates differ little:
experiments/finite_k.py.
"""

import functools

import jax
import jax.numpy as jnp

from infalign_jax.transformations import Transformation

Array = jax.Array

_NODES = 129  # of the quadrature


def mean(transformation: Transformation, k_ref: int) -> Array:
    """E[Φ(u) | m of K_ref reference rewards lie below], float[K_ref + 1] over m = 0 … K_ref.

    Under the reference policy u is uniform, and m given u binomial: so u given m is
    Beta(m + 1, K_ref − m + 1), and the mean of Φ under it is the estimate of Φ(u) by rank that has
    the least mean square error; its mean over u is that of Φ (derived). A policy that knows ranks
    alone has one density all over a count, so it leaves this law as it is, but for Z, which
    differs with each prompt's reference (derived). ``tabulated`` makes a Φ of the table.

    The integral is a trapezoid sum over log(u/(1−u)), where the posterior is smooth, of one peak,
    and falls exponentially to both sides; the weights sum to one, so that the mean lies within
    what Φ takes on.

    Raises ValueError where ``k_ref`` is no positive integer.

    >>> from infalign_jax import transformations
    >>> [round(float(x), 4) for x in mean(transformations.identity, 3)]  # (m+1)/(K+2)
    [0.2, 0.4, 0.6, 0.8]
    >>> round(float(mean(transformations.log, 2)[0]), 4)  # −(1 + ½ + ⅓)
    -1.8333
    """
    if not isinstance(k_ref, int) or isinstance(k_ref, bool) or k_ref < 1:
        raise ValueError(
            f"expected a positive number of reference rewards, got {k_ref!r}: give calibrate's "
            f"K_ref, or K_ref − 1 where it leaves one out"
        )
    u, weights = _posterior(k_ref)
    return jnp.sum(weights * transformation(u), axis=1)


@functools.partial(jax.jit, static_argnums=0)
def _posterior(k_ref: int) -> tuple[Array, Array]:
    """Nodes in (0, 1) and weights of sum one for each Beta(a, b), float[k_ref + 1, nodes]."""
    a = jnp.arange(1, k_ref + 2, dtype=jnp.result_type(float))[:, None]
    b = a[::-1]
    spread = 9 * jnp.sqrt((a + b) / (a * b))
    # Steps d from the mode of the posterior of log(u/(1−u)), down to e^-40 of its density.
    low, high = 40 / a + spread, 40 / b + spread
    d = (low + high) * jnp.linspace(0, 1, _NODES, dtype=a.dtype)[None, :] - low
    log_density = a * d - (a + b) * jnp.log1p(a / (a + b) * jnp.expm1(d))
    return jax.nn.sigmoid(jnp.log(a / b) + d), jax.nn.softmax(log_density, axis=1)


def tabulated(table: Array) -> Transformation:
    """The transformation of mid-rank quantiles that takes the value ``table[m]`` at count m.

    ``table`` is float[K_ref + 1], such as ``mean`` gives. A quantile û stands for the count
    û·(K_ref + 1) − ½; ties give halves, between whose neighbours it is linear. A pytree: the table
    passes through jit.

    >>> table = jnp.array([0.0, 1.0, 4.0, 9.0])  # the square of the count of 3
    >>> tabulated(table)(jnp.array([0.125, 0.375, 0.75])).tolist()  # counts 0, 1 and, by a tie, 2.5
    [0.0, 1.0, 6.5]
    """
    return jax.tree_util.Partial(_look_up, table)


def _look_up(table: Array, u: Array) -> Array:
    last = table.size - 1
    place = jnp.clip(u * (last + 1) - 0.5, 0, last)
    low = jnp.minimum(place.astype(jnp.int32), last - 1)
    share = place - low.astype(place.dtype)
    table = table.astype(place.dtype)
    return table[low] * (1 - share) + table[low + 1] * share
