"""Φ, the transformation of calibrated rewards: what a policy should maximise to win *after* T.

The reward that the solver sees is Φ(û), with û in (0, 1) the quantile of a response under the
reference policy. Φ hangs on the inference-time procedure alone, never on the model or the data
(*InfAlign*, arXiv 2412.19792, section 4). Any elementwise callable will do; the ones of the
paper are here, and the exact one is ``frontier.optimal(procedure, beta).transformation``.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array
Transformation = Callable[[Array], Array]  # quantiles in (0, 1) -> rewards, elementwise

# Beyond this e^t no longer fits into float32.
_LARGEST_EXPONENT = 80.0


def identity(u: Array) -> Array:
    """Φ(u) = u: exactly optimal for the standard win rate, and a strong baseline elsewhere.

    >>> identity(0.25)
    0.25
    """
    return u


def log(u: Array) -> Array:
    """Φ(u) = log u: with β = 1/(N−1) the aligned policy *is* best-of-N of the reference.

    ``u`` must be above 0, as ``calibration.calibrate`` sees to.

    >>> round(float(log(0.5)), 4)
    -0.6931
    """
    return jnp.log(u)


def exponential(t: float) -> Transformation:
    """Φ(u) = sign(t)·e^{tu}: t > 0 for best-of-N, t < 0 for worst-of-N (the paper: ±10 at N = 4).

    Raises ValueError where ``t`` is 0, not finite, or so large that e^t overflows float32.

    >>> [round(float(exponential(t)(0.5)), 3) for t in (2.0, -2.0)]
    [2.718, -0.368]
    """
    if not (math.isfinite(t) and t != 0 and t <= _LARGEST_EXPONENT):
        raise ValueError(
            f"expected a finite exponent other than 0, at most {_LARGEST_EXPONENT:g}, "
            f"got {t!r}: the paper takes 10 for best-of-4 and -10 for worst-of-4"
        )
    return jax.tree_util.Partial(_exponential, float(t))


def _exponential(t: float, u: Array) -> Array:
    return jnp.sign(t) * jnp.exp(t * u)
