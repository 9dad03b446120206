"""The whole problem on [0, 1]: which Φ is best, and what win rate a KL can buy.

With u the quantile of a response under the reference policy, a policy is its density f of u, and
everything hangs on Φ, β and the procedure alone (*InfAlign*, arXiv 2412.19792, section 4):

    f = e^{Φ/β}/Z      KL = ∫ f log f      W = 1 − ∫ G_π(F(u)) dG_ref(u)

The best Φ is the R that solves the coupled equations R(v) = ∫₀^v g_π(F) g_ref du, f = e^{R/β}/Z.
Iterating them oscillates for small β (derived), so they are solved as a boundary problem.

All numbers are in JAX's default float type, all functions jit and vmap (over β and KL).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from infalign_jax import optimum, quadrature
from infalign_jax.objective import duel
from infalign_jax.optimum import Optimum
from infalign_jax.procedures import Procedure
from infalign_jax.transformations import Transformation

Array = jax.Array


def log_partition(transformation: Transformation, beta: float | Array) -> Array:
    """log Z = log ∫₀¹ e^{Φ(u)/β} du, float[]: the same for every prompt, as u is uniform there.

    β·log Z is the natural baseline of a policy gradient: at the optimum it equals
    Φ(u) − β·log(π/π_ref) for every response (derived). Finite however small β is.

    >>> from infalign_jax import transformations
    >>> round(float(log_partition(transformations.log, 1 / 3)), 4)  # Z = ∫ u³ = 1/4
    -1.3863
    """
    u, _ = quadrature.grid()
    return quadrature.log_mean_exp(transformation(u) / optimum.positive("beta", beta))


def density(transformation: Transformation, beta: float | Array, grid: Array) -> Array:
    """f(u) = e^{Φ(u)/β}/Z at the points of ``grid``, of any shape, in (0, 1).

    >>> from infalign_jax import transformations
    >>> density(transformations.log, 1 / 3, jnp.array([0.25, 0.5])).round(4).tolist()  # 4u³
    [0.0625, 0.5]
    """
    scaled = transformation(grid) / optimum.positive("beta", beta).astype(grid.dtype)
    return jnp.exp(scaled - log_partition(transformation, beta).astype(grid.dtype))


def curve(
    transformation: Transformation,
    procedure: Procedure,
    betas: float | Array,
    reference_procedure: Procedure | None = None,
) -> tuple[Array, Array]:
    """KL and win rate that a perfect solver reaches with Φ, at each β.

    ``betas`` is positive and of any shape; both results have that shape. The reference is
    decoded by ``reference_procedure``, the policy's own unless given.

    >>> from infalign_jax import procedures, transformations
    >>> kl, win_rate = curve(transformations.log, procedures.standard(), jnp.array([1 / 3]))
    >>> [round(float(x[0]), 4) for x in (kl, win_rate)]  # best of 4: log 4 − 3/4 and 4/5
    [0.6363, 0.8]
    """
    reference = procedure if reference_procedure is None else reference_procedure
    u, _ = quadrature.grid()
    rewards = transformation(u)
    betas = optimum.positive("betas", betas)
    kl, win_rate = jax.vmap(lambda beta: _outcome(rewards, beta, procedure, reference))(
        betas.reshape(-1)
    )
    return kl.reshape(betas.shape), win_rate.reshape(betas.shape)


def beta_for_kl(transformation: Transformation, kl: float | Array) -> Array:
    """The β at which the optimum for Φ has this KL: float[...] in nats -> float[...].

    KL falls with β, so that bisection on log β finds it, between 1e-6 and 1e6 times the range
    of Φ; a ``kl`` out of that reach gives the end of the range.

    >>> from infalign_jax import transformations
    >>> round(float(beta_for_kl(transformations.log, 0.6362943611)), 4)
    0.3333
    """
    u, _ = quadrature.grid()
    rewards = transformation(u)

    def kl_at(beta: Array) -> Array:
        return quadrature.kl_integral(quadrature.tilt(rewards / beta).log_density)

    reach = 1e6 * (jnp.max(rewards) - jnp.min(rewards))
    return _over(kl, lambda target: optimum.bisect(kl_at, target, reach / 1e12, reach))


def optimal(
    procedure: Procedure,
    beta: float | Array,
    reference_procedure: Procedure | None = None,
) -> Optimum:
    """The policy of highest W − β·KL, when it is decoded by one procedure and met by another's.

    With different procedures several policies can be stationary (worst-of-4 against best-of-4
    at β = 0.3 has three): all are found and the best is returned. Whoever uses the result
    checks ``converged``; in float32, expect it where N/β ≤ 100.

    >>> from infalign_jax import procedures
    >>> best = optimal(procedures.best_of_n(4), 0.25)
    >>> round(float(best.kl), 3), round(float(best.win_rate), 3), bool(best.converged)
    (0.44, 0.859, True)
    """
    reference = procedure if reference_procedure is None else reference_procedure
    return _optimal(procedure, optimum.positive("beta", beta), reference)


def optimal_at_kl(
    procedure: Procedure, kl: float | Array, reference_procedure: Procedure | None = None
) -> tuple[Array, Optimum]:
    """The β, float[], at which ``optimal`` has this KL, float[] in nats; and that optimum.

    Where different procedures make the optimum jump over the KL, one side of the jump.

    >>> from infalign_jax import procedures
    >>> beta, best = optimal_at_kl(procedures.best_of_n(4), 0.44008)
    >>> round(float(beta), 3), round(float(best.win_rate), 3)
    (0.25, 0.859)
    """
    reference = procedure if reference_procedure is None else reference_procedure
    return _optimal_at_kl(procedure, jnp.asarray(kl, jnp.result_type(float)), reference)


def frontier_win_rate(
    procedure: Procedure, kl: float | Array, reference_procedure: Procedure | None = None
) -> Array:
    """The highest win rate that any policy of this KL can have: float[...] nats -> float[...].

    It is min_β max_π (W − β·KL) + β·kl (derived): the concave envelope over KL, as a policy may
    spend its KL unevenly over prompts. It bounds win rates where one reward selects and
    compares, without atoms. A KL below 0, which an estimate can be, counts as 0. Infinite,
    which is no bound, where no optimum near that KL could be found.

    >>> from infalign_jax import procedures
    >>> round(float(frontier_win_rate(procedures.best_of_n(4), 0.5)), 3)
    0.873
    """
    reference = procedure if reference_procedure is None else reference_procedure
    return _frontier_win_rate(procedure, jnp.asarray(kl, jnp.result_type(float)), reference)


@functools.partial(jax.jit, static_argnames=("procedure", "reference"))
def _optimal(procedure: Procedure, beta: Array, reference: Procedure) -> Optimum:
    return optimum.solve(duel(procedure, reference), beta)


@functools.partial(jax.jit, static_argnames=("procedure", "reference"))
def _optimal_at_kl(procedure: Procedure, kl: Array, reference: Procedure) -> tuple[Array, Optimum]:
    return optimum.at_kl(duel(procedure, reference), kl)


@functools.partial(jax.jit, static_argnames=("procedure", "reference"))
def _frontier_win_rate(procedure: Procedure, kl: Array, reference: Procedure) -> Array:
    objective = duel(procedure, reference)
    return _over(jnp.maximum(kl, 0), lambda target: optimum.frontier(objective, target))


def _outcome(
    rewards: Array, beta: Array, procedure: Procedure, reference: Procedure
) -> tuple[Array, Array]:
    """KL and win rate of f = e^{rewards/β}/Z, rewards float[nodes] on the quadrature's nodes."""
    u, weights = quadrature.grid()
    law = quadrature.tilt(rewards / beta)
    loss = jnp.sum(weights * procedure.cdf(law.cdf) * reference.density(u))
    return quadrature.kl_integral(law.log_density), 1 - loss


def _over(values: float | Array, function: Callable[[Array], Array]) -> Array:
    values = jnp.asarray(values, jnp.result_type(float))
    return jax.vmap(function)(values.reshape(-1)).reshape(values.shape)
