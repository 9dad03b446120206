"""The problem with atoms: rewards of few values, a verifier's 0 and 1 or a rubric's 1 to 5.

``frontier.py`` is for quantiles spread evenly over [0, 1]. Where many responses tie, they share one
quantile, ties are neither won nor lost, and its curves promise too much: with a verifier that the
reference passes half the time, the best policy wins .531 after best-of-4, where it says .873.

Levels ascend; p_i is a level's probability under the reference, q_i under the policy, P and Q their
sums up to and including i. Within a level responses are alike, so a policy is its q. Then (derived)

    KL = Σ q_i log(q_i/p_i)        W = Σ s_i c_i = c_L − Σ_{i<L} d_i G_π(Q_i)

with s_i = G_π(Q_i) − G_π(Q_{i−1}) what the policy serves, T_i = G_ref(P_i) what the reference
serves up to i, c_i = (T_{i−1} + T_i)/2 the chance to beat it, ties counting one half, and
d_i = c_{i+1} − c_i. At the optimum q ∝ p·e^{R/β} with R_i = ∂W/∂q_i, that is R_{i+1} − R_i =
d_i g_π(Q_i). W is concave in Q where G is convex, as for best-of-N: one solution. For worst-of-N
there can be several even with equal procedures, which is not so without atoms (derived).

All numbers are in JAX's default float type, all functions jit and vmap: over β, KL and prompts. A
level that a prompt's reference never reaches may have probability 0.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from infalign_jax import climbing, optimum, quadrature
from infalign_jax.objective import duel
from infalign_jax.procedures import Procedure

Array = jax.Array


class Optimum(NamedTuple):
    """The best policy over levels for a procedure and a β, and how exactly it was found.

    >>> Optimum._fields
    ('policy', 'rewards', 'kl', 'win_rate', 'residual', 'converged')
    """

    policy: Array  # float[L], q
    rewards: Array  # float[L], R, the Φ of each level, with R = 0 at the lowest
    kl: Array  # float[], in nats
    win_rate: Array  # float[], after the procedures, ties counting one half
    residual: Array  # float[], max |Q − Q[R(Q)]|
    converged: Array  # bool[]: residual at most 1e-8 in float64, 1e-5 in float32


def quantiles(probabilities: Array) -> Array:
    """The mid-rank of each level, u_i = P_{i−1} + p_i/2: float[..., L] -> float[..., L].

    What ``calibration.calibrate`` tends to with more and more reference responses.

    Raises ValueError where the probabilities are negative or do not sum to 1.

    >>> quantiles(jnp.array([0.5, 0.25, 0.25])).tolist()
    [0.25, 0.625, 0.875]
    """
    p = _probabilities(probabilities)
    return jnp.cumsum(p, axis=-1) - p / 2


def curve(
    values: Array,
    procedure: Procedure,
    probabilities: Array,
    betas: float | Array,
    reference_procedure: Procedure | None = None,
) -> tuple[Array, Array]:
    """KL and win rate of the policy q ∝ p·e^{values/β}, at each β.

    Args:
      values: float[L], the reward that the solver sees on each level: Φ of ``quantiles``, say.
      procedure: of the policy, and of the reference unless ``reference_procedure`` is given.
      probabilities: float[L], of the levels under the reference.
      betas: positive, of any shape; both results have that shape.

    Raises ValueError where the probabilities are no distribution over two levels or more, a β is
    not positive, or there is not one value a level.

    >>> from infalign_jax import procedures
    >>> passes = jnp.array([0.5, 0.5])
    >>> kl, win_rate = curve(quantiles(passes), procedures.best_of_n(4), passes, jnp.array([0.5]))
    >>> [round(float(x[0]), 4) for x in (kl, win_rate)]
    [0.1109, 0.5286]
    """
    p = _one_prompt(probabilities)
    values = jnp.asarray(values, p.dtype)
    if values.shape != p.shape:
        raise ValueError(
            f"expected values of shape {p.shape}, got {values.shape}: give one a level"
        )
    reference = procedure if reference_procedure is None else reference_procedure
    return _curve(values, procedure, p, optimum.positive("betas", betas), reference)


def optimal(
    procedure: Procedure,
    probabilities: Array,
    beta: float | Array,
    reference_procedure: Procedure | None = None,
) -> Optimum:
    """The policy over levels of highest W − β·KL, ties counting one half.

    Where G_π is convex, as for best-of-N, there is one stationary policy. Elsewhere there can be
    several; all lie on one curve of policies, from 16 points of which the objective is climbed,
    and the highest summit is returned. Whoever uses the result checks ``converged``. It costs
    O(L³): for a hundred levels and more there is ``frontier.optimal``.

    Args:
      procedure: of the policy, and of the reference unless ``reference_procedure`` is given.
      probabilities: float[L] under the reference, levels in ascending order of reward.
      beta: positive.

    Raises ValueError where the probabilities are no distribution over two levels or more, or β is
    not positive.

    >>> from infalign_jax import procedures
    >>> best = optimal(procedures.best_of_n(4), jnp.array([0.8, 0.1, 0.1]), 0.25)
    >>> [round(float(mass), 3) for mass in best.policy], bool(best.converged)
    ([0.501, 0.121, 0.378], True)
    """
    p = _one_prompt(probabilities)
    reference = procedure if reference_procedure is None else reference_procedure
    return _optimal(procedure, p, optimum.positive("beta", beta), reference)


def frontier_win_rate(
    procedure: Procedure,
    probabilities: Array,
    kl: float | Array,
    reference_procedure: Procedure | None = None,
) -> Array:
    """The highest win rate at this KL, float[...] nats -> float[...], on prompts of these levels.

    It is min_β max_π (W − β·KL) + β·kl (derived): the concave envelope over KL, as a policy may
    spend its KL unevenly over prompts of the same kind. From KL = −log p_L on, where all mass is
    on the highest level, it is flat. A KL below 0, which an estimate can be, counts as 0.

    Raises ValueError where the probabilities are no distribution over two levels or more.

    >>> from infalign_jax import procedures
    >>> passes = jnp.array([0.5, 0.5])
    >>> round(float(frontier_win_rate(procedures.best_of_n(4), passes, 0.5)), 3)
    0.531
    """
    p = _one_prompt(probabilities)
    reference = procedure if reference_procedure is None else reference_procedure
    kl = jnp.maximum(jnp.asarray(kl, p.dtype), 0)
    return jax.vmap(lambda target: _envelope(procedure, p, target, reference))(
        kl.reshape(-1)
    ).reshape(kl.shape)


def pass_at_k(success: Array, k: int) -> Array:
    """1 − (1−q)^k, the chance that one of ``k`` responses is right: float[...] -> float[...].

    It is what best-of-k serves of the upper of two levels, so that two policies of success rates q
    and p under best-of-k have W = ½ + ½·(pass@k(q) − pass@k(p)) (derived). To maximise
    pass@k − β·KL is therefore ``optimal`` at β/2.

    >>> round(float(pass_at_k(0.2, 4)), 4)
    0.5904
    >>> from infalign_jax import procedures
    >>> best = optimal(procedures.best_of_n(4), jnp.array([0.8, 0.2]), 0.1)
    >>> gain = pass_at_k(best.policy[1], 4) - pass_at_k(0.2, 4)
    >>> bool(jnp.isclose(best.win_rate, 0.5 + gain / 2))
    True
    """
    return 1 - (1 - success) ** k


def success_rate(probability: float | Array, kl: float | Array) -> Array:
    """The highest success rate q that ``kl`` nats can buy a prompt of success rate p.

    float[...] and float[...] of one shape, or either a scalar -> float[...]: the q in [p, 1] with
    q log(q/p) + (1−q) log((1−q)/(1−p)) = kl, and 1 from kl = −log p on. A p of 0 or 1 stays.

    With two levels every increasing Φ gives logit q = logit p + (Φ(u_2) − Φ(u_1))/β: all of them,
    the optimum included, trace this one curve, and at a prompt's own KL no Φ is better than
    another, whatever the procedure. What a Φ decides is how KL is shared among prompts of
    different p at one β; ``experiments/levels.py`` measures what the usual ones lose by that.

    >>> round(float(success_rate(0.2, 0.5)), 4)
    0.6614
    """
    dtype = jnp.result_type(float)
    known, kl = jnp.broadcast_arrays(jnp.asarray(probability, dtype), jnp.asarray(kl, dtype))
    return _success_rate(known, kl)


@jax.jit
def _success_rate(known: Array, kl: Array) -> Array:
    open_ended = (known > 0) & (known < 1)  # elsewhere no tilt moves anything
    p = jnp.where(open_ended, known, 0.5)

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        q = (low + high) / 2
        right, wrong = jnp.log(q / p), jnp.log((1 - q) / (1 - p))
        short = p * quadrature.kl_terms(right) + (1 - p) * quadrature.kl_terms(wrong) < kl
        return jnp.where(short, q, low), jnp.where(short, high, q)

    steps = jnp.finfo(p.dtype).nmant + 2
    low, high = jax.lax.fori_loop(0, steps, halve, (p, jnp.ones_like(p)))
    return jnp.where(open_ended, (low + high) / 2, known)


@functools.partial(jax.jit, static_argnames=("procedure", "reference"))
def _curve(
    values: Array, procedure: Procedure, p: Array, betas: Array, reference: Procedure
) -> tuple[Array, Array]:
    def outcome(beta: Array) -> tuple[Array, Array]:
        problem = climbing.problem(procedure, p, beta, reference)
        return climbing.outcome(problem, jnp.diff(values) / beta)

    kl, win_rate = jax.vmap(outcome)(betas.reshape(-1))
    return kl.reshape(betas.shape), win_rate.reshape(betas.shape)


@functools.partial(jax.jit, static_argnames=("procedure", "reference"))
def _optimal(procedure: Procedure, p: Array, beta: Array, reference: Procedure) -> Optimum:
    problem = climbing.problem(procedure, p, beta, reference)
    x = climbing.highest(problem)
    policy, _ = climbing.policy(p, x)
    kl, win_rate = climbing.outcome(problem, x)
    residual = climbing.residual(problem, x)
    tolerance = 1e-8 if p.dtype == jnp.float64 else 1e-5
    rewards = beta * climbing.exponents(x)
    return Optimum(policy, rewards, kl, win_rate, residual, residual <= tolerance)


@functools.partial(jax.jit, static_argnames=("procedure", "reference"))
def _envelope(procedure: Procedure, p: Array, kl: Array, reference: Procedure) -> Array:
    def kl_at(beta: Array) -> Array:
        return _optimal(procedure, p, beta, reference).kl

    steepest = duel(procedure, reference).steepest
    beta = optimum.bisect(kl_at, kl, 1e-4 * steepest, 1e4 * steepest)
    best = _optimal(procedure, p, beta, reference)
    highest = p[jnp.argmax(jnp.cumsum(p > 0))]  # the last that is above 0
    return best.win_rate + beta * (jnp.minimum(kl, -jnp.log(highest)) - best.kl)


def _probabilities(probabilities: Array) -> Array:
    """In the default float type, checked where the values are known."""
    if not isinstance(probabilities, jax.core.Tracer):
        known = np.asarray(probabilities, np.float64)
        if not (np.all(known >= 0) and np.allclose(known.sum(axis=-1), 1, rtol=0, atol=1e-4)):
            raise ValueError(
                f"expected probabilities that sum to 1, got sums {known.sum(axis=-1)} and a least "
                f"of {known.min(initial=np.inf)}: divide counts by their sum"
            )
    p = jnp.asarray(probabilities, jnp.result_type(float))
    return p / jnp.sum(p, axis=-1, keepdims=True)


def _one_prompt(probabilities: Array) -> Array:
    p = _probabilities(probabilities)
    if p.ndim != 1 or p.size < 2:
        raise ValueError(
            f"expected the probabilities of two levels or more, got shape {p.shape}: "
            f"give float[L], and take jax.vmap over prompts"
        )
    return p
