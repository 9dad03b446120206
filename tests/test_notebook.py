"""The Colab notebook: whole, short, of no machine; and run from its first cell to its last."""

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import nbformat
import pytest
from sources import ROOT

PATH = ROOT / "experiments" / "infalign_colab.ipynb"
LARGEST = 500_000  # bytes


@pytest.fixture(scope="module")
def notebook() -> Any:
    return nbformat.read(PATH, as_version=4)


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def python(source: str) -> str:
    """The source with IPython's own lines, which start with ! or %, left out."""
    lines = source.splitlines()
    return "\n".join(
        line[: len(line) - len(line.lstrip())] + "pass" if line.lstrip()[:1] in ("!", "%") else line
        for line in lines
    )


def printed(notebook: Any) -> str:
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def check(notebook: Any) -> None:
    """Every code cell ran, in order, without an error; results, plots and samples were shown."""
    cells = code(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    pictures = [output.data for output in outputs if "data" in output]
    assert sum("image/png" in data for data in pictures) == 3
    told = printed(notebook)
    for line in ("align exponential(10) kl=0.5 ", "frontier ", "productive", "best of 4"):
        assert line in told
    assert told.count(" with ") > 3  # responses in the synthetic language


def test_the_notebook_is_valid_small_and_of_no_machine(notebook: Any) -> None:
    nbformat.validate(notebook)
    assert PATH.stat().st_size < LARGEST
    text = json.dumps([cell.outputs for cell in code(notebook)])
    for place in ("/tmp", "/root", "/home", "site-packages", str(ROOT)):
        assert place not in text


def test_its_cells_are_short_python(notebook: Any) -> None:
    for cell in code(notebook):
        compile(python(cell.source), "cell", "exec")
        assert len(cell.source.splitlines()) <= 25


def test_its_stored_outputs_are_there(notebook: Any) -> None:
    check(notebook)


def test_a_notebook_without_outputs_is_found(notebook: Any) -> None:
    bare = nbformat.from_dict(json.loads(json.dumps(notebook)))
    code(bare)[-1].outputs = []
    code(bare)[3].outputs = []
    with pytest.raises(AssertionError):
        check(bare)


def test_installing_keeps_the_jax_that_is_there(
    notebook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first cell where the package is missing: what it hands to pip."""
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "quickstart.py").touch()
    monkeypatch.chdir(tmp_path / "experiments")
    others = [d for d in metadata.distributions() if d.name != "infalign-jax"]
    monkeypatch.setattr(metadata, "distributions", lambda: others)
    source = code(notebook)[0].source
    assert "%pip install -q -c constraints.txt ." in source
    exec(compile(python(source), "cell", "exec"), {})  # noqa: S102
    kept = (tmp_path / "constraints.txt").read_text().split()
    assert {f"{name}=={metadata.version(name)}" for name in ("jax", "jaxlib")} <= set(kept)
    assert all(line.startswith(("jax", "libtpu")) for line in kept)


RUN = """
import sys
import nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
for cell in notebook.cells:
    if cell.cell_type == "code":
        cell.outputs, cell.execution_count = [], None
place = {"metadata": {"path": sys.argv[2]}}
nbclient.NotebookClient(notebook, timeout=1200, kernel_name="python3", resources=place).execute()
nbformat.write(notebook, sys.argv[1])
"""


@pytest.mark.slow
def test_it_runs_from_its_first_cell_to_its_last(tmp_path: Path) -> None:
    place = tmp_path / "experiments"
    place.mkdir()
    for name in (PATH.name, "quickstart.py"):
        shutil.copy(PATH.parent / name, place)
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(place / PATH.name), str(place)],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    check(nbformat.read(place / PATH.name, as_version=4))
    assert (tmp_path / "runs" / "colab" / "report.html").exists()
