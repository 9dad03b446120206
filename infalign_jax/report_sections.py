"""The text and tables of a report, section by section."""

from collections.abc import Mapping
from html import escape
from typing import Any

from infalign_jax import report_page as html
from infalign_jax.report_data import Run, lead, training_lines
from infalign_jax.report_style import look, title, words
from infalign_jax.runtime import goodput

# Section: link in the page's head ("" for none), heading, how to read it.
SECTIONS = {
    "win-rates": (
        "Win rates",
        "Win rate against KL",
        "Each marker is a trained policy by the training reward, with 95 % intervals. The thick "
        "line is the frontier: no policy of that KL lies above it, errors apart. Each thin line "
        "is what a perfect solver of one transformation reaches, each β a point on it; how far a "
        "marker lies below its own line is what training lost.",
    ),
    "scorers": (
        "",
        "The same policies by other scorers",
        "Responses are always selected by the training reward, then compared by the training "
        "reward, by a judge that training never saw and, where it is known, by the true reward, "
        "with 95 % intervals. The frontier bounds the first alone; a policy that gains only there "
        "has learnt the reward model's mistakes.",
    ),
    "calibration": (
        "Calibration",
        "Calibration",
        "The quantiles of held-out reference responses should be uniform: every bar at the dashed "
        "line. Before: one monotone map of the raw reward for all prompts. After: each prompt's "
        "own reference samples.",
    ),
    "quantiles": (
        "Quantiles",
        "Where each policy puts its mass",
        "Bars are the quantiles û of a policy's responses, the dark line is the density that its "
        "transformation and β ask for, the dashed line the reference. Bars that fall short of the "
        "line at the right edge are what the policy has not learnt to reach.",
    ),
    "training": (
        "Training",
        "Training curves",
        "One panel for each metric of each stage; long curves are means over windows of steps. "
        "In the align stage every policy has a line of its own.",
    ),
    "reward-length": (
        "",
        "Reward and length",
        "Raw reward and response length in tokens, means over the policy's own draws at each "
        "step. Length that climbs along with reward can mean that the reward model merely likes "
        "long responses.",
    ),
    "responses": (
        "Responses",
        "Responses side by side",
        "The same prompt answered by the reference and by each policy: of the responses drawn, "
        "the one that the reward model chose; the others are folded away under it.",
    ),
    "numbers": (
        "Every number",
        "Every number",
        "Win rates in percent, ± one standard error over prompts; KL in nats a response; the gap "
        "is the frontier at the policy's own KL less its win rate by the training reward, in "
        "points.",
    ),
    "setting": (
        "Configuration",
        "Configuration, versions and time",
        "What it takes to repeat the run, and what it took.",
    ),
}
OPTIONAL = {
    "reward_model": "Reward model",
    "calibration": "Calibration",
    "reference": "Reference policy",
    "data": "Data",
}
SHOWN_APART = ("reward", "length")  # metrics of the align stage that have a section of their own


def document(run: Run, figures: Mapping[str, str]) -> str:
    """The body of the page.

    Args:
        run: what the run stored; all of its text is escaped here.
        figures: HTML of the figures by section: win-rates, scorers, calibration, quantiles,
            training, reward-length.

    >>> results = {"experiment": "<b>", "seed": 0, "device": "cpu", "policies": []}
    >>> results["reward_model"] = {"accuracy": 0.7, "standard_error": 0.01}
    >>> results["calibration"] = {"absolute_error_before": 0.1, "absolute_error_after": 0.02}
    >>> "<h1>&lt;b&gt;</h1>" in document(Run(results, [], {}, []), {})
    True
    """
    policies = run.results["policies"]
    panels = {name: f'<div class="panels">{svgs}</div>' for name, svgs in figures.items()}
    legend = html.legend(look(policies))
    parts = {
        **panels,
        "training": legend + panels.get("training", ""),
        "reward-length": legend + panels.get("reward-length", ""),
        "responses": html.samples(run.samples, policies),
        "numbers": _numbers(run),
        "setting": _setting(run.results),
    }
    sections = "".join(
        html.section(name, heading, how_to_read, parts.get(name, ""))
        for name, (_, heading, how_to_read) in SECTIONS.items()
    )
    return f"{_head(run.results)}<main>{sections}</main>{_foot()}"


def _head(results: Mapping[str, Any]) -> str:
    minutes, seconds = divmod(round(sum(results.get("seconds", {}).values())), 60)
    about = [f"seed {results['seed']}", results["device"], f"{len(results['policies'])} policies"]
    about += [f"{minutes} min {seconds} s"] * bool(minutes or seconds)
    links = "".join(
        f'<a href="#{name}">{link}</a>' for name, (link, _, _) in SECTIONS.items() if link
    )
    return (
        '<header><p class="kicker">InfAlign: language model alignment for inference time</p>'
        f'<h1>{escape(results["experiment"])}</h1><p class="quiet">{escape(" · ".join(about))}</p>'
        f'<nav aria-label="Sections">{links}</nav>'
        f'<div class="cards">{_win_rate_cards(results)}{_other_cards(results)}</div></header>'
    )


def _win_rate_cards(results: Mapping[str, Any]) -> str:
    first = lead(results)
    measured = [p for p in results["policies"] if p["win_rates"].get(first, {}).get("train")]
    if not measured:
        return ""
    best = max(measured, key=lambda p: p["win_rates"][first]["train"]["mean"])
    rate, limit = best["win_rates"][first]["train"], best.get("frontier_win_rate", {}).get(first)
    cards = html.card(
        f"Highest win rate, {words(first).lower()}",
        f"{100 * rate['mean']:.1f} %",
        f"± {100 * rate['standard_error']:.1f} · {title(best)} · KL {best['kl']:.2f}",
    )
    if limit is not None:
        note = f"frontier at that KL: {100 * limit:.1f} %"
        gap = html.points(limit - rate["mean"])
        cards += html.card("Below the frontier", f"{gap} points", note)
    return cards


def _other_cards(results: Mapping[str, Any]) -> str:
    reward, error = results["reward_model"], results["calibration"]
    before, after = error["absolute_error_before"], error["absolute_error_after"]
    return html.card(
        "Calibration error", f"{after:.3f}", f"mean |û − u|, {before:.3f} before calibration"
    ) + html.card(
        "Reward model",
        f"{100 * reward['accuracy']:.1f} %",
        f"± {100 * reward['standard_error']:.1f} · held-out pairs ranked right",
    )


def _numbers(run: Run) -> str:
    results, policies = run.results, run.results["policies"]
    shown = {*OPTIONAL, "policies", "configuration", "versions", "seconds", "tokens_per_second"}
    shown |= {"goodput"}
    rest = {key: value for key, value in results.items() if key not in shown}
    boxes = "".join(html.facts(name, results.get(key, {})) for key, name in OPTIONAL.items())
    return (
        f"<h3>Win rates</h3>{html.win_rate_table(policies)}"
        f"<h3>Policies</h3>{html.policy_table(policies)}"
        f'<div class="tables">{boxes}{html.facts("Run", rest)}</div>'
        f"<h3>Last step of every stage</h3>{_last_steps(run)}"
    )


def _last_steps(run: Run) -> str:
    rows: dict[str, dict[str, float]] = {}
    for stage, fields in training_lines(run.metrics).items():
        for name, lines in fields.items():
            for policy, (step, value) in lines.items():
                row = rows.setdefault(f"{stage} {policy}".strip(), {"step": step[-1]})
                row[name] = value[-1]
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    cells = [[line, *(html.number(row.get(c)) for c in columns)] for line, row in rows.items()]
    return html.table(["stage", *(c.replace("_", " ") for c in columns)], {"": cells})


def _setting(results: Mapping[str, Any]) -> str:
    seconds, rates = results.get("seconds", {}), results.get("tokens_per_second", {})
    phases = [
        [phase, html.number(seconds.get(phase)), html.number(rates.get(phase))]
        for phase in dict.fromkeys([*seconds, *rates])
    ]
    time = html.table(["phase", "seconds", "tokens a second"], {"": phases})
    if "goodput" in results:
        time += f"<h3>Goodput</h3>{_goodput(results['goodput'])}"
    configuration = html.facts("", results.get("configuration", {}))
    return (
        f'<div class="tables"><div><h3>Wall time and speed</h3>{time}</div>'
        f"{html.facts('Versions', results.get('versions', {}))}</div>"
        f"<details><summary>Configuration</summary>{configuration}</details>"
    )


def _goodput(stages: Mapping[str, Mapping[str, float]]) -> str:
    """The share of each stage's seconds that went to its steps, and what the rest went to."""
    rows = [
        [
            stage,
            f"{100 * parts['productive']:.0f} %",
            *(html.number(parts.get(cause)) for cause in goodput.CAUSES),
        ]
        for stage, parts in stages.items()
    ]
    lost = [f"seconds lost to {cause}" for cause in goodput.CAUSES]
    return html.table(["phase", "productive", *lost], {"": rows})


def _foot() -> str:
    return (
        "<footer><p>Drawn from results.json, metrics.jsonl, evaluation.npz and samples.json by "
        "<code>infalign report</code>. Every figure is in <code>plots/</code> as PNG and PDF.</p>"
        "</footer>"
    )
