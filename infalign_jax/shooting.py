"""The boundary problem behind ``frontier.optimal``, shot from u = 1.

With x = 1 − u, the policy's mass above u as F̄ and the reward below its peak as R̄ = R(1) − R(u):

    dF̄/dx = e^{a − R̄/β}      dR̄/dx = g_π(1 − F̄)·g_ref(1 − x)      F̄ = R̄ = 0 at x = 0

and a = log f(1) is sought that makes F̄(x = 1) = 1 (derived). From this end nothing overflows, and
a has bounds that hold for every solution of every pair of procedures: R′ ≤ M = max g_π·max g_ref,
so that 1 ≤ f(1) ≤ (M/β)/(1 − e^{−M/β}). Shot from u = 0, log f(0) ≈ −N/β for worst-of-N: that
single number would lose all its digits.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from infalign_jax.procedures import Procedure

Array = jax.Array

_CANDIDATES = 64  # values of a in the first scan for changes of sign
_SOLUTIONS = 4  # as many solutions as are followed
_WAYS = 16  # each bracket is cut in 15 at a time


def steepest(procedure: Procedure, reference: Procedure) -> Array:
    """M, an upper bound of R′, float[].

    >>> from infalign_jax import procedures
    >>> float(steepest(procedures.best_of_n(4), procedures.worst_of_n(2)))
    8.0
    """
    q = jnp.linspace(0, 1, 257, dtype=jnp.result_type(float))
    return jnp.max(procedure.density(q)) * jnp.max(reference.density(q))


def solve(procedure: Procedure, beta: Array, reference: Procedure) -> jax.tree_util.Partial:
    """Every stationary policy's R, as a transformation whose leaves have a leading axis [4].

    Fewer than four solutions repeat. β is float[].

    >>> from infalign_jax import procedures
    >>> solve = jax.jit(solve, static_argnums=(0, 2))
    >>> found = solve(procedures.standard(), jnp.array(1.0), procedures.standard())
    >>> first = jax.tree.map(lambda leaf: leaf[0], found)
    >>> round(float(first(jnp.array(0.3))), 4)  # R(u) = u
    0.3
    """
    ratio = steepest(procedure, reference) / beta
    largest = jnp.log(ratio) - jnp.log(-jnp.expm1(-ratio))
    nodes, widths = _graded(ratio)
    u = nodes[::-1]

    def overshoots(a: Array) -> Array:
        (mass, _), _ = _integrate(procedure, reference, beta, a, u, widths, trace=False)
        return mass >= 1

    bracket = jnp.stack(_refine(overshoots, *_brackets(overshoots, largest)))
    _, path = _integrate(procedure, reference, beta, bracket, u, widths, trace=True)
    mass, fall = _blend(*path)
    slope = procedure.density(jnp.maximum(1 - mass, 0)) * reference.density(u)[:, None]
    rewards = (fall[-1:] - fall)[::-1].T
    grids = (jnp.broadcast_to(leaf, (_SOLUTIONS, leaf.size)) for leaf in (nodes, widths))
    return jax.tree_util.Partial(_interpolate, *grids, rewards, slope[::-1].T)


def _graded(ratio: Array) -> tuple[Array, Array]:
    """Nodes from 0 to 1, symmetric and dense at both ends, float[n + 1]; widths, float[n].

    Near 1 the optimum varies over some β/M = 1/ratio, and so do the nodes' distances.
    """
    steps = 2048 if ratio.dtype == jnp.float64 else 512
    reach = jnp.log1p(ratio) + 3
    tau = reach * jnp.linspace(-1, 0, steps // 2 + 1, dtype=ratio.dtype)
    end = jax.nn.sigmoid(-reach)
    lower = (jax.nn.sigmoid(tau) - end) / (1 - 2 * end)
    lower = lower.at[0].set(0).at[-1].set(0.5)
    widths = jnp.diff(lower)
    # The upper half mirrors the lower one, so that small distances from 1 stay exact.
    return jnp.concatenate([lower, 1 - lower[-2::-1]]), jnp.concatenate([widths, widths[::-1]])


def _integrate(
    procedure: Procedure,
    reference: Procedure,
    beta: Array,
    a: Array,
    u: Array,
    widths: Array,
    trace: bool,
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Runge–Kutta steps down from u = 1 for every a, of any shape.

    F̄ and R̄ at u = 0, in the shape of a; and, where ``trace`` asks for them, at all nodes.
    """

    def slope(mass: Array, fall: Array, weight: Array) -> tuple[Array, Array]:
        return jnp.exp(a - fall / beta), procedure.density(jnp.maximum(1 - mass, 0)) * weight

    def step(
        state: tuple[Array, Array], inputs: tuple[Array, ...]
    ) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        mass, fall = state
        width, start, middle, end = inputs
        m1, r1 = slope(mass, fall, start)
        m2, r2 = slope(mass + width / 2 * m1, fall + width / 2 * r1, middle)
        m3, r3 = slope(mass + width / 2 * m2, fall + width / 2 * r2, middle)
        m4, r4 = slope(mass + width * m3, fall + width * r3, end)
        mass = mass + width / 6 * (m1 + 2 * m2 + 2 * m3 + m4)
        fall = fall + width / 6 * (r1 + 2 * r2 + 2 * r3 + r4)
        return (mass, fall), ((mass, fall) if trace else (zeros[:0], zeros[:0]))

    zeros = jnp.zeros_like(a)
    weights = reference.density(u)
    middles = reference.density(u[:-1] - widths / 2)
    last, path = jax.lax.scan(step, (zeros, zeros), (widths, weights[:-1], middles, weights[1:]))
    if trace:
        path = jax.tree.map(lambda leaf: jnp.concatenate([zeros[None], leaf]), path)
    return last, path


def _brackets(overshoots: Callable[[Array], Array], largest: Array) -> tuple[Array, Array, Array]:
    """Intervals of a where the shot's miss changes sign: low and high, float[4]; sign at low."""
    a = largest * jnp.linspace(0, 1, _CANDIDATES, dtype=largest.dtype)
    # At the bounds of a the signs are known; rounding must not say otherwise.
    over = overshoots(a).at[0].set(False).at[-1].set(True)
    index = jnp.nonzero(over[1:] != over[:-1], size=_SOLUTIONS, fill_value=-1)[0]
    index = jnp.where(index < 0, index[0], index)
    return a[index], a[index + 1], over[index]


def _refine(
    overshoots: Callable[[Array], Array], low: Array, high: Array, sign: Array
) -> tuple[Array, Array]:
    """The brackets, float[4], narrowed to a few units in the last place of a."""
    parts = jnp.linspace(0, 1, _WAYS, dtype=low.dtype)
    rows = jnp.arange(_SOLUTIONS)

    def cut(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        a = low[:, None] + (high - low)[:, None] * parts[None, :]
        over = overshoots(a.reshape(-1)).reshape(a.shape)
        over = over.at[:, 0].set(sign).at[:, -1].set(~sign)
        first = jnp.argmax(over[:, 1:] != over[:, :-1], axis=1)
        return a[rows, first], a[rows, first + 1]

    rounds = 7 if low.dtype == jnp.float64 else 4
    return jax.lax.fori_loop(0, rounds, cut, (low, high))


def _blend(mass: Array, fall: Array) -> tuple[Array, Array]:
    """F̄ and R̄, float[n + 1, 4], of the shots that end at F̄ = 1, from both ends of each bracket.

    a alone cannot hold the digits: where N/β = 100, one unit in its last place in float32
    moves F̄(x = 1) by 1e-5. Over so narrow a bracket, float[n + 1, 2, 4], shots are linear in a.
    """
    start, end = mass[-1, 0], mass[-1, 1]
    gap = jnp.where(end == start, 1, end - start)
    share = jnp.where(end == start, 0.5, jnp.clip((1 - start) / gap, 0, 1))[None]
    mass, fall = (leaf[:, 0] + share * (leaf[:, 1] - leaf[:, 0]) for leaf in (mass, fall))
    return mass, fall


def _interpolate(nodes: Array, widths: Array, rewards: Array, slopes: Array, u: Array) -> Array:
    """R at u, by cubics through its values and slopes at the nodes.

    Found by the distance from the nearer end, in which u is as exact near 1 as near 0.
    """
    nodes, widths, rewards, slopes = (
        leaf.astype(u.dtype) for leaf in (nodes, widths, rewards, slopes)
    )
    half = widths.size // 2
    upper = u > 0.5
    distance = jnp.where(upper, 1 - u, u)
    near = jnp.clip(jnp.searchsorted(nodes[: half + 1], distance, side="right") - 1, 0, half - 1)
    width = widths[near]
    t = jnp.clip((distance - nodes[near]) / width, 0, 1)
    t = jnp.where(upper, 1 - t, t)
    i = jnp.where(upper, widths.size - 1 - near, near)
    value = rewards[i] * (1 + 2 * t) * (1 - t) ** 2 + rewards[i + 1] * t**2 * (3 - 2 * t)
    return value + width * (slopes[i] * t * (1 - t) ** 2 - slopes[i + 1] * t**2 * (1 - t))
