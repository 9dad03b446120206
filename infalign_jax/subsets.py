"""Counting subsets: the laws of ranks behind procedures that choose among samples."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def at_least(m: int, n: int, q: Array) -> Array:
    """P(Binomial(n, q) ≥ m) = I_q(m, n−m+1), elementwise for q in [0, 1]; 1 ≤ m ≤ n.

    The first term of the sum times Σ_i Π_{l≤i} (n−m−l+1)/(m+l)·q/(1−q), which falls below the
    mean; above it, 1 less the same from the other side. All terms are positive: where JAX's
    ``betainc`` is off by 2e-4 in single precision at n = 1,024, this is by 1e-6. Its derivative is
    n·P(Binomial(n−1, q) = m−1), exact at the ends too.

    >>> [round(float(at_least(2, 3, jnp.array(q))), 5) for q in (0.0, 0.25, 1.0)]
    [0.0, 0.15625, 1.0]
    """
    q = jnp.asarray(q)
    low = q < m / n
    small = jnp.where(low, q, 1 - q)
    odds = small / (1 - small)
    start = jnp.where(low, m, n - m + 1).astype(q.dtype)

    def add(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        term, total = state
        place = i.astype(q.dtype)
        term = term * odds * jnp.maximum(n - start - place + 1, 0) / (start + place)
        return term, total + term

    first = jnp.where(low, exactly(m, n, q), exactly(m - 1, n, q))
    _, tail = jax.lax.fori_loop(1, n, add, (first, first))
    return jnp.where(low, tail, 1 - tail)


@at_least.defjvp
def _at_least_jvp(
    m: int, n: int, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    (q,), (change,) = primals, tangents
    return at_least(m, n, q), n * exactly(m - 1, n - 1, q) * change


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def exactly(k: int, n: int, q: Array) -> Array:
    """P(Binomial(n, q) = k) = C(n, k)·q^k·(1−q)^{n−k}, elementwise for q in [0, 1]; 0 where not
    0 ≤ k ≤ n.

    Through logarithms, so that no binomial overflows, and relative to the most probable q, where
    they are small, so that single precision suffices. The derivative is n times the difference of
    two such terms, and so exists in every order, at the ends too.

    >>> round(float(exactly(1, 3, jnp.array(0.25))), 5)  # 3·¼·(¾)²
    0.42188
    """
    q = jnp.asarray(q)
    if not 0 <= k <= n:
        return jnp.zeros_like(q)
    mode = float(np.float32(k / n)) if n else 0.0
    log_peak = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    fall = jnp.zeros_like(q)
    for power, top, away in ((k, mode, q - mode), (n - k, 1 - mode, mode - q)):
        if power:  # 0·log 0 is 0 here
            log_peak += power * math.log(top)
            fall = fall + power * jnp.log1p(
                jnp.maximum(away / top, -1)
            )  # rounding must not pass −1
    return jnp.exp(log_peak + fall)


@exactly.defjvp
def _exactly_jvp(
    k: int, n: int, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    (q,), (change,) = primals, tangents
    slope = n * (exactly(k - 1, n - 1, q) - exactly(k, n - 1, q))
    return exactly(k, n, q), slope * change


def dealt(outer: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """Which rank of M·N is served, when M·N are dealt at random to M batches of N.

    Args:
      outer: float64[M], the probability of serving the batch whose own is i-th smallest.
      inner: float64[N], the probability of a batch's putting forward its j-th smallest.

    Returns:
      float64[M·N], the probability of each rank.

    Of the k lowest, the last of r + 1 batches gets j with the hypergeometric probability
    C(N, j)·C(rN, k−j)/C((r+1)N, k) and puts a low one forward with Σ_{i≤j} inner_i; the batches
    that do are counted, and the served one is low with Σ_{i≤count} outer_i (derived).

    >>> dealt(np.array([1.0, 0.0]), np.array([0.0, 1.0])).round(3).tolist()  # worst of 2 bests
    [0.0, 0.333, 0.667, 0.0]
    """
    batches, size = outer.size, inner.size
    low = np.concatenate([[0], np.cumsum(inner)])
    counts = np.ones((1, 1))  # [low ones among those dealt, batches that put a low one forward]
    for r in range(batches):
        padded = np.pad(counts, ((size, size), (1, 1)))
        weights = _hypergeometric(size, r * size)
        rows = np.arange((r + 1) * size + 1)[:, None] + size - np.arange(size + 1)
        kept = np.einsum("kj,kjc->kc", weights * (1 - low), padded[rows])[:, 1:]
        added = np.einsum("kj,kjc->kc", weights * low, padded[rows])[:, :-1]
        counts = kept + added
    reach = counts @ np.concatenate([[0], np.cumsum(outer)])
    return np.maximum(np.diff(reach), 0)


def lift(selection: np.ndarray, n: int) -> np.ndarray:
    """A choice among D samples, averaged over all subsets of D of n: float64[D] -> float64[n].

    >>> lift(np.array([0.0, 1.0]), 4).round(3).tolist()  # best of 2
    [0.0, 0.167, 0.333, 0.5]
    """
    degree = selection.size
    rank, place = np.arange(n)[:, None], np.arange(degree)
    logs = _log_choose(rank, place) + _log_choose(n - 1 - rank, degree - 1 - place)
    chances = np.exp(logs - _log_choose(n, degree))
    return (chances / chances.sum(axis=0)) @ selection


def log_factorials(n: int) -> np.ndarray:
    """log 0! … log n!, float64[n + 1].

    >>> log_factorials(3).round(3).tolist()
    [0.0, 0.0, 0.693, 1.792]
    """
    return np.array([math.lgamma(k + 1) for k in range(n + 1)])


def _hypergeometric(size: int, rest: int) -> np.ndarray:
    """P(j of the k low ones are in a batch of ``size``, beside ``rest``), [size+rest+1, size+1]."""
    k, j = np.arange(size + rest + 1)[:, None], np.arange(size + 1)
    logs = _log_choose(size, j) + _log_choose(rest, k - j)
    chances = np.exp(logs - _log_choose(size + rest, k))
    return chances / chances.sum(axis=1, keepdims=True)


def _log_choose(n: int | np.ndarray, k: int | np.ndarray) -> np.ndarray:
    """log C(n, k), −∞ where k is not in 0 … n."""
    n, k = np.broadcast_arrays(n, k)
    logs = log_factorials(int(n.max()))
    inside = (k >= 0) & (k <= n)
    below = np.where(inside, k, 0)
    return np.where(inside, logs[n] - logs[below] - logs[n - below], -np.inf)
