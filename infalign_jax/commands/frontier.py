"""`infalign frontier`: what each Φ reaches at a KL or a β, and how far under the frontier that is.

As JSON: ``procedure``, ``reference_procedure``, ``optimum`` (the name of the best Φ in ``rows``),
``asked_kl`` and ``asked_beta`` (a list or null), and ``rows``, each of ``transformation``,
``beta``, ``kl`` (nats), ``win_rate``, ``below_frontier`` (the frontier's win rate at this row's KL
less this one's; null where it could not be computed), ``residual`` (of an optimum, else null) and
``converged``; win rates are shares.
"""

import math
from collections.abc import Sequence
from typing import Any

from infalign_jax.commands import candidates
from infalign_jax.commands.candidates import Candidate, Contest
from infalign_jax.commands.printing import points, table

USUAL_KLS = (0.1, 0.25, 0.5, 1.0, 2.0)


def compare(
    procedure: str,
    *,
    reference_procedure: str | None = None,
    transformations: Sequence[str] = (),
    kls: Sequence[float] = (),
    betas: Sequence[float] = (),
) -> dict[str, Any]:
    """What a perfect solver reaches with each Φ, KL by KL or, where given, β by β.

    The optimum is always among the Φ; the others are `candidates.USUAL` unless given. KLs are
    `USUAL_KLS` unless KLs or βs are given. In JAX's default float type.

    Raises ValueError on a name that is unknown or a KL out of reach.

    >>> found = compare("best_of_4", transformations=["identity"], kls=[0.5])
    >>> [(row["transformation"], round(row["win_rate"], 3)) for row in found["rows"]]
    [('identity', 0.8), ('optimal(best_of_4)', 0.873)]
    >>> round(found["rows"][0]["below_frontier"], 3)
    0.073
    """
    about = candidates.contest(procedure, reference_procedure)
    names = candidates.names(transformations, about)
    if betas:
        solved = {name: candidates.at_betas(name, about, betas) for name in names}
        rows = _by_beta(about, solved)
    else:
        kls = kls or USUAL_KLS
        solved = {}
        for name in names:
            solved[name] = candidates.at_kls(name, about, kls)
            candidates.check_reach(solved[name], kls)
        best = solved[about.optimum]
        rows = [_row(solved[name][i], best[i]) for i in range(len(kls)) for name in names]
    asked = {"asked_kl": None if betas else list(kls), "asked_beta": list(betas) or None}
    procedures = dict(zip(("procedure", "reference_procedure"), about.names, strict=True))
    return {**procedures, "optimum": about.optimum, **asked, "rows": rows}


def _by_beta(about: Contest, solved: dict[str, list[Candidate]]) -> list[dict[str, Any]]:
    """Rows in which each Φ has a KL of its own, and so a frontier of its own to be held to."""
    found = [one for same in zip(*solved.values(), strict=True) for one in same]
    others = [one for one in found if one.name != about.optimum]
    best = candidates.at_kls(about.optimum, about, [one.kl for one in others])
    limit = {id(one): top for one, top in zip(others, best, strict=True)}
    return [_row(one, limit.get(id(one), one)) for one in found]


def _row(one: Candidate, best: Candidate) -> dict[str, Any]:
    return {
        "transformation": one.name,
        "beta": one.beta,
        "kl": one.kl,
        "win_rate": one.win_rate,
        "below_frontier": candidates.limit(best, one.kl) - one.win_rate,
        "residual": one.residual,
        "converged": one.converged,
    }


def text(result: dict[str, Any]) -> str:
    """What `compare` returned as a table, and a line for each row that is not what was asked for.

    >>> print(text(compare("standard", transformations=["identity"], kls=[0.5])))
    standard, reference standard: what a perfect solver reaches
    <BLANKLINE>
    Φ                       β   KL  win rate %  below the frontier
    identity           0.2428  0.5       77.37                0.00
    optimal(standard)  0.2428  0.5       77.37                0.00
    """
    rows = result["rows"]
    cells = [
        [row["transformation"], *(f"{row[name]:.4g}" for name in ("beta", "kl"))]
        + [points(row[name], 2) for name in ("win_rate", "below_frontier")]
        for row in rows
    ]
    header = ["Φ", "β", "KL", "win rate %", "below the frontier"]
    title = f"{result['procedure']}, reference {result['reference_procedure']}"
    lines = [f"{title}: what a perfect solver reaches", "", table(header, cells)]
    lines += [
        f"Not converged: {row['transformation']} at β = {row['beta']:.4g} (residual "
        f"{row['residual']:.1g}); do not trust this row, nor a distance to it."
        for row in rows
        if not row["converged"]
    ]
    if any(math.isnan(row["below_frontier"]) for row in rows):
        lines.append("–: the frontier could not be computed at that KL.")
    if missed := _missed(result):
        lines.append(
            f"The optimum was not found at KL {', '.join(missed)}: shown is the nearest one found."
        )
        if candidates.OPTIMUM in (row["transformation"] for row in rows):
            lines.append(
                "Where procedures differ it may jump over a KL; there only a policy that spends "
                "its KL unevenly over prompts is on the frontier."
            )
    return "\n".join(lines)


def _missed(result: dict[str, Any]) -> list[str]:
    """The KLs asked for at which the optimum lies elsewhere."""
    best = [row for row in result["rows"] if row["transformation"] == result["optimum"]]
    pairs = zip(result["asked_kl"] or (), best, strict=False)
    return [f"{kl:g}" for kl, row in pairs if not abs(row["kl"] / kl - 1) < 0.01]
