"""The picture of `infalign frontier`: win rate against KL, each Φ a line under the frontier."""

from itertools import cycle
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from infalign_jax.commands import candidates
from infalign_jax.commands.candidates import OPTIMUM, Contest
from infalign_jax.report_style import GRID, INK, LEAD, PALETTE, PAPER, STYLE, image, words

_BETAS = np.geomspace(60, 0.004, 96)  # from KL 0.0001 to beyond 2
_KLS = np.linspace(0.02, 1, 48) ** 2  # in parts of the reach


def draw(result: dict[str, Any]) -> Figure:
    """A line and the rows' points for each Φ, the frontier thick above them.

    `result` is what `frontier.compare` returned. Where the optimum has not converged it is left
    out of its line.

    >>> names = dict.fromkeys(("procedure", "reference_procedure"), "standard")
    >>> rows = [{"transformation": "log", "kl": 0.5, "win_rate": 0.767}]
    >>> axes = draw({**names, "optimum": "optimal(standard)", "rows": rows}).axes[0]
    >>> [text.get_text() for text in axes.get_legend().get_texts()]
    ['frontier', 'log', 'reference']
    """
    about = candidates.contest(result["procedure"], result["reference_procedure"])
    rows, best = result["rows"], result["optimum"]
    reach = 1.1 * max(row["kl"] for row in rows)
    names = dict.fromkeys(row["transformation"] for row in rows if row["transformation"] != best)
    with rc_context(STYLE):
        figure = Figure(figsize=LEAD, layout="constrained")
        axes = figure.add_subplot()
        kl, limit = line(best, about, reach)
        axes.fill_between(kl, limit, 1.1, color=GRID, alpha=0.5, linewidth=0)
        axes.plot(kl, limit, color=INK, linewidth=2.6, label="frontier")
        for name, (colour, marker) in zip(names, cycle(PALETTE), strict=False):
            axes.plot(*line(name, about, reach), color=colour, linewidth=1.2)
            mine = [(row["kl"], row["win_rate"]) for row in rows if row["transformation"] == name]
            axes.plot(*np.transpose(mine), marker, color=colour, markersize=6, label=name)
        axes.plot(0, limit[0], "o", markerfacecolor=PAPER, markeredgecolor=INK, label="reference")
        low = min(limit[0], *(row["win_rate"] for row in rows))
        axes.set(xlim=(-0.025 * reach, reach), ylim=(low - 0.02, limit[-1] + 0.025))
        other = "" if best != OPTIMUM else f", reference {words(about.names[1]).lower()}"
        axes.set(title=words(about.names[0]) + other, xlabel="KL from the reference (nats)")
        axes.set(ylabel="win rate against the reference")
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.legend(loc="lower right", borderaxespad=1)
    return figure


def line(name: str, about: Contest, reach: float) -> tuple[np.ndarray, np.ndarray]:
    """KL and win rate [n] of a perfect solver with Φ of that name, from KL 0 to `reach`.

    >>> kl, win_rate = line("log", candidates.contest("standard", None), 0.6362943611)
    >>> [round(float(x), 3) for x in (win_rate[0], win_rate[-1])]  # at the end best of 4
    [0.5, 0.8]
    """
    start = candidates.at_betas("identity", about, [1e6])
    if name == OPTIMUM or name.startswith("optimal("):
        found = candidates.at_betas(name, about, _BETAS.tolist())
    else:
        found = candidates.at_kls(name, about, (reach * _KLS).tolist())
    kept = [(one.kl, one.win_rate) for one in [*start, *found] if one.converged]
    kl, win_rate = np.transpose(kept)
    inside, end = kl < reach, min(reach, kl.max())
    return np.append(kl[inside], end), np.append(win_rate[inside], np.interp(end, kl, win_rate))


def picture(result: dict[str, Any], suffix: str) -> bytes:
    """The figure as the bytes of a file whose name ends in `suffix`: .png, .pdf or .svg.

    >>> names = dict.fromkeys(("procedure", "reference_procedure"), "standard")
    >>> rows = [{"transformation": "log", "kl": 0.5, "win_rate": 0.767}]
    >>> picture({**names, "optimum": "optimal(standard)", "rows": rows}, ".pdf")[:4]
    b'%PDF'
    """
    return image(draw(result), suffix.lower().removeprefix("."))
