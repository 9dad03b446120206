"""Win rates after an inference-time procedure, without bias, from samples in hand.

On the host, in NumPy's float64 whatever JAX's precision: the arrays are small, done once, and
XLA's sort on a CPU is some 40 times slower.

Intervals are over prompts, which are independent, and by Student's t: with B prompts the standard
error is itself an estimate, and ±1.96 of it covers too little (90 % rather than 95 % of the time
at B = 8). Student's t held 93 to 97 % from 32 prompts on for win rates up to .91, from 64 at .963;
nearer to 1, where most prompts are won for certain, no such interval does
(`experiments/results/estimators/README.md`).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from infalign_jax import ranking
from infalign_jax.procedures import Procedure


class WinRate(NamedTuple):
    """A win rate and its standard error; `confidence_interval` makes an interval of them.

    >>> WinRate(0.5, 0.1, np.array([0.4, 0.6])).mean
    0.5
    """

    mean: float
    standard_error: float  # over prompts; nan for a single prompt
    per_prompt: np.ndarray  # float64[B]


def win_rate(
    policy_rewards: ArrayLike,
    reference_rewards: ArrayLike,
    procedure: Procedure,
    *,
    reference_procedure: Procedure | None = None,
    policy_judge: ArrayLike | None = None,
    reference_judge: ArrayLike | None = None,
) -> WinRate:
    """How often the policy's served response beats the reference's, equal ones counting one half.

    Each side's procedure selects by the rewards, over random subsets drawn without replacement,
    samples of equal reward sharing their probability: so W = Σ_ij p_i·q_j·w(i, j) is unbiased for
    the true win rate at any n, m of at least the procedure's N (derived: it is a U-statistic).
    The judge's rewards then compare what was selected. O(n log n) a prompt.

    Args:
      policy_rewards: float[B, n], by the reward that selects.
      reference_rewards: float[B, m], likewise; m may be larger than n.
      procedure: of the policy, and of the reference unless ``reference_procedure`` is given.
      policy_judge: float[B, n], by the reward that compares; the selecting one unless given.
      reference_judge: float[B, m], given together with ``policy_judge``.

    Raises ValueError where shapes do not fit, a reward is not finite, one judge comes without
    the other, or there are fewer samples than the procedure takes.

    >>> from infalign_jax import procedures
    >>> result = win_rate([[1.0, 4.0]], [[2.0, 3.0]], procedures.standard())
    >>> result.mean
    0.5
    >>> win_rate([[1.0, 4.0]], [[2.0, 3.0]], procedures.best_of_n(2)).mean
    1.0
    """
    rewards = checked_rows("policy", policy_rewards)
    references = checked_rows("reference", reference_rewards)
    if len(rewards) != len(references):
        raise ValueError(
            f"expected as many prompts on both sides, got {len(rewards)} of the policy and "
            f"{len(references)} of the reference: give one row a prompt"
        )
    if (policy_judge is None) != (reference_judge is None):
        raise ValueError(
            "expected a judge's rewards of both sides or of neither, got one: "
            "give policy_judge and reference_judge together"
        )
    judges = None
    if policy_judge is not None and reference_judge is not None:
        judges = (
            checked_rows("policy_judge", policy_judge),
            checked_rows("reference_judge", reference_judge),
        )
        if judges[0].shape != rewards.shape or judges[1].shape != references.shape:
            raise ValueError(
                f"expected judges' rewards of shapes {rewards.shape} and {references.shape}, got "
                f"{judges[0].shape} and {judges[1].shape}: judge every sample that may be selected"
            )
    p = _by_rank(procedure, rewards)
    alike = reference_procedure is None and rewards.shape == references.shape
    q = p if alike else _by_rank(reference_procedure or procedure, references)
    per_prompt = ranking.wins_by_rank(rewards, p, references, q, judges)
    return WinRate(*mean_and_standard_error(per_prompt), per_prompt)


def selection_weights(rewards: ArrayLike, procedure: Procedure) -> np.ndarray:
    """The probability with which the procedure serves each sample: float[B, n] -> float64[B, n].

    Over random subsets without replacement; samples of equal reward share theirs. Rows sum to 1.

    Raises ValueError on fewer samples than the procedure takes.

    >>> from infalign_jax import procedures
    >>> selection_weights([[5.0, 1.0, 5.0]], procedures.best_of_n(2)).round(3).tolist()
    [[0.5, 0.0, 0.5]]
    """
    rewards = checked_rows("policy", rewards)
    return ranking.weights_by_rank(rewards, _by_rank(procedure, rewards))


def paired_difference(result: WinRate, other: WinRate) -> WinRate:
    """How much ``result`` is above ``other``, prompt by prompt: mean, standard error, differences.

    For two policies on the same prompts and reference samples: what a prompt or its reference
    samples give to both cancels, so that the interval is the narrower one.

    Raises ValueError where the two are of different numbers of prompts.

    >>> rates = [WinRate(0.5, 0.2, np.array(each)) for each in ([0.3, 0.9, 0.6], [0.2, 0.9, 0.4])]
    >>> difference = paired_difference(*rates)
    >>> round(difference.mean, 4), round(difference.standard_error, 4)
    (0.1, 0.0577)
    """
    if result.per_prompt.shape != other.per_prompt.shape:
        raise ValueError(
            f"expected win rates on the same prompts, got {result.per_prompt.size} and "
            f"{other.per_prompt.size}: pair policies on one list of prompts"
        )
    differences = result.per_prompt - other.per_prompt
    return WinRate(*mean_and_standard_error(differences), differences)


def confidence_interval(result: WinRate, level: float = 0.95) -> tuple[float, float]:
    """The interval, mean ± t·standard_error, that holds the true mean with probability ``level``.

    t is the quantile of Student's distribution with B − 1 degrees of freedom: exact for normal
    per-prompt values; how good for those of win rates is told at the top of this file. The
    interval may reach beyond [0, 1]; both ends are nan for a single prompt.

    Raises ValueError where ``level`` is not between 0 and 1.

    >>> result = WinRate(*mean_and_standard_error([0.4, 0.5, 0.6]), np.array([0.4, 0.5, 0.6]))
    >>> [round(bound, 4) for bound in confidence_interval(result)]  # ± 4.3027·0.0577
    [0.2516, 0.7484]
    """
    if not 0 < level < 1:
        raise ValueError(f"expected a level between 0 and 1, got {level!r}: 0.95 is usual")
    reach = student_quantile(level, result.per_prompt.size - 1) * result.standard_error
    return result.mean - reach, result.mean + reach


def student_quantile(level: float, degrees: int) -> float:
    """The t with P(|T| ≤ t) = ``level`` for Student's T with that many degrees of freedom.

    By bisection in θ = atan(t/√ν), where the probability is a finite sum (Abramowitz and Stegun,
    *Handbook of Mathematical Functions*, 26.7.3 and 26.7.4). nan for no degrees of freedom.

    >>> [round(student_quantile(0.95, degrees), 4) for degrees in (1, 7, 1000)]
    [12.7062, 2.3646, 1.9623]
    """
    if degrees < 1:
        return np.nan
    odd = degrees % 2
    # The k-th term is the one before times cos²θ times this.
    steps = np.arange(2 + odd, degrees, 2)
    coefficients = np.cumprod(np.concatenate([[1.0], (steps - 1) / steps]))

    def probability(theta: float) -> float:
        cosine = np.cos(theta)
        powers = cosine ** np.arange(odd, 2 * len(coefficients) + odd, 2)
        total = np.sin(theta) * np.sum(coefficients * powers)
        if not odd:
            return float(total)
        return float(2 / np.pi * (theta + (total if degrees > 1 else 0)))

    low, high = 0.0, np.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if probability(middle) < level else (low, middle)
    return float(np.sqrt(degrees) * np.tan(low))


def bootstrap(values: ArrayLike, generator: np.random.Generator, draws: int = 2000) -> np.ndarray:
    """Means of ``draws`` resamples of the prompts: float[B] -> float64[draws].

    Their standard deviation is √((B−1)/B) of the closed form in `mean_and_standard_error`, and
    their quantiles make an interval that assumes no shape. Give differences to compare policies.

    Raises ValueError where there is no prompt, or ``draws`` is not positive.

    >>> means = bootstrap([0.0, 1.0, 0.0, 1.0], np.random.default_rng(0), draws=4000)
    >>> round(float(means.std()), 2), np.quantile(means, [0.025, 0.975]).tolist()
    (0.25, [0.0, 1.0])
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or values.size == 0 or draws < 1:
        raise ValueError(
            f"expected values of shape [B] and at least 1 draw, got {values.shape} and {draws}: "
            "give one number a prompt"
        )
    counts = generator.multinomial(values.size, np.full(values.size, 1 / values.size), draws)
    return counts @ values / values.size


def mean_and_standard_error(values: ArrayLike) -> tuple[float, float]:
    """The mean over prompts, float[B], and its standard error, nan for a single prompt.

    >>> mean_and_standard_error([0.0, 1.0, 0.0, 1.0])[0]
    0.5
    >>> round(mean_and_standard_error([0.0, 1.0, 0.0, 1.0])[1], 4)
    0.2887
    """
    values = np.asarray(values, np.float64)
    error = float(np.std(values, ddof=1) / np.sqrt(values.size)) if values.size > 1 else np.nan
    return float(np.mean(values)), error


def _by_rank(procedure: Procedure, rewards: np.ndarray) -> np.ndarray:
    return np.asarray(procedure.selection(rewards.shape[1]), np.float64)


def checked_rows(name: str, rewards: ArrayLike) -> np.ndarray:
    """Rewards of one side, a row a prompt, as float64[B, n].

    Raises ValueError where they are not of two dimensions, or one is not finite.

    >>> checked_rows("policy", [[1, 2]]).tolist()
    [[1.0, 2.0]]
    """
    rows = np.asarray(rewards, np.float64)
    if rows.ndim != 2 or rows.size == 0:
        raise ValueError(
            f"expected {name} rewards of shape [B, n], got {rows.shape}: give one row a prompt"
        )
    if not np.all(np.isfinite(rows)):
        prompt, sample = np.argwhere(~np.isfinite(rows))[0]
        raise ValueError(
            f"expected finite {name} rewards, got {rows[prompt, sample]} at prompt {prompt}, "
            f"sample {sample}: find out why the reward model gave it"
        )
    return rows
