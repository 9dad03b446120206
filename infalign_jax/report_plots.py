"""The figures of a report: pure functions from stored results to Matplotlib figures.

Figures are built without pyplot, so that nothing global is touched and no display is needed.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from infalign_jax import report_theory
from infalign_jax.report_style import (
    GRID,
    INK,
    LEAD,
    MUTED,
    NORMAL_95,
    PALETTE,
    PANEL,
    PAPER,
    STYLE,
    look,
    series,
    title,
    words,
)

BINS = np.linspace(0, 1, 41)  # of every histogram of quantiles


def _axes(size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.add_subplot()


def win_rate_plot(
    results: Mapping[str, Any], procedure: str, size: tuple[float, float] = LEAD
) -> Figure:
    """Win rate against KL under one procedure: what was measured, and what theory allows.

    Args:
        results: what results.json holds; policies not evaluated under `procedure` are left out.
        procedure: "standard", "best_of_4", "worst_of_8", ...
        size: width and height in inches; the legend of a figure narrower than `LEAD` is below it.

    Returns:
        A figure with each policy (95 % intervals, by the training reward), one thin analytic line
        a transformation, the frontier, and the untrained reference at KL 0 and 50 %.

    >>> policy = {"transformation": "identity", "beta": 0.5, "kl": 0.16, "kl_standard_error": 0.01,
    ...           "win_rates": {"standard": {"train": {"mean": 0.65, "standard_error": 0.01}}}}
    >>> win_rate_plot({"policies": [policy]}, "standard").axes[0].get_title(loc="left")
    'Standard'
    """
    shown = [p for p in results["policies"] if p["win_rates"].get(procedure, {}).get("train")]
    reach = max([0.3, *(p["kl"] + NORMAL_95 * p["kl_standard_error"] for p in shown)]) * 1.15
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for policy in shown:
        lines.setdefault(series(policy), []).append(policy)
    looks = look(results["policies"])
    with rc_context(STYLE):
        figure, axes = _axes(size)
        kl, limit = report_theory.frontier_line(procedure, reach)
        axes.fill_between(kl, limit, 1.1, color=GRID, alpha=0.5, linewidth=0)
        axes.plot(kl, limit, color=INK, linewidth=2.6, label="frontier")
        for line, members in lines.items():
            colour, marker, _ = looks[title(members[0])]
            theory = report_theory.transformation_line(
                members[0]["transformation"], procedure, reach
            )
            axes.plot(*theory, color=colour, linewidth=1.2)
            _points(axes, members, procedure, colour, marker)
            axes.plot([], [], color=colour, marker=marker, linewidth=1.2, label=line)
        _reference(axes)
        _frame(axes, procedure, reach, [p["win_rates"][procedure]["train"] for p in shown], limit)
        if size[0] < LEAD[0]:
            figure.legend(loc="outside lower center", ncols=3, columnspacing=1.2)
        else:
            axes.legend(loc="lower right", borderaxespad=1)
    return figure


def _points(
    axes: Axes, members: Sequence[Mapping[str, Any]], procedure: str, colour: str, marker: str
) -> None:
    rates = [p["win_rates"][procedure]["train"] for p in members]
    axes.errorbar(
        [p["kl"] for p in members],
        [r["mean"] for r in rates],
        xerr=[NORMAL_95 * p["kl_standard_error"] for p in members],
        yerr=[NORMAL_95 * r["standard_error"] for r in rates],
        fmt=marker,
        color=colour,
        markersize=6.5,
        markeredgecolor=PAPER,
        markeredgewidth=0.7,
        elinewidth=1.5,
        zorder=3,
    )


def _reference(axes: Axes) -> None:
    axes.plot(
        0,
        0.5,
        "o",
        markerfacecolor=PAPER,
        markeredgecolor=INK,
        markeredgewidth=1.5,
        markersize=7.5,
        label="reference",
        zorder=4,
    )


def _frame(
    axes: Axes,
    procedure: str,
    reach: float,
    rates: Sequence[Mapping[str, float]],
    limit: np.ndarray,
) -> None:
    means = [rate["mean"] for rate in rates]
    floor, top = min([0.5, *means]) - 0.02, max([limit[-1], *means]) + 0.025
    axes.set(
        xlim=(-0.025 * reach, reach),
        ylim=(floor, top),
        title=words(procedure),
        xlabel="KL from the reference (nats)",
        ylabel="win rate against the reference",
    )
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))


def calibration_plot(quantiles: np.ndarray, when: str, top: float) -> Figure:
    """Histogram of the quantiles [n] of held-out reference responses; uniform is the ideal.

    Args:
        quantiles: estimates in [0, 1].
        when: "before" or "after" calibration, for the title.
        top: density at which the axis ends, so that two figures compare.

    >>> calibration_plot(np.linspace(0, 1, 100), "after", 2.0).axes[0].get_title(loc="left")
    'After calibration'
    """
    colour = PALETTE[when == "before"][0]
    with rc_context(STYLE):
        figure, axes = _axes(PANEL)
        axes.hist(quantiles, BINS, density=True, color=colour, alpha=0.8)
        axes.axhline(1, color=INK, linewidth=1.4, linestyle="dashed", label="uniform")
        axes.set(xlim=(0, 1), ylim=(0, top), title=f"{when} calibration".capitalize())
        axes.set(xlabel="estimated quantile û", ylabel="density")
        axes.legend(loc="upper center")
    return figure


def density_top(*quantiles: np.ndarray) -> float:
    """The highest bar of the histograms of several arrays of quantiles [n], and some air.

    >>> density_top(np.linspace(0, 1, 4000))
    1.25
    """
    bars = [np.histogram(u, BINS, density=True)[0].max() for u in quantiles]
    return round(float(1.25 * max([1.0, *bars])), 2)


def quantile_plot(policy: Mapping[str, Any], quantiles: np.ndarray, colour: str) -> Figure:
    """Histogram of û [m] under a policy against the density its transformation asks for.

    >>> policy = {"transformation": "identity", "beta": 0.5}
    >>> len(quantile_plot(policy, np.linspace(0, 1, 100), "#0072b2").axes)
    1
    """
    with rc_context(STYLE):
        figure, axes = _axes(PANEL)
        axes.hist(quantiles, BINS, density=True, color=colour, alpha=0.75, label="policy")
        target = report_theory.target_density(policy["transformation"], policy["beta"])
        axes.plot(*target, color=INK, linewidth=1.6, label="target")
        axes.axhline(1, color=MUTED, linewidth=1, linestyle="dashed", label="reference")
        axes.set(xlim=(0, 1), title=title(policy), xlabel="estimated quantile û", ylabel="density")
        axes.legend(loc="upper left")
    return figure


def scorers_plot(results: Mapping[str, Any], procedure: str) -> Figure:
    """Win rates under one procedure by every scorer that measured it, with 95 % intervals.

    >>> len(scorers_plot({"policies": []}, "best_of_4").axes)
    1
    """
    policies = results["policies"]
    with rc_context(STYLE):
        figure, axes = _axes((LEAD[0], 1.5 + 0.34 * len(policies)))
        for k, scorer in enumerate(("train", "judge", "true")):
            rows = [(i, p["win_rates"].get(procedure, {}).get(scorer)) for i, p in
                    enumerate(policies)]  # fmt: skip
            measured = [(i + (k - 1) * 0.2, rate) for i, rate in rows if rate]
            if not measured:
                continue
            axes.errorbar(
                [rate["mean"] for _, rate in measured],
                [y for y, _ in measured],
                xerr=[NORMAL_95 * rate["standard_error"] for _, rate in measured],
                fmt=PALETTE[k][1],
                color=PALETTE[k][0],
                markersize=6,
                elinewidth=1.3,
                label={"train": "training reward", "judge": "judge", "true": "truth"}[scorer],
            )
        axes.axvline(0.5, color=MUTED, linewidth=1, linestyle="dashed")
        axes.set_yticks(range(len(policies)), [title(p) for p in policies])
        axes.tick_params(axis="y", labelcolor=INK)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set(xlabel=f"win rate, {words(procedure).lower()}")
        if axes.containers:
            figure.legend(loc="outside upper right", ncols=3)
    return figure


def training_plot(
    lines: Mapping[str, tuple[np.ndarray, np.ndarray]],
    name: str,
    looks: Mapping[str, tuple[str, str, str]],
) -> Figure:
    """One metric against steps, a line a policy; long lines are thinned to means of windows.

    Args:
        lines: step [n] and value [n] by policy name ("" for a stage that has no policy).
        name: the metric, the figure's title.
        looks: colour, marker and dash by policy name, from `look`.

    >>> len(training_plot({"": (np.arange(9), np.ones(9))}, "loss", {}).axes[0].lines)
    1
    """
    with rc_context(STYLE):
        figure, axes = _axes(PANEL)
        for policy, (step, value) in lines.items():
            colour, _, dash = looks.get(policy, (PALETTE[0][0], "", "solid"))
            axes.plot(*thin(step, value), color=colour, linestyle=dash, linewidth=1.4)
        axes.set(title=name.replace("_", " "), xlabel="step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    return figure


def thin(step: np.ndarray, value: np.ndarray, most: int = 80) -> tuple[np.ndarray, np.ndarray]:
    """Step [n] and value [n] as means of at most `most` windows of equal count, NaN kept.

    >>> thin(np.arange(4), np.array([1.0, 3.0, 5.0, 7.0]), most=2)
    (array([0.5, 2.5]), array([2., 6.]))
    """
    if len(step) <= most:
        return step, value
    edges = np.linspace(0, len(step), most + 1).round().astype(int)
    windows = list(pairwise(edges))
    return tuple(np.array([x[a:b].mean() for a, b in windows]) for x in (step, value))  # type: ignore[return-value]
