"""The repository's own texts, for the tests that hold it to its rules."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = "infalign_jax"

Sources = dict[str, str]  # path below the root -> text


def python_files(folder: str) -> Sources:
    return {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted((ROOT / folder).rglob("*.py"))
    }


def tracked_texts() -> Sources:
    """What git knows or would add; without git, the package and its surroundings."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    paths = [ROOT / name for name in listing.stdout.split("\0") if name]
    if listing.returncode != 0:
        folders = [ROOT / name for name in (PACKAGE, "tests", "experiments")]
        paths = [path for folder in folders for path in folder.rglob("*")]
    contents = {path: path.read_bytes() for path in paths if path.is_file()}
    return {
        path.relative_to(ROOT).as_posix(): content.decode("utf-8", "replace")
        for path, content in contents.items()
        if b"\0" not in content
    }


def inside_package(path: str) -> str:
    return path.removeprefix(PACKAGE + "/")


def imported(path: str, source: str) -> Iterator[str]:
    """Every module a file imports, wherever in it, as an absolute dotted name."""
    package = path.split("/")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join(above + ([node.module] if node.module else []))
            yield from (f"{base}.{alias.name}" for alias in node.names)


def outsiders_imported(path: str, source: str) -> set[str]:
    """The top-level packages a file needs from neither Python nor this repository."""
    tops = {name.split(".")[0] for name in imported(path, source)}
    neighbours = {near.stem for near in (ROOT / path).parent.iterdir()}
    ours = {PACKAGE, "experiments", "tests"} | (set() if path.startswith(PACKAGE) else neighbours)
    return tops - set(sys.stdlib_module_names) - ours
