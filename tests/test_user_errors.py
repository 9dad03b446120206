"""What a user gets wrong is answered in one line (expected, got, what to do) with exit code 2."""

import json
import re
import resource
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import processes
import pytest
import toy_run

from infalign_jax import cli, phases, pipeline
from infalign_jax import config as configs
from infalign_jax.runtime import measure
from infalign_jax.runtime.files import exclusive

HH = ["data=HHConfig", "data.judge_fraction=0.4", "data.test_fraction=0.2"]
HH += ["data.validation_fraction=0.2", "data.file=hh.jsonl"]


@pytest.fixture(autouse=True)
def as_the_command_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A compilation cache of the test's own, and no NaN caught before the program sees it."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    with jax.debug_nans(False):
        yield


def infalign(out: Path, *changes: str, stage: str = "report") -> int:
    words = [word for change in changes for word in ("--set", change)]
    return cli.main(["run", toy_run.__file__, "--out", str(out), "--stage", stage, *words])


def check_answer(capsys: pytest.CaptureFixture[str], pattern: str) -> None:
    """The last line on standard error is the answer, and nothing but progress came before it."""
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert [line for line in lines if line.startswith("infalign: ")] == lines[-1:]
    assert "Traceback" not in err
    assert re.search("^infalign: .*expected .*, got ", lines[-1])
    assert re.search(pattern, lines[-1]), lines[-1]


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        ("algin.steps=3", r"a field of Experiment, got algin; did you mean align\?"),
        ("align.stepz=3", r"a field of AlignConfig \(align\), got stepz; did you mean steps\?"),
        ("align.steps=many", "align.steps to be int, got many"),
        ("align.steps=0", "align.steps: expected at least 1, got 0; raise it"),
        ("align.solver=ppo", "align.solver to be one of policy_gradient, regression, got ppo"),
        ("sft.optimiser.learning_rate=-1", "learning_rate: expected a positive number, got -1"),
        ("data.train_pairs=0", "data.train_pairs: expected at least 1, got 0"),
        ("policies.0.transformation=exponental(5)", "exponental"),
        ("policies=", "policies: expected at least one, got none"),
        ("policies.0.kl=3", "expected a positive kl or a positive beta, got kl=3"),
        ("evaluate.procedures=best_of_4,best_of_16", "at least 16 samples for best_of_16, got 8"),
        ("evaluate.reference_responses=15", "expected at least 16, got 15"),
        ("calibrate.responses=1", "calibrate.responses: expected at least 2, got 1"),
        ("calibrate.prompts=3", "align.batch_size: expected at most 3, got 4; lower it or raise"),
        ("foresight.responses=9", "foresight.responses: expected at most 8, got 9; lower it or"),
        ("sampling.temperature=0.7", "temperature=1, .* got temperature=0.7"),
        ("sampling.end=3", "sampling.end: expected 2, .* got 3"),
        ("model.vocab_size=512", "the tokenizer's 320, got 512"),
        ("seed=-1", "seed: expected at least 0, got -1"),
        ("seed=123456789012", "seed: expected at most 100000000, got 123456789012"),
        ("model.mlp_width=99999999999", r"sft.batch_size: expected at most \d+ GiB .* lower it,"),
        ("calibrate.chunk=99999999", r"calibrate.chunk: expected at most \d+ GiB on a device"),
        ("align.responses=99999999", r"align.batch_size: expected at most \d+ GiB on a device"),
        (
            "evaluate.reference_responses=99999999",
            r"evaluate.reference_responses: expected at most \d+ GiB on a device",
        ),
        ("mesh.data=3", r"mesh: expected a product of 1 \(the devices\), got data=3; use data=1"),
        ("data=HHConfig", "data.judge_fraction: expected above 0, got 0.0"),
    ],
)
def test_a_wrong_setting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, answer: str
) -> None:
    assert infalign(tmp_path / "out", change) == 2
    check_answer(capsys, answer)
    assert not (tmp_path / "out").exists()


def test_a_kl_out_of_reach(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert infalign(tmp_path / "out", "policies.1.kl=1e6") == 2
    check_answer(capsys, r"a KL that exponential\(10\) can be computed at, got kl=1e\+06")
    assert not (tmp_path / "out").exists()


def test_foresight_needs_room_for_the_reference_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many responses as alignment has, so that only π_ref makes it the largest phase."""
    change, devices = "foresight.responses=8", len(jax.devices())
    toy = configs.override(toy_run.experiment, [change])
    sizes = toy.mesh.over(devices)
    needed = {name: phases.least(toy, sizes, name) for name in phases.of(toy)}
    most = devices * needed.pop(phases.FORESIGHT)
    assert most > devices * max(needed.values())
    monkeypatch.setattr(measure, "memory_limit", lambda _: int(most) - 1)
    assert infalign(tmp_path / "out", change, stage="foresight") == 2
    check_answer(capsys, r"foresight.batch_size: expected at most 0 GiB on a device, got at least")
    assert infalign(tmp_path / "out", change, stage="calibrate") == 0


def test_a_reward_s_trunk_needs_room_where_it_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = replace(toy_run.experiment.model, width=64)
    toy, devices = replace(toy_run.experiment, reward_model=wide), len(jax.devices())
    most = devices * phases.least(toy, toy.mesh.over(devices), phases.TRUNK)
    monkeypatch.setattr(measure, "memory_limit", lambda _: int(most) - 1)
    with pytest.raises(ValueError, match=r"sft\.batch_size: expected at most 0 GiB on a device"):
        pipeline.run(toy, tmp_path / "out", "reward")
    pipeline.run(toy, tmp_path / "out", "sft")


def test_an_unknown_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert infalign(tmp_path / "out", stage="calibrat") == 2
    check_answer(capsys, r"got calibrat; did you mean calibrate\?")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        (["prompt_length=3"], "prompts of at most 3 tokens, got none .*: raise prompt_length"),
        (["tokenizer.vocab_size=4096", "model.vocab_size=4096"], "lower tokenizer.vocab_size"),
        (["sft.batch_size=61"], r"sft.batch_size: .* at most 60 \(the rows of train\), got 61"),
        (["reward.batch_size=31"], r"reward.batch_size: .* 30 \(the rows of judge\), got 31"),
        (["tokenizer.file=none.model"], "a SentencePiece model at none.model, got no file"),
    ],
)
def test_data_that_the_settings_do_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: list[str], answer: str
) -> None:
    assert infalign(tmp_path / "out", *changes) == 2
    check_answer(capsys, answer)


def test_a_tokenizer_of_another_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert infalign(tmp_path / "out", stage="tokenizer") == 0
    (model,) = (tmp_path / "out" / "stages").glob("tokenizer-*.model")
    shutil.copy(model, tmp_path / "own.model")
    changes = ["tokenizer.vocab_size=330", "model.vocab_size=330"]
    changes.append(f"tokenizer.file={tmp_path / 'own.model'}")
    assert infalign(tmp_path / "out", *changes, stage="tokenizer") == 2
    check_answer(capsys, "tokenizer.vocab_size: expected the 320 pieces of .*, got 330")


@pytest.mark.parametrize(
    ("lines", "answer"),
    [
        (None, "expected a directory of HH files, got '.*nowhere'"),
        ([], "got no line"),
        (['{"chosen": "a", "rejected": "b"}', '{"chosen": 1}'], r"hh.jsonl, line 2: repair"),
    ],
)
def test_human_preferences_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: list[str] | None, answer: str
) -> None:
    if lines is not None:
        (tmp_path / "hh.jsonl").write_text("\n".join(lines))
    place = "nowhere" if lines is None else ""
    assert infalign(tmp_path / "out", *HH, f"data.directory={tmp_path / place}") == 2
    check_answer(capsys, answer)


def test_too_few_prompts_to_measure_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = []
    for number in range(60):
        ask = f"\n\nHuman: {'what is it ' * (30 if number else 1)}{number}?\n\nAssistant:"
        rows.append(json.dumps({"chosen": ask + " This.", "rejected": ask + " That."}))
    (tmp_path / "hh.jsonl").write_text("\n".join(rows))
    assert infalign(tmp_path / "out", *HH, f"data.directory={tmp_path}") == 2
    check_answer(capsys, "expected prompts of at most 32 tokens, got none among")


def test_a_directory_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with exclusive(tmp_path / "out"):
        assert infalign(tmp_path / "out") == 2
    check_answer(capsys, "in use by another run")


def test_a_batch_that_the_devices_do_not_divide(tmp_path: Path) -> None:
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    words = ["--set", "calibrate.chunk=8", "--set", "align.batch_size=6"]
    process = processes.command("--out", tmp_path / "out", *words, **flags)
    (err,) = processes.ended(process)
    assert process.returncode == 2
    assert err.startswith(
        "infalign: mesh: expected replica × data × fsdp to divide 6 (align.batch_size; 8 would "
        "do), got data=8; use "
    )
    assert err.count("\n") == 1


def test_a_full_disk_while_pairs_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        assert infalign(tmp_path / "out", "data.train_pairs=9000", stage="data") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    check_answer(capsys, "expected room for the preference pairs in .*File too large.*free some")
    assert infalign(tmp_path / "out", "data.train_pairs=9000", stage="data") == 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run up to SFT, and another of another seed beside it."""
    out = tmp_path_factory.mktemp("trained") / "out"
    assert infalign(out, stage="sft") == 0
    return out


def sft_of(out: Path) -> Path:
    (path,) = (out / "stages").glob("sft-*")
    return path


def test_a_bucket_as_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert infalign(Path("gs://some/run")) == 2
    check_answer(capsys, "--out: expected a directory, got the bucket gs://some/run; give a local")


def copy_with_header(trained: Path, out: Path, **changed: object) -> Path:
    shutil.copytree(trained, out)
    header = sft_of(out) / "header.json"
    header.write_text(json.dumps(json.loads(header.read_text()) | changed))
    return out


@pytest.mark.parametrize(
    ("changed", "answer"),
    [
        ({"format": 99}, "of format 1 at .*, got the newer format 99; upgrade"),
        ({"digest": "0123456789abcdef"}, "got a checkpoint of another configuration"),
        ({"files": {}}, "got a damaged one; delete it"),
    ],
)
def test_a_checkpoint_that_is_not_this_runs(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    changed: dict[str, object], answer: str,
) -> None:  # fmt: skip
    out = copy_with_header(trained, tmp_path / "out", **changed)
    assert infalign(out, stage="sft") == 2
    check_answer(capsys, answer)


def test_a_loss_that_is_not_finite(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(trained, tmp_path / "out")
    absurd = ["sft.optimiser.learning_rate=1e38", "sft.optimiser.warmup_steps=0", "sft.steps=6"]
    assert infalign(out, *absurd, "checkpoint_every=1", stage="sft") == 2
    check_answer(
        capsys,
        r"sft: expected finite numbers, got \w+ = (nan|inf) at step [2-6] \(last good checkpoint: "
        r"step [1-5] in .*\); lower the learning rate",
    )
    assert sft_of(out).name == sft_of(trained).name  # nothing was kept of it


def test_a_reward_that_is_not_finite(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(trained, tmp_path / "out")
    absurd = ["reward.optimiser.learning_rate=1e38", "reward.optimiser.warmup_steps=0"]
    assert infalign(out, *absurd, "reward.steps=1", stage="calibrate") == 2
    check_answer(capsys, "calibrate: expected finite rewards, got .* at prompt 0, response 0; ")
    assert not list((out / "stages").glob("calibrate-*"))
