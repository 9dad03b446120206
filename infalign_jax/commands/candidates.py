"""The Φ that a command compares, each solved at the KLs or the βs asked for."""

import functools
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from infalign_jax import frontier, notation
from infalign_jax.procedures import Procedure
from infalign_jax.transformations import Transformation

Array = jax.Array

USUAL = ("identity", "log", "exponential(10)", "exponential(-10)")
OPTIMUM = "optimum"  # of two procedures that differ: notation has no name for it


class Contest(NamedTuple):
    """How both sides are decoded.

    >>> contest("best_of_4", None).optimum
    'optimal(best_of_4)'
    """

    procedure: Procedure  # of the policy
    reference: Procedure
    names: tuple[str, str]  # of the two
    optimum: str  # the name of the best Φ


class Candidate(NamedTuple):
    """Φ at one β.

    >>> Candidate._fields
    ('name', 'transformation', 'beta', 'kl', 'win_rate', 'residual', 'converged')
    """

    name: str
    transformation: Transformation
    beta: float
    kl: float  # that a perfect solver has, in nats
    win_rate: float  # of a perfect solver, after the procedures
    residual: float | None  # of an optimum: `frontier.Optimum`
    converged: bool


def contest(procedure: str, reference_procedure: str | None) -> Contest:
    """The contest of two procedures by name; the reference's is the policy's own unless given.

    Raises ValueError with the nearest name where there is no such procedure.

    >>> contest("best_of_4", "standard").optimum
    'optimum'
    """
    other = procedure if reference_procedure is None else reference_procedure
    laws = notation.procedure(procedure), notation.procedure(other)
    best = f"optimal({procedure})" if other == procedure else OPTIMUM
    return Contest(*laws, (procedure, other), best)


def names(asked: Sequence[str], about: Contest) -> list[str]:
    """The names to compare, each once, `USUAL` where none is asked for; the optimum always.

    Raises ValueError with the nearest name where there is no such Φ.

    >>> names(["log", "exponential(5.0)"], contest("best_of_4", None))
    ['log', 'exponential(5)', 'optimal(best_of_4)']
    """
    known = [notation.canonical(name) for name in asked or USUAL]
    return list(dict.fromkeys([*known, about.optimum]))


def at_kls(name: str, about: Contest, kls: Sequence[float]) -> list[Candidate]:
    """Φ of that name where a perfect solver has these KLs, in nats, or comes nearest to them.

    >>> (found,) = at_kls("log", contest("standard", None), [0.6362943611])
    >>> round(found.beta, 4), round(found.win_rate, 3)  # best of 4
    (0.3333, 0.8)
    """
    if (pair := _optimised(name, about)) is None:
        phi, wanted = notation.transformation(name, 1.0), jnp.asarray(kls, jnp.result_type(float))
        return _fixed(name, about, frontier.beta_for_kl(phi, wanted))
    found = [frontier.optimal_at_kl(pair[0], kl, pair[1]) for kl in kls]
    return [_optimum(name, about, beta, best) for beta, best in found]


def check_reach(found: Sequence[Candidate], kls: Sequence[float]) -> None:
    """Raises ValueError where a KL is out of reach of what can be computed.

    An optimum is let through: it may jump over a KL, or not have converged there, and the table
    says so.

    >>> check_reach(at_kls("log", contest("standard", None), [1e4]), [1e4])  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: expected a KL that log can be computed at, got 10000 (the nearest is 9.13): ask ...
    """
    for kl, one in zip(kls, found, strict=True):
        if one.residual is None and is_elsewhere(one, kl):
            raise ValueError(
                f"expected a KL that {one.name} can be computed at, got {kl:g} (the nearest is "
                f"{one.kl:.3g}): ask for another"
            )


def is_elsewhere(one: Candidate, kl: float) -> bool:
    """Whether the candidate's KL is not the one that was asked for.

    >>> (found,) = at_betas("log", contest("standard", None), [1 / 3])
    >>> is_elsewhere(found, 0.6363), is_elsewhere(found, 0.7)
    (False, True)
    """
    return not abs(one.kl / kl - 1) < 0.01


def limit(best: Candidate, kl: float) -> float:
    """The highest win rate at a KL, given the optimum there; nan where that could not be found.

    ``best`` may lie beside the KL where the optimum of two procedures jumps over it: the limit is
    the envelope of `frontier.frontier_win_rate`.

    >>> about = contest("best_of_4", None)
    >>> (best,) = at_kls(about.optimum, about, [0.5])
    >>> round(limit(best, 0.5), 3)
    0.873
    """
    highest = best.win_rate + best.beta * (kl - best.kl)
    missed = best.name != OPTIMUM and is_elsewhere(best, kl)
    return highest if best.converged and not missed and highest <= 1 + 1e-6 else math.nan


def at_betas(name: str, about: Contest, betas: Sequence[float]) -> list[Candidate]:
    """Φ of that name at these β.

    >>> (found,) = at_betas("optimal(best_of_4)", contest("best_of_4", None), [0.25])
    >>> round(found.kl, 3), round(found.win_rate, 3), found.converged
    (0.44, 0.859, True)
    """
    each = jnp.asarray(betas, jnp.result_type(float))
    if (pair := _optimised(name, about)) is None:
        return _fixed(name, about, each)
    found = [frontier.optimal(pair[0], beta, pair[1]) for beta in each]
    return [_optimum(name, about, beta, best) for beta, best in zip(each, found, strict=True)]


def _optimised(name: str, about: Contest) -> tuple[Procedure, Procedure] | None:
    """The procedures whose optimum that is, None for a Φ that depends on no β."""
    if name == OPTIMUM:
        return about.procedure, about.reference
    if target := re.fullmatch(r"optimal\((.*)\)", name):
        return (notation.procedure(target[1]),) * 2
    return None


def _fixed(name: str, about: Contest, betas: Array) -> list[Candidate]:
    phi = notation.transformation(name, 1.0)
    kl, win_rate = frontier.curve(phi, about.procedure, betas, about.reference)
    rows = zip(betas.tolist(), kl.tolist(), win_rate.tolist(), strict=True)
    return [Candidate(name, phi, *row, None, True) for row in rows]


def _optimum(name: str, about: Contest, beta: Array, best: frontier.Optimum) -> Candidate:
    phi = jax.tree_util.Partial(_evaluated, best.transformation)
    kl, win_rate = _outcome(best.transformation, beta, about.procedure, about.reference)
    return Candidate(
        name,
        phi,
        float(beta),
        float(kl),
        float(win_rate),
        float(best.residual),
        bool(best.converged),
    )


@functools.partial(jax.jit, static_argnames=("procedure", "reference"))
def _outcome(
    transformation: Transformation, beta: Array, procedure: Procedure, reference: Procedure
) -> tuple[Array, Array]:
    return frontier.curve(transformation, procedure, beta, reference)


@jax.jit
def _evaluated(transformation: Transformation, u: Array) -> Array:
    """Compiled once a shape, where an optimum by itself is compiled at every call."""
    return transformation(u)
