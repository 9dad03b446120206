"""What a perfect solver would reach with Φ at β, foretold from reference samples alone.

The optimum re-weights the reference by e^{Φ(û)/β}/Z, so its rewards are the reference's own K
samples of a prompt with other weights: no training, no sampling. By the reward that is maximised,
and without ties, the answer hangs on ranks alone: a constant of K, Φ, β and the procedure, which
`frontier.curve` gives for K → ∞. What it says of a model comes from ties and, above all, from a
second judge: how much of the gain survives where selection is by one reward, comparison by another.

Bias (derived). Policy and reference are weighted on the same samples, where a sample against itself
counts one half, as two responses of equal rank would. The i-th smallest stands for the quantile
(i − ½)/K but has a random one, so that a plain estimate is off by c/K + O(1/K²) wherever something
besides rank matters. The jackknife of two halves, 2·W(K) − ½·(W(half) + W(other half)), removes
c/K; it widens a prompt's spread by up to a half, and a prompt's figure may leave [0, 1]. What is
left falls as 1/K²: by the reward, after best-of-4 with e^{10u} at KL 0.5, 0.75 points at K = 64
and 0.2 at K = 128 (`experiments/results/estimators/README.md`).
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from infalign_jax import divergence, evaluation, ranking
from infalign_jax.evaluation import WinRate
from infalign_jax.procedures import Procedure
from infalign_jax.transformations import Transformation

# Under it biases of up to 2.2 points of win rate were measured, from it on none beyond 0.8:
# `experiments/results/estimators/README.md`.
FEWEST_EFFECTIVE = 6.0


class Prediction(NamedTuple):
    """What a perfect solver reaches, and on how many samples that rests.

    >>> Prediction._fields
    ('kl', 'kl_standard_error', 'win_rate', 'judged', 'effective_sample_size', 'warning')
    """

    kl: float  # of the policy from the reference, in nats
    kl_standard_error: float  # over prompts; 0 where no two rewards tie
    win_rate: WinRate  # after the procedures, by the reward that is maximised
    judged: WinRate | None  # selected by that reward, compared by the judge's
    # (Σw)²/Σw² of the policy's weights or the served ones, whichever is less; mean over prompts.
    effective_sample_size: float
    warning: str | None  # why not to trust the numbers, where they rest on too few samples


class _Weights(NamedTuple):
    """Weights of a prompt's samples in ascending order of reward, float64[B, K] each."""

    policy: np.ndarray  # e^{Φ/β}/Z
    served: np.ndarray  # after the policy's procedure
    met: np.ndarray  # what the reference serves


def predict(
    reference_rewards: ArrayLike,
    transformation: Transformation,
    beta: float,
    procedure: Procedure,
    *,
    reference_procedure: Procedure | None = None,
    judge: ArrayLike | None = None,
) -> Prediction:
    """KL and win rates of π ∝ π_ref·e^{Φ(û)/β} from K reference responses to each of B prompts.

    Trust it where `warning` is None: that is from an effective sample size of 6 on. Sharp Φ, large
    KL and best-of-N of large N put the weight on few samples: then K must be the larger.
    Φ and the procedures' laws are evaluated in JAX's default float type, all else in float64.

    Args:
      reference_rewards: float[B, K], by the reward that is maximised and that selects; K at
        least 4.
      transformation: Φ.
      beta: positive.
      procedure: of the policy, and of the reference unless ``reference_procedure`` is given.
      judge: float[B, K], the same responses' rewards by whom compares.

    Raises ValueError where shapes do not fit, a reward is not finite, K is under 4 or β not
    positive.

    >>> from infalign_jax import procedures, transformations
    >>> rng = np.random.default_rng(0)
    >>> rewards = rng.normal(size=(400, 128))
    >>> judge = 0.8 * rewards + 0.6 * rng.normal(size=rewards.shape)
    >>> found = predict(rewards, transformations.log, 1 / 3, procedures.standard(), judge=judge)
    >>> round(found.kl, 3), round(found.win_rate.mean, 3)  # best of 4: .636, .800
    (0.636, 0.8)
    >>> 0.71 < found.judged.mean < 0.74, found.warning
    (True, None)
    """
    rewards = evaluation.checked_rows("reference", reference_rewards)
    if not beta > 0:
        raise ValueError(f"expected a positive beta, got {beta!r}: β weighs the KL penalty")
    if rewards.shape[1] < 4:
        raise ValueError(
            f"expected at least 4 responses a prompt, got {rewards.shape[1]}: "
            "each half of them is counted on its own"
        )
    columns = [rewards] if judge is None else [rewards, evaluation.checked_rows("judge", judge)]
    if columns[-1].shape != rewards.shape:
        raise ValueError(
            f"expected judge's rewards of shape {rewards.shape}, got {columns[-1].shape}: "
            "judge every response"
        )
    laws = procedure, reference_procedure or procedure

    def measured(part: slice) -> tuple[np.ndarray, np.ndarray]:
        kept = [column[:, part] for column in columns]
        return _measure(kept, transformation, beta, laws)

    figures, effective = measured(slice(None))
    halves = measured(slice(0, None, 2))[0], measured(slice(1, None, 2))[0]
    figures = 2 * figures - (halves[0] + halves[1]) / 2
    means = [evaluation.mean_and_standard_error(figure) for figure in figures]
    rates = [WinRate(*mean, figure) for mean, figure in zip(means, figures, strict=True)][1:]
    size = float(np.mean(effective))
    return Prediction(*means[0], rates[0], rates[1] if judge is not None else None, size,
                      _warning(size))  # fmt: skip


def _measure(
    columns: list[np.ndarray],
    transformation: Transformation,
    beta: float,
    laws: tuple[Procedure, Procedure],
) -> tuple[np.ndarray, np.ndarray]:
    """float64[1 + columns, B]: KL, then win rates by each column; effective sizes float64[B]."""
    order = np.argsort(columns[0], axis=1)
    columns = [ranking.taken(column, order) for column in columns]
    weights = _weigh(columns[0], transformation, beta, laws)
    k = order.shape[1]
    positive = weights.policy > 0
    log_ratio = np.log(np.where(positive, k * weights.policy, 1))
    figures = [np.sum(weights.policy * log_ratio, axis=1)]
    figures += [ranking.wins(column, weights.served, column, weights.met) for column in columns]
    largest = np.maximum(np.sum(weights.policy**2, axis=1), np.sum(weights.served**2, axis=1))
    return np.array(figures), 1 / largest


def _weigh(
    ordered: np.ndarray,
    transformation: Transformation,
    beta: float,
    laws: tuple[Procedure, Procedure],
) -> _Weights:
    """Weights of samples in ascending order; equal rewards weigh the same."""
    k = ordered.shape[1]
    middles = np.broadcast_to((np.arange(k) + 0.5) / k, ordered.shape)
    quantiles = ranking.evened(ordered, middles)  # the mean of a run is its mid-rank
    phi = np.asarray(transformation(jnp.asarray(quantiles, jnp.result_type(float))), np.float64)
    tilt = np.exp((phi - phi.max(axis=1, keepdims=True)) / beta)
    policy = tilt / tilt.sum(axis=1, keepdims=True)
    served = np.diff(divergence.law_at(laws[0], ranking.cumulated(policy)), axis=1)
    met = np.diff(divergence.law_at(laws[1], np.arange(k + 1) / k))
    return _Weights(
        policy,
        ranking.evened(ordered, served),
        ranking.evened(ordered, np.broadcast_to(met, ordered.shape)),
    )


def _warning(size: float) -> str | None:
    if size >= FEWEST_EFFECTIVE:
        return None
    return (
        f"expected an effective sample size of at least {FEWEST_EFFECTIVE:g}, got {size:.1f}: "
        "sample more reference responses a prompt, or ask for less KL"
    )
