"""The README's examples run, and print what they say."""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import processes
import pytest
from sources import ROOT

from infalign_jax import cli


def section(heading: str) -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def code_of(heading: str) -> str:
    found = re.findall(r"^```python\n(.*?)^```", section(heading), re.MULTILINE | re.DOTALL)
    return "".join(found)


def check(code: str, printed: str, units: float = 0.5) -> None:
    """Every number printed is the one in the comment beside it, to so many units of its last digit.

    Half a unit is what the digits say.
    """
    said = re.findall(r"^print\(.*#\s*(\S+?),?(?: .*)?$", code, re.MULTILINE)
    assert len(said) >= 3
    for number, line in zip(said, printed.split(), strict=True):
        digits = len(number.partition(".")[2])
        assert float(line) == pytest.approx(float(number), abs=units * 10**-digits)


def test_the_ten_lines_print_what_their_comments_say() -> None:
    printed, code = io.StringIO(), code_of("Ten lines")
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})  # noqa: S102
    check(code, printed.getvalue())


def test_no_other_example_goes_unchecked() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    checked = "".join(map(code_of, ("Ten lines", "A loop of your own")))
    assert "".join(re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)) == checked


@pytest.mark.slow
def test_the_loop_prints_what_its_comments_say_and_is_the_same_on_eight_devices() -> None:
    """Compared after five steps: later a sum's rounding tips a draw, and the runs part.

    So do those of another kind of CPU, whose last digit may be another: 0.82 and 0.83 were seen.
    """
    code = code_of("A loop of your own")
    few = code.replace("range(80)", "range(5)")
    assert few != code
    printed = {}
    for devices, run in ((1, code), (1, few), (8, few)):
        flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        done = subprocess.run(
            [sys.executable, "-c", f"{run}\nassert mesh.size == {devices}"],
            env=os.environ | {"JAX_PLATFORMS": "cpu"} | flags,
            capture_output=True, text=True, timeout=processes.PATIENCE, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        if run != few:
            check(code, done.stdout, units=1.5)
        printed[devices] = [float(line) for line in done.stdout.split()]
    assert printed[8] == pytest.approx(printed[1], abs=1e-4)


@pytest.mark.slow
def test_the_three_commands_print_what_is_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    text = section("With another trainer")
    asked, shown = re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    code = asked.partition("<<END\n")[2].partition("END\n")[0]
    exec(compile(code, "README.md", "exec"), {})  # noqa: S102
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        commands = re.findall(r"^infalign (.*)$", asked, re.MULTILINE)
        assert [cli.main(shlex.split(command)) for command in commands] == [0, 0, 0]
    lines = {line for line in shown.splitlines() if line}
    assert lines - set(printed.getvalue().splitlines()) == set()
    assert len(lines) > 10
    assert (tmp_path / "frontier.png").exists()
