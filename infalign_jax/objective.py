"""What a policy is paid for: a win rate after a procedure, or a mean of several.

Everything that the solvers of ``frontier`` and ``shared`` know of an objective is three things,
with F the policy's CDF of quantiles u under the reference:

    W = 1 − ∫₀¹ loss(F(u), u) du      R′(u) = slope(F(u), u)      slope ≲ steepest

and slope = ∂loss/∂F: the more of the policy lies below u, the more it loses there (derived from
*InfAlign*, arXiv 2412.19792, section 4, by varying F).
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from infalign_jax.procedures import Procedure

Array = jax.Array


class Objective(NamedTuple):
    """A win rate as a function of F.

    >>> Objective._fields
    ('slope', 'loss', 'steepest')
    """

    slope: Callable[[Array, Array], Array]  # R′ of F and u, elementwise
    loss: Callable[[Array, Array], Array]  # what is lost of W at u, elementwise
    steepest: Array  # float[], about an upper bound of R′


def duel(procedure: Procedure, reference: Procedure) -> Objective:
    """The win rate of a policy under ``procedure`` against π_ref under ``reference``.

    >>> from infalign_jax import procedures
    >>> objective = duel(procedures.best_of_n(2), procedures.standard())
    >>> objective.slope(0.5, 0.1), float(objective.steepest)  # 2F
    (1.0, 2.0)
    """
    # Peaks are about as wide as they are far from an end, or wider than 1/√N.
    q = jax.nn.sigmoid(jnp.linspace(-20, 20, 2049, dtype=jnp.result_type(float)))
    q = q.at[0].set(0).at[-1].set(1)
    return Objective(
        slope=lambda cdf, u: procedure.density(cdf) * reference.density(u),
        loss=lambda cdf, u: procedure.cdf(cdf) * reference.density(u),
        steepest=jnp.max(procedure.density(q)) * jnp.max(reference.density(q)),
    )


def mean(objectives: Sequence[Objective], weights: Array) -> Objective:
    """Σ wᵢWᵢ, with weights float[objectives] that sum to 1.

    >>> from infalign_jax import procedures
    >>> both = [duel(one, one) for one in (procedures.standard(), procedures.best_of_n(2))]
    >>> half = jnp.array(0.5)
    >>> float(mean(both, jnp.array([0.5, 0.5])).slope(half, half))  # ½·1 + ½·4F·u
    1.0
    """

    def total(values: list[Array]) -> Array:
        parts = [weights[i].astype(value.dtype) * value for i, value in enumerate(values)]
        return functools.reduce(jnp.add, parts)

    return Objective(
        slope=lambda cdf, u: total([one.slope(cdf, u) for one in objectives]),
        loss=lambda cdf, u: total([one.loss(cdf, u) for one in objectives]),
        steepest=total([one.steepest for one in objectives]),
    )
