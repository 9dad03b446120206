"""Plots and the self-contained HTML report of a run, drawn from what the run stored.

    infalign report runs/quickstart

reads results.json, metrics.jsonl, evaluation.npz and samples.json in that directory and nothing
else, and writes report.html (opens from disk, asks the network for nothing, runs no script) and
plots/*.png and *.pdf.
"""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from infalign_jax import notation
from infalign_jax import report_plots as plots
from infalign_jax.report_data import Run, lead, read, training_lines
from infalign_jax.report_page import figure as framed
from infalign_jax.report_page import page
from infalign_jax.report_sections import SHOWN_APART, document
from infalign_jax.report_style import image, look, svg, title, words
from infalign_jax.runtime.files import write_bytes, write_text


def draw(out: Path) -> Path:
    """Draw the report of the run stored in `out`: plots/*.png, plots/*.pdf, report.html.

    Returns:
        The path of report.html.

    Raises:
        ValueError: a file of the run is missing, damaged or lacks what the report needs.

    >>> draw(Path("nowhere"))
    Traceback (most recent call last):
    ValueError: nowhere/results.json: expected a stored file, got none: run the evaluate stage again
    """
    run = read(out)
    inline: dict[str, str] = {}
    for group, named in figures(run).items():
        inline[group] = ""
        for stem, (label, figure) in named.items():
            for kind in ("png", "pdf"):
                write_bytes(out / "plots" / f"{stem}.{kind}", image(figure, kind))
            wide = stem in (f"win-rate-{lead(run.results)}", "scorers")
            inline[group] += framed(svg(figure, stem), label, "lead" if wide else "panel")
    write_text(out / "report.html", page(run.results["experiment"], document(run, inline)))
    return out / "report.html"


def figures(run: Run) -> dict[str, dict[str, tuple[str, Figure]]]:
    """Every figure of a run: by section, by file stem, with the label a screen reader says.

    >>> from numpy import linspace
    >>> names = ("quantiles_before", "quantiles_after")
    >>> run = Run({"policies": []}, [], dict.fromkeys(names, linspace(0, 1, 99)), [])
    >>> list(figures(run)["calibration"])
    ['calibration-before', 'calibration-after']
    """
    policies, looks = run.results["policies"], look(run.results["policies"])
    first = lead(run.results)
    measured = {name for p in policies for name in p["win_rates"]} - {first}
    names = [first, *sorted(measured, key=notation.procedure_order)]
    before, after = run.quantiles["quantiles_before"], run.quantiles["quantiles_after"]
    top = plots.density_top(before, after)
    return {
        "win-rates": {f"win-rate-{name}": _win_rate(run, name, first) for name in names},
        "scorers": {
            "scorers": ("Win rates by scorer", plots.scorers_plot(run.results, first)),
        },
        "calibration": {
            "calibration-before": (
                "Quantiles before calibration",
                plots.calibration_plot(before, "before", top),
            ),
            "calibration-after": (
                "Quantiles after calibration",
                plots.calibration_plot(after, "after", top),
            ),
        },
        "quantiles": {
            f"quantiles-{i}": (
                f"Quantiles under {title(p)}",
                plots.quantile_plot(p, run.quantiles[f"policy_quantiles/{i}"], looks[title(p)][0]),
            )
            for i, p in enumerate(policies)
        },
        **_training(run, looks),
    }


def _win_rate(run: Run, procedure: str, first: str) -> tuple[str, Figure]:
    size = plots.LEAD if procedure == first else plots.PANEL
    label = f"Win rate against KL: {words(procedure)}"
    return label, plots.win_rate_plot(run.results, procedure, size)


def _training(
    run: Run, looks: Mapping[str, tuple[str, str, str]]
) -> dict[str, dict[str, tuple[str, Figure]]]:
    groups: dict[str, dict[str, tuple[str, Figure]]] = {"training": {}, "reward-length": {}}
    for stage, fields in training_lines(run.metrics).items():
        for name, lines in fields.items():
            group = "reward-length" if stage == "align" and name in SHOWN_APART else "training"
            stem = f"{stage}-{name}".replace("/", "-")
            heading = f"{stage}: {name}".replace("_", " ")
            groups[group][stem] = (
                f"{heading} against steps",
                plots.training_plot(lines, heading, looks),
            )
    return groups
