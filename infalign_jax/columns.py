"""The columns of a table in a file: JSON lines, CSV, Parquet or NPZ, each value with its place.

What the columns mean is the reader's business; here a file is taken apart, quickly, and whatever
cannot be is refused with the file and the line. No file can run code: NPZ is read without pickle.
"""

import csv
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Columns(NamedTuple):
    """Columns of one length.

    >>> Columns({"x": [1, None]}, ("x", "y"), "row {}".format, False).place(1)
    'row 1'
    """

    values: dict[str, Any]  # of each wanted column: a list, None where a row lacks it; or an array
    names: Sequence[str]  # of all columns, wanted or not
    place: Callable[[int], str]  # row -> where it is, for messages
    text: bool  # values are strings, whatever they stand for


def read(path: str | Path, wanted: str) -> Columns:
    """The columns whose name matches the pattern ``wanted``, by the suffix of the file's.

    ``.jsonl`` and ``.ndjson``: one JSON object a line; ``.csv``: a header, commas, quotes doubled;
    ``.parquet``; ``.npz``: an array a column. Text is UTF-8, blank lines are skipped. Lines count
    from 1, rows of Parquet and NPZ from 0.

    Raises ValueError that names the file, and the line where there is one, for another suffix, a
    broken file, a row of too many or too few cells, or columns of one name or of unequal lengths;
    OSError where the file cannot be opened.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "x.jsonl")
    >>> _ = path.write_text('{"x": 1, "y": 2}\\n\\n{"x": 3}\\n')
    >>> found = read(path, "x|z")
    >>> found.values, found.place(1).split("/")[-1]
    ({'x': [1, 3]}, 'x.jsonl, line 3')
    """
    path, pattern = Path(path), re.compile(wanted)
    match path.suffix.lower():
        case ".jsonl" | ".ndjson":
            return _json_lines(path, pattern)
        case ".csv":
            return _csv(path, pattern)
        case ".parquet":
            return _parquet(path, pattern)
        case ".npz":
            return _npz(path, pattern)
    raise ValueError(
        f"{path}: expected a name that ends in .jsonl, .ndjson, .csv, .parquet or .npz, got "
        f"{path.suffix!r}: write one of these and name it so"
    )


def _broken(place: str, kind: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())
    return ValueError(
        f"{place}: expected {kind}, got what cannot be read so ({reason:.100}): mend it"
    )


def _check_distinct(path: Path, names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: expected columns of distinct names, got {names}: rename one")


def _json_lines(path: Path, pattern: re.Pattern[str]) -> Columns:
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    number = 0
    with open(path, encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    rows.append(json.loads(line))
                    lines.append(number)
        except UnicodeDecodeError as error:
            raise _broken(f"{path}, after line {number}", "UTF-8", error) from None
        except (ValueError, RecursionError) as error:
            raise _broken(f"{path}, line {number}", "a JSON object", error) from None
    if not set(map(type, rows)) <= {dict}:
        odd = next(i for i, row in enumerate(rows) if not isinstance(row, dict))
        raise ValueError(
            f"{path}, line {lines[odd]}: expected a JSON object, got {rows[odd]!r:.60}: "
            "write one object a line"
        )
    names = list(dict.fromkeys(chain.from_iterable(rows)))
    values = {name: [row.get(name) for row in rows] for name in names if pattern.fullmatch(name)}
    return Columns(values, names, lambda row: f"{path}, line {lines[row]}", text=False)


def _csv(path: Path, pattern: re.Pattern[str]) -> Columns:
    rows: list[list[str]] = []
    lines: list[int] = []
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            names = next(reader, [])
            for cells in reader:
                if cells:
                    rows.append(cells)
                    lines.append(reader.line_num)
        except UnicodeDecodeError as error:
            raise _broken(f"{path}, after line {reader.line_num}", "UTF-8", error) from None
        except csv.Error as error:
            raise _broken(f"{path}, line {reader.line_num}", "CSV", error) from None
    _check_distinct(path, names)
    if set(map(len, rows)) - {len(names)}:
        odd = next(i for i, cells in enumerate(rows) if len(cells) != len(names))
        raise ValueError(
            f"{path}, line {lines[odd]}: expected {len(names)} cells, as many as in the header, "
            f"got {len(rows[odd])}: quote cells that hold a comma"
        )
    at = {name: i for i, name in enumerate(names) if pattern.fullmatch(name)}
    values = {name: [cells[i] for cells in rows] for name, i in at.items()}
    return Columns(values, names, lambda row: f"{path}, line {lines[row]}", text=True)


def _parquet(path: Path, pattern: re.Pattern[str]) -> Columns:
    try:
        import pyarrow  # here, because it takes long to import
        from pyarrow import parquet
    except ImportError:
        raise ValueError(
            f"{path}: expected pyarrow, to read Parquet with, got none: pip install pyarrow"
        ) from None
    with open(path, "rb") as file:
        try:
            opened = parquet.ParquetFile(file)
            names = opened.schema_arrow.names
            _check_distinct(path, names)
            data = opened.read([name for name in names if pattern.fullmatch(name)])
            values = {name: _arrow_values(data[name]) for name in data.column_names}
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise _broken(str(path), "Parquet", error) from None
    return Columns(values, names, lambda row: f"{path}, row {row}", text=False)


def _arrow_values(column: Any) -> Any:
    """An array where all rows have a number, or equally many; else a list of Python's objects."""
    from pyarrow import compute, types

    def numeric(kind: Any) -> bool:
        return bool(types.is_floating(kind) or types.is_integer(kind))

    listed = (types.is_list, types.is_large_list, types.is_fixed_size_list)
    if not column.null_count and numeric(column.type):
        return column.to_numpy()
    if any(kind(column.type) for kind in listed) and numeric(column.type.value_type):
        flat = compute.list_flatten(column)
        lengths = compute.list_value_length(column).unique().to_pylist()  # None for a missing list
        if len(lengths) == 1 and lengths[0] and not flat.null_count:
            return flat.to_numpy().reshape(len(column), lengths[0])
    return column.to_pylist()


def _npz(path: Path, pattern: re.Pattern[str]) -> Columns:
    damage = (
        EOFError, NotImplementedError, OSError, OverflowError, RuntimeError, TypeError, ValueError,
        zipfile.BadZipFile, zlib.error,
    )  # fmt: skip  # what zipfile and NumPy's reader of headers raise on damaged bytes
    with open(path, "rb") as file:
        try:
            with np.load(file, allow_pickle=False) as opened:
                names = list(opened.files)
                values = {name: opened[name] for name in names if pattern.fullmatch(name)}
        except damage as error:
            raise _broken(str(path), "an NPZ file of plain arrays", error) from None
    if len(lengths := {array.shape[:1] for array in values.values()}) > 1 or () in lengths:
        shapes = {name: array.shape for name, array in values.items()}
        raise ValueError(f"{path}: expected arrays of as many rows, got {shapes}: store equal ones")
    return Columns(values, names, lambda row: f"{path}, row {row}", text=False)
