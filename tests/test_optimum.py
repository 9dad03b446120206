"""The solver: exact for every family, N and β; its certificates; and no silent non-solution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from infalign_jax import frontier, optimum, shooting
from infalign_jax.objective import duel
from infalign_jax.procedures import (
    best_of_n,
    best_of_poisson,
    compose,
    mixture,
    order_statistic,
    standard,
    worst_of_n,
)

BETAS = jnp.geomspace(1e-3, 1e3, 7)
FAMILIES = {
    "standard": standard(),
    "best of 64": best_of_n(64),
    "best of 1024": best_of_n(1024),
    "worst of 1024": worst_of_n(1024),
    "17th of 64": order_statistic(17, 64),
    "512th of 1024": order_statistic(512, 1024),
    "best of Poisson 100": best_of_poisson(100.0),
    "best or worst of 16": mixture([best_of_n(16), worst_of_n(16)], [0.5, 0.5]),
    "worst of 71 or best of 144": mixture([worst_of_n(71), best_of_n(144)], [0.74, 0.26]),
    "worst of 4 bests of 8": compose(worst_of_n(4), best_of_n(8)),
}
PAIRS = [
    (worst_of_n(4), best_of_n(4)),
    (order_statistic(2, 381), compose(best_of_n(2), worst_of_n(7))),
    (order_statistic(229, 693), standard()),
]


def solve_all(procedure, betas, reference=None):
    return jax.vmap(lambda beta: frontier.optimal(procedure, beta, reference))(betas)


def certificate(best, procedure, beta, reference, points=200_000):
    """max |F − F[R(F)]| of a Φ by sums of its own: the trapezoid rule, in NumPy's arrays."""
    tau = np.linspace(-40, 40, points)
    u, rest = 1 / (1 + np.exp(-tau)), 1 / (1 + np.exp(tau))
    width = np.where(tau[1:] > 0, rest[:-1] - rest[1:], u[1:] - u[:-1])

    def running(values):
        return np.concatenate([[0], np.cumsum((values[1:] + values[:-1]) / 2 * width)])

    def law(reward):
        mass = running(np.exp((reward - reward.max()) / beta))
        return mass / mass[-1]

    cdf = law(np.asarray(best.transformation(jnp.asarray(u))))
    slope = procedure.density(jnp.asarray(cdf)) * reference.density(jnp.asarray(u))
    return np.max(np.abs(law(running(np.asarray(slope))) - cdf))


# A solver is compiled for each, in some four seconds: the fast tests leave a few out.
SLOW = {
    "standard",
    "best of 64",
    "worst of 1024",
    "best of 1024",
    "17th of 64",
    "best of Poisson 100",
    "worst of 71 or best of 144",
    "worst of 4 bests of 8",
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in FAMILIES]
)
@pytest.mark.usefixtures("x64")
def test_every_family_is_solved_in_double_precision_at_every_beta(name):
    best = solve_all(FAMILIES[name], BETAS)
    assert best.converged.all()
    assert best.residual.max() <= 1e-8
    assert jnp.all(jnp.diff(best.kl) < 0)
    assert jnp.all(jnp.diff(best.win_rate) < 0)


@pytest.mark.parametrize(
    "pair", [PAIRS[0], *(pytest.param(pair, marks=pytest.mark.slow) for pair in PAIRS[1:])]
)
@pytest.mark.usefixtures("x64")
def test_different_procedures_on_the_two_sides_are_solved_at_every_beta(pair):
    best = solve_all(pair[0], BETAS, pair[1])
    assert best.converged.all()
    assert jnp.all(jnp.diff(best.kl) < 0)


@pytest.mark.parametrize("name", ["best of 64", "worst of 4 bests of 8"])
def test_every_family_is_solved_in_single_precision_where_it_is_promised(name):
    with jax.enable_x64(False):
        betas = jnp.array([0.64, 3.0, 1e3])  # N/β of 100 at most
        assert solve_all(FAMILIES[name], betas).residual.max() <= 1e-5


@st.composite
def procedures(draw):
    n = draw(st.integers(1, 64))
    one = st.sampled_from([best_of_n(n), worst_of_n(n), order_statistic((n + 1) // 2, n)])
    if draw(st.booleans()):
        return mixture([draw(one), best_of_poisson(float(n))], [0.3, 0.7])
    return draw(one)


@given(procedures(), st.booleans(), st.floats(-3, 3))
# No shrinking: every example compiles a solver of its own.
@pytest.mark.slow
@settings(max_examples=3, deadline=None, derandomize=True, phases=[Phase.generate])
def test_what_is_called_solved_is_solved_by_sums_of_another_kind(procedure, against, exponent):
    beta = 10.0**exponent
    reference = best_of_n(3) if against else procedure
    with jax.enable_x64(True):
        best = frontier.optimal(procedure, beta, reference)
        error = certificate(best, procedure, beta, reference)
    assert bool(best.converged) == (float(best.residual) <= 1e-8)
    assert not best.converged or error < 1e-4


def test_a_start_too_far_off_is_not_called_solved(monkeypatch):
    # Shots that miss: what Newton's method makes of them must not pass for a solution.
    with jax.enable_x64(True):
        objective = duel(worst_of_n(64), worst_of_n(64))
        monkeypatch.setattr(shooting, "_MESHES", 1)
        monkeypatch.setattr(shooting, "_STEPS", 8)
        best = optimum.solve(objective, jnp.array(1e-3))
        assert best.residual > 1e-8
        assert not best.converged


@pytest.mark.usefixtures("x64")
def test_an_optimum_has_the_kl_that_was_asked_for():
    for kl in (1e-4, 0.5, 3.0):
        _, best = frontier.optimal_at_kl(best_of_n(64), kl)
        assert best.converged
        np.testing.assert_allclose(best.kl, kl, rtol=0.05 if kl == 3 else 1e-6)


def test_the_frontier_is_no_bound_where_no_optimum_is_found():
    broken = best_of_n(2)._replace(density=lambda q: jnp.where(q > 0.5, jnp.nan, 1.0) * q)
    with jax.debug_nans(False):
        assert jnp.isinf(frontier.frontier_win_rate(broken, 0.5))
