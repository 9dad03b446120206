"""What the commands hand over: a table to read, JSON to reckon with, a picture."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from infalign_jax import evaluation
from infalign_jax.evaluation import WinRate
from infalign_jax.runtime import files

PICTURES = (".png", ".pdf", ".svg")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns two spaces apart, the first to the left, the others to the right.

    >>> print(table(["Φ", "KL"], [["identity", "0.5"], ["log", "0.25"]]))
    Φ           KL
    identity   0.5
    log       0.25
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for first, *others in [header, *rows]:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def points(share: float, digits: int = 1) -> str:
    """A share in per cent, or a difference of shares in points, never as −0.

    >>> points(0.87328, 2), points(-1e-9), points(float("nan"))
    ('87.33', '0.0', '–')
    """
    return "–" if math.isnan(share) else f"{round(100 * share, digits) + 0.0:.{digits}f}"


def rate(found: WinRate) -> dict[str, Any]:
    """A win rate, or another mean over prompts, as JSON has it.

    >>> import numpy as np
    >>> rate(WinRate(0.5, 0.1, np.array([0.4, 0.6])))["mean"]
    0.5
    """
    interval = list(evaluation.confidence_interval(found))
    return {"mean": found.mean, "standard_error": found.standard_error, "interval": interval}


def plus_minus(found: Mapping[str, Any]) -> str:
    """A rate in per cent with half its 95 % interval.

    >>> plus_minus({"mean": 0.5, "interval": [0.45, 0.55]})
    '50.0 ± 5.0'
    """
    low, high = found["interval"]
    return f"{points(found['mean'])} ± {points((high - low) / 2)}"


def interval(bounds: Sequence[float]) -> str:
    """An interval of shares in per cent.

    >>> interval((0.801, 0.8234))
    '80.1 to 82.3'
    """
    low, high = bounds
    return "–" if math.isnan(low) else f"{points(low)} to {points(high)}"


def check_targets(json_path: str | None, picture: Path | None = None) -> None:
    """Raises ValueError, before anything is computed, where a file could not be written.

    >>> check_targets("-", Path("x.gif"))
    Traceback (most recent call last):
    ValueError: expected a picture that ends in .png, .pdf or .svg, got x.gif: name it so
    """
    if picture is not None and picture.suffix.lower() not in PICTURES:
        kinds = f"{', '.join(PICTURES[:-1])} or {PICTURES[-1]}"
        raise ValueError(f"expected a picture that ends in {kinds}, got {picture}: name it so")
    for path in (picture, Path(json_path) if json_path not in (None, "-") else None):
        if path is not None and path.is_dir():
            raise ValueError(f"expected a file to write to, got the directory {path}: name a file")


def deliver(
    result: Mapping[str, Any],
    text: str,
    json_path: str | None,
    picture: tuple[Path, bytes] | None = None,
) -> None:
    """Prints the text, or the result as JSON where its path is "-"; writes the files asked for.

    Files are written whole or not at all. In JSON a number that is none is null. Raises OSError
    where a file cannot be written.

    >>> deliver({"kl": 0.5, "standard_error": float("nan")}, "KL 0.5", "-")
    {
      "kl": 0.5,
      "standard_error": null
    }
    """
    written = json.dumps(_plain(result), indent=2, ensure_ascii=False, allow_nan=False)
    if picture is not None:
        files.write_bytes(*picture)
    if json_path not in (None, "-"):
        files.write_text(Path(json_path), written + "\n")
    print(written if json_path == "-" else text)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
