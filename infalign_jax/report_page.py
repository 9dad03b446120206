"""The page of a report: stored numbers and model text to escaped HTML."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from string import Template
from typing import Any

import numpy as np

from infalign_jax.report_style import PALETTE, series, title, words

NONE = "–"
SCORERS = ("train", "judge", "true")


def page(heading: str, body: str) -> str:
    """A whole HTML document around a body that is HTML already; the heading is plain text.

    >>> "<title>a &lt; b</title>" in page("a < b", "")
    True
    """
    template = resources.files("infalign_jax").joinpath("report.html").read_text("utf-8")
    return Template(template).substitute(title=escape(heading), body=body)


def section(name: str, heading: str, how_to_read: str, *parts: str) -> str:
    """A section that begins with a sentence on how to read it; the parts are HTML.

    >>> section("kl", "KL", "Less is closer.", "<b>1</b>")
    '<section id="kl"><h2>KL</h2><p class="read">Less is closer.</p><b>1</b></section>'
    """
    head = f'<h2>{escape(heading)}</h2><p class="read">{escape(how_to_read)}</p>'
    return f'<section id="{name}">{head}{"".join(parts)}</section>'


def number(value: object) -> str:
    """A number as a reader wants it, four digits where it is not whole; other values as text.

    >>> number(0.123456), number(12000.0), number(None), number("cpu")
    ('0.1235', '12,000', '–', 'cpu')
    """
    if value is None:
        return NONE
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,.0f}" if value == round_or_nan(value) or abs(value) >= 1e4 else f"{value:.4g}"


def round_or_nan(value: float) -> float:
    """The nearest whole number, or NaN where there is none.

    >>> round_or_nan(2.5), round_or_nan(float("inf"))
    (2.0, nan)
    """
    return float(round(value)) if np.isfinite(value) else float("nan")


def percent(rate: Mapping[str, float] | None) -> str:
    """A mean with its standard error, in percent.

    >>> percent({"mean": 0.8614, "standard_error": 0.0031}), percent({})
    ('86.1 ± 0.3', '–')
    """
    if not rate:
        return NONE
    return f"{100 * rate['mean']:.1f} ± {100 * rate['standard_error']:.1f}"


def points(difference: float) -> str:
    """A difference of two win rates in percentage points.

    >>> points(0.0123), points(-0.0123)
    ('1.2', '−1.2')
    """
    return f"{100 * difference:.1f}".replace("-", "−")


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as one level with dotted names.

    >>> flat({"a": {"b": 1}, "c": 2})
    {'a.b': 1, 'c': 2}
    """
    result: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            result |= flat(item, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = item
    return result


def table(
    header: Sequence[str], groups: Mapping[str, Iterable[Sequence[str]]], kind: str = ""
) -> str:
    """A table that scrolls inside its own box; a group of rows may have a heading, or "".

    >>> "<td>&lt;b&gt;</td>" in table(["x"], {"": [["<b>"]]})
    True
    """
    names = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    head = f"<thead><tr>{names}</tr></thead>" if any(header) else ""
    body = ""
    for group, rows in groups.items():
        first = f'<tr><th colspan="{len(header)}" scope="rowgroup">{escape(group)}</th></tr>'
        cells = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
        body += f"<tbody>{first if group else ''}{''.join(f'<tr>{c}</tr>' for c in cells)}</tbody>"
    return f'<div class="scroll" tabindex="0"><table class="{kind}">{head}{body}</table></div>'


def facts(heading: str, values: Mapping[str, Any]) -> str:
    """A titled table of names and values, nothing where there are none.

    >>> facts("Data", {})
    ''
    """
    if not values:
        return ""
    rows = [[key, number(value)] for key, value in flat(values).items()]
    return f"<div><h3>{escape(heading)}</h3>{table(['', ''], {'': rows}, 'facts')}</div>"


def card(label: str, value: str, note: str) -> str:
    """One headline number.

    >>> card("KL", "0.5", "nats")
    '<div class="card"><span class="label">KL</span><b>0.5</b><span>nats</span></div>'
    """
    parts = escape(label), escape(value), escape(note)
    return '<div class="card"><span class="label">{}</span><b>{}</b><span>{}</span></div>'.format(
        *parts
    )


def figure(svg: str, label: str, kind: str = "panel") -> str:
    """A figure around an SVG, with the label that a screen reader says.

    >>> figure("<svg></svg>", "KL & reward", "lead")
    '<figure class="lead panel" role="img" aria-label="KL &amp; reward"><svg></svg></figure>'
    """
    kind = kind if kind == "panel" else f"{kind} panel"
    return f'<figure class="{kind}" role="img" aria-label="{escape(label)}">{svg}</figure>'


def win_rate_table(policies: Sequence[Mapping[str, Any]]) -> str:
    """Every win rate, grouped by procedure: three scorers, the frontier and the gap to it.

    >>> win_rate_table([]).count("<td>")
    0
    """
    header = ["policy", "KL", "training reward", "judge", "truth", "frontier", "gap, points"]
    groups: dict[str, list[list[str]]] = {}
    for policy in policies:
        for procedure, rates in policy["win_rates"].items():
            limit, train = policy.get("frontier_win_rate", {}).get(procedure), rates.get("train")
            row = [title(policy), f"{policy['kl']:.3f}", *(percent(rates.get(s)) for s in SCORERS)]
            row.append(f"{100 * limit:.1f}" if limit is not None else NONE)
            row.append(points(limit - train["mean"]) if limit and train else NONE)
            groups.setdefault(words(procedure), []).append(row)
    return table(header, groups)


def policy_table(policies: Sequence[Mapping[str, Any]]) -> str:
    """Whatever else was measured of each policy, a column a number.

    >>> "<td>0.5</td>" in policy_table([{"transformation": "log", "beta": 0.5}])
    True
    """
    nested = {"name", "win_rates", "frontier_win_rate", "frontier_gap"}
    rows = [flat({k: v for k, v in p.items() if k not in nested}) for p in policies]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [
        [title(p), *(number(row.get(c)) for c in columns)]
        for p, row in zip(policies, rows, strict=True)
    ]
    return table(["policy", *(c.replace("_", " ") for c in columns)], {"": cells})


def legend(looks: Mapping[str, tuple[str, str, str]]) -> str:
    """A list of policies with the colour and dash of their lines.

    >>> legend({"log": ("#0072b2", "o", "dashed")}).count("var(--c0)")
    1
    """
    numbers = {colour: i for i, (colour, _) in enumerate(PALETTE)}
    dashes = {"solid": "", "dashed": "6 3", "dotted": "2 3", "dashdot": "8 3 2 3"}
    items = "".join(
        f'<li><svg viewBox="0 0 30 10" aria-hidden="true"><path d="M0 5H30" stroke-width="2.5" '
        f'stroke="var(--c{numbers[colour]})" stroke-dasharray="{dashes[dash]}"/></svg>'
        f"{escape(name)}</li>"
        for name, (colour, _, dash) in looks.items()
    )
    return f'<ul class="legend">{items}</ul>'


def answers(name: str, responses: Sequence[Mapping[str, Any]], best: int, colour: str) -> str:
    """The response that was chosen, the others folded away under it.

    >>> "&lt;script&gt;" in answers("log", [{"text": "<script>", "reward": 1}], 0, "--c0")
    True
    """
    shown = [
        f'<p class="text">{escape(r["text"]) or NONE}</p><p class="score">'
        f"reward {number(r['reward'])} · quantile {number(r.get('quantile'))}</p>"
        for r in responses
    ]
    others = "".join(text for i, text in enumerate(shown) if i != best)
    folded = f"<details><summary>{len(shown) - 1} not chosen</summary>{others}</details>"
    return (
        f'<div class="answer" style="--line: var({colour})"><h4>{escape(name)}</h4>'
        f"{shown[best]}{folded if others else ''}</div>"
    )


def samples(rows: Sequence[Mapping[str, Any]], policies: Sequence[Mapping[str, Any]]) -> str:
    """Prompts, each with the reference's answer beside each policy's, the first three open.

    >>> samples([], [])
    ''
    """
    lines = dict.fromkeys(series(p) for p in policies)
    numbers = {line: i % len(PALETTE) for i, line in enumerate(lines)}
    result = ""
    for i, row in enumerate(rows):
        top = int(np.argmax([r["reward"] for r in row["reference"]]))
        reference, aligned = answers("reference", row["reference"], top, "--muted"), ""
        for p in row["policies"]:
            colour = f"--c{numbers.get(series(p), 0)}"
            aligned += answers(p["name"], p["responses"], p["best"], colour)
        result += (
            f'<details class="sample"{" open" if i < 3 else ""}><summary class="prompt text">'
            f'{escape(row["prompt"].strip())}</summary><div class="answers">{reference}'
            f'<div class="aligned">{aligned}</div></div></details>'
        )
    return result
