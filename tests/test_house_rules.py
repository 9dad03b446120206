"""Short files, examples that run, no place of one machine; each rule shown to bite."""

import ast
import re

import pytest
from sources import PACKAGE, ROOT, Sources, python_files, tracked_texts

LONGEST_FILE, LONGEST_FUNCTION = 300, 40  # lines, both excluded

# Written so that this file does not match itself.
FOREIGN = re.compile(
    r"(?<![\w.~$}<])/(?:[r]oot|[w]ork|[t]mp/w|[U]sers|[h]ome/[a-z]\w*|[m]nt|[o]pt)/[\w.]"
    r"|[f]ile://|[p]ypi\.org|[p]ythonhosted|[r]egistry\.npmjs|[C]:\\+Users",
    re.IGNORECASE,
)
DRAWERS = re.compile(r"/(_src|\w*utils|\w*helpers|misc|common)\b")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def code_lines(function: Function, lines: list[str]) -> int:
    """Lines from `def` to the end that hold code: not blank, comment or docstring."""
    last = function.end_lineno or function.lineno
    numbers = set(range(function.lineno, last + 1))
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        numbers -= set(range(docstring.lineno, (docstring.end_lineno or last) + 1))
    return sum(1 for n in numbers if (text := lines[n - 1].strip()) and not text.startswith("#"))


def too_long(files: Sources) -> list[str]:
    found = []
    for path, source in files.items():
        lines = source.splitlines()
        if len(lines) >= LONGEST_FILE:
            found.append(f"{path}: {len(lines)} lines")
        functions = (node for node in ast.walk(ast.parse(source)) if isinstance(node, Function))
        lengths = ((f, code_lines(f, lines)) for f in functions)
        found += [f"{path}: {f.name} has {n} lines" for f, n in lengths if n >= LONGEST_FUNCTION]
    return found


def undocumented(files: Sources) -> list[str]:
    """Public functions without an example that runs, public classes without a docstring."""
    found = []
    for path, source in files.items():
        for node in ast.parse(source).body:
            if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
                continue
            text = ast.get_docstring(node) or ""
            example = ">>>" in text and "+SKIP" not in text
            if not (text if isinstance(node, ast.ClassDef) else example):
                found.append(f"{path}:{node.lineno}: {node.name}")
    return found


def foreign_places(texts: Sources) -> list[str]:
    return [
        f"{path}:{number}: {match.group()}"
        for path, text in texts.items()
        for number, line in enumerate(text.splitlines(), 1)
        if (match := FOREIGN.search(line))
    ]


def drawers(texts: Sources) -> list[str]:
    return [path for path in texts if DRAWERS.search("/" + path.removesuffix(".py"))]


PACKAGE_FILES = python_files(PACKAGE)


def test_files_and_functions_are_short() -> None:
    assert len(PACKAGE_FILES) > 1
    assert too_long(PACKAGE_FILES | python_files("experiments") | python_files("tests")) == []


def test_public_functions_show_an_example() -> None:
    assert undocumented(PACKAGE_FILES) == []


def test_examples_are_run_and_slow_tests_are_not() -> None:
    settings = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    assert re.search(rf"^testpaths = {PACKAGE} tests$", settings, re.MULTILINE)
    assert re.search(r'^addopts = .*--doctest-modules .*-m "not slow"$', settings, re.MULTILINE)


def test_no_place_of_one_machine_is_named() -> None:
    assert foreign_places(tracked_texts()) == []


def test_everything_has_a_room() -> None:
    assert drawers(PACKAGE_FILES) == []


def test_readme_and_ci_run_the_same_tests() -> None:
    command = 'pip install -e ".[test]" && python -m pytest'
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert command in (ROOT / "README.md").read_text(encoding="utf-8")


def body(lines: int, docstring: int = 0) -> str:
    text = ['    """One.', *["    x"] * docstring, '    """', "    # why", ""]
    return "\n".join(["def f():", *text, *["    y = 1"] * lines])


def test_a_long_function_is_found() -> None:
    assert too_long({"a.py": body(lines=38, docstring=99)}) == []
    assert too_long({"a.py": body(lines=39)}) == ["a.py: f has 40 lines"]
    method = "class A:\n" + "\n".join("    " + line for line in body(39).splitlines())
    assert too_long({"a.py": method}) == ["a.py: f has 40 lines"]


def test_a_long_file_is_found() -> None:
    assert too_long({"a.py": "x = 1\n" * 299}) == []
    assert too_long({"a.py": "x = 1\n" * 300}) == ["a.py: 300 lines"]


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("def f(): ...", 1),
        ("def f():\n    'Says much, shows nothing.'", 1),
        ("def f():\n    '>>> 1  # doctest: +SKIP'", 1),
        ("class A: ...", 1),
        ("def f():\n    '>>> 1 + 1'", 0),
        ("class A:\n    'A thing.'", 0),
        ("def _f(): ...\nclass _A: ...", 0),
    ],
)
def test_a_missing_example_is_found(source: str, count: int) -> None:
    assert len(undocumented({"a.py": source})) == count


@pytest.mark.parametrize(
    ("words", "count"),
    [
        (("see", "/ro" + "ot/.cache/x"), 1),
        (("--out", "/ho" + "me/ada/runs"), 1),
        (('"' + "/wo" + "rk/main/x" + '"',), 1),
        (("C:" + "\\Users\\ada",), 1),
        (("fi" + "le:///simple",), 1),
        (("https://py" + "pi.org/simple",), 1),
        (("--out runs/quickstart --set data.directory=../shared/data/hh",), 0),
        (("a tokens/s", "and/or", "~/wo" + "rk/x", "/usr/bin/env", "{}/wo" + "rk/x"), 0),
    ],
)
def test_a_place_of_one_machine_is_found(words: tuple[str, ...], count: int) -> None:
    assert len(foreign_places({"a.md": " ".join(words)})) == count


def test_a_drawer_is_found() -> None:
    planted = dict.fromkeys(["p/utils.py", "p/_src/x.py", "p/io_utils.py", "p/mesh.py"], "")
    assert drawers(planted) == ["p/utils.py", "p/_src/x.py", "p/io_utils.py"]
