"""Procedures and Φ by the names that results.json and the command line write them with."""

import difflib
import re
from collections.abc import Sequence

import jax

from infalign_jax import frontier, procedures, transformations
from infalign_jax.procedures import Procedure
from infalign_jax.transformations import Transformation

Array = jax.Array

_PROCEDURES = ("standard", "best_of_4", "worst_of_4")
_TRANSFORMATIONS = ("identity", "log", "exponential(10)", "optimal(best_of_4)")


def procedure(name: str) -> Procedure:
    """The procedure of that name: ``standard``, ``best_of_4``, ``worst_of_8``, …

    Raises ValueError with the nearest name on anything else.

    >>> procedure("best_of_4").cdf(0.5)
    0.0625
    """
    match re.fullmatch(r"(standard)|(best|worst)_of_([1-9]\d*)", name):
        case re.Match() as found if found[1]:
            return procedures.standard()
        case re.Match() as found if found[2] == "best":
            return procedures.best_of_n(int(found[3]))
        case re.Match() as found:
            return procedures.worst_of_n(int(found[3]))
    raise ValueError(_unknown("procedure", name, _PROCEDURES))


def transformation(name: str, beta: float | Array) -> Transformation:
    """Φ of that name: ``identity``, ``log``, ``exponential(-10)``, ``optimal(best_of_4)``, …

    The optimum depends on β, the others do not. Raises ValueError with the nearest name on
    anything else.

    >>> round(float(transformation("exponential(2)", 0.1)(0.5)), 3)
    2.718
    """
    match _parts(name):
        case "identity", None:
            return transformations.identity
        case "log", None:
            return transformations.log
        case "exponential", str(exponent):
            return transformations.exponential(_number(name, exponent))
        case "optimal", str(target):
            return frontier.optimal(procedure(target), beta).transformation
    raise ValueError(_unknown("transformation", name, _TRANSFORMATIONS))


def beta_for_kl(name: str, kl: float | Array) -> Array:
    """The β, float[], at which a perfect solver with Φ of that name has this KL, in nats.

    Raises ValueError with the nearest name where there is no such Φ.

    >>> round(float(beta_for_kl("log", 0.6362943611)), 4)  # best of 4
    0.3333
    """
    match _parts(name):
        case "optimal", str(target):
            return frontier.optimal_at_kl(procedure(target), kl)[0]
    return frontier.beta_for_kl(transformation(name, 1.0), kl)


def canonical(name: str) -> str:
    """The one spelling of a Φ's name, for keys and tables.

    Raises ValueError with the nearest name where there is no such Φ.

    >>> canonical("exponential(10.0)")
    'exponential(10)'
    """
    match _parts(name):
        case "identity" | "log" as plain, None:
            return plain
        case "exponential", str(exponent):
            t = _number(name, exponent)
            transformations.exponential(t)
            return f"exponential({t:.17g})" if t != int(t) else f"exponential({int(t)})"
        case "optimal", str(target):
            procedure(target)
            return f"optimal({target})"
    raise ValueError(_unknown("transformation", name, _TRANSFORMATIONS))


def procedure_order(name: str) -> tuple[int, int]:
    """A sort key: ``standard`` first, then best-of-N by N, then worst-of-N.

    >>> sorted(["worst_of_2", "best_of_8", "standard", "best_of_16"], key=procedure_order)
    ['standard', 'best_of_8', 'best_of_16', 'worst_of_2']
    """
    procedure(name)
    kind, _, count = name.partition("_of_")
    return ("standard", "best", "worst").index(kind), int(count or 1)


def samples_needed(name: str) -> int:
    """The procedure's N: the fewest samples it can select from.

    >>> samples_needed("best_of_8")
    8
    """
    return procedure_order(name)[1]


def _parts(name: str) -> tuple[str, str | None]:
    found = re.fullmatch(r"(\w+)(?:\(([^()]*)\))?", name.strip())
    return (found[1], found[2]) if found else (name, "")


def _number(name: str, exponent: str) -> float:
    try:
        return float(exponent)
    except ValueError:
        raise ValueError(
            f"expected a number within {name!r}, got {exponent!r}: write exponential(10)"
        ) from None


def _unknown(kind: str, name: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    return f"expected a {kind} such as {', '.join(known)}, got {name!r}: did you mean {nearest!r}?"
