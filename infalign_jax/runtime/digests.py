"""Digests: short names of what a result depends on, the same in every process."""

import dataclasses
import hashlib

import numpy as np


def digest(*parts: object) -> str:
    """Names what a result depends on: 16 hexadecimal characters, the same in every process.

    Takes frozen dataclasses (class name and fields), str, int, float, bool, None, bytes, tuples,
    lists, dicts (in any order) and NumPy arrays, nested. Equal numbers of different types differ.
    Raises TypeError for anything else, since it may have no stable spelling.

    >>> digest("sft", 0), digest({"a": 1, "b": 2.0}) == digest({"b": 2.0, "a": 1})
    ('087666bf3b954af0', True)
    """
    return hashlib.sha256(_spell(parts)).hexdigest()[:16]


def _spell(value: object) -> bytes:
    match value:
        case np.ndarray() | np.generic() if not value.dtype.hasobject:
            pieces = [str(value.dtype).encode(), repr(value.shape).encode(), value.tobytes()]
        case bytes():
            pieces = [value]
        case None | bool() | int() | float() | str():
            pieces = [repr(value).encode()]
        case tuple() | list():
            pieces = [_spell(item) for item in value]
        case dict():
            pieces = sorted(_spell(item) for item in value.items())
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            pieces = [
                _spell((field.name, getattr(value, field.name)))
                for field in dataclasses.fields(value)
            ]
        case _:
            raise TypeError(
                f"expected plain values, dataclasses or NumPy arrays, got {type(value).__name__}; "
                "spell it as one of those"
            )
    head = type(value).__name__.encode()
    return b"".join(b"%d:%s" % (len(piece), piece) for piece in [head, *pieces])
