"""Rows of rewards in order: what each rank weighs, and which side wins, at the speed of a sort.

NumPy sorts twice as fast as it finds an order (``argsort``), and searches far more slowly. So
``wins_by_rank`` sorts numbers whose lowest bits of mantissa say where they come from: one sort
brings values and origins. Rows in which two values are equal, or differ in what was left out alone,
are found out afterwards and counted the general way. Rows are taken in blocks that stay in a
processor's cache, in memory that is asked for once: its first touch costs more than arithmetic.
"""

from collections.abc import Iterator

import numpy as np

_BLOCK = 28_000  # values: half a block of doubles is less than malloc takes from the system anew


def cumulated(weights: np.ndarray) -> np.ndarray:
    """Running sums along the last axis that begin at 0: float64[..., n] -> float64[..., n + 1].

    >>> cumulated(np.array([0.25, 0.75])).tolist()
    [0.0, 0.25, 1.0]
    """
    running = np.zeros((*weights.shape[:-1], weights.shape[-1] + 1))
    np.cumsum(weights, axis=-1, out=running[..., 1:])
    return running


def taken(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    """``take_along_axis`` of rows, in half its time: float[B, n] at int[B, k] -> float[B, k].

    >>> taken(np.array([[3.0, 1.0, 2.0]]), np.array([[1, 2, 0]])).tolist()
    [[1.0, 2.0, 3.0]]
    """
    return values.ravel().take(order + values.shape[1] * np.arange(len(values))[:, None])


def evened(ordered: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weights of sorted rows, each run of equal values sharing its own evenly.

    Args:
      ordered: float64[B, n], each row in ascending order.
      weights: float64[B, n], of these values.

    >>> evened(np.array([[1.0, 2.0, 2.0]]), np.array([[0.5, 0.125, 0.375]])).tolist()
    [[0.5, 0.25, 0.25]]
    """
    new = np.ones(ordered.shape, bool)
    np.not_equal(ordered[:, 1:], ordered[:, :-1], out=new[:, 1:])
    starts = np.flatnonzero(new)
    lengths = np.diff(starts, append=ordered.size)
    mass = np.add.reduceat(weights.ravel(), starts)
    return np.repeat(mass / lengths, lengths).reshape(ordered.shape)


def weights_by_rank(values: np.ndarray, by_rank: np.ndarray) -> np.ndarray:
    """Each value's weight where the i-th smallest has ``by_rank[i]`` and equal ones share theirs.

    float64[B, n], float64[n] -> float64[B, n].

    >>> weights_by_rank(np.array([[5.0, 1.0, 5.0]]), np.array([0.0, 0.2, 0.8])).tolist()
    [[0.5, 0.0, 0.5]]
    """
    weights = np.empty(values.shape)
    for rows in _blocks(*values.shape):
        block = values[rows]
        order = np.argsort(block, axis=1)
        even = evened(taken(block, order), np.broadcast_to(by_rank, block.shape))
        np.put_along_axis(weights[rows], order, even, axis=1)
    return weights


def wins(values: np.ndarray, p: np.ndarray, others: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Σ_ij p_i·q_j·(1{values_i > others_j} + ½·1{values_i = others_j}) of each row, float64[B].

    With both sides' weights evened out over equal values, everything meets all that is below it
    and half of its own place: (derived) a run of L then counts ΔP·ΔQ·(L(L−1)/2 + L/2)/L².

    Args:
      values, p: float64[B, n], samples of one side with their weights, which are not negative.
      others, q: float64[B, m], those of the other.

    >>> half = np.array([[0.5, 0.5]])
    >>> wins(np.array([[1.0, 3.0]]), half, np.array([[1.0, 2.0]]), half).tolist()
    [0.625]
    """
    found = np.empty(len(values))
    for rows in _blocks(len(values), values.shape[1] + others.shape[1]):
        both = np.concatenate([values[rows], others[rows]], axis=1)
        order = np.argsort(both, axis=1)
        both = taken(both, order)
        weights = taken(np.concatenate([p[rows], -q[rows]], axis=1), order)
        won = np.maximum(weights, 0)
        met = evened(both, won - weights)
        found[rows] = np.vecdot(evened(both, won), np.cumsum(met, axis=1) - met / 2)
    return found


def wins_by_rank(
    values: np.ndarray,
    p: np.ndarray,
    others: np.ndarray,
    q: np.ndarray,
    judges: tuple[np.ndarray, np.ndarray] | None = None,
) -> np.ndarray:
    """``wins`` where the i-th smallest value weighs ``p[i]``, the j-th smallest other ``q[j]``.

    Args:
      values, p: float64[B, n], finite, and float64[n].
      others, q: float64[B, m], finite, and float64[m].
      judges: float64[B, n] and [B, m], finite, by which the sides are compared once values and
        others have been weighed; the values and others themselves unless given.

    >>> best = np.array([0.0, 1.0])
    >>> wins_by_rank(np.array([[1.0, 3.0]]), best, np.array([[4.0, 2.0]]), best).tolist()
    [0.0]
    >>> judges = np.array([[7.0, 6.0]]), np.array([[5.0, 8.0]])
    >>> wins_by_rank(np.array([[1.0, 3.0]]), best, np.array([[2.0, 0.0]]), best, judges).tolist()
    [1.0]
    """
    if judges is None:
        won, close = _by_values(values, p, others, q)
        if close.any():
            # In order, weights are by place: what is equal shares them once the sides meet.
            mine, theirs = np.sort(values[close], axis=1), np.sort(others[close], axis=1)
            rows = len(mine), 1
            won[close] = wins(mine, np.tile(p, rows), theirs, np.tile(q, rows))
        return won
    won, close = _by_judges(values, p, others, q, *judges)
    if close.any():
        mine, theirs = weights_by_rank(values[close], p), weights_by_rank(others[close], q)
        won[close] = wins(judges[0][close], mine, judges[1][close], theirs)
    return won


def _by_values(
    values: np.ndarray, p: np.ndarray, others: np.ndarray, q: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Wins, float64[B], right but for the rows where the second result, bool[B], is set.

    In single precision, which sorts twice as fast and, one bit less, still tells 256 normal values
    of one side from 256 of the other in all but some 2 of 1,000 rows.
    """
    n, width, running = len(p), len(p) + len(q), cumulated(q)
    won, close = np.empty(len(values)), np.empty(len(values), bool)
    step = min(len(values), max(1, _BLOCK // width))
    offsets = width * np.arange(step)[:, None] + np.arange(n)
    keys_space, lost_space = np.empty((step, width), np.float32), np.empty((step, n))
    for rows in _blocks(len(values), width):
        count = len(values[rows])
        keys, lost = keys_space[:count], lost_space[:count]
        with np.errstate(over="ignore"):
            keys[:, :n] = values[rows]
            keys[:, n:] = others[rows]
        vast = np.isinf(keys)
        keys[vast] = 0  # an infinity would lose its origin
        bits = keys.view(np.int32)
        bits &= ~1
        bits[:, n:] |= 1
        keys.sort(axis=1)
        free = np.bitwise_and(bits, 1)
        # The i-th smallest of the values stands above i of them and, besides, above others alone.
        below = np.flatnonzero(free == 0).reshape(count, n)
        below -= offsets[:count]
        won[rows] = np.take(running, below, out=lost, mode="clip") @ p
        # Equal neighbours of one side have equal bits, and may stand in any order.
        close[rows] = _any(_apart(bits, free) == 1) | _any(vast)
    return won, close


def _by_judges(
    values: np.ndarray,
    p: np.ndarray,
    others: np.ndarray,
    q: np.ndarray,
    judged: np.ndarray,
    judged_others: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """As ``_by_values``: judges' rewards are put in the order of what weighs them, where a place
    is a rank, and then sorted with their places, which take more bits than a single can spare."""
    n, width, signed = len(p), len(p) + len(q), np.concatenate([p, -q])
    won, close = np.empty(len(values)), np.empty(len(values), bool)
    step = min(len(values), max(1, _BLOCK // width))
    low = (1 << (width - 1).bit_length()) - 1
    offsets, space = width * np.arange(step)[:, None], np.empty((3, step, width))
    for rows in _blocks(len(values), width):
        keys, spare, third = space[:, : len(values[rows])]
        bits, free, places = keys.view(np.int64), spare.view(np.int64), third.view(np.int64)
        keys[:, :n] = values[rows]
        keys[:, n:] = others[rows]
        _mark(bits, low)
        keys[:, :n].sort(axis=1)
        keys[:, n:].sort(axis=1)
        near = _any(_apart(bits, free) <= low)
        np.bitwise_and(bits, low, out=places)
        places += offsets[: len(keys)]
        spare[:, :n] = judged[rows]
        spare[:, n:] = judged_others[rows]
        np.take(spare.ravel(), places, out=keys, mode="clip")
        _mark(bits, low)
        keys.sort(axis=1)
        close[rows] = near | _any(_apart(bits, free) <= low)
        np.bitwise_and(bits, low, out=places)
        weights = np.take(signed, places, out=spare, mode="clip")
        served = np.maximum(weights, 0, out=keys)
        met = np.cumsum(np.subtract(served, weights, out=weights), axis=1, out=third)
        won[rows] = np.vecdot(served, met)
    return won, close


def _mark(bits: np.ndarray, low: int) -> None:
    """Puts each value's place in its row into its lowest bits."""
    bits &= ~low
    bits |= np.arange(bits.shape[1])


def _apart(bits: np.ndarray, free: np.ndarray) -> np.ndarray:
    """The bits in which each value differs from the next, written into ``free``.

    Without the sign's, as 0.0 equals -0.0. Taken flat, and so across the ends of rows: that, as
    neighbours x and -x, can but set a row too many.
    """
    flat = free.ravel()
    flat[-1] = -1  # the last of all has no next
    np.bitwise_xor(bits.ravel()[1:], bits.ravel()[:-1], out=flat[:-1])
    return np.bitwise_and(free, np.iinfo(free.dtype).max, out=free)


def _any(near: np.ndarray) -> np.ndarray:
    """``near.any(axis=1)``, which is slow, where there is one at all."""
    return np.asarray(near.any(axis=1)) if near.any() else np.zeros(len(near), bool)


def _blocks(rows: int, width: int) -> Iterator[slice]:
    step = max(1, _BLOCK // width)
    return (slice(start, start + step) for start in range(0, rows, step))
