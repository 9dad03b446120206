"""`infalign frontier` prints what the library computes, draws it, and refuses in one line."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from matplotlib.figure import Figure

from infalign_jax import cli, frontier, notation
from infalign_jax.commands import frontier as command
from infalign_jax.commands import frontier_plot


@pytest.fixture(autouse=True)
def a_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))


@pytest.fixture(scope="module")
def usual() -> Iterator[dict[str, Any]]:
    with jax.enable_x64(True):
        yield command.compare("best_of_4", kls=[0.25, 0.5])


@pytest.fixture(scope="module")
def figure(usual: dict[str, Any]) -> Figure:
    with jax.enable_x64(True):
        return frontier_plot.draw(usual)


def asked(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert cli.main(["frontier", *words, "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


def test_rows_are_the_library_s(usual: dict[str, Any], x64: None) -> None:
    law, kls = notation.procedure("best_of_4"), jnp.array([0.25, 0.5])
    names = ["identity", "log", "exponential(10)", "exponential(-10)", "optimal(best_of_4)"]
    assert [row["transformation"] for row in usual["rows"]] == names * 2
    limits = frontier.frontier_win_rate(law, kls).tolist()
    for i, name in enumerate(names):
        rows = usual["rows"][i::5]
        best = name == "optimal(best_of_4)"
        for row, kl, limit in zip(rows, kls.tolist(), limits, strict=True):
            phi = notation.transformation(name, row["beta"])
            found = [float(x) for x in frontier.curve(phi, law, row["beta"])]
            assert [row["kl"], row["win_rate"]] == pytest.approx(found, abs=1e-9)
            assert row["kl"] == pytest.approx(kl, rel=1e-7)
            assert row["below_frontier"] == pytest.approx(limit - row["win_rate"], abs=1e-7)
            assert (row["below_frontier"] > 1e-4) == (not best)
            assert row["converged"]
            assert (row["residual"] is None) == (not best)


@pytest.mark.slow
def test_the_command_prints_them(
    usual: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["--procedure", "best_of_4", "--kl", "0.25", "--kl", "0.5", "--json", "out/x.json"]
    assert cli.main(["frontier", *words, "--plot", "out/x.svg"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "best_of_4, reference best_of_4: what a perfect solver reaches"
    for line, row in zip(printed[3:], usual["rows"], strict=True):
        assert line.split() == [
            row["transformation"],
            f"{row['beta']:.4g}",
            f"{row['kl']:.4g}",
            f"{100 * row['win_rate']:.2f}",
            f"{abs(100 * row['below_frontier']):.2f}",
        ]
    stored = json.loads((tmp_path / "out/x.json").read_text())
    assert stored["asked_kl"] == [0.25, 0.5]
    for one, other in zip(stored["rows"], usual["rows"], strict=True):
        assert one["win_rate"] == pytest.approx(other["win_rate"], abs=1e-12)
    svg = (tmp_path / "out/x.svg").read_text()
    assert "<svg" in svg
    assert all(name in svg for name in ("frontier", "identity", "exponential(-10)", "Best of 4"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["x.json", "x.svg"]


@pytest.mark.slow
def test_at_a_beta_each_row_is_held_to_the_frontier_at_its_own_kl(
    capsys: pytest.CaptureFixture[str], x64: None
) -> None:
    words = ["--procedure", "best_of_4", "--beta", "1", "0.25", "--transformation", "identity"]
    found = asked(capsys, *words)
    assert (found["asked_kl"], found["asked_beta"]) == (None, [1.0, 0.25])
    assert [row["beta"] for row in found["rows"]] == [1.0, 1.0, 0.25, 0.25]
    kls = jnp.array([row["kl"] for row in found["rows"][::2]])  # of the identity
    limits = frontier.frontier_win_rate(notation.procedure("best_of_4"), kls).tolist()
    for row, limit in zip(found["rows"][::2], limits, strict=True):
        assert row["below_frontier"] == pytest.approx(limit - row["win_rate"], abs=1e-7)
    assert found["rows"][0]["below_frontier"] > 0.01


@pytest.mark.slow
def test_procedures_may_differ(capsys: pytest.CaptureFixture[str], x64: None) -> None:
    words = ["--procedure", "worst_of_4", "--reference-procedure", "best_of_4", "--kl", "0.2", "3"]
    assert cli.main(["frontier", *words, "--transformation", "log"]) == 0
    printed = capsys.readouterr().out
    assert "\noptimum " in printed
    assert "The optimum was not found at KL 0.2: shown" in printed  # it jumps
    found = asked(capsys, *words, "--transformation", "log")
    laws = [notation.procedure(found[name]) for name in ("procedure", "reference_procedure")]
    limits = frontier.frontier_win_rate(laws[0], jnp.array([0.2, 3.0]), laws[1]).tolist()
    logs = [row for row in found["rows"] if row["transformation"] == "log"]
    for row, limit in zip(logs, limits, strict=True):
        assert row["win_rate"] + row["below_frontier"] == pytest.approx(limit, abs=1e-7)


def test_what_has_not_converged_is_said(usual: dict[str, Any]) -> None:
    assert "onverged" not in command.text(usual)
    rows = [row | {"converged": row["residual"] is None} for row in usual["rows"]]
    said = command.text(usual | {"rows": rows})
    assert said.count("Not converged: optimal(best_of_4) at β = ") == 2
    unknown = [row | {"below_frontier": float("nan")} for row in usual["rows"]]
    assert "–: the frontier could not be computed" in command.text(usual | {"rows": unknown})


@pytest.mark.parametrize(("suffix", "begin"), [(".png", b"\x89PNG"), (".PDF", b"%PDF")])
def test_the_picture_is_of_the_kind_its_name_says(
    usual: dict[str, Any],
    figure: Figure,
    monkeypatch: pytest.MonkeyPatch,
    suffix: str,
    begin: bytes,
) -> None:
    monkeypatch.setattr(frontier_plot, "draw", lambda result: figure if result is usual else None)
    assert frontier_plot.picture(usual, suffix).startswith(begin)


def test_lines_go_through_the_rows(usual: dict[str, Any], figure: Figure) -> None:
    axes = figure.axes[0]
    curves = [line for line in axes.lines if len(line.get_xdata()) > 10]
    assert len(curves) == 5
    best = [row for row in usual["rows"] if row["residual"] is not None]
    for row in best:
        x, y = curves[0].get_data()
        nearest = abs(x - row["kl"]).argmin()
        assert abs(y[nearest] - row["win_rate"]) < 0.02
        assert all(line.get_ydata()[-1] <= y[-1] + 1e-6 for line in curves)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--plot", "x.gif"], r"a picture that ends in .png, .pdf or .svg, got x.gif: name it so"),
        (["--plot", "x"], r"got x: name it so"),
        (["--json", "."], r"a file to write to, got the directory \.: name a file"),
        (["--procedure", "best_of_x"], r"expected a procedure .* got 'best_of_x'"),
        (["--reference-procedure", "bst_of_4"], r"did you mean 'best_of_4'\?"),
        (["--transformation", "log", "exponental(5)"], r"got 'exponental\(5\)': did you mean"),
        (["--kl", "0"], r"argument --kl: expected positive numbers, got 0: such as 0.5"),
        (["--kl", "0.5", "-1"], r"expected positive numbers, got -1"),
        (["--beta", "nan"], r"argument --beta: expected positive numbers, got nan"),
        (["--beta", "1", "--kl", "1"], r"argument --kl: not allowed with argument --beta"),
        (["--kl", "1e5", "--plot", "x.png"], r"a KL that identity can be computed at, got 100000"),
        (["--refrence-procedure", "log"], r"did you mean --reference-procedure\?"),
        (["--plto", "x.png"], r"did you mean --plot\?"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], answer: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["frontier", "--procedure", "best_of_4", *words]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert re.search(answer, err), err
    assert not [path for path in tmp_path.iterdir() if path.name != "compiled"]


def test_a_wrong_picture_is_refused_before_anything_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command, "compare", lambda *_, **__: pytest.fail("computed"))
    assert cli.main(["frontier", "--procedure", "best_of_4", "--plot", "x.jpeg"]) == 2


def test_a_procedure_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["frontier"]) == 2
    assert "required: --procedure; see infalign frontier --help" in capsys.readouterr().err
