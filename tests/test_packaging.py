"""What is built from the checkout holds what the checkout holds."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from sources import PACKAGE, ROOT, tracked_texts

from infalign_jax import __version__


@pytest.mark.slow
def test_the_wheel_holds_the_whole_package(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"  # a build leaves files beside its sources
    for path in tracked_texts():
        (checkout / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, checkout / path)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, checkout]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("infalign_jax-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        (about,) = (name for name in held if name.endswith("entry_points.txt"))
        assert "infalign = infalign_jax.cli:main" in archive.read(about).decode()
    assert any(name.endswith("licenses/LICENSE") for name in held)
    package = {path for path in tracked_texts() if path.startswith(PACKAGE + "/")}
    assert package - held == set()
    assert {name.split("/")[0].split("-")[0] for name in held} == {PACKAGE}


def test_the_citation_names_this_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {__version__}\n" in citation
