"""The maximisation behind ``levels.optimal``: many starts, then Newton's method.

In the notation of ``levels.py`` a policy on L levels is unfolded from the L − 1 rises of its
reward, x_i = (R_{i+1} − R_i)/β: q ∝ p·e^{R/β}, so that any x is a policy. It is stationary where

    x_i = d_i·g_π(Q_i)/β

and ∂Q_i/∂x_j = −C_ij with C_ij = min(Q_i, Q_j)·(1 − max(Q_i, Q_j)), the covariance of a Brownian
bridge (derived). So Newton's step solves (I + D·C)·Δ = d·g/β − x with D = diag(d·g′/β). With the
negative entries of D left out it points uphill from everywhere; with D = 0 it is the iteration
q ∝ p·e^{R(q)/β}, which by itself climbs where G is concave and oscillates where it is convex.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from infalign_jax import quadrature
from infalign_jax.objective import duel
from infalign_jax.procedures import Procedure, standard

Array = jax.Array

_STARTS = 16
_ASCENTS = 40
_HALVINGS = 12  # the shortest step tried is 2^-11 of Newton's
_POLISHES = 6


class Problem(NamedTuple):
    """W − β·KL on the levels of one prompt.

    >>> Problem._fields
    ('procedure', 'probabilities', 'beta', 'values', 'gaps', 'steepest')
    """

    procedure: Procedure  # of the policy
    probabilities: Array  # float[L], p
    beta: Array  # float[]
    values: Array  # float[L], c: the win rate of a response of each level when it is served
    gaps: Array  # float[L − 1], d: by how much one level's value exceeds the last's
    steepest: Array  # float[], about the maximum of g_π


def problem(procedure: Procedure, probabilities: Array, beta: Array, ref: Procedure) -> Problem:
    """The problem of a policy decoded by ``procedure``, met by a reference decoded by ``ref``.

    Probabilities are float[L], β is float[].

    >>> from infalign_jax import procedures
    >>> one = procedures.standard()
    >>> problem(one, jnp.array([0.5, 0.5]), jnp.array(1.0), one).values.tolist()
    [0.25, 0.75]
    """
    up_to = ref.cdf(jnp.minimum(jnp.cumsum(probabilities), 1))
    values = (jnp.concatenate([jnp.zeros_like(up_to[:1]), up_to[:-1]]) + up_to) / 2
    steepest = duel(procedure, standard()).steepest
    return Problem(procedure, probabilities, beta, values, jnp.diff(values), steepest)


def exponents(x: Array) -> Array:
    """R/β with R = 0 at the lowest level, from its rises: float[L − 1] -> float[L].

    >>> exponents(jnp.array([1.0, 2.0])).tolist()
    [0.0, 1.0, 3.0]
    """
    return jnp.concatenate([jnp.zeros_like(x[:1]), jnp.cumsum(x)])


def policy(p: Array, x: Array) -> tuple[Array, Array]:
    """q and log(q/p), both float[L], of probabilities float[L] and rises float[L − 1].

    On a level of probability 0 the second is set to 0.

    >>> q, _ = policy(jnp.array([0.5, 0.25, 0.25]), jnp.log(jnp.array([2.0, 3.0])))
    >>> [round(float(mass), 3) for mass in q]  # weights 1 : 2 : 6 on 2 : 1 : 1
    [0.2, 0.2, 0.6]
    """
    tilt = exponents(x)
    reached = p > 0
    tilt = jnp.where(reached, tilt - jnp.max(jnp.where(reached, tilt, -jnp.inf)), 0)
    log_ratio = jnp.where(reached, tilt - jnp.log(jnp.sum(p * jnp.exp(tilt))), 0)
    return p * jnp.exp(log_ratio), log_ratio


def outcome(this: Problem, x: Array) -> tuple[Array, Array]:
    """KL and win rate, both float[], of the policy with rises x, float[L − 1].

    >>> from infalign_jax import procedures
    >>> one, p = procedures.standard(), jnp.array([0.5, 0.5])
    >>> kl, win_rate = outcome(problem(one, p, jnp.array(1.0), one), jnp.log(jnp.array([3.0])))
    >>> round(float(kl), 4), round(float(win_rate), 4)  # q = (1/4, 3/4)
    (0.1308, 0.625)
    """
    _, log_ratio = policy(this.probabilities, x)
    kl = jnp.sum(this.probabilities * quadrature.kl_terms(log_ratio))
    losses = jnp.sum(this.gaps * this.procedure.cdf(_cumulated(this, x)))
    return kl, this.values[-1] - losses


def residual(this: Problem, x: Array) -> Array:
    """max |Q − Q[R(Q)]|, float[]: 0 where the policy with rises x, float[L − 1], is stationary.

    >>> from infalign_jax import procedures
    >>> one, p = procedures.standard(), jnp.array([0.5, 0.5])
    >>> float(residual(problem(one, p, jnp.array(1.0), one), jnp.array([0.5])))
    0.0
    """
    cumulated = _cumulated(this, x)
    return jnp.max(jnp.abs(cumulated - _cumulated(this, _rises(this, cumulated))))


def highest(this: Problem) -> Array:
    """The rises x, float[L − 1], of the highest summit that is found.

    >>> from infalign_jax import procedures
    >>> four, p = procedures.best_of_n(4), jnp.array([0.8, 0.2])
    >>> x = highest(problem(four, p, jnp.array(0.1), four))
    >>> round(float(policy(p, x)[0][1]), 4)
    0.5649
    """

    def climb(x: Array) -> Array:
        x = jax.lax.fori_loop(0, _ASCENTS, lambda _, x: _ascend(this, x), x)
        return jax.lax.fori_loop(0, _POLISHES, lambda _, x: _polish(this, x), x)

    summits = jax.vmap(climb)(_shots(this))
    return summits[jnp.argmax(jax.vmap(lambda x: _objective(this, x))(summits))]


def _cumulated(this: Problem, x: Array) -> Array:
    """Q below the highest level, float[L − 1]."""
    return jnp.clip(jnp.cumsum(policy(this.probabilities, x)[0])[:-1], 0, 1)


def _rises(this: Problem, cumulated: Array) -> Array:
    return this.gaps * this.procedure.density(cumulated) / this.beta


def _objective(this: Problem, x: Array) -> Array:
    kl, win_rate = outcome(this, x)
    return win_rate - this.beta * kl


def _shots(this: Problem) -> Array:
    """Rises, float[starts, L − 1], along the curve on which all stationary policies lie.

    Given a = log(q_L/p_L), the levels follow one after another from the highest: each mass gives
    the rise above it, and that the next mass. Stationary are those whose masses sum to 1.
    0 ≤ a ≤ log(q_L/p_L) of the steepest rises (derived).
    """
    p, gaps = this.probabilities, this.gaps

    def shoot(a: Array) -> Array:
        def step(state: tuple[Array, Array], level: tuple[Array, Array]):  # type: ignore[no-untyped-def]
            above, log_ratio = state
            mass, gap = level
            above = jnp.minimum(above + mass * jnp.exp(log_ratio), 1)
            rise = gap * this.procedure.density(1 - above) / this.beta
            # Above the highest level with mass, a rise moves nothing.
            return (above, log_ratio - jnp.where(above > 0, rise, 0)), rise

        start = (jnp.zeros_like(a), a)
        return jax.lax.scan(step, start, (p[1:], gaps), reverse=True)[1]

    largest = jnp.max(policy(p, gaps * this.steepest / this.beta)[1])
    return jax.vmap(shoot)(largest * jnp.linspace(0, 1, _STARTS, dtype=p.dtype))


def _newton(this: Problem, x: Array, uphill: bool) -> Array:
    """Newton's step from x, float[L − 1]; or the one that points uphill from everywhere."""
    cumulated = _cumulated(this, x)
    # By differences: a density need not have a derivative that is finite at 0 and 1.
    width = float(jnp.finfo(x.dtype).eps) ** (1 / 3)
    below, above = jnp.clip(cumulated - width, 0, 1), jnp.clip(cumulated + width, 0, 1)
    bend = (_rises(this, above) - _rises(this, below)) / (above - below)
    bend = jnp.maximum(bend, 0) if uphill else bend
    row, column = cumulated[:, None], cumulated[None, :]
    bridge = jnp.minimum(row, column) * (1 - jnp.maximum(row, column))
    matrix = jnp.eye(x.size, dtype=x.dtype) + bend[:, None] * bridge
    return jnp.linalg.solve(matrix, _rises(this, cumulated) - x)


def _within(this: Problem, x: Array) -> Array:
    """No stationary rise is outside; twice, as ``steepest`` is a maximum over a grid."""
    return jnp.clip(x, 0, 2 * this.gaps * this.steepest / this.beta)


def _ascend(this: Problem, x: Array) -> Array:
    halved = 0.5 ** jnp.arange(_HALVINGS, dtype=x.dtype)
    lengths = jnp.concatenate([jnp.zeros_like(halved[:1]), halved])
    step = _newton(this, x, uphill=True)
    tried = jax.vmap(lambda length: _within(this, x + length * step))(lengths)
    return tried[jnp.argmax(jax.vmap(lambda x: _objective(this, x))(tried))]


def _polish(this: Problem, x: Array) -> Array:
    """Newton's step where it comes nearer: the objective is too flat to see the last digits."""
    both = jnp.stack([x, _within(this, x + _newton(this, x, uphill=False))])
    return both[jnp.argmin(jax.vmap(lambda x: residual(this, x))(both))]
