"""From rewards to quantiles under the reference policy, prompt by prompt.

The quantile of a response is C(x, y) = P(r(z) < r(y)) + ½·P(r(z) = r(y)), z drawn from the
reference policy for the same prompt (*InfAlign*, arXiv 2412.19792, section 4.1). Under the
reference policy it is uniform on [0, 1], whatever the reward's scale or shape on that prompt.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

Array = jax.Array

_LEVELS = 10  # the global map's values are multiples of 2^-10
_COUNTED = 128  # up to so many reference rewards counting beats binary search on a CPU
_ALIGNED = 64  # bytes: JAX copies what begins elsewhere


def sorted_reference(rewards: ArrayLike) -> np.ndarray:
    """The rewards of each prompt's reference responses in ascending order, once and on the host.

    NumPy sorts some 40 times faster than XLA does on a CPU. The result begins where JAX on a CPU
    takes it as it is: elsewhere copying 40 MB takes longer than ranking among them.

    Args:
      rewards: float[..., K_ref], finite, in any order.

    Returns:
      float32[..., K_ref], or float64 where float32 does not hold the type of ``rewards``.

    Raises ValueError where a reward is not finite or a prompt has none.

    >>> sorted_reference([[3.0, 1.0, 2.0]]).tolist()
    [[1.0, 2.0, 3.0]]
    """
    values = np.asarray(rewards)
    _check_count(values.shape)
    _check_finite("reference rewards", values)
    dtype = np.result_type(values.dtype, np.float32)
    room = np.empty(values.size * dtype.itemsize + _ALIGNED, np.uint8)
    start = -room.ctypes.data % _ALIGNED
    ordered = room[start : start + values.size * dtype.itemsize].view(dtype).reshape(values.shape)
    ordered[...] = values
    ordered.sort(axis=-1)
    return ordered


def calibrate(
    rewards: Array | np.ndarray,
    reference_rewards: Array | np.ndarray,
    *,
    leave_one_out: bool = False,
) -> Array:
    """Mid-rank quantiles û in (0, 1) among the rewards of K_ref reference responses.

    û = (#{r_k < r} + ½·#{r_k = r} + ½)/(K_ref + 1), which never reaches 0 or 1, so that log û and
    e^{tû} stay finite. Averaged over u at K_ref = 8 it biases e^{10u} by −5 %; the plain share of
    rewards below, #{r_k < r}/K_ref, by +56 % (derived).

    NumPy's arrays are checked; JAX's are not, whose values may be traced or on other hosts. There
    a reward that is not finite has the quantile NaN, and so has all of a row whose reference
    rewards are not, rather than a plausible number: NaN sorts last, as if it were best.

    Args:
      rewards: float[..., K], finite.
      reference_rewards: float[..., K_ref], each row sorted in ascending order (as
        ``sorted_reference`` does, once), with the same leading dimensions.
      leave_one_out: each of ``rewards`` is one of the row's reference rewards: the quantile is
        then taken among the K_ref − 1 others, (#{r_k < r} + ½·#{r_k = r})/K_ref.

    Returns:
      quantiles, float32[..., K], or float64 where either input is (and x64 is on).

    Raises ValueError where the leading dimensions differ, a row has no reference reward, or a
    NumPy array holds rewards that are not finite or reference rewards out of order.

    >>> reference = sorted_reference([[5.0, 1.0, 2.0, 2.0]])
    >>> [round(float(u), 3) for u in calibrate(np.array([[0.0, 2.0, 9.0]]), reference)[0]]
    [0.1, 0.5, 0.9]
    >>> calibrate(reference, reference, leave_one_out=True).tolist()
    [[0.125, 0.5, 0.5, 0.875]]
    """
    if rewards.shape[:-1] != reference_rewards.shape[:-1]:
        raise ValueError(
            f"expected reference rewards with leading dimensions {rewards.shape[:-1]}, those of "
            f"the rewards, got {reference_rewards.shape[:-1]}: give one sorted row a prompt"
        )
    _check_count(reference_rewards.shape)
    if isinstance(rewards, np.ndarray):
        _check_finite("rewards", rewards)
    if isinstance(reference_rewards, np.ndarray):
        _check_finite("reference rewards", reference_rewards)
        _check_order(reference_rewards)
    new, known = jnp.asarray(rewards), jnp.asarray(reference_rewards)
    dtype = jnp.float64 if jnp.float64 in (new.dtype, known.dtype) else jnp.float32
    new, known = new.astype(dtype), known.astype(dtype)
    k_ref = known.shape[-1]
    ranks = _mid_ranks(new, known)
    quantiles = ranks / k_ref if leave_one_out else (ranks + 0.5) / (k_ref + 1)
    # Rows are sorted: what is not finite lies at an end.
    ends = jnp.isfinite(known[..., :1]) & jnp.isfinite(known[..., -1:])
    return jnp.where(jnp.isfinite(new) & ends, quantiles, jnp.nan)


@jax.jit
def _mid_ranks(rewards: Array, known: Array) -> Array:
    """#{r_k < r} + ½·#{r_k = r}, float[..., K], among sorted rows float[..., K_ref].

    Nothing crosses prompts, so that no device needs another's where they are divided.
    """
    k_ref = known.shape[-1]
    if k_ref <= _COUNTED:

        def count(k: int | Array, found: Array) -> Array:
            column = jax.lax.dynamic_slice_in_dim(known, k, 1, axis=-1)
            below, up_to = column < rewards, column <= rewards
            return found + below.astype(found.dtype) + up_to.astype(found.dtype)

        zero = jnp.zeros(rewards.shape, jnp.int32)
        return jax.lax.fori_loop(0, k_ref, count, zero, unroll=8).astype(rewards.dtype) / 2

    search = _search
    for _ in rewards.shape[:-1]:
        search = jax.vmap(search)
    return search(known, rewards).astype(rewards.dtype) / 2


def _search(known: Array, rewards: Array) -> Array:
    """#{r_k < r} + #{r_k ≤ r}, int32[K], by halving: on a CPU thrice as fast as searchsorted."""
    k_ref = known.size
    highest = 1 << (k_ref.bit_length() - 1)

    def halve(i: int | Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        below, up_to = (count + (highest >> i) for count in found)
        at_below, at_up_to = (
            known.at[jnp.minimum(count, k_ref) - 1].get(mode="promise_in_bounds")
            for count in (below, up_to)
        )
        return (
            jnp.where((below <= k_ref) & (at_below < rewards), below, found[0]),
            jnp.where((up_to <= k_ref) & (at_up_to <= rewards), up_to, found[1]),
        )

    zero = jnp.zeros(rewards.shape, jnp.int32)
    below, up_to = jax.lax.fori_loop(0, k_ref.bit_length(), halve, (zero, zero))
    return below + up_to


def _check_count(shape: tuple[int, ...]) -> None:
    if len(shape) == 0 or shape[-1] == 0:
        raise ValueError(
            f"expected reference rewards of shape [..., K_ref] with K_ref at least 1, got "
            f"{tuple(shape)}: score at least one reference response a prompt"
        )


def _check_finite(name: str, rewards: np.ndarray) -> None:
    wrong = ~np.isfinite(rewards)
    if wrong.any():
        first, place = _first(wrong)
        raise ValueError(
            f"expected finite {name}, got {rewards[first]} at {place}: "
            f"find out why the reward model gave it, or leave that response out"
        )


def _check_order(reference: np.ndarray) -> None:
    falls = reference[..., 1:] < reference[..., :-1]
    if falls.any():
        raise ValueError(
            f"expected reference rewards in ascending order, got a fall after {_first(falls)[1]}: "
            f"sort them once with calibration.sorted_reference"
        )


def _first(wrong: np.ndarray) -> tuple[tuple[int, ...], str]:
    """The index of the first True of bool[..., K], and that place in words."""
    *prompt, sample = (int(i) for i in np.argwhere(wrong)[0])
    return (*prompt, sample), f"prompt {', '.join(map(str, prompt)) or 0}, sample {sample}"


def absolute_error(quantiles: np.ndarray, true_quantiles: np.ndarray) -> float:
    """mean |û − u| over arrays of one shape: the calibration error of a report.

    >>> round(absolute_error(np.array([0.2, 0.9]), np.array([0.3, 0.7])), 4)
    0.15
    """
    return float(np.mean(np.abs(np.asarray(quantiles, float) - np.asarray(true_quantiles, float))))


def held_out_errors(rewards: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each prompt's mean |û − u| on responses that û has not seen, before and after calibration.

    û and u come from two halves of a prompt's K rewards (even and odd places), in turn: u is the
    quantile within the one half, without the response itself; û is taken from the other, before
    by the best map of the raw reward that all prompts share (``global_map``), after by
    ``calibrate``. Both hold the noise of halves; without ties the second is nothing else.

    Args:
      rewards: float[B, K] of reference responses, K at least 4.

    Returns:
      float64[B], before, and float64[B], after.

    Raises ValueError where there are fewer than 4 responses a prompt.

    >>> rng = np.random.default_rng(0)
    >>> offset = rng.normal(size=(200, 1))
    >>> before, after = held_out_errors(offset + rng.normal(size=(200, 64)))
    >>> round(float(before.mean()), 2), round(float(after.mean()), 2)
    (0.17, 0.08)
    """
    if rewards.ndim != 2 or rewards.shape[1] < 4:
        raise ValueError(
            f"expected rewards of shape [B, K] with K at least 4, got {rewards.shape}: "
            "each half of them is ranked on its own"
        )
    errors = []
    halves = rewards[:, ::2], rewards[:, 1::2]
    for known, new in (halves, halves[::-1]):
        seen, truth = (
            np.asarray(calibrate(half, sorted_reference(half), leave_one_out=True))
            for half in (known, new)
        )
        guesses = global_map(known, seen)(new), np.asarray(calibrate(new, sorted_reference(known)))
        errors.append([np.mean(np.abs(guess - truth), axis=1, dtype=float) for guess in guesses])
    before, after = np.mean(errors, axis=0)
    return before, after


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
