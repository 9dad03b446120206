"""Every stationary policy of an objective, to some three digits: shot from u = 1.

With x = 1 − u, the policy's mass above u as F̄ and the reward below its peak as R̄ = R(1) − R(u):

    dF̄/dx = e^{a − R̄/β}      dR̄/dx = slope(1 − F̄, 1 − x)      F̄ = R̄ = 0 at x = 0

and a = log f(1) is sought that makes F̄(x = 1) = 1 (derived). From this end nothing overflows, and
a has bounds that hold for every solution of every objective: R′ ≤ M, so that
1 ≤ f(1) ≤ (M/β)/(1 − e^{−M/β}). Shot from u = 0, log f(0) ≈ −N/β for worst-of-N: that single
number would lose all its digits.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from infalign_jax.objective import Objective
from infalign_jax.panels import REACH, fitted, widths

Array = jax.Array

_SHOTS = 64  # at a time
_SOLUTIONS = 4  # as many as are followed
_STEPS = 1536
_MESHES = 2  # the first is even in τ, each other fitted to what was found on the one before


class Paths(NamedTuple):
    """F and ℓ = log f of stationary policies, at the same τ = log(u/(1−u)).

    >>> Paths._fields
    ('found', 'tau', 'cdf', 'log_density')
    """

    found: Array  # int[], how many: the rows from there on repeat the first
    tau: Array  # float[n + 1], ascending
    cdf: Array  # float[4, n + 1]
    log_density: Array  # float[4, n + 1]


def solve(objective: Objective, beta: Array) -> Paths:
    """Up to four stationary policies, β being float[].

    >>> from infalign_jax.procedures import standard
    >>> from infalign_jax.objective import duel
    >>> paths = jax.jit(lambda beta: solve(duel(standard(), standard()), beta))(jnp.array(1.0))
    >>> int(paths.found), round(float(paths.log_density[0, 0]), 4)  # f(0) = 1/(e − 1)
    (1, -0.5413)
    """
    # Near 1 the optimum varies over some β/M.
    reach = jnp.minimum(jnp.log1p(objective.steepest / beta) + 6, REACH)
    even = reach * jnp.linspace(-1, 1, _STEPS + 1, dtype=beta.dtype)
    even = even.at[0].set(-REACH).at[-1].set(REACH)
    empty = jnp.zeros((_SOLUTIONS, _STEPS + 1), beta.dtype)

    def again(_: int, state: tuple[Array, Paths]) -> tuple[Array, Paths]:
        paths = _search(objective, beta, state[0])
        return fitted(_STEPS, paths.tau, paths.cdf, paths.log_density), paths

    start = (even, Paths(jnp.int32(0), even, empty, empty))
    return jax.lax.fori_loop(0, _MESHES, again, start)[1]


def _search(objective: Objective, beta: Array, tau: Array) -> Paths:
    """Brackets of a in which the miss changes sign, narrowed to the last digits but a few."""
    ratio = 1.01 * objective.steepest / beta  # for M was looked for on a grid
    largest = jnp.log(ratio) - jnp.log(-jnp.expm1(-ratio))
    last = _SHOTS - 1

    def narrow(i: Array, state: tuple[Array, Paths]) -> tuple[Array, Paths]:
        a = state[0]
        mass, fall = _shoot(objective, beta, a, tau)
        # At the bounds of a the signs are known; rounding must not say otherwise.
        over = (a > 0) & ((mass[-1] >= 1) | (a >= largest))
        over = jnp.where(i == 0, over, _once(over))
        changes = jnp.where(over[1:] != over[:-1], jnp.arange(last), last)
        index = jnp.sort(changes)[:_SOLUTIONS]
        low, high = a[index], a[jnp.minimum(index + 1, last)]
        cut = low[:, None] + (high - low)[:, None] * parts[None]
        taken = jnp.where(index < last, index, index[0])
        peak, mass, fall = _blend(a, mass, fall, taken)
        return cut.at[:, -1].set(high).reshape(-1), Paths(
            jnp.sum(index < last, dtype=jnp.int32),
            tau,
            (1 - mass)[::-1].T,
            (peak[None] - fall / beta)[::-1].T,
        )

    parts = jnp.linspace(0, 1, _SHOTS // _SOLUTIONS, dtype=tau.dtype)
    shots = largest * jnp.linspace(0, 1, _SHOTS, dtype=tau.dtype)
    empty = jnp.zeros((_SOLUTIONS, tau.size), tau.dtype)
    first = (shots, Paths(jnp.int32(0), tau, empty, empty))
    # Each narrows a bracket 15 times, to the last digits of a.
    rounds = 6 if tau.dtype == jnp.float64 else 5
    return jax.lax.fori_loop(0, rounds, narrow, first)[1]


def _once(over: Array) -> Array:
    """The signs of the shots in each bracket, which change once: what follows is rounding."""
    rows = over.reshape(_SOLUTIONS, -1)
    changed = jax.lax.cummax((rows != rows[:, :1]).astype(jnp.int32), axis=1) > 0
    return (rows[:, :1] ^ changed).reshape(-1)


def _blend(a: Array, mass: Array, fall: Array, index: Array) -> tuple[Array, Array, Array]:
    """a, F̄ and R̄ of the shots that end at F̄ = 1, between the shots at ``index`` and the next.

    a alone cannot hold the digits: a unit in its last place may move F̄ at u = 0 by much. Over so
    narrow a bracket shots are linear in a (derived).
    """
    start, gap = mass[-1, index], mass[-1, index + 1] - mass[-1, index]
    share = jnp.clip((1 - start) / jnp.where(gap == 0, 1, gap), 0, 1)

    def between(values: Array) -> Array:
        low, high = values[..., index], values[..., index + 1]
        return low + jnp.broadcast_to(share, low.shape) * (high - low)

    mass = between(mass)
    total = mass[-1:]
    return between(a) - jnp.log(total[0]), mass / total, between(fall)


def _shoot(objective: Objective, beta: Array, a: Array, tau: Array) -> tuple[Array, Array]:
    """F̄ and R̄ of every shot from u = 1 down, float[n + 1, shots] each.

    R̄ moves by the slope in the middle of a step, F̄ as if R̄ had moved evenly through it.
    """

    def step(
        state: tuple[Array, Array], inputs: tuple[Array, Array]
    ) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        mass, fall = state
        width, middle = inputs
        density = jnp.exp(a - fall / beta)
        half_way = jnp.maximum(1 - mass - width / 2 * density, 0)
        climb = width * objective.slope(half_way, jnp.broadcast_to(middle, a.shape))
        rate = climb / beta
        mean = jnp.where(rate > 1e-4, -jnp.expm1(-rate) / jnp.maximum(rate, 1e-4), 1 - rate / 2)
        state = (mass + width * density * mean, fall + climb)
        return state, state

    zeros = jnp.zeros_like(a)
    u = jax.nn.sigmoid(tau)
    middles = (u[1:] + u[:-1]) / 2
    _, path = jax.lax.scan(step, (zeros, zeros), (widths(tau)[::-1], middles[::-1]))
    mass, fall = (jnp.concatenate([zeros[None], values]) for values in path)
    return mass, fall
