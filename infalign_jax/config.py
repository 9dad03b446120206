"""Experiments as files: reading the one frozen dataclass, and `--set field.sub=value`."""

import dataclasses
import difflib
import importlib.util
import math
import re
import sys
import traceback
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

Changes = dict[str, Any]  # field -> Changes of that field; "" -> the text that replaces it whole


def load(path: Path) -> Any:
    """The frozen dataclass named `experiment` in a Python file, which is run to get it.

    Raises FileNotFoundError for a missing file (with the nearest name beside it), ValueError for
    a file that fails (with its line) or holds no such dataclass.

    >>> load(Path("nowhere.py"))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    FileNotFoundError: expected an experiment file, got nowhere.py, which does not exist; ...
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"expected an experiment file, got {path}, which does not exist; "
            f"{_instead(path.name, sorted(p.name for p in path.parent.glob('*.py')))}"
        )
    experiment = vars(_run(path)).get("experiment")
    if not dataclasses.is_dataclass(experiment) or isinstance(experiment, type):
        raise ValueError(
            f"expected a dataclass named experiment in {path}, got {type(experiment).__name__}; "
            "write `experiment = ...` at its top level"
        )
    return experiment


def _run(path: Path) -> types.ModuleType:
    name = f"infalign_experiment_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"expected an experiment file, got {path}; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses in the file look their module up
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        place = f"{error.filename}, line {error.lineno}"
        raise ValueError(f"expected Python, got {error.msg} in {place}") from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        line = [frame.lineno for frame in frames if frame.filename == spec.origin][-1]
        raise ValueError(f"{path}, line {line}: {type(error).__name__}: {error}") from error
    return module


def override(config: Any, assignments: Iterable[str]) -> Any:
    """A copy of a frozen dataclass with the fields named in `field.sub=value` set, all at once.

    Values are read by the field's type: bool (true, false), int, float, str, None (none), a
    Literal's choices, a tuple (with commas, in parentheses or not), and for a field that may hold
    one of several dataclasses the class name, which stands for its defaults. An item of a tuple is
    named by its number: `policies.0.beta=0.1`.
    Raises ValueError for an unknown field (with the nearest name), a value of the wrong type, and
    whatever the dataclasses themselves refuse.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Model:
    ...     width: int = 64
    >>> override(Model(), ["width=128"])
    Model(width=128)
    >>> override(Model(), ["widht=128"])
    Traceback (most recent call last):
    ValueError: expected a field of Model, got widht; did you mean width?
    """
    changes: Changes = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"expected field=value, got {assignment}; write for example seed=1")
        node = changes
        for part in name.strip().split("."):
            node = node.setdefault(part, {})
        node[""] = text.strip()
    return _changed(config, changes, "")


def _changed(node: Any, changes: Changes, where: str) -> Any:
    if isinstance(node, tuple):
        names = [str(number) for number in range(len(node))]
        hints: dict[str, Any] = {name: type(node[int(name)]) for name in names}
        values: dict[str, Any] = dict(zip(names, node, strict=True))
    elif dataclasses.is_dataclass(node):
        names = [field.name for field in dataclasses.fields(node) if field.init]
        hints = get_type_hints(type(node))
        values = {name: getattr(node, name) for name in names}
    else:
        raise ValueError(
            f"expected {where} to have fields, got {type(node).__name__}; "
            f"write {where}=value or one of the fields beside it"
        )
    kind = f"{type(node).__name__} ({where})" if where else type(node).__name__
    new = {}
    for name, change in changes.items():
        if name == "":
            continue
        if name not in names:
            raise ValueError(f"expected a field of {kind}, got {name}; {_instead(name, names)}")
        place = f"{where}.{name}" if where else name
        value = _read(hints[name], change[""], place) if "" in change else values[name]
        new[name] = _changed(value, change, place) if change.keys() - {""} else value
    if isinstance(node, tuple):
        return tuple(new.get(name, value) for name, value in values.items())
    return dataclasses.replace(node, **new)


def _read(hint: Any, text: str, where: str) -> Any:
    """A value of type `hint` written as `text`, for the field called `where`."""
    found = _values(hint, text, where)
    if not found:
        raise ValueError(f"expected {where} to be {_spelt(hint)}, got {text}; {_how(hint, text)}")
    return found[0]


def _values(hint: Any, text: str, where: str) -> list[Any]:
    """The readings of `text` as a `hint`, the best one first; none if it cannot be one."""
    origin, choices = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        # Text fits every string, so the other readings come first.
        ordered = sorted(choices, key=lambda choice: choice is str)
        return [value for choice in ordered for value in _values(choice, text, where)]
    if origin is Literal:
        return [choice for choice in choices if str(choice) == text]
    if origin is tuple:
        return _tuples(choices, text, where)
    if hint is types.NoneType:
        return [None] if text.lower() == "none" else []
    if hint is bool:
        return [text.lower() == "true"] if text.lower() in ("true", "false") else []
    if hint in (int, float, str):
        try:
            return [hint(text)]
        except ValueError:
            return []
    if _is_class(hint) and hint.__name__ == text:
        return [_default(hint, where)]
    return []


def _is_class(hint: Any) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _default(hint: Any, where: str) -> Any:
    try:
        return hint()
    except TypeError as error:
        raise ValueError(
            f"expected a class with defaults for {where}, got {hint.__name__} ({error}); "
            "set it in the experiment file"
        ) from error


def _tuples(choices: tuple[Any, ...], text: str, where: str) -> list[tuple[Any, ...]]:
    items = _split(text)
    hints = [choices[0]] * len(items) if choices[1:] == (...,) else list(choices)
    if len(items) != len(hints):
        return []
    readings = [_values(hint, item, where) for hint, item in zip(hints, items, strict=True)]
    return [tuple(reading[0] for reading in readings)] if all(readings) else []


def _split(text: str) -> list[str]:
    """Splits at commas outside parentheses: a(1,2),b is a(1,2) and b."""
    inner = re.fullmatch(r"\((.*)\)", text)
    depth, items = 0, [""]
    if inner and _balanced(inner[1]):
        text = inner[1]
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0:
            items.append("")
        else:
            items[-1] += letter
    items = [item.strip() for item in items]
    return items if items[-1] else items[:-1]


def _balanced(text: str) -> bool:
    depth = 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if depth < 0:
            return False
    return depth == 0


def _spelt(hint: Any) -> str:
    """A type as one writes about it: `int or None`, `one of left, right`."""
    origin, choices = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_spelt(choice) for choice in choices)
    if origin is Literal:
        return f"one of {', '.join(map(str, choices))}"
    if origin is tuple:
        inner = [_spelt(choice) for choice in choices if choice is not ...]
        return f"a tuple of {', '.join(inner)}"
    return "none" if hint is types.NoneType else str(getattr(hint, "__name__", hint))


def _how(hint: Any, text: str) -> str:
    if names := _names(hint):
        return _instead(text, names)
    if _is_class(hint):
        return "set its fields one by one"
    return "write true or false" if hint is bool else "write one"


def _names(hint: Any) -> list[str]:
    """The names that a value of this type may be written as, beside numbers and free text."""
    if get_origin(hint) is Literal:
        return [str(choice) for choice in get_args(hint)]
    if get_origin(hint) in (Union, types.UnionType):
        classes = [each.__name__ for each in get_args(hint) if _is_class(each)]
        return [*classes, *(name for choice in get_args(hint) for name in _names(choice))]
    return []


def _instead(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"did you mean {close[0]}?"
    return f"choose from {', '.join(names)}" if names else "check its place"


def to_dict(config: Any) -> Any:
    """A configuration as JSON holds it: dataclasses as dicts, tuples as lists, inf as "inf".

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Model:
    ...     rates: tuple[float, ...] = (0.1, math.inf)
    >>> to_dict(Model())
    {'rates': [0.1, 'inf']}
    """
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    match config:
        case tuple() | list():
            return [to_dict(item) for item in config]
        case dict():
            return {str(key): to_dict(value) for key, value in config.items()}
        case float() if not math.isfinite(config):
            return str(config)
        case None | bool() | int() | float() | str():
            return config
    return str(config)
