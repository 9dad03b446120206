"""KL divergence: of a policy from its reference, over tokens, and of a procedure from sampling.

For y drawn from π, both Σ_t KL(π(·|y_<t) ‖ π_ref(·|y_<t)) and log π(y)/π_ref(y) have expectation
KL(π ‖ π_ref) (derived: the chain rule, prefix by prefix). The first takes the law of each token,
the second one number a sequence. The first varies less, but on policies made against it (measured:
`experiments/results/estimators/README.md`). Either is averaged over prompts, neither ever clipped.
"""

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from infalign_jax import quadrature, ranking
from infalign_jax.procedures import Procedure

Array = jax.Array


def per_token(log_probs: Array, reference_log_probs: Array, mask: Array) -> Array:
    """Σ_t KL(π(·|y_<t) ‖ π_ref(·|y_<t)), exact over the vocabulary at y's prefixes, in nats.

    Each token's Σ_v p·log(p/q) is summed as Σ_v q·(f log f − f + 1), f = p/q, where nothing
    cancels: that is as exact in float32 as the log-probabilities are, however near π is to π_ref.

    Args:
      log_probs, reference_log_probs: float[..., T, V], normalised over V, where −inf is allowed:
        what π never says adds nothing, what π_ref alone never says makes the result infinite.
      mask: bool[..., T], the tokens of the sequence, that of its end included.

    Returns:
      float[...], not negative.

    >>> p, q = jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.25, 0.75]]))
    >>> round(float(per_token(p, q, jnp.array([True]))), 4)  # ½·log 2 + ½·log ⅔
    0.1438
    """
    never, barred = jnp.isneginf(log_probs), jnp.isneginf(reference_log_probs)
    known = ~(never | barred)
    ratio = jnp.where(known, log_probs, 0) - jnp.where(known, reference_log_probs, 0)
    p, q = jnp.exp(log_probs), jnp.exp(reference_log_probs)
    near = q * quadrature.kl_terms(jnp.minimum(ratio, 1))
    each = jnp.where(ratio < 1, near, p * ratio - p + q)  # p/q itself may overflow
    each = jnp.where(never, q, jnp.where(barred, jnp.inf, each))
    return jnp.sum(jnp.where(mask, jnp.sum(each, axis=-1), 0), axis=-1)


def log_ratio(log_probs: ArrayLike, reference_log_probs: ArrayLike) -> np.ndarray:
    """log π(y) − log π_ref(y) of whole sequences, in nats: float[...] -> float64[...].

    Often negative for one sequence, never on average over π: a mean of clipped values is biased.

    >>> log_ratio([-2.0, -3.0], [-2.5, -2.75]).tolist()
    [0.5, -0.25]
    """
    return np.asarray(log_probs, np.float64) - np.asarray(reference_log_probs, np.float64)


def of_procedure(procedure: Procedure) -> Array:
    """KL of what a procedure serves from one sample: ∫₀¹ g log g du, float[], in nats.

    For rewards without ties. Best-of-N, and by symmetry worst-of-N: log N − (N−1)/N.

    >>> from infalign_jax import procedures
    >>> round(float(of_procedure(procedures.best_of_n(4))), 4)  # log 4 − 3/4
    0.6363
    """
    u, weights = quadrature.grid()
    g = procedure.density(u)
    log_g = jnp.log(jnp.where(g > 0, g, 1))
    return jnp.sum(weights * jnp.where(g > 0, quadrature.kl_terms(log_g), 1))


def of_procedure_over_levels(procedure: Procedure, masses: ArrayLike) -> np.ndarray:
    """The same where rewards take L values: Σ_l s_l·log(s_l/π_l), s_l = G(Π_l) − G(Π_{l−1}).

    At most `of_procedure`, and less wherever two responses can tie: among equals a procedure
    chooses as the reference does, so that the KL over levels is that over responses (derived).

    Args:
      procedure: its G is evaluated in JAX's default float type, the rest in float64.
      masses: float[..., L], π_l, the reference's probability of each level, worst first; rows
        sum to 1, 0 is allowed.

    Returns:
      float64[...], in nats.

    >>> from infalign_jax import procedures
    >>> best = procedures.best_of_n(2)
    >>> of_procedure_over_levels(best, [[0.5, 0.5], [0.0, 1.0]]).round(4).tolist()
    [0.1308, 0.0]
    """
    masses = np.asarray(masses, np.float64)
    served = np.diff(law_at(procedure, ranking.cumulated(masses)), axis=-1)
    return np.sum(served * _log_where(served > 0, served, masses), axis=-1)


def of_procedure_from_samples(procedure: Procedure, rewards: ArrayLike) -> np.ndarray:
    """The same with masses estimated from K samples a prompt: float[B, K] -> float64[B], in nats.

    Without ties a constant of K and the procedure, under `of_procedure` by what K levels cannot
    resolve (best-of-4: .003 at K = 16, .0002 at K = 64). With ties each prompt's own.

    >>> from infalign_jax import procedures
    >>> rewards = [[1.0, 2.0, 3.0, 4.0], [7.0, 0.0, 7.0, 0.0]]
    >>> of_procedure_from_samples(procedures.best_of_n(2), rewards).round(4).tolist()
    [0.174, 0.1308]
    """
    ordered = np.sort(np.asarray(rewards, np.float64), axis=1)
    k = ordered.shape[1]
    by_rank = np.diff(law_at(procedure, np.arange(k + 1) / k))
    served = ranking.evened(ordered, np.broadcast_to(by_rank, ordered.shape))
    return np.sum(served * _log_where(served > 0, served, np.full(served.shape, 1 / k)), axis=1)


def law_at(procedure: Procedure, q: np.ndarray) -> np.ndarray:
    """G at cumulative masses, each row ascending: float64[...] -> float64[...], ascending too.

    Evaluated in JAX's default float type.

    >>> from infalign_jax import procedures
    >>> law_at(procedures.best_of_n(2), np.array([0.0, 0.5, 1.0 + 1e-9])).tolist()
    [0.0, 0.25, 1.0]
    """
    edges = jnp.asarray(np.clip(q, 0, 1), jnp.result_type(float))
    # Rounding may make G fall by a last digit.
    return np.maximum.accumulate(np.asarray(procedure.cdf(edges), np.float64), axis=-1)


def _log_where(known: np.ndarray, served: np.ndarray, masses: np.ndarray) -> np.ndarray:
    """log(served/masses) where known, elsewhere 0."""
    return np.log(np.where(known, served, 1) / np.where(known, masses, 1))
