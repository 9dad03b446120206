"""What calibrating with K reference rewards costs, and by which estimator of the quantile least.

Command:   XLA_FLAGS=--xla_cpu_multi_thread_eigen=false python experiments/finite_k.py
Cost:      4 minutes of one thread, beside other work
Expected:  experiments/results/finite_k/README.md: at KL 0.5 ranks among 128 cost exponential(10)
           0.7 points of best-of-4, whatever the estimator, which matters by up to 0.3, at K ≤ 16

No model: for one prompt the K reference rewards cut [0, 1] into K + 1 cells of true quantile, whose
widths are Dirichlet(1, …, 1). A reward by rank is one number T(m) a cell, so a perfect solver's
density is constant in each, f = e^{T/β}/Z with that prompt's own Z, and its KL and win rate are
exact sums. One β serves all prompts and makes the mean KL what is asked for.
"""

import functools
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from infalign_jax import frontier, notation, posterior, quadrature, report_style
from infalign_jax.procedures import Procedure
from infalign_jax.transformations import Transformation

Row = dict[str, Any]

COUNTS = (4, 8, 16, 32, 64, 128, 256, 512)  # K
CELLS, FEWEST = 64_000, 250  # prompts times K, but so many prompts at least
KLS = (0.5, 0.25)
TRANSFORMATIONS = {
    "best_of_4": ("identity", "log", "exponential(5)", "exponential(10)", "optimal(best_of_4)"),
    "worst_of_4": ("identity", "exponential(-10)", "optimal(worst_of_4)"),
}
LEVELS = 10  # equally likely values of a reward with ties
NODES, WEIGHTS = np.polynomial.legendre.leggauss(4)  # exact to degree 7, as best-of-4 needs


@functools.cache
def target(name: str, kl: float) -> tuple[Transformation, float]:
    """Φ and the β at which a perfect solver that knows u has this KL."""
    beta = notation.beta_for_kl(name, kl)
    return jax.tree_util.Partial(notation.transformation(name, beta)), float(beta)


@jax.jit
def values(phi: Transformation, u: jax.Array) -> jax.Array:
    return phi(u)


@functools.partial(jax.jit, static_argnums=3)
def means(phi: Transformation, beta: float, top: float, k: int) -> tuple[jax.Array, jax.Array]:
    """E[Φ(u) | m] and β·log E[e^{Φ(u)/β} | m], float64[K + 1]; `top` keeps the latter finite."""
    mean = posterior.mean(lambda u: jnp.exp((phi(u) - top) / beta), k)
    return posterior.mean(phi, k), top + beta * jnp.log(mean)


def estimators(phi: Transformation, beta: float, k: int) -> dict[str, np.ndarray]:
    """T(m), float64[K + 1], by every way to estimate Φ(u) from m of K reference rewards below."""
    m = np.arange(COUNTS[-1] + 1.0)  # one length for all K: nothing recompiles
    quantiles = {
        "mid-rank": (m + 0.5) / (k + 1),
        "m/K": m / k,
        "(m+1)/(K+1)": (m + 1) / (k + 1),
        "m/(K+1)": m / (k + 1),
    }
    by_rank = np.asarray(values(phi, np.minimum(list(quantiles.values()), 1)))[:, : k + 1]
    tables = dict(zip(quantiles, by_rank, strict=True))  # log 0 is −∞: such a one is never given
    found = (np.asarray(table) for table in means(phi, beta, by_rank[2, -1], k))
    return tables | dict(zip(("posterior mean", "posterior log-mean"), found, strict=True))


def tilt(widths: np.ndarray, table: np.ndarray, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """f, float[n, cells], and KL, float[n], of the perfect solver; `table` float[n or 1, cells]."""
    scaled = (table - table.max(axis=1, keepdims=True)) / beta
    grown = np.exp(scaled)
    z, risen = (
        np.einsum("nc,nc->n", widths, np.broadcast_to(part, widths.shape))
        for part in (grown, grown * np.maximum(scaled, -800))  # 0, not 0·∞, where Φ is −∞
    )
    return grown / z[:, None], risen / z - np.log(z)


def beta_for_kl(widths: np.ndarray, table: np.ndarray, kl: float) -> float:
    """The β, one for all prompts, at which the mean KL over prompts is `kl`, by bisection."""
    span = np.ptp(table[np.isfinite(table)])
    low, high = np.log(1e-4 * span), np.log(1e3 * span)
    for _ in range(30):
        middle = (low + high) / 2
        reached = np.mean(tilt(widths, table, np.exp(middle))[1])
        low, high = (middle, high) if reached > kl else (low, middle)
    return float(np.exp((low + high) / 2))


def loss_in_cells(
    widths: np.ndarray, density: np.ndarray, procedure: Procedure
) -> tuple[np.ndarray, np.ndarray]:
    """1 − W = ∫ G(F) g du, float[n], and R(u) = ∫₀^u g(F) g du averaged in each cell.

    R is the gradient of W: in one cell F is linear, and the integrands are polynomials.
    """
    mass = widths * density
    before, start = np.cumsum(mass, axis=1) - mass, np.cumsum(widths, axis=1) - widths
    lost, whole, inside = (np.zeros_like(mass) for _ in range(3))
    for x, weight in zip((NODES + 1) / 2, WEIGHTS / 2, strict=True):
        cdf, g_ref = before + x * mass, procedure.density(start + x * widths)
        slope = weight * widths * procedure.density(cdf) * g_ref
        lost += weight * widths * procedure.cdf(cdf) * g_ref
        whole += slope
        inside += (1 - x) * slope
    return lost.sum(axis=1), np.cumsum(whole, axis=1) - whole + inside


def loss_with_ties(widths: np.ndarray, density: np.ndarray, procedure: Procedure) -> np.ndarray:
    """1 − W, float[n], where all responses of a cell have one reward: ties count one half."""
    served, met = (
        np.diff(procedure.cdf(np.cumsum(mass, axis=1)), axis=1, prepend=0)
        for mass in (widths * density, widths)
    )
    above = 1 - np.cumsum(met, axis=1)
    return np.sum(served * (above + met / 2), axis=1)


def at_equal_kl(
    widths: np.ndarray, table: np.ndarray, kl: float, procedure: Procedure, ties: bool = False
) -> np.ndarray:
    """Each prompt's win rate, float[n], led back to the mean KL: W − (dW/dKL)·(KL − kl).

    Their mean is that of W, and their spread that of an estimate at *equal* KL, as β is set by
    the same prompts (delta method).
    """
    beta = beta_for_kl(widths, table, kl)

    def outcome(beta: float) -> tuple[np.ndarray, np.ndarray]:
        density, kls = tilt(widths, table, beta)
        lost = loss_with_ties if ties else (lambda *args: loss_in_cells(*args)[0])
        return kls, 1 - lost(widths, density, procedure)

    (kls, wins), (kls_near, wins_near) = outcome(beta), outcome(1.001 * beta)
    slope = np.mean(wins_near - wins) / np.mean(kls_near - kls)
    return wins - slope * (kls - kl)


def best_by_rank(widths: np.ndarray, start: np.ndarray, kl: float, law: Procedure) -> np.ndarray:
    """The table T, float64[K + 1], of highest mean win rate at this mean KL: no estimator beats it.

    Where E W − β·E KL is stationary in T, E[p·((R̄ − T) − Σ p·(R̄ − T))] = 0 for every m, with p a
    cell's mass under the policy, R̄ the average of R there, E over prompts (derived: R̄ and T + const
    are the gradients of W and β·KL in p, and dp = p·(dT − Σ p dT)/β). Damped steps lead there.
    """
    table = start[None]
    for _ in range(16):
        density, _ = tilt(widths, table, beta_for_kl(widths, table, kl))
        mass = widths * density
        excess = loss_in_cells(widths, density, law)[1] - table
        excess -= np.sum(mass * excess, axis=1, keepdims=True)
        table = table + 0.3 * np.mean(mass * excess, axis=0) / np.mean(mass, axis=0)
    return table[0]


def errors(phi: Transformation, table: np.ndarray) -> Row:
    """Bias and variance of T(m) for Φ(u), m binomial given u, u uniform; in parts of Φ's spread."""
    k = len(table) - 1
    u, weights = (np.minimum(x, 1 - 2**-53) for x in quadrature.grid())
    truth, m = np.asarray(values(phi, u)), np.arange(k + 1.0)[:, None]
    log_choose = np.concatenate([[0], np.cumsum(np.log(np.arange(k, 0, -1) / np.arange(1, k + 1)))])
    chance = np.exp(log_choose[:, None] + m * np.log(u) + (k - m) * np.log1p(-u))
    mean = table @ chance
    variance = np.sum(chance * (table[:, None] - mean) ** 2, axis=0)
    middle = weights @ truth
    spread = np.sqrt(weights @ (truth - middle) ** 2)
    return {
        "bias_of_mean": (weights @ mean - middle) / abs(middle),
        "rms_bias": np.sqrt(weights @ (mean - truth) ** 2) / spread,
        "rms_deviation": np.sqrt(weights @ variance) / spread,
    }


def compared(wins: dict[str, np.ndarray], infinite: float, about: Row) -> list[Row]:
    """One row an estimator: points lost to K = ∞, and gained over mid-rank on the same prompts."""

    def row(name: str) -> Row:
        gain, root = wins[name] - wins["mid-rank"], np.sqrt(len(wins[name]))
        return about | {
            "estimator": name,
            "prompts": len(wins[name]),
            "infinite": 100 * infinite,
            "win_rate": 100 * np.mean(wins[name]),
            "lost": 100 * (infinite - np.mean(wins[name])),
            "lost_error": 100 * np.std(wins[name], ddof=1) / root,
            "gain": 100 * np.mean(gain),
            "gain_error": 100 * np.std(gain, ddof=1) / root,
        }

    return [row(name) for name in wins]


def draw(seed: int, k: int) -> np.ndarray:
    """Widths of the cells, float64[n, K + 1]."""
    rng = np.random.default_rng([seed, k])
    return rng.dirichlet(np.ones(k + 1), max(FEWEST, CELLS // k))


def without_ties(kl: float, k: int, name: str) -> list[Row]:
    """All Φ and estimators for one procedure, on the same prompts."""
    procedure, widths = notation.procedure(name), draw(0, k)
    start = np.asarray(means(*target(f"optimal({name})", kl), 0.0, k)[0])
    fitted = best_by_rank(draw(1, k), start, kl, procedure)
    bound, rows = at_equal_kl(widths, fitted[None], kl, procedure), []
    for transformation in TRANSFORMATIONS[name]:
        phi, beta = target(transformation, kl)
        tables = estimators(phi, beta, k)
        wins = {n: at_equal_kl(widths, t[None], kl, procedure) for n, t in tables.items()}
        infinite = float(frontier.curve(phi, procedure, beta)[1])
        about = {"procedure": name, "kl": kl, "k": k, "transformation": transformation}
        found = compared(wins | {"best by rank": bound}, infinite, about)
        finite = {n: errors(phi, t) for n, t in tables.items() if np.isfinite(t).all()}
        rows += [row | finite.get(row["estimator"], {}) for row in found]
    return rows


def with_ties(kl: float, k: int, transformation: str) -> list[Row]:
    """Best-of-4 where a reward takes `LEVELS` equally likely values."""
    procedure, (phi, beta) = notation.procedure("best_of_4"), target(transformation, kl)
    widths = np.full((CELLS // LEVELS, LEVELS), 1 / LEVELS)
    equal = np.random.default_rng([2, k]).multinomial(k, widths[0], len(widths))
    below = np.cumsum(equal, axis=1) - equal
    middle = (below + equal / 2 + 0.5) / (k + 1)
    mean = posterior.tabulated(means(phi, beta, 0.0, k)[0])
    at = {"mid-rank": middle, "≤": (below + equal) / k, "<": below / k}
    tables = {name: np.asarray(values(phi, u)) for name, u in at.items()}
    tables["posterior mean"] = np.asarray(mean(jnp.asarray(middle)))
    wins = {n: at_equal_kl(widths, t, kl, procedure, ties=True) for n, t in tables.items()}
    truth = np.asarray(values(phi, (np.arange(LEVELS)[None] + 0.5) / LEVELS))
    infinite = float(at_equal_kl(widths[:1], truth, kl, procedure, ties=True)[0])
    about = {"procedure": "best_of_4", "levels": LEVELS, "kl": kl, "k": k}
    return compared(wins, infinite, about | {"transformation": transformation})


def line(
    axes: Axes, rows: list[Row], what: str, phi: str, by: str, look: tuple[str, str], label: str
) -> None:
    shown = [row for row in rows if (row["transformation"], row["estimator"]) == (phi, by)]
    k, y, e = np.transpose([(row["k"], row[what], 1.96 * row[f"{what}_error"]) for row in shown])
    axes.errorbar(k, y, e, color=look[0], marker=look[1], markersize=4, lw=1.2, label=label)


def figure(rows: list[Row]) -> Figure:
    """Above what finite K costs by Φ, below what an estimator gains over the mid-rank; KL 0.5."""
    drawn = Figure(figsize=(9.6, 7), layout="constrained")
    for column, name in enumerate(TRANSFORMATIONS):
        lost, gain = (drawn.add_subplot(2, 2, 2 * line + column + 1) for line in (0, 1))
        mine = [row for row in rows if row["procedure"] == name and row["kl"] == KLS[0]]
        for phi, look in zip(TRANSFORMATIONS[name], report_style.PALETTE, strict=False):
            line(lost, mine, "lost", phi, "mid-rank", look, phi)
        best = TRANSFORMATIONS[name][-1]
        line(lost, mine, "lost", best, "best by rank", ("black", ""), "best by rank")
        kinds = ("m/K", "(m+1)/(K+1)", "m/(K+1)", "posterior mean", "best by rank")
        for by, look in zip(kinds, report_style.PALETTE, strict=False):
            line(gain, mine, "gain", best, by, look, by)
        title = report_style.words(name)
        lost.set(title=f"{title}: lost to K = ∞, by mid-rank", xscale="log", yscale="log")
        lost.set_yticks((0.1, 1, 10), ("0.1", "1", "10"))
        gain.set(title=f"{title}: gained over mid-rank, optimal Φ", xscale="log", ylim=(-0.8, 0.4))
        for axes in (lost, gain):
            axes.set_xticks(COUNTS, [str(k) for k in COUNTS])
            axes.minorticks_off()
            axes.set(xlabel="K reference rewards a prompt", ylabel="points of win rate")
            axes.legend(
                loc="lower left" if axes is lost else "lower right", ncols=1 + (axes is gain)
            )
    return drawn


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results/finite_k"
    jax.config.update("jax_enable_x64", True)
    rows: list[Row] = []
    for name, kl, k in itertools.product(TRANSFORMATIONS, KLS, COUNTS):
        rows += without_ties(kl, k, name)
    tied = itertools.product(("log", "exponential(10)", "optimal(best_of_4)"), (8, 32, 128))
    ties = [row for phi, k in tied for row in with_ties(KLS[0], k, phi)]
    out.mkdir(parents=True, exist_ok=True)
    for row in rows + ties:
        row |= {n: round(v, 5) for n, v in row.items() if isinstance(v, float)}
    lines = map(json.dumps, rows + ties)
    (out / "results.json").write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    with rc_context(report_style.STYLE):
        (out / "finite-k.png").write_bytes(report_style.image(figure(rows), "png"))


if __name__ == "__main__":
    main()
