"""Rewards that another program computed, read from a file as B prompts × K responses.

Long form, one row a response:

==========  ======================================================================================
prompt      the prompt or whatever stands for it: a string, an integer or a list of chat messages;
            ``tables.prompt_text`` says when two are the same
reward      a finite number
judge       optional: the same response's reward by another model, in every row or in none
==========  ======================================================================================

The rows of a prompt may stand anywhere; prompts come in the order of their first rows.

Wide form, one row a prompt, none twice: ``prompt``, ``rewards`` (a list of K numbers) and,
optionally, ``judge`` (a list of K numbers). Where there are no lists, as in CSV, they are columns:
``reward_0``, ``reward_1``, … and ``judge_0``, ``judge_1``, ….

JSON lines, CSV and Parquet hold either form (``columns.read`` says how the file's name ends), NPZ
arrays: ``rewards`` float[B, K], optionally ``judge`` float[B, K] and ``prompts``, str[B] or int[B]
(the numbers 0 … B − 1 unless given). Columns of other names are ignored. Every prompt has the same
number K of responses: what a quantile or a win rate is worth depends on K, so nothing is cut or
filled up here.
"""

import difflib
import re
import sys
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from infalign_jax import columns
from infalign_jax.columns import Columns
from infalign_jax.tables import prompt_text

_WANTED = r"prompts?|rewards?|judge|(reward|judge)_\d+"

Place = Callable[[int], str]  # row -> where it is, for messages


class Rewards(NamedTuple):
    """K rewards of each of B prompts, in the order of the file.

    >>> Rewards(("a",), np.array([[1.0, 2.0]]), None).rewards.shape
    (1, 2)
    """

    prompts: tuple[str, ...]  # B, distinct, as `tables.prompt_text` writes them
    rewards: np.ndarray  # float64[B, K], finite
    judge: np.ndarray | None  # float64[B, K], finite; None where the file has no judge


def read(path: str | Path) -> Rewards:
    """The rewards in a file of the form that the module describes.

    Raises ValueError that names the file, and the line or row, where one is not a finite number, a
    column is missing, a prompt comes twice in wide form or with another number of responses in
    long form, or a judge's reward is missing here but not there; and as ``columns.read`` does.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "rewards.csv")
    >>> _ = path.write_text("prompt,reward\\nHi,0.5\\nYo,1\\nHi,2\\nYo,3\\n")
    >>> read(path).prompts, read(path).rewards.tolist()
    (('Hi', 'Yo'), [[0.5, 2.0], [1.0, 3.0]])
    """
    path = Path(path)
    found = columns.read(path, _WANTED)
    values, place = _values(path, found), found.place
    if "reward" in values and "rewards" in values:
        raise ValueError(
            f"{path}: expected rewards in long form (a column 'reward') or in wide form, got both: "
            "keep one"
        )
    if "reward" not in values and "rewards" not in values:
        raise _missing(path, "reward", found.names)
    if "prompt" not in values:
        raise _missing(path, "prompt", found.names)
    if not len(values["prompt"]):
        raise ValueError(f"{path}: expected at least one row, got none: write the rewards to it")
    prompts = _texts(values["prompt"], place)
    judge = _judge(values.get("judge"), place)
    if "rewards" in values:
        _check_distinct(prompts, place)
        rewards = _matrix(values["rewards"], "rewards", place)
        judged = None if judge is None else _matrix(judge, "judge", place, rewards.shape[1])
        return Rewards(prompts, rewards, judged)
    rewards = _numbers(values["reward"], "reward", place)
    judged = None if judge is None else _numbers(judge, "judge", place)
    kept, rows = _by_prompt(path, prompts)
    return Rewards(kept, rewards[rows], None if judged is None else judged[rows])


def _values(path: Path, found: Columns) -> dict[str, Any]:
    """Columns `prompt`, `reward` or `rewards`, and `judge`, as lists where they were numbered."""
    values = dict(found.values)
    for name in values.keys() - {"prompt"} if found.text else ():
        values[name] = [_number_or_text(cell) for cell in values[name]]
    if path.suffix.lower() == ".npz":
        rows = len(next(iter(values.values()), ()))
        values.setdefault("prompt", values.pop("prompts", np.arange(rows)))
    for name, joined in (("reward", "rewards"), ("judge", "judge")):
        numbered = [other for other in values if re.fullmatch(rf"{name}_\d+", other)]
        for i in range(len(numbered)):
            if f"{name}_{i}" not in numbered:
                raise _missing(path, f"{name}_{i}", found.names)
        if numbered:
            values[joined] = _lists([values.pop(f"{name}_{i}") for i in range(len(numbered))])
    return values


def _lists(parts: Sequence[Any]) -> Any:
    """K columns as one of lists of K, None in place of a list of nothing."""
    if all(isinstance(part, np.ndarray) for part in parts):
        return np.stack(parts, axis=1)
    plain = (part.tolist() if isinstance(part, np.ndarray) else part for part in parts)
    return [None if set(row) == {None} else list(row) for row in zip(*plain, strict=True)]


def _number_or_text(cell: str) -> float | str | None:
    """The number, None for a blank cell, or the text that is none (float would take 1_0 for 10)."""
    try:
        return cell if "_" in cell else float(cell)
    except ValueError:
        return cell.strip() or None


def _missing(path: Path, wanted: str, names: Sequence[str]) -> ValueError:
    nearest = difflib.get_close_matches(wanted, names, n=1)
    todo = f"did you mean {nearest[0]!r}? Rename it" if nearest else "add it"
    there = ", ".join(map(repr, names)) or "none"
    return ValueError(f"{path}: expected a column {wanted!r}, got {there:.200}: {todo}")


def _texts(prompts: Any, place: Place) -> tuple[str, ...]:
    texts: list[str] = []
    prompts = prompts.tolist() if isinstance(prompts, np.ndarray) else prompts
    try:
        texts.extend(map(prompt_text, prompts))
    except ValueError as error:
        raise ValueError(f"{place(len(texts))}: {error}") from None
    return tuple(texts)


def _check_distinct(prompts: Sequence[str], place: Place) -> None:
    first: dict[str, int] = {}
    for row, prompt in enumerate(prompts):
        if (before := first.setdefault(prompt, row)) != row:
            raise ValueError(
                f"{place(row)}: expected each prompt once, got {prompt!r:.60}, which stands at "
                f"{place(before)} too: join their rewards in one row"
            )


def _by_prompt(path: Path, prompts: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """The distinct prompts, and the rows of each, int64[B, K], in the order of the file."""
    number: dict[str, int] = {}
    index = np.array([number.setdefault(prompt, len(number)) for prompt in prompts])
    kept, counts = tuple(number), np.bincount(index)
    if (other := np.flatnonzero(counts != counts[0])).size:
        raise ValueError(
            f"{path}: expected as many responses to each prompt, got {counts[0]} to "
            f"{kept[0]!r:.60} and {counts[other[0]]} to {kept[other[0]]!r:.60}: score more, or "
            f"keep {counts.min()} rows of each, chosen without a look at their rewards"
        )
    return kept, np.argsort(index, kind="stable").reshape(len(kept), -1)


def _judge(judge: Any, place: Place) -> Any:
    """The judge's column, None where every row lacks it."""
    if judge is None or isinstance(judge, np.ndarray):
        return judge
    missing = [row for row, value in enumerate(judge) if value is None]
    if missing and len(missing) < len(judge):
        raise ValueError(
            f"{place(missing[0])}: expected a judge's reward in every row or in none, got none "
            f"here and {len(judge) - len(missing)} elsewhere: judge every response"
        )
    return None if missing else judge


def _matrix(rows: Any, name: str, place: Place, k: int | None = None) -> np.ndarray:
    """float64[B, K] of lists of K numbers, K being that of the first row unless given."""
    if isinstance(rows, np.ndarray):
        if rows.ndim == 2 and rows.size and k in (None, rows.shape[1]):
            numbers = _numbers(rows.reshape(-1), name, lambda i: place(i // rows.shape[1]))
            return numbers.reshape(rows.shape)
        rows = rows.tolist()
    for row, values in enumerate(rows):
        count = len(values) if isinstance(values, list) else None
        k = k or count
        if not count or count != k:
            got = f"{values!r:.60}" if count is None else f"a list of {count}"
            raise ValueError(
                f"{place(row)}: expected {name} to be a list of {k or 'K'} numbers, as many as of "
                f"every prompt, got {got}: score as many responses to each"
            )
    flat = list(chain.from_iterable(rows))
    return _numbers(flat, name, lambda i: place(i // (k or 1))).reshape(len(rows), -1)


def _numbers(values: Any, name: str, place: Place) -> np.ndarray:
    """float64[n] of finite numbers."""
    if isinstance(values, np.ndarray) and (values.ndim != 1 or values.dtype.kind not in "fiu"):
        values = values.tolist()
    if isinstance(values, list) and not set(map(type, values)) <= {int, float}:
        row = next(i for i, value in enumerate(values) if type(value) not in (int, float))
        raise ValueError(
            f"{place(row)}: expected {name} to be a number, got {values[row]!r:.60}: "
            "give every response a reward"
        )
    try:
        numbers = np.array(values, np.float64)
    except OverflowError:  # an integer of more than 308 digits
        numbers = np.array(
            [value if abs(value) < sys.float_info.max else np.inf for value in values]
        )
    if not np.all(np.isfinite(numbers)):
        row = int(np.flatnonzero(~np.isfinite(numbers))[0])
        raise ValueError(
            f"{place(row)}: expected {name} to be finite, got {numbers[row]}: "
            "find out why the reward model gave it"
        )
    return numbers
