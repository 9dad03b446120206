"""The real pipeline at toy size: what it leaves, what it takes up again, what it reads."""

import contextlib
import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import events
import jax
import numpy as np
import pytest
import toy_run

from infalign_jax import frontier, pipeline, procedures, transformations
from infalign_jax.experiment import Experiment, PolicyConfig
from infalign_jax.hh import HHConfig
from infalign_jax.lm.tokenizer import TokenizerConfig
from infalign_jax.stages import facts, language, serve

NUMBER = (int, float)
RATE = {"mean": NUMBER, "standard_error": NUMBER}


class Done(NamedTuple):
    """A finished run."""

    out: Path
    results: dict[str, Any]
    said: str


def run(experiment: Experiment, out: Path, stage: str | None = None) -> Done:
    with contextlib.redirect_stderr(io.StringIO()) as said:
        results = pipeline.run(experiment, out, stage)
    return Done(out, results, said.getvalue())


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps what is compiled from run to run, as the command does."""
    least = "jax_persistent_cache_min_compile_time_secs"
    before = jax.config.jax_compilation_cache_dir, getattr(jax.config, least)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update(least, 0.1)
    yield
    jax.config.update("jax_compilation_cache_dir", before[0])
    jax.config.update(least, before[1])


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    return run(toy_run.experiment, tmp_path_factory.mktemp("run") / "toy")


def stages(out: Path) -> set[str]:
    return {path.name for path in (out / "stages").iterdir()}


def refuse(constant: str) -> None:
    raise AssertionError(f"results.json holds {constant}")


def check(found: Any, schema: Any) -> None:
    """Asserts that what the schema names is there, of its type."""
    if not isinstance(schema, dict):
        assert isinstance(found, schema)
        return
    for name, inner in schema.items():
        check(found[name], inner)


def test_results_say_what_callers_rely_on(done: Done) -> None:
    text = (done.out / "results.json").read_text()
    results = json.loads(text, parse_constant=refuse)
    assert results == json.loads(json.dumps(done.results))
    stages = ("sft", "judge", "calibrate", "foresight", "align identity beta=0.3", "evaluate")
    shares = {"productive": NUMBER, "compilation": NUMBER}
    rates = {"best_of_4": dict.fromkeys(("train", "judge", "true"), RATE)}
    check(
        results,
        {
            "experiment": str,
            "seed": int,
            "device": str,
            "versions": {"jax": str},
            "goodput": dict.fromkeys(stages, shares),
            "seconds": dict.fromkeys(("data", "sft", "reward", "calibrate", "evaluate"), NUMBER),
            "reward_model": {"accuracy": NUMBER, "standard_error": NUMBER},
            "calibration": {"absolute_error_before": NUMBER, "absolute_error_after": NUMBER},
            "policies": list,
        },
    )
    for policy in results["policies"]:
        numbers = dict.fromkeys(("beta", "kl", "kl_standard_error"), NUMBER)
        bounds = {"best_of_4": NUMBER}
        check(
            policy,
            {"transformation": str, "win_rates": rates, "frontier_win_rate": bounds} | numbers,
        )
        assert set(policy["win_rates"]) == {"best_of_4"}
    assert all(0 < stage["productive"] < 1 for stage in results["goodput"].values())
    assert "lost" not in results["reward_model"]
    names = [policy["transformation"] for policy in results["policies"]]
    assert names == ["identity", "exponential(10)"]
    assert results["policies"][0]["beta"] == 0.3
    assert results["policies"][1]["target_kl"] == pytest.approx(0.5, abs=1e-3)


def test_every_step_has_one_line(done: Done) -> None:
    lines = [json.loads(line) for line in (done.out / "metrics.jsonl").read_text().splitlines()]
    counted = Counter((line["stage"], line.get("policy"), line["step"]) for line in lines)
    once = ("sft", "reward", "judge_sft", "judge", "foresight")
    steps: dict[tuple[str, str | None], int] = {(stage, None): 3 for stage in once}
    steps |= {("align", policy.name): 4 for policy in toy_run.experiment.policies}
    wanted = {(*stage, step): 1 for stage, n in steps.items() for step in range(1, n + 1)}
    assert counted == wanted
    assert all("loss" in line and line["seconds"] >= 0 for line in lines)


def test_a_finished_run_answers_prompts_of_ones_own(done: Done) -> None:
    there = stages(done.out)
    served = serve.load(toy_run.experiment, done.out)
    assert stages(done.out) == there
    names = [policy.name for policy in toy_run.experiment.policies]
    assert list(served.policies) == ["reference", *names]
    prompts = ["plan a feast for a proud king in winter", "plan a"]
    drawn = serve.respond(served, names[0], prompts, 3)
    assert {prompt: len(responses) for prompt, responses in drawn.items()} == dict.fromkeys(
        prompts, 3
    )
    assert drawn == serve.respond(served, names[0], [*prompts, prompts[0]], 3)
    assert drawn != serve.respond(served, names[0], prompts, 3, seed=1)
    with pytest.raises(ValueError, match="expected a policy among reference"):
        serve.respond(served, "mine", prompts, 3)
    with pytest.raises(ValueError, match="got an empty one"):
        serve.respond(served, names[0], [" "], 3)


def test_the_judge_shares_no_prompt_and_no_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    met: dict[str, tuple[set[bytes], Any]] = {}

    def spy(run: Any, stage: str, digest: str, state: Any, *rest: Any, **named: Any) -> Any:
        fitted = fit(run, stage, digest, state, *rest, **named)
        met[stage] = rows[-1], jax.device_get(fitted[0])
        return fitted

    def spy_rows(split: Any, size: int, seed: int, own: Any) -> Any:
        rows.append({row.tobytes() for row in np.asarray(split.prompts.tokens)})
        return minibatches(split, size, seed, own)

    rows: list[set[bytes]] = []
    fit, minibatches = language.fit, language.minibatches
    monkeypatch.setattr(language, "fit", spy)
    monkeypatch.setattr(language, "minibatches", spy_rows)
    run(toy_run.experiment, tmp_path, "calibrate")
    for own, others in (("judge_sft", "sft"), ("judge", "reward")):
        assert not met[own][0] & met[others][0]
    reference, trunk = (met[stage][1]["embedding"].ravel() for stage in ("sft", "judge_sft"))
    judge = met["judge"][1]["trunk"]["embedding"].ravel()
    assert np.corrcoef(judge, reference)[0, 1] < 0.1
    assert np.corrcoef(judge, trunk)[0, 1] > 0.9


def test_points_of_identitys_curve_are_none_above_another() -> None:
    def row(name: str, beta: float, more: float = 0.0) -> dict[str, Any]:
        kl, rate = frontier.curve(transformations.identity, procedures.best_of_n(4), beta)
        rates = {"best_of_4": {"train": {"mean": float(rate) + more}}}
        return {"transformation": name, "kl": float(kl), "win_rates": rates}

    rows = [row("identity", 0.5, more=-0.01), row("identity", 0.25), row("log", 0.24, more=0.03)]
    gains = [row["best_of_4"] for row in facts.above_identity(rows)]
    np.testing.assert_allclose(gains, [0.0, 0.0, 0.03], atol=1e-5)
    assert facts.above_identity(rows[2:]) == [{}]


def test_tensorboard_is_told_what_the_log_says(done: Done) -> None:
    told = {path.name: events.numbers(path) for path in (done.out / "tensorboard").iterdir()}
    lines = [json.loads(line) for line in (done.out / "metrics.jsonl").read_text().splitlines()]
    assert set(told) == {line.get("policy", line["stage"]) for line in lines}
    for line in lines:
        scalars = told[line.get("policy", line["stage"])]
        assert scalars["loss", line["step"]] == pytest.approx(line["loss"], rel=1e-6)


def test_report_and_tables_are_drawn(done: Done) -> None:
    page = (done.out / "report.html").read_text()
    assert all(policy.transformation in page for policy in toy_run.experiment.policies)
    with np.load(done.out / "evaluation.npz", allow_pickle=False) as arrays:
        assert {name: arrays[name].shape for name in arrays} == {
            "quantiles_before": (8,),
            "quantiles_after": (8,),
            "policy_quantiles/0": (32,),
            "policy_quantiles/1": (32,),
        }
    shown = json.loads((done.out / "samples.json").read_text())
    assert len(shown) == 4
    for one in shown:
        assert [policy["name"] for policy in one["policies"]] == [
            policy.name for policy in toy_run.experiment.policies
        ]
        for policy in one["policies"]:
            rewards = [response["reward"] for response in policy["responses"]]
            assert policy["best"] == rewards.index(max(rewards))


def test_nothing_unfinished_is_left(done: Done) -> None:
    names = [path.name for path in done.out.rglob("*")]
    assert not any(name.endswith((".tmp", ".old")) or name.startswith("step-") for name in names)


def test_a_second_run_makes_nothing_again(done: Done) -> None:
    made = {path: path.stat().st_mtime_ns for path in (done.out / "stages").rglob("*")}
    again = run(toy_run.experiment, done.out, "evaluate")
    assert {path: path.stat().st_mtime_ns for path in (done.out / "stages").rglob("*")} == made
    kinds = [line.split()[0] for line in again.said.splitlines() if " reused from " in line]
    once = ("data", "tokenizer", "sft", "reward", "judge_sft", "judge", "calibrate", "foresight")
    assert kinds == [*once, "align", "align", "samples", "samples", "samples"]
    timing = ("seconds", "tokens_per_second", "goodput")
    assert [{k: v for k, v in each.results.items() if k not in timing} for each in (done, again)]
    for name in done.results.keys() - set(timing):
        assert again.results[name] == done.results[name], name


def test_another_beta_repeats_its_own_policy_alone(done: Done) -> None:
    before = stages(done.out)
    changed = (PolicyConfig("identity", beta=0.4), toy_run.experiment.policies[1])
    after = run(replace(toy_run.experiment, policies=changed), done.out, "evaluate")
    kinds = sorted(name.partition("-")[0] for name in stages(after.out) - before)
    assert kinds == ["align", "samples"]
    first, second = after.results["policies"]
    kept = done.results["policies"][1]
    assert second.pop("above_identity") != kept["above_identity"]  # identity has another β
    assert second == {name: value for name, value in kept.items() if name != "above_identity"}
    assert first["beta"] == 0.4
    assert first["kl"] != done.results["policies"][0]["kl"]


def hh_files(directory: Path, conversations: int = 60) -> None:
    """Made-up pairs in Anthropic's form; every tenth prompt is long, one response is empty."""
    rng, lines = np.random.default_rng(0), []
    for number in range(conversations):
        words = " ".join(
            rng.choice(["what", "is", "a", "cat", "dog"], 60 if number % 10 == 0 else 4)
        )
        prompt = f"\n\nHuman: {number} {words}?\n\nAssistant:"
        answers = [f" It is {number + 7 * i}." for i in range(2)]
        if number == 1:
            answers[1] = ""
        lines.append(
            json.dumps(
                dict(zip(("chosen", "rejected"), [prompt + a for a in answers], strict=True))
            )
        )
    (directory / "made.jsonl").write_text("\n".join(lines))


def test_human_preferences_are_read_and_trained_on(tmp_path: Path) -> None:
    hh_files(tmp_path)
    data = HHConfig(
        str(tmp_path), "made.jsonl", validation_fraction=0.2, test_fraction=0.2, judge_fraction=0.4
    )
    experiment = replace(toy_run.experiment, data=data, tokenizer=TokenizerConfig(vocab_size=320))
    told = run(experiment, tmp_path / "out", "data")
    counts = told.results["data"]
    assert counts["read"]["empty_response"] == 1
    assert counts["read"]["kept"] == 59
    splits = ("train", "judge", "validation", "test")
    assert sum(counts[split]["rows"] for split in splits) == 59
    assert sum(counts[split]["long_prompt_rows"] for split in splits) == 6
    assert "long prompt rows" in told.said
    run(experiment, tmp_path / "out", "sft")
    assert {name.partition("-")[0] for name in stages(tmp_path / "out")} == {"tokenizer", "sft"}


def test_another_file_of_pairs_is_not_taken_for_the_first(tmp_path: Path) -> None:
    hh_files(tmp_path)
    data = HHConfig(
        str(tmp_path), "made.jsonl", validation_fraction=0.2, test_fraction=0.2, judge_fraction=0.4
    )
    experiment = replace(toy_run.experiment, data=data, tokenizer=TokenizerConfig(vocab_size=320))
    first = run(experiment, tmp_path / "out", "data").results["data"]
    hh_files(tmp_path, 80)
    second = run(experiment, tmp_path / "out", "data").results["data"]
    assert second["read"]["rows"] == first["read"]["rows"] + 20
