"""`infalign predict` prints what the library foretells, and recommends by a rule that is told."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from written_rewards import write_csv, write_json, write_npz

from infalign_jax import calibration, cli, evaluation, notation, prediction, sample_size
from infalign_jax.commands import predict, predict_text
from infalign_jax.reward_files import Rewards

RNG = np.random.default_rng(0)
REWARDS = RNG.normal(size=(60, 64)) + RNG.normal(size=(60, 1))
OWN = REWARDS - REWARDS.mean(axis=1, keepdims=True)
AGREES = 0.8 * OWN + 0.6 * RNG.normal(size=OWN.shape)
BOTH = ("identity", "exponential(5)")


@pytest.fixture(autouse=True)
def a_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))


def advised(rewards: np.ndarray, judge: np.ndarray | None, **options: Any) -> dict[str, Any]:
    prompts = tuple(f"p{i}" for i in range(len(rewards)))
    asked = {"transformations": BOTH, "kls": [0.25]} | options
    with jax.enable_x64(True):
        return predict.advise(Rewards(prompts, rewards, judge), "best_of_4", **asked)


@pytest.fixture(scope="module")
def judged() -> dict[str, Any]:
    return advised(REWARDS, AGREES)


def test_rows_are_the_library_s(judged: dict[str, Any], x64: None) -> None:
    law, rows = notation.procedure("best_of_4"), judged["kls"][0]["rows"]
    assert [row["transformation"] for row in rows] == [*BOTH, "optimal(best_of_4)"]
    for row in rows[:2]:
        beta = float(notation.beta_for_kl(row["transformation"], 0.25))
        phi = notation.transformation(row["transformation"], beta)
        assert row["beta"] == pytest.approx(beta, rel=1e-9)
        found = prediction.predict(REWARDS, phi, row["beta"], law, judge=AGREES)
        assert found.judged is not None
        for name, rate in (("by_reward", found.win_rate), ("by_judge", found.judged)):
            assert row[name]["mean"] == pytest.approx(rate.mean, abs=1e-12)
            assert row[name]["interval"] == pytest.approx(evaluation.confidence_interval(rate))
        assert row["effective_sample_size"] == pytest.approx(found.effective_sample_size)
        assert row["warning"] == found.warning
        at_k = sample_size.at_k(phi, 0.25, law, 64)
        assert (row["at_k"], row["beta_at_k"]) == pytest.approx((at_k.win_rate, at_k.beta))
    ahead = rows[1]["by_judge"]["mean"] - rows[0]["by_judge"]["mean"]
    assert rows[1]["ahead"]["mean"] == pytest.approx(ahead)
    assert rows[0]["ahead"]["mean"] == 0


def test_the_reward_s_miscalibration_is_the_library_s(judged: dict[str, Any]) -> None:
    with jax.enable_x64(True):
        errors = calibration.held_out_errors(REWARDS)
    for name, each in zip(("raw", "calibrated"), errors, strict=True):
        mean, error = evaluation.mean_and_standard_error(each)
        assert judged["miscalibration"][name]["mean"] == mean
        assert judged["miscalibration"][name]["standard_error"] == error


def test_a_judge_that_agrees_leaves_it_to_theory(judged: dict[str, Any]) -> None:
    found = judged["kls"][0]["recommended"]
    assert found["transformation"] == "optimal(best_of_4)"
    row = judged["kls"][0]["rows"][-1]
    assert found["beta"] == row["beta"]
    assert max(r["at_k"] for r in judged["kls"][0]["rows"]) == row["at_k"]


def test_a_judge_that_sees_through_the_top_prevails() -> None:
    """A reward hacked at its top: the judge likes nothing that the sharper Φ picks."""
    u = OWN.argsort(axis=1).argsort(axis=1) / 64
    hacked = np.where(u > 0.85, -3.0, u) + 0.01 * RNG.normal(size=OWN.shape)
    found = advised(REWARDS, hacked)["kls"][0]
    assert found["recommended"]["transformation"] == "identity"
    assert found["recommended"]["leader"] == "identity"
    assert found["rows"][1]["ahead"]["interval"][1] < 0


def test_few_responses_with_a_judge() -> None:
    found = advised(REWARDS[:, :7], AGREES[:, :7])
    assert found["kls"][0]["judged_half_width"] is None  # halves of 3 cannot be predicted from
    assert all(row["warning"] for row in found["kls"][0]["rows"])
    assert "! fewer than 6: " in predict_text.text(found, "x")


def test_what_finite_k_loses(judged: dict[str, Any]) -> None:
    samples = judged["kls"][0]["samples"]
    assert [each["responses"] for each in samples] == [64, 128, 256]
    lost = [each["lost"] for each in samples]
    row = judged["kls"][0]["rows"][-1]
    assert lost[0] == pytest.approx(row["theory"] - row["at_k"])
    assert lost[0] > 1.5 * lost[1] > 2 * lost[2] > 0


def test_the_judge_s_interval_shrinks(judged: dict[str, Any]) -> None:
    found, row = judged["kls"][0]["judged_half_width"], judged["kls"][0]["rows"][-1]
    low, high = row["by_judge"]["interval"]
    assert found["now"] == pytest.approx((high - low) / 2)
    t = evaluation.student_quantile(0.95, 119) / evaluation.student_quantile(0.95, 59)
    assert found["twice_prompts"] == pytest.approx(t * found["now"] / np.sqrt(2))
    assert found["now"] / np.sqrt(2) <= found["twice_responses"] * 1.0001
    assert found["twice_responses"] < found["now"]


def test_where_rewards_tie_theory_is_not_followed() -> None:
    passed = (OWN > 0.8).astype(float)
    found = advised(passed, None, transformations=["exponential(-10)", *BOTH])
    assert found["tied"] == pytest.approx(
        np.mean([[p[i] == p[j] for i in range(64) for j in range(i)] for p in passed])
    )
    rows = {row["transformation"]: row for row in found["kls"][0]["rows"]}
    best = max(rows, key=lambda name: rows[name]["by_reward"]["mean"])
    assert found["kls"][0]["recommended"]["transformation"] == best == "identity"
    assert max(rows, key=lambda name: rows[name]["at_k"]) == "optimal(best_of_4)"
    assert "% of a prompt's pairs tie" in predict_text.text(found, "x")


@pytest.mark.parametrize("kind", ["long.csv", "wide.jsonl", "arrays.npz"])
def test_the_command_reads_files_and_prints_the_numbers(
    kind: str, judged: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = list(zip(map(str, range(60)), REWARDS.tolist(), AGREES.tolist(), strict=True))
    if kind == "long.csv":
        parts = [(p, r, j) for p, rs, js in rows for r, j in zip(rs, js, strict=True)]
        write_csv(tmp_path / kind, [{"prompt": p, "reward": r, "judge": j} for p, r, j in parts])
    elif kind == "wide.jsonl":
        write_json(tmp_path / kind, [{"prompt": p, "rewards": r, "judge": j} for p, r, j in rows])
    else:
        write_npz(tmp_path / kind, rewards=REWARDS, judge=AGREES)
    words = ["predict", kind, "--procedure", "best_of_4", "--kl", "0.25", "--transformation"]
    assert cli.main([*words, *BOTH, "--json", "x.json"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{kind}: 60 prompts, 64 reference responses each, with a judge\n")
    stored = json.loads((tmp_path / "x.json").read_text())
    assert stored == json.loads(json.dumps(judged))
    for row in judged["kls"][0]["rows"]:
        low, high = row["by_judge"]["interval"]
        cell = f"{100 * row['by_judge']['mean']:.1f} ± {50 * (high - low):.1f}"
        (line,) = re.findall(rf"^{re.escape(row['transformation'])} .*$", printed, re.MULTILINE)
        assert cell in line
        about = [f"{row['beta']:.4g}", f"{row['kl']:.3f}", f"{100 * row['theory']:.2f}"]
        assert line.split()[1:4] == about
    chosen = judged["kls"][0]["recommended"]
    assert f"Recommended: {chosen['transformation']}, β = {chosen['beta']:.4g}: " in printed


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["none.csv"], "No such file or directory: none.csv"),
        (["nan.csv"], "nan.csv, line 2: expected reward to be finite, got nan"),
        (["two.csv"], r"shape \[B, K\] with K at least 4, got \(2, 2\)"),
        (
            ["four.csv", "--kl", "3", "--transformation", "log"],
            r"ranks among 4 can lead to .* got 3: ask for less",
        ),
        (["four.txt"], "expected a name that ends in .jsonl"),
        (["four.csv", "--transformation", "lgo"], r"got 'lgo': did you mean 'log'\?"),
        (["four.csv", "--beta", "3"], "got --beta; see infalign predict --help"),
        ([], "required: REWARDS"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], answer: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name, k, last in (("nan.csv", 4, "nan"), ("two.csv", 2, 0), ("four.csv", 4, 0)):
        rows = [{"prompt": p, "reward": i} for p in "ab" for i in range(k)]
        write_csv(tmp_path / name, [rows[0] | {"reward": last}, *rows[1:]])
    assert cli.main(["predict", *words, "--procedure", "standard", "--json", "x.json"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert re.search(answer, err), err
    assert not (tmp_path / "x.json").exists()
