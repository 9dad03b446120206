"""From rewards to quantiles under the reference policy, prompt by prompt.

The quantile of a response is C(x, y) = P(r(z) < r(y)) + ½·P(r(z) = r(y)), z drawn from the
reference policy for the same prompt (*InfAlign*, arXiv 2412.19792, section 4.1). Under the
reference policy it is uniform on [0, 1], whatever the reward's scale or shape on that prompt.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

_LEVELS = 10  # the global map's values are multiples of 2^-10


def calibrate(rewards: Array, reference_rewards: Array, *, leave_one_out: bool = False) -> Array:
    """Mid-rank quantiles û in (0, 1) among the rewards of K_ref reference responses.

    û = (#{r_k < r} + ½·#{r_k = r} + ½)/(K_ref + 1). Counting ties as wins, or as losses, biases
    e^{10u} by more than half at K_ref = 8; mid-ranks by 5 %, and they never reach 0 or 1, so
    that log û and e^{tû} stay finite (derived).

    Args:
      rewards: float[..., K], finite.
      reference_rewards: float[..., K_ref], each row sorted in ascending order (sort once, on the
        host: XLA's sort is slow on a CPU), with the same leading dimensions.
      leave_one_out: each of ``rewards`` is one of the row's reference rewards: the quantile is
        then taken among the K_ref − 1 others, (#{r_k < r} + ½·#{r_k = r})/K_ref.

    Returns:
      quantiles, float32[..., K], or float64 where either input is.

    Raises ValueError where the leading dimensions differ.

    >>> reference = jnp.array([[1.0, 2.0, 2.0, 5.0]])
    >>> [round(float(u), 3) for u in calibrate(jnp.array([[0.0, 2.0, 9.0]]), reference)[0]]
    [0.1, 0.5, 0.9]
    >>> calibrate(reference, reference, leave_one_out=True).tolist()
    [[0.125, 0.5, 0.5, 0.875]]
    """
    if rewards.shape[:-1] != reference_rewards.shape[:-1]:
        raise ValueError(
            f"expected reference rewards with leading dimensions {rewards.shape[:-1]}, those of "
            f"the rewards, got {reference_rewards.shape[:-1]}: give one sorted row a prompt"
        )
    double = jnp.float64 in (rewards.dtype, reference_rewards.dtype)
    dtype = jnp.float64 if double else jnp.float32
    k_ref = reference_rewards.shape[-1]

    def rank(row: Array, reference: Array) -> Array:
        below = jnp.searchsorted(reference, row, side="left")
        up_to = jnp.searchsorted(reference, row, side="right")
        return (below + up_to).astype(dtype) / 2

    for _ in rewards.shape[:-1]:
        rank = jax.vmap(rank)
    ranks = rank(rewards.astype(dtype), reference_rewards.astype(dtype))
    return ranks / k_ref if leave_one_out else (ranks + 0.5) / (k_ref + 1)


def absolute_error(quantiles: np.ndarray, true_quantiles: np.ndarray) -> float:
    """mean |û − u| over arrays of one shape: the calibration error of a report.

    >>> round(absolute_error(np.array([0.2, 0.9]), np.array([0.3, 0.7])), 4)
    0.15
    """
    return float(np.mean(np.abs(np.asarray(quantiles, float) - np.asarray(true_quantiles, float))))


def global_map(rewards: np.ndarray, quantiles: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The increasing map from raw reward to quantile, one for all prompts, of least mean |û − u|.

    The best that a raw reward can do without looking at the prompt: what calibration is measured
    against. Isotonic regression in L1 on the host, exact for levels of 2^-10, by parting the
    sorted rewards at each level in turn (Stout, *Isotonic regression via partitioning*, 2013).

    Args:
      rewards: float[...], finite.
      quantiles: float[...] in [0, 1], of the same shape.

    Returns:
      A function of rewards of any shape that gives float64 quantiles of that shape.

    Raises ValueError where the shapes differ or are empty.

    >>> raw = np.array([-1.0, 0.0, 1.0, 2.0, 2.0])
    >>> to_quantile = global_map(raw, np.array([0.1, 0.35, 0.35, 0.8, 0.8]))
    >>> to_quantile(np.array([-5.0, 0.5, 2.0])).round(2).tolist()
    [0.1, 0.35, 0.8]
    """
    if rewards.shape != quantiles.shape or rewards.size == 0:
        raise ValueError(
            f"expected as many quantiles as rewards and at least one, got shapes {rewards.shape} "
            f"and {quantiles.shape}: give the quantile of each reward"
        )
    order = np.argsort(rewards, axis=None, kind="stable")
    knots = np.ravel(rewards)[order]
    values = np.empty(knots.size)
    _part(np.ravel(quantiles)[order].astype(float), knots, values, 0, 2**_LEVELS)
    # Rewards between two seen ones take the lower one's value, those below all the lowest.
    return lambda raw: values[np.maximum(np.searchsorted(knots, raw, side="right") - 1, 0)]


def _part(
    quantiles: np.ndarray, knots: np.ndarray, values: np.ndarray, low: int, high: int
) -> None:
    """Fills ``values`` with the L1 isotonic fit of ``quantiles`` on levels low … high."""
    if quantiles.size == 0 or high - low <= 1:
        # The level is known to within one: its middle.
        values[:] = (low + high) / 2 ** (_LEVELS + 1)
        return
    middle = (low + high) // 2
    above = np.where(quantiles > middle / 2**_LEVELS, 1, -1)
    # Those before the cut stay below the middle level: the cost is what lies on the wrong side.
    cost = np.concatenate([[0], np.cumsum(above)])
    tied = np.concatenate([[False], knots[1:] == knots[:-1], [False]])
    cut = int(np.argmin(np.where(tied, quantiles.size + 1, cost)))
    _part(quantiles[:cut], knots[:cut], values[:cut], low, middle)
    _part(quantiles[cut:], knots[cut:], values[cut:], middle, high)
