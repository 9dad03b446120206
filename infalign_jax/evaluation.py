"""Win rates after an inference-time procedure, without bias, from samples in hand.

On the host, in NumPy's float64 whatever JAX's precision: the arrays are small, done once, and
XLA's sort on a CPU is some 40 times slower.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from infalign_jax.procedures import Procedure


class WinRate(NamedTuple):
    """A win rate with its interval over prompts: mean ± 1.96·standard_error.

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
    rewards, references = _rows("policy", policy_rewards), _rows("reference", reference_rewards)
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
    served = selection_weights(rewards, procedure)
    met = selection_weights(references, reference_procedure or procedure)
    judged = rewards if policy_judge is None else _rows("policy_judge", policy_judge)
    judged_met = (
        references if reference_judge is None else _rows("reference_judge", reference_judge)
    )
    if judged.shape != rewards.shape or judged_met.shape != references.shape:
        raise ValueError(
            f"expected judges' rewards of shapes {rewards.shape} and {references.shape}, got "
            f"{judged.shape} and {judged_met.shape}: judge every sample that may be selected"
        )
    per_prompt = np.array(
        [_compare(*row) for row in zip(judged, served, judged_met, met, strict=True)]
    )
    return WinRate(*mean_and_standard_error(per_prompt), per_prompt)


def selection_weights(rewards: ArrayLike, procedure: Procedure) -> np.ndarray:
    """The probability with which the procedure serves each sample: float[B, n] -> float64[B, n].

    Over random subsets without replacement; samples of equal reward share theirs. Rows sum to 1.

    Raises ValueError on fewer samples than the procedure takes.

    >>> from infalign_jax import procedures
    >>> selection_weights([[5.0, 1.0, 5.0]], procedures.best_of_n(2)).round(3).tolist()
    [[0.5, 0.0, 0.5]]
    """
    rewards = _rows("policy", rewards)
    by_rank = np.asarray(procedure.selection(rewards.shape[1]), np.float64)
    running = np.concatenate([[0], np.cumsum(by_rank)])
    ordered = np.sort(rewards, axis=1)
    weights = np.empty_like(rewards)
    for row, (values, known) in enumerate(zip(rewards, ordered, strict=True)):
        first = np.searchsorted(known, values, side="left")
        after = np.searchsorted(known, values, side="right")
        weights[row] = (running[after] - running[first]) / (after - first)
    return weights


def mean_and_standard_error(values: ArrayLike) -> tuple[float, float]:
    """The mean over prompts, float[B], and its standard error, nan for a single prompt.

    For two policies on the same prompts and reference samples, give the differences: the
    interval of a paired comparison is the narrower one.

    >>> mean_and_standard_error([0.0, 1.0, 0.0, 1.0])[0]
    0.5
    >>> round(mean_and_standard_error([0.0, 1.0, 0.0, 1.0])[1], 4)
    0.2887
    """
    values = np.asarray(values, np.float64)
    error = float(np.std(values, ddof=1) / np.sqrt(values.size)) if values.size > 1 else np.nan
    return float(np.mean(values)), error


def _compare(values: np.ndarray, p: np.ndarray, others: np.ndarray, q: np.ndarray) -> float:
    """Σ_ij p_i·q_j·(1{values_i > others_j} + ½·1{values_i = others_j}) of one prompt."""
    order = np.argsort(others)
    others, running = others[order], np.concatenate([[0], np.cumsum(q[order])])
    below = running[np.searchsorted(others, values, side="left")]
    up_to = running[np.searchsorted(others, values, side="right")]
    return float(np.dot(p, (below + up_to) / 2))


def _rows(name: str, rewards: ArrayLike) -> np.ndarray:
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
