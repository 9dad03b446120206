"""`infalign evaluate` pairs files by prompt and prints the library's win rates."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from written_rewards import write_csv, write_json, write_npz

from infalign_jax import cli, evaluation, procedures

B = 12
RNG = np.random.default_rng(0)
POLICY, OTHER, REFERENCE = (
    RNG.normal(shift, 1, (B, k)) for shift, k in ((1, 8), (0.5, 6), (0, 16))
)
JUDGES = [x + RNG.normal(size=x.shape) for x in (POLICY, OTHER, REFERENCE)]
ORDER = RNG.permutation(B)  # the reference's file has the prompts in another order


def wide(rewards: np.ndarray, judge: np.ndarray | None, order: Any) -> list[dict[str, Any]]:
    rows = [{"prompt": f"p{i}", "rewards": rewards[i].tolist()} for i in order]
    if judge is not None:
        rows = [row | {"judge": judge[i].tolist()} for row, i in zip(rows, order, strict=True)]
    return rows


@pytest.fixture(autouse=True)
def files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    write_json(tmp_path / "policy.jsonl", wide(POLICY, JUDGES[0], range(B)))
    write_json(tmp_path / "other.jsonl", wide(OTHER, JUDGES[1], range(B)))
    write_json(tmp_path / "reference.jsonl", wide(REFERENCE, JUDGES[2], ORDER))
    return tmp_path


def asked(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert cli.main(["evaluate", *words, "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


def check(found: dict[str, Any], expected: evaluation.WinRate) -> None:
    assert found["mean"] == expected.mean
    assert found["standard_error"] == expected.standard_error
    assert found["interval"] == list(evaluation.confidence_interval(expected))


def test_rows_are_the_library_s(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["policy.jsonl", "reference.jsonl", "--against", "other.jsonl"]
    found = asked(capsys, *words, "--procedure", "standard", "best_of_4", "--procedure", "standard")
    assert found["responses"] == {"policy": 8, "reference": 16, "against": 6}
    rows = {(row["procedure"], row["by"]): row for row in found["rows"]}
    assert list(rows) == [(p, by) for p in ("standard", "best_of_4") for by in ("reward", "judge")]
    for (name, by), row in rows.items():
        law = procedures.standard() if name == "standard" else procedures.best_of_n(4)
        one, other = (
            evaluation.win_rate(
                rewards,
                REFERENCE,
                law,
                policy_judge=judge if by == "judge" else None,
                reference_judge=JUDGES[2] if by == "judge" else None,
            )
            for rewards, judge in ((POLICY, JUDGES[0]), (OTHER, JUDGES[1]))
        )
        check(row["policy"], one)
        check(row["against"], other)
        check(row["difference"], evaluation.paired_difference(one, other))


def test_the_table_has_the_same_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["policy.jsonl", "reference.jsonl", "--procedure", "best_of_4"]
    row = asked(capsys, *words)["rows"][0]["policy"]
    assert cli.main(["evaluate", *words, "--json", "x.json"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "policy.jsonl over reference.jsonl: 12 prompts, 8 and 16 responses each"
    low, high = row["interval"]
    assert printed[3].split(maxsplit=3) == [
        *("best_of_4", "reward", f"{100 * row['mean']:.1f}"),
        f"{100 * low:.1f} to {100 * high:.1f}",
    ]
    assert json.loads(Path("x.json").read_text())["rows"][0]["policy"] == row


def test_the_reference_may_be_served_otherwise(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["policy.jsonl", "reference.jsonl", "--procedure", "worst_of_4"]
    found = asked(capsys, *words, "--reference-procedure", "standard")["rows"][0]
    law, other = procedures.worst_of_n(4), procedures.standard()
    expected = evaluation.win_rate(POLICY, REFERENCE, law, reference_procedure=other)
    check(found["policy"], expected)


def test_without_a_judge_everywhere_there_is_none(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_json(tmp_path / "plain.jsonl", wide(REFERENCE, None, ORDER))
    words = ["policy.jsonl", "plain.jsonl", "--procedure", "standard"]
    assert [row["by"] for row in asked(capsys, *words)["rows"]] == ["reward"]
    assert cli.main(["evaluate", *words]) == 0
    assert "plain.jsonl has no judge's rewards" in capsys.readouterr().out


def test_a_tie_across_precisions_remains_a_tie(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """0.1 in a JSON file of doubles, and as it was stored in single precision."""
    write_json(tmp_path / "double.jsonl", [{"prompt": 0, "rewards": [0.1, 0.7]}])
    write_npz(tmp_path / "single.npz", rewards=np.array([[0.1, 0.7]], np.float32))
    for words in (["double.jsonl", "single.npz"], ["single.npz", "double.jsonl"]):
        assert cli.main(["evaluate", *words, "--procedure", "best_of_2", "--json", "x.json"]) == 0
        assert json.loads(Path("x.json").read_text())["rows"][0]["policy"]["mean"] == 0.5
        assert "–" in capsys.readouterr().out  # no interval from one prompt


def test_too_few_samples_of_an_endless_procedure_are_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["policy.jsonl", "reference.jsonl", "--procedure", "best_of_poisson(3)"]
    law = procedures.best_of_poisson(3.0)
    assert asked(capsys, *words)["rows"][0]["bias"] == law.bias(8) + law.bias(16)
    assert cli.main(["evaluate", *words]) == 0
    assert "too few samples may move the rate by" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["policy.jsonl", "none.jsonl"], "No such file or directory: none.jsonl"),
        (["policy.jsonl", "broken.csv"], "broken.csv, line 3: expected reward to be a number"),
        (
            ["policy.jsonl", "few.csv"],
            r"few.csv: .* of policy.jsonl, got none of 'p1' \(it lacks 11",
        ),
        (
            ["few.csv", "policy.jsonl"],
            r"few.csv: .* of policy.jsonl, got none of 'p1' \(it lacks 11",
        ),
        (["policy.jsonl", "policy.jsonl", "--against", "few.csv"], "few.csv: expected the prompts"),
        (["policy.jsonl"], "required: REFERENCE_REWARDS"),
        (["policy.jsonl", "reference.jsonl", "--agianst", "x"], "did you mean --against?"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], answer: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_csv(tmp_path / "few.csv", [{"prompt": "p0", "reward": 1.0}] * 4)
    write_csv(tmp_path / "broken.csv", [{"prompt": "p0", "reward": r} for r in (1.0, "x")])
    assert cli.main(["evaluate", *words, "--procedure", "standard", "--json", "x.json"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert re.search(answer.replace("?", r"\?"), err), err
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--procedure", "best_of_9"], "policy.jsonl: expected at least 9 .* best_of_9, got 8"),
        (["--procedure", "best_of_8", "--against", "other.jsonl"], "other.jsonl: .* got 6: sample"),
        (
            ["--procedure", "standard", "--reference-procedure", "best_of_17"],
            "reference.jsonl: expected at least 17 responses a prompt for best_of_17, got 16",
        ),
        (["--procedure", "standard", "bst_of_2"], "got 'bst_of_2': did you mean"),
    ],
)
def test_what_a_procedure_takes(
    words: list[str], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", "policy.jsonl", "reference.jsonl", *words]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert re.search(answer, err), err
