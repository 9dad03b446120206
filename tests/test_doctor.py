"""The doctor finds what is amiss, says what to do, and never shows a traceback."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from sources import ROOT

from infalign_jax import cli
from infalign_jax.commands import doctor as command
from infalign_jax.experiment import EvaluateConfig, Experiment
from infalign_jax.hh import HHConfig
from infalign_jax.lm.arithmetic import parameters
from infalign_jax.lm.tokenizer import TokenizerConfig
from infalign_jax.lm.transformer import TransformerConfig
from infalign_jax.runtime import agreement, doctor
from infalign_jax.runtime import mesh as meshes
from infalign_jax.runtime.agreement import Gather
from infalign_jax.runtime.doctor import Finding
from infalign_jax.runtime.progress import KeepConfig

HI = "\n\nHuman: Hi\n\nAssistant:"
HERE = {"python": "3.11.7", "jax": "0.10.2", "jaxlib": "0.10.2"}
WANTED = ["python>=3.11", "jax<0.12,>=0.10"]


@pytest.fixture
def small_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "WRITTEN", doctor.MIB)


def test_this_environment_is_as_asked_for() -> None:
    found = command.versions()
    assert found.ok, found
    assert f"jax {jax.__version__}" in found.text


@pytest.mark.parametrize(
    ("changes", "text", "remedy"),
    [
        ({"python": "3.10.12"}, "python 3.10.12, expected >=3.11", 'pip install "python>=3.11"'),
        ({"jax": "0.9.3"}, "jax 0.9.3, expected <0.12,>=0.10", 'pip install "jax<0.12,>=0.10"'),
        ({"jax": "0.12.0"}, "jax 0.12.0, expected <0.12", "pip install"),
        (
            {"jax": "0.11.1"},
            "python 3.11.7 with jax 0.11.1, which does not work",
            "use Python 3.12",
        ),
        ({"jax-cuda13-plugin": "0.10.1"}, "jax-cuda13-plugin 0.10.1 with jaxlib 0.10.2", "[cuda]"),
    ],
)
def test_wrong_versions_are_named(changes: dict[str, str], text: str, remedy: str) -> None:
    found = command.versions(HERE | changes, WANTED)
    assert not found.ok
    assert text in found.text
    assert remedy in found.remedy


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"jax": "0.10"},
        {"jax": "0.10.2.dev3"},
        {"python": "3.12.1", "jax": "0.11.1"},
        {"jax-cuda13-plugin": "0.10.2"},
    ],
)
def test_right_versions_pass(changes: dict[str, str]) -> None:
    assert command.versions(HERE | changes, WANTED).ok


def test_a_package_that_is_missing_is_named() -> None:
    found = command.versions(HERE, [*WANTED, "grain>=0.2"])
    assert found.text == "grain not installed, expected >=0.2"


def test_an_accelerator_that_sleeps_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "HARDWARE", {str(tmp_path): "cuda"})
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert doctor.devices().ok, "a CPU was asked for"
    monkeypatch.delenv("JAX_PLATFORMS")
    found = doctor.devices()
    assert not found.ok
    assert found.remedy == 'pip install -e ".[cuda]"'


def test_processes_have_as_many_devices() -> None:
    assert doctor.processes([0] * 4).text.startswith("1 process, with 4 devices;")
    assert doctor.processes([0, 1, 0, 1]) == Finding(
        "processes", True, "2 processes, with 2 devices each; this is 0", doctor.processes().remedy
    )
    assert not doctor.processes([0, 1, 1]).ok


def test_a_wrong_sum_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    made = meshes.make(meshes.MeshConfig(), jax.devices()[:1])
    assert doctor.all_reduce(made, "data").ok
    monkeypatch.setattr(jax.lax, "psum", lambda x, axis: x + 1)
    found = doctor.all_reduce(made, "data")
    assert (found.ok, found.text) == (False, "sum of 1 ones is 2.0 to 2.0")


@pytest.mark.usefixtures("small_file")
def test_the_disk_is_left_as_it_was(tmp_path: Path) -> None:
    found = doctor.disk(tmp_path / "new" / "runs", needed=1)
    assert found.ok
    assert found.text.endswith(f"in {tmp_path}")
    assert list(tmp_path.iterdir()) == []
    full = doctor.disk(tmp_path, needed=2**60)
    assert (full.ok, full.remedy) == (False, "make room, or name another --out")


def test_a_bucket_is_no_directory() -> None:
    for address in ("gs://bucket/x", "s3://bucket/x"):
        found = doctor.disk(Path(address), needed=1)
        assert not found.ok
        assert address in found.text


def test_data_of_files_is_read(tmp_path: Path) -> None:
    rows = [{"chosen": f"{HI} Yes.", "rejected": f"{HI}{word}"} for word in (" No.", "")]
    (tmp_path / "hi.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = HHConfig(str(tmp_path), file="hi.jsonl", judge_fraction=0.4)
    there = Experiment("hh", data=config)
    assert command.data(there).text == f"1 of 2 pairs of {tmp_path / 'hi.jsonl'}"


@pytest.mark.usefixtures("small_file")
def test_what_a_check_raises_is_a_line(tmp_path: Path) -> None:
    nowhere = Experiment("hh", data=HHConfig("nowhere", judge_fraction=0.4))
    found = {finding.name: finding for finding in command.examine(nowhere, tmp_path)}
    assert [name for name, finding in found.items() if not finding.ok] == ["data"]
    assert "expected a directory of HH files, got 'nowhere': set data.dir" in found["data"].text
    assert found["data"].remedy == "", "it is in the text"


@pytest.mark.usefixtures("small_file")
def test_a_mesh_that_devices_do_not_make_is_a_line(tmp_path: Path) -> None:
    wide = Experiment("wide", mesh=meshes.MeshConfig(data=3, fsdp=7))
    found = {finding.name: finding for finding in command.examine(wide, tmp_path)}
    assert not found["mesh"].ok
    assert found["mesh"].text.startswith("mesh: expected a product of 1 (the devices), got data=3")


def gathered(*changed: int) -> Gather:
    """What three processes have, the last of which differs in these parts."""

    def gather(own: np.ndarray) -> np.ndarray:
        rows = np.stack([own] * 3)
        rows[2, list(changed), 0] ^= 1
        return rows

    return gather


def test_processes_agree() -> None:
    assert command.agreement(Experiment("a")).ok
    found = command.agreement(Experiment("a"), gathered())
    assert found.ok
    assert found.text.endswith(": the same on every host")


@pytest.mark.parametrize("name", ["code", "packages", "configuration"])
def test_processes_that_do_not_agree_are_named(name: str) -> None:
    part = list(agreement.parts(None)).index(name)
    found = command.agreement(Experiment("a"), gathered(part))
    assert not found.ok
    assert re.fullmatch(f"{name} (.+) on host 0 and (?!\\1)(.+) on host 2", found.text)


def test_the_digest_is_of_the_configuration() -> None:
    one, other = (
        command.agreement(Experiment("a", evaluate=EvaluateConfig(show=n))).text for n in (1, 2)
    )
    codes, configurations = zip(
        *(text.split(", configuration ") for text in (one, other)), strict=True
    )
    assert codes[0] == codes[1]
    assert configurations[0] != configurations[1]


@pytest.mark.parametrize(("ok", "code"), [(True, 0), (False, 1)])
def test_the_exit_code_is_whether_all_is_well(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ok: bool, code: int
) -> None:
    rows = [Finding("a", True, "fine"), Finding("b", ok, "so", "do")]
    monkeypatch.setattr(command, "examine", lambda experiment, out: rows)
    assert cli.main(["doctor"]) == code
    said = "b  ok      so" if ok else "b  FAILED  so: do"
    assert capsys.readouterr().out == f"a  ok      fine\n{said}\n"


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [(["nowhere.py"], "got nowhere.py"), (["--set", "seed=1"], "expected an EXPERIMENT for --set")],
)
def test_a_mistake_is_answered_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], answer: str
) -> None:
    assert cli.main(["doctor", *arguments]) == 2
    err = capsys.readouterr().err
    assert answer in err
    assert err.count("\n") == 1


def test_every_axis_with_devices_is_measured(tmp_path: Path) -> None:
    code = "import sys; from infalign_jax import cli; sys.exit(cli.main(sys.argv[1:]))"
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    experiment = [str(ROOT / "experiments" / "quickstart.py"), "--set", "mesh.fsdp=2"]
    done = subprocess.run(
        [sys.executable, "-c", code, "doctor", *experiment, "--out", tmp_path],
        env=os.environ | flags, capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = dict(line.split("  ", 1) for line in done.stdout.splitlines())
    assert {"all-reduce data", "all-reduce fsdp", "disk"} <= {name.strip() for name in lines}
    assert "data 2 × fsdp 2 × tensor 1" in done.stdout


def test_checkpoints_that_are_kept_need_room() -> None:
    model = TransformerConfig(vocab_size=32_000, width=2048, layers=16)
    tokens = TokenizerConfig(vocab_size=32_000)
    experiment = Experiment("large", model=model, tokenizer=tokens)
    usual = command.room_needed(experiment)
    # Two trunks, reward, judge, foresight and a policy stay; three checkpoints with Adam's moments.
    assert usual == (6 * 4 + 3 * 12) * parameters(model) > 2**30
    more = replace(experiment, keep=KeepConfig(newest=4, every=200))
    stages = 2 * (300 + 300) + 800 + 400
    assert command.room_needed(more) == (24 + 12 * (5 + stages // 200)) * parameters(model)
    own = replace(experiment, reward_model=model)
    assert command.room_needed(own) == usual + 4 * parameters(model)
