"""The README's examples run, and print what they say."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
from sources import ROOT

from infalign_jax import cli


def examples() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_the_examples_print_what_their_comments_say() -> None:
    printed, scope = io.StringIO(), {}
    code = "".join(examples())
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), scope)  # noqa: S102
    said = re.findall(r"^print\(.*#\s*(\S+?),?(?: .*)?$", code, re.MULTILINE)
    found = [
        f"{float(line):.{len(number) - 2}f}"
        for line, number in zip(printed.getvalue().split(), said, strict=True)
    ]
    assert len(said) >= 3
    assert found == said


@pytest.mark.slow
def test_the_three_commands_print_what_is_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition("## With another trainer")[2].partition("\n## ")[0]
    asked, shown = re.findall(r"^```\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
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
