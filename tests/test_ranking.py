"""Sorting with origins in the lowest bits against comparing every pair."""

import numpy as np
import pytest

from infalign_jax import ranking


def shared(values, by_rank):
    """Weights of one row, by counting."""
    below = (values[None, :] < values[:, None]).sum(axis=1)
    equal = (values[None, :] == values[:, None]).sum(axis=1)
    return np.array([by_rank[b : b + e].mean() for b, e in zip(below, equal, strict=True)])


def compared(values, p, others, q):
    above, level = values[:, None] > others[None, :], values[:, None] == others[None, :]
    return p @ (above + level / 2) @ q


def awkward(generator, rows, n):
    """Rows of many kinds: far apart, equal, equal but for the last bit, tiny, huge, zeros."""
    values = generator.normal(size=(rows, n)) * 10.0 ** generator.integers(-3, 4, (rows, 1))
    coarse, close, tiny, huge, zeros = (slice(k, None, 7) for k in range(1, 6))
    values[coarse] = np.round(values[coarse])
    bits = generator.integers(0, 40, values[close].shape).astype(np.uint64)
    values[close] = (np.float64(-1.5).view(np.uint64) + bits).view(np.float64)
    values[tiny] = generator.integers(-40, 40, values[tiny].shape) * 5e-324
    # Of these some 3 % are beyond single precision.
    values[huge] = generator.normal(size=values[huge].shape) * 1.6e38
    values[zeros] = generator.choice([0.0, -0.0, 1e-300], values[zeros].shape)
    return values


def weights(generator, n):
    return generator.dirichlet(np.ones(n))


# Blocks hold 28,000 values: the widest rows go 7 to a block and leave a shorter last one.
@pytest.mark.parametrize(("rows", "n", "m"), [(70, 5, 9), (7, 1, 1), (1, 40, 3), (12, 2000, 1900)])
@pytest.mark.parametrize("judges", [False, True])
def test_wins_by_rank_are_those_of_every_pair(rows, n, m, judges):
    generator = np.random.default_rng(n)
    both = awkward(generator, rows, n + m)
    values, others = both[:, :n], both[:, n:]
    p, q = weights(generator, n), weights(generator, m)
    # Rows of one kind for what selects meet every kind for what judges.
    seen = awkward(generator, rows, n + m)[generator.permutation(rows)] if judges else both
    pair = (seen[:, :n], seen[:, n:]) if judges else None
    before = [x.copy() for x in (values, others, seen)]
    found = ranking.wins_by_rank(values, p, others, q, pair)
    for row in range(rows):
        served, met = shared(values[row], p), shared(others[row], q)
        expected = compared(seen[row, :n], served, seen[row, n:], met)
        np.testing.assert_allclose(found[row], expected, rtol=1e-12, atol=1e-14)
    for kept, given in zip(before, (values, others, seen), strict=True):
        np.testing.assert_array_equal(kept, given)


def test_rows_without_ties_are_right_at_once(monkeypatch):
    """The general way is not needed, and not taken, where values are well apart."""
    generator = np.random.default_rng(0)
    values, others, judged, judged_others = generator.normal(size=(4, 50, 64))
    p, q = weights(generator, 64), weights(generator, 64)
    general = [
        ranking.wins(x, ranking.weights_by_rank(values, p), y, ranking.weights_by_rank(others, q))
        for x, y in ((values, others), (judged, judged_others))
    ]
    monkeypatch.setattr(ranking, "wins", None)
    found = ranking.wins_by_rank(values, p, others, q)
    np.testing.assert_allclose(found, general[0], rtol=1e-13)
    found = ranking.wins_by_rank(values, p, others, q, (judged, judged_others))
    np.testing.assert_allclose(found, general[1], rtol=1e-13)


def test_weights_of_equal_values_are_shared():
    generator = np.random.default_rng(1)
    values = awkward(generator, 40, 30)
    p = weights(generator, 30)
    found = ranking.weights_by_rank(values, p)
    for row, expected in zip(found, values, strict=True):
        np.testing.assert_allclose(row, shared(expected, p), rtol=1e-12)


def test_weighted_wins_are_those_of_every_pair():
    generator = np.random.default_rng(2)
    both = awkward(generator, 40, 25)
    p, q = generator.dirichlet(np.ones(10), 40), generator.dirichlet(np.ones(15), 40)
    found = ranking.wins(both[:, :10], p, both[:, 10:], q)
    for row in range(40):
        expected = compared(both[row, :10], p[row], both[row, 10:], q[row])
        np.testing.assert_allclose(found[row], expected, rtol=1e-12, atol=1e-14)
