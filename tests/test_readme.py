"""The README's examples run, and print what they say."""

import contextlib
import io
import re

from sources import ROOT


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
