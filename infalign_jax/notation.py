"""Procedures and Φ by the names that results.json and the command line write them with."""

import difflib
import re
from collections.abc import Sequence

import jax

from infalign_jax import frontier, procedures, transformations
from infalign_jax.procedures import Procedure
from infalign_jax.transformations import Transformation

Array = jax.Array

_PROCEDURES = (
    "standard", "best_of_4", "worst_of_4", "order_statistic(2,3)", "best_of_poisson(3)",
    "mixture(best_of_2:0.5,best_of_8:0.5)", "compose(worst_of_2,best_of_4)",
)  # fmt: skip
_TRANSFORMATIONS = ("identity", "log", "exponential(10)", "optimal(best_of_4)")


def procedure(name: str) -> Procedure:
    """The procedure of that name.

    ``standard``, ``best_of_4``, ``worst_of_4``, ``order_statistic(2,3)`` (the 2nd smallest of 3),
    ``best_of_poisson(3)``, ``mixture(best_of_2:0.5,best_of_8:0.5)`` and
    ``compose(worst_of_2,best_of_4)`` (the worst of 2, each the best of 4); any numbers and parts.

    Raises ValueError with the nearest name on anything else.

    >>> procedure("best_of_4").cdf(0.5)
    0.0625
    >>> procedure("compose(worst_of_2,best_of_4)").samples
    8
    """
    counted = re.fullmatch(r"(best|worst)_of_([1-9]\d*)", name)
    match _parts(name):
        case "standard", None:
            return procedures.standard()
        case _, None if counted:
            one = procedures.best_of_n if counted[1] == "best" else procedures.worst_of_n
            return one(int(counted[2]))
        case "order_statistic", str(ranks) if re.fullmatch(r"\s*\d+\s*,\s*\d+\s*", ranks):
            return procedures.order_statistic(*(int(rank) for rank in ranks.split(",")))
        case "best_of_poisson", str(mean):
            return procedures.best_of_poisson(_number(name, mean))
        case "mixture", str(parts):
            pairs = [part.rpartition(":") for part in _split(parts)]
            weights = [_number(name, weight) for _, _, weight in pairs]
            return procedures.mixture([procedure(part) for part, _, _ in pairs], weights)
        case "compose", str(parts) if len(both := _split(parts)) == 2:
            return procedures.compose(*(procedure(part) for part in both))
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


def procedure_order(name: str) -> tuple[int, int, str]:
    """A sort key: ``standard`` first, then best-of-N by N, then worst-of-N, then all others.

    >>> sorted(["worst_of_2", "best_of_8", "standard", "best_of_16"], key=procedure_order)
    ['standard', 'best_of_8', 'best_of_16', 'worst_of_2']
    """
    kind = re.match(r"standard$|best_of_\d|worst_of_\d|", name)
    place = ("s", "b", "w", "").index(kind[0][:1] if kind else "")
    return place, procedure(name).samples, name


def samples_needed(name: str) -> int:
    """The procedure's N: the fewest samples it can select from.

    >>> samples_needed("best_of_8")
    8
    """
    return procedure(name).samples


def _parts(name: str) -> tuple[str, str | None]:
    found = re.fullmatch(r"(\w+)(?:\((.*)\))?", name.strip())
    return (found[1], found[2]) if found else (name, "")


def _split(arguments: str) -> list[str]:
    """What stands between the commas that no bracket encloses."""
    parts, depth = [""], 0
    for letter in arguments:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _number(name: str, number: str) -> float:
    try:
        return float(number)
    except ValueError:
        raise ValueError(
            f"expected a number within {name!r}, got {number!r}: write it in figures, such as 0.5"
        ) from None


def _unknown(kind: str, name: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    return f"expected a {kind} such as {', '.join(known)}, got {name!r}: did you mean {nearest!r}?"
