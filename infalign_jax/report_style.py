"""The look of a report: palette, labels, and Matplotlib figures turned into SVG, PNG and PDF.

The colours of `INK`, `MUTED`, `GRID`, `PAPER` and `PALETTE` become CSS variables in `svg`, so that
an embedded figure follows the page into its dark dress; a PNG or PDF keeps the light one.
"""

import io
import re
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

INK, MUTED, GRID, PAPER = "#1d2733", "#66717e", "#e2e6eb", "#fefefd"
# Okabe and Ito's palette (yellow left out: too pale for a line), then two of Paul Tol's.
PALETTE = (
    ("#0072b2", "o"),
    ("#d55e00", "s"),
    ("#009e73", "^"),
    ("#cc79a7", "D"),
    ("#e69f00", "v"),
    ("#56b4e9", "P"),
    ("#882255", "X"),
    ("#999933", "h"),
)
DASHES = ("solid", "dashed", "dotted", "dashdot")
NORMAL_95 = 1.96  # half-width of a 95 % interval in standard errors
PANEL, LEAD = (4.4, 3.3), (5.8, 4.3)  # inches
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Inter", "Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans"],
    "font.size": 9.5,
    "text.color": INK,
    "text.parse_math": False,  # a $ in a stored name is a $
    "figure.constrained_layout.h_pad": 0.07,
    "figure.constrained_layout.w_pad": 0.07,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "xtick.major.pad": 6,
    "ytick.major.size": 0,
    "ytick.major.pad": 6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    "savefig.dpi": 200,
    "svg.fonttype": "none",
    "svg.hashsalt": "infalign",
    "pdf.fonttype": 42,
}


def series(policy: Mapping[str, Any]) -> str:
    """The line a policy belongs to: its name without the KL aimed at, or its transformation.

    >>> series({"name": "log kl=0.5", "transformation": "log"})
    'log'
    """
    return (policy.get("name") or policy["transformation"]).split(" kl=")[0]


def look(policies: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, str, str]]:
    """Colour, marker and dash by policy name: one colour a series, one dash a policy in it.

    >>> look([{"name": "log kl=0.5"}, {"name": "log kl=0.2"}])["log kl=0.2"]
    ('#0072b2', 'o', 'dashed')
    """
    colours = dict(zip(dict.fromkeys(series(p) for p in policies), cycle(PALETTE), strict=False))
    dashes = {line: cycle(DASHES) for line in colours}
    return {title(p): (*colours[series(p)], next(dashes[series(p)])) for p in policies}


def title(policy: Mapping[str, Any]) -> str:
    """The name of a policy, made from transformation and β where none is stored.

    >>> title({"transformation": "identity", "beta": 0.125})
    'identity β=0.125'
    """
    return policy.get("name") or f"{policy['transformation']} β={policy['beta']:.3g}"


def words(name: str) -> str:
    """A procedure's name as a reader says it.

    >>> words("best_of_4"), words("standard")
    ('Best of 4', 'Standard')
    """
    return name.replace("_", " ").capitalize()


def svg(figure: Figure, prefix: str) -> str:
    """The figure as an inline SVG element whose ids begin with `prefix` and colours are CSS's.

    >>> svg(Figure(), "a")[:4]
    '<svg'
    """
    buffer = io.StringIO()
    with rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(\sid="|="#|url\(#)', rf"\g<1>{prefix}-", text)
    names = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper"}
    names |= {colour: f"c{i}" for i, (colour, _) in enumerate(PALETTE)}
    return re.sub(
        "#[0-9a-f]{6}", lambda m: f"var(--{names[m[0]]})" if m[0] in names else m[0], text
    )


def image(figure: Figure, kind: str) -> bytes:
    """The figure as the bytes of a "png", "pdf" or "svg" file, the same for the same figure.

    >>> image(Figure(), "pdf")[:4]
    b'%PDF'
    """
    buffer = io.BytesIO()
    dated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}
    with rc_context(STYLE):
        figure.savefig(buffer, format=kind, metadata=dated.get(kind, {}))
    return buffer.getvalue()
