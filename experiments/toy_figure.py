"""The paper's toy figure: what win rate each Φ buys with its KL, and what is the most one can buy.

Command:   python experiments/toy_figure.py
Cost:      under a minute on two CPU cores, compilation included
Expected:  the picture and the table of experiments/results/toy/README.md

No model and no samples: on [0, 1] a perfect solver of Φ and β has the density e^{Φ(u)/β}/Z
(*InfAlign*, arXiv 2412.19792, section 4). The black line is the fixed point, β by β; the others
are read off at given KLs. On the line of log u lie the policies that *are* best of 2, 4, … of the
reference: β = 1/(N−1).
"""

import functools
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from infalign_jax import frontier, notation
from infalign_jax.report_style import GRID, INK, MUTED, PALETTE, PAPER, STYLE, image, words

COUNTS = (2, 4, 8, 16)  # N
PROCEDURES = ("standard", *(f"{kind}_of_{n}" for kind in ("best", "worst") for n in COUNTS))
REACH = 1.4  # nats
KLS = np.arange(1, 141) / 100  # nats, where the lines of Φ are drawn
NAMES = ("identity", "log", "exponential(±5)", "exponential(±10)")  # − for worst-of-N
TABLE = (0.1, 0.5, 1.0)  # of these, the table's


class Line(NamedTuple):
    """The fixed point, β falling: float64[n] each."""

    beta: np.ndarray
    kl: np.ndarray
    win_rate: np.ndarray


def transformations(procedure: str) -> tuple[str, ...]:
    """The paper's candidates: exponentials that rise to the top, or fall off at the bottom."""
    sign = "-" if procedure.startswith("worst") else ""
    return "identity", "log", f"exponential({sign}5)", f"exponential({sign}10)"


def fixed_point(procedure: str, ratio: float = 0.85, reach: float = REACH) -> Line:
    """The optimum, β falling by `ratio`, up to KL `reach` or to where the solver converges last."""
    law, beta, found = notation.procedure(procedure), 16.0, []
    while not found or found[-1][1] < reach:
        best = frontier.optimal(law, beta)
        if not best.converged:
            break
        found.append((beta, float(best.kl), float(best.win_rate)))
        beta *= ratio
    return Line(*np.transpose(found))


def at_kl(procedure: str, line: Line, kl: float) -> float:
    """The highest win rate at this KL; NaN beyond the line.

    From the optimum nearest on a finer β, along its tangent: dW/dKL = β.
    """
    if kl > line.kl[-1]:
        return np.nan
    beta = float(np.exp(np.interp(np.log(kl), np.log(line.kl), np.log(line.beta))))
    best = frontier.optimal(notation.procedure(procedure), beta)
    return float(best.win_rate + beta * (kl - best.kl))


@functools.cache
def betas(transformation: str, kls: tuple[float, ...]) -> jax.Array:
    """The β, float64[n], at which Φ's policies have these KLs, whatever the procedure."""
    return frontier.beta_for_kl(notation.transformation(transformation, 1.0), jnp.asarray(kls))


def reached(transformation: str, procedure: str, kls: np.ndarray) -> np.ndarray:
    """The win rate, float64[n], of perfect solvers of Φ with these KLs."""
    phi, law = notation.transformation(transformation, 1.0), notation.procedure(procedure)
    return np.asarray(frontier.curve(phi, law, betas(transformation, tuple(kls)))[1])


def distilled(procedure: str) -> tuple[np.ndarray, np.ndarray]:
    """KL and win rate of the policies that are best-of-N of the reference, N in COUNTS."""
    phi, law = notation.transformation("log", 1.0), notation.procedure(procedure)
    kl, win_rate = frontier.curve(phi, law, 1 / (jnp.asarray(COUNTS, float) - 1))
    return np.asarray(kl), np.asarray(win_rate)


def draw(axes: Axes, procedure: str, line: Line) -> None:
    """One procedure: every Φ, the fixed point, and the best-of-N policies on the line of log."""
    start = (np.zeros(1), np.full(1, 0.5))
    kl, limit = (np.append(*pair) for pair in zip(start, line[1:], strict=True))
    axes.fill_between(kl, limit, 1.1, color=GRID, alpha=0.5, linewidth=0)
    axes.plot(kl, limit, color=INK, linewidth=2.6)
    for phi, (colour, _) in zip(transformations(procedure), PALETTE, strict=False):
        axes.plot(np.append(0, KLS), np.append(0.5, reached(phi, procedure, KLS)), color=colour)
    log_colour, marker = PALETTE[1]
    for n, x, y in zip(COUNTS, *distilled(procedure), strict=True):
        if x < REACH:
            axes.plot(x, y, marker, color=log_colour, markeredgecolor=PAPER, markersize=7, zorder=3)
            axes.annotate(
                str(n), (x, y), (4, -12), textcoords="offset points", color=MUTED, fontsize=8
            )
    axes.set(xlim=(0, REACH), ylim=(0.48, 1.01), title=words(procedure))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def figure(lines: dict[str, Line]) -> Figure:
    """The standard win rate and a legend, then a row of best-of-N and one of worst-of-N."""
    drawn = Figure(figsize=(10, 5), layout="constrained")
    grid = drawn.subplots(2, 5, sharex=True, sharey=True)
    panels = [grid[0, 0], *grid[0, 1:], *grid[1, 1:]]
    for axes, (procedure, line) in zip(panels, lines.items(), strict=True):
        draw(axes, procedure, line)
    grid[0, 0].tick_params(labelbottom=True)
    grid[1, 0].axis("off")
    looks = zip(NAMES, PALETTE, strict=False)
    handles = [Line2D([], [], color=INK, linewidth=2.6, label="fixed point")]
    handles += [Line2D([], [], color=colour, label=name) for name, (colour, _) in looks]
    colour, marker = PALETTE[1]
    handles.append(Line2D([], [], color=colour, marker=marker, ls="", label="is best of 2, 4, 8"))
    grid[1, 0].legend(handles=handles, loc="center left")
    drawn.supxlabel("KL from the reference (nats)", fontsize=9.5)
    drawn.supylabel("win rate against the reference", fontsize=9.5)
    return drawn


def table(lines: dict[str, Line]) -> list[str]:
    """Win rates in per cent at the KLs of TABLE, a row a procedure and KL, a column a Φ."""
    at = np.searchsorted(KLS, TABLE)
    rows = [
        "| procedure | KL | identity | log | exponential(±5) | exponential(±10) | fixed point |"
    ]
    rows.append("|---|---|---|---|---|---|---|")
    for procedure, line in lines.items():
        won = [reached(phi, procedure, KLS)[at] for phi in transformations(procedure)]
        for kl, *rates in zip(TABLE, *won, strict=True):
            rates.append(at_kl(procedure, line, kl))
            cells = ["–" if np.isnan(rate) else f"{100 * rate:.2f}" for rate in rates]
            rows.append(f"| {words(procedure)} | {kl} | {' | '.join(cells)} |")
    return rows


def main() -> None:
    start = time.perf_counter()
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results/toy"
    jax.config.update("jax_enable_x64", True)
    lines = {procedure: fixed_point(procedure) for procedure in PROCEDURES}
    print(*table(lines), sep="\n")
    out.mkdir(parents=True, exist_ok=True)
    with rc_context(STYLE):
        (out / "toy.png").write_bytes(image(figure(lines), "png"))
    print(f"{time.perf_counter() - start:.0f} s, jax {jax.__version__}")


if __name__ == "__main__":
    main()
