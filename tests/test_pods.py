"""The launchers print commands of documented options, whole after quoting, and refuse mistakes."""

import argparse
import doctest
import json
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from launchers import COMMON, FURTHER, OWN, launch, printed

DOCUMENTED = {  # command -> its page, and the options of it that are used
    "gcloud compute tpus queued-resources create": (
        "cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources/create",
        {"zone", "project", "node-id", "accelerator-type", "runtime-version", "scopes", "spot"}
        | {"reserved"},
    ),
    "gcloud compute tpus queued-resources describe": (
        "cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources/describe",
        {"zone", "project", "format"},
    ),
    "gcloud compute tpus queued-resources delete": (
        "cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources/delete",
        {"zone", "project", "force", "quiet"},
    ),
    "gcloud compute tpus tpu-vm ssh": (
        "cloud.google.com/sdk/gcloud/reference/compute/tpus/tpu-vm/ssh",
        {"zone", "project", "worker", "command"},
    ),
    "xpk workload create": (
        "github.com/AI-Hypercomputer/xpk, src/xpk/parser/workload.py",
        {"workload", "cluster", "tpu-type", "num-slices", "docker-image", "max-restarts"}
        | {"restart-on-exit-codes", "termination-grace-period-seconds", "command", "zone"}
        | {"project"},
    ),
    "sbatch": (
        "slurm.schedmd.com/sbatch.html",
        {"job-name", "nodes", "ntasks-per-node", "gpus-per-node", "requeue", "open-mode", "signal"}
        | {"output", "partition", "account", "time"},
    ),
}


def known(command: list[str]) -> tuple[str, set[str]]:
    """The documented command that this is one of, and its options."""
    text = " ".join(command)
    (name,) = (name for name in DOCUMENTED if text.startswith(name + " "))
    return name, DOCUMENTED[name][1]


@pytest.mark.parametrize(
    ("which", "more"),
    [
        ("tpu", ["--spot"]),
        ("tpu", ["--reserved"]),
        ("gke", ["--project", "p"]),
        ("slurm", ["--partition", "a", "--account", "b", "--time", "1:00:00"]),
    ],
)
def test_only_documented_options_are_used(
    capsys: pytest.CaptureFixture[str], which: str, more: list[str]
) -> None:
    commands = [c for c in printed(capsys, which, *more) if c[0] != "bash"]
    assert commands
    for command in commands:
        ours = command[: command.index("100")] if "100" in command else command
        used = {word[2:].partition("=")[0] for word in ours if word.startswith("--")}
        assert used - known(command)[1] == set()


def on_host(command: list[str]) -> list[str]:
    """The words of a shell command that a host is given."""
    (text,) = (word for word in command if word.startswith("--command="))
    return shlex.split(text.partition("=")[2])


@pytest.mark.parametrize("which", OWN)
def test_hosts_install_the_revision_and_run_the_experiment(
    capsys: pytest.CaptureFixture[str], which: str
) -> None:
    commands = printed(capsys, which)
    if which == "slurm":
        words = shlex.split(commands[0][2]) + commands[1]
    else:
        (words,) = (on_host(c) for c in commands if any(w.startswith("--command=") for w in c))
    assert words[words.index("clone") + 2] == "https://h/a.git"
    assert words[words.index("--detach") + 1] == "v1"
    (install,) = (i for i, word in enumerate(words) if word.endswith("install.sh"))
    assert words[install + 1] == ("cuda" if which == "slurm" else "tpu")
    (run,) = (i for i, word in enumerate(words) if word.endswith("on_host.sh"))
    if which != "slurm":
        assert words[run - 2 : run] == ["exec", "bash"], "what stops the shell stops the run"
    assert words[run + 1 :] == [
        "quick",
        "gs://b/my runs",
        "experiments/quickstart.py",
        *FURTHER[1:],
    ]


SAID = [  # options, and the words for the tool that they, and what is not asked for, come to
    (
        "tpu",
        ["--spot"],
        "--zone=us-west4-a --project=p --node-id=quick --spot --force --quiet "
        "--accelerator-type=v5litepod-16 --worker=all "
        "--runtime-version=v2-alpha-tpuv5-lite --format=value(state.state) "
        "--scopes=https://www.googleapis.com/auth/cloud-platform",
    ),
    ("tpu", ["--reserved", "--runtime-version", "v"], "--reserved --runtime-version=v"),
    ("tpu", ["--accelerator", "v4-8"], "--runtime-version=tpu-ubuntu2204-base"),
    ("tpu", ["--accelerator", "v5p-8"], "--runtime-version=v2-alpha-tpuv5"),
    ("tpu", ["--accelerator", "v6e-8"], "--runtime-version=v2-alpha-tpuv6e"),
    (
        "gke",
        ["--project", "p", "--slices", "3", "--image", "i"],
        "--cluster=c --tpu-type=v5litepod-16 --num-slices=3 --docker-image=i --zone=us-west4-a "
        "--project=p --termination-grace-period-seconds=120",
    ),
    (
        "slurm",
        ["--partition", "a", "--account", "b", "--time", "1:00:00", "--sbatch=--qos=high"],
        "--partition=a --account=b --time=1:00:00 --qos=high --nodes=2 --ntasks-per-node=8 "
        "--gpus-per-node=8 --open-mode=append --signal=TERM@120",
    ),
]


@pytest.mark.parametrize(("which", "more", "words"), SAID)
def test_the_options_reach_the_tool(
    capsys: pytest.CaptureFixture[str], which: str, more: list[str], words: str
) -> None:
    said = {word for command in printed(capsys, which, *more) for word in command}
    assert set(words.split()) - said == set()


def test_a_tpu_that_is_to_be_kept_is_not_deleted(capsys: pytest.CaptureFixture[str]) -> None:
    *others, last = printed(capsys, "tpu")
    assert "delete" in last
    assert printed(capsys, "tpu", "--keep") == others


def test_relative_paths_under_slurm_begin_here(capsys: pytest.CaptureFixture[str]) -> None:
    submit = printed(capsys, "slurm", "--directory", "d", "--out", "o")[1]
    assert f"--output={Path.cwd()}/d/%j.log" in submit
    assert submit[submit.index("quick") + 1] == str(Path.cwd() / "o")


def test_a_name_with_spaces_is_quoted(capsys: pytest.CaptureFixture[str]) -> None:
    install, submit = printed(capsys, "slurm", "--name", "it's a run")
    assert "--job-name=it's a run" in submit
    assert any(word.endswith("it's a run/experiments/pods/in_slurm.sh") for word in submit)
    clone = str(Path("infalign-pods", "it's a run").absolute())
    assert clone in shlex.split(install[2])


def test_every_launcher_starts_again(capsys: pytest.CaptureFixture[str]) -> None:
    (create,) = printed(capsys, "gke", "--max-restarts", "7")
    assert {"--max-restarts=7", "--restart-on-exit-codes=75"} <= set(create)
    submit = printed(capsys, "slurm", "--max-restarts", "7")[1]
    assert "--requeue" in submit
    assert submit[submit.index("bash") - 1] == "7"


MISTAKES = {
    "tpu": [
        (
            ["--name", "My run"],
            "expected --name of a-z, 0-9 and -, at most 63, got 'My run': such ",
        ),
        (["--out", "runs/a"], "expected --out to be a bucket or a mounted path, got runs/a"),
        (["--accelerator", "v9-8"], "got v9-8: give --runtime-version too"),
        (["--spot", "--reserved"], "argument --reserved: not allowed with argument --spot"),
        (["--max-restarts", "-1"], "expected --max-restarts from 0 on, got -1"),
        (["--zne", "x"], "unrecognized arguments: --zne x"),
    ],
    "gke": [
        (["--name", "a" * 41], "at most 40"),
        (["--slices", "0"], "expected --slices from 1 on, got 0"),
    ],
    "slurm": [
        (["--nodes", "x"], "invalid int value: 'x'"),
        (["--gpus-per-node", "0"], "expected --gpus-per-node from 1 on, got 0"),
        (["--name", "a/b"], "expected --name without / and line breaks, got 'a/b'"),
        (["--", "--out", "x"], "expected --out before --, got it after"),
        (["--", "--out=x"], "expected --out before --, got it after"),
    ],
}


@pytest.mark.parametrize(
    ("which", "more", "line"), [(w, m, text) for w, rows in MISTAKES.items() for m, text in rows]
)
def test_a_mistake_gets_one_line_and_code_2(
    capsys: pytest.CaptureFixture[str], which: str, more: list[str], line: str
) -> None:
    module, own = OWN[which]
    assert launch.answer(module.main, [*COMMON, *own, *more]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert line in err


def test_an_unknown_experiment_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    module, own = OWN["tpu"]
    assert launch.answer(module.main, ["nowhere.py", *COMMON[1:], *own]) == 2
    assert "got nowhere.py" in capsys.readouterr().err


def git(place: Path, *arguments: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    subprocess.run(["git", "-C", place, *who, *arguments], check=True, capture_output=True)


def test_the_default_is_what_origin_has_of_this_clone(tmp_path: Path) -> None:
    options = argparse.Namespace(
        experiment="e.py", name="a", out="gs://b/a/", repository=None, revision=None, max_restarts=1
    )
    clone = tmp_path / "clone"
    git(tmp_path, "init", "--quiet", "--bare", "origin.git")
    git(tmp_path, "clone", "--quiet", "origin.git", "clone")
    (clone / "e.py").touch()
    git(clone, "add", "e.py")
    git(clone, "commit", "--quiet", "-m", "one")
    with pytest.raises(ValueError, match=r"expected a commit that origin has, got .*: push it"):
        launch.job(options, (), clone)
    elsewhere = argparse.Namespace(**vars(options) | {"repository": "https://h/a.git"})
    assert launch.job(elsewhere, (), clone).repository == "https://h/a.git"
    git(clone, "push", "--quiet", "origin", "HEAD")
    found = launch.job(options, (), clone)
    assert (found.experiment, found.out) == ("e.py", "gs://b/a")
    assert found.repository.endswith("origin.git")
    assert len(found.revision) == 40
    (clone / "new.py").touch()
    options.experiment = "new.py"
    with pytest.raises(ValueError, match=r"expected new.py in .*, got none: commit and push it"):
        launch.job(options, (), clone)


def test_a_program_that_is_missing_gets_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    module, own = OWN["gke"]
    assert launch.answer(module.main, [*COMMON, *own]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_ctrl_c_gets_one_line_and_code_130(capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(_: Sequence[str]) -> int:
        raise KeyboardInterrupt

    assert launch.answer(stopped, []) == 130
    assert capsys.readouterr().err.count("\n") == 1


def test_the_examples_of_what_is_shared() -> None:
    found = doctest.testmod(launch)
    assert (found.failed, found.attempted > 5) == (0, True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcloud") is None, reason="gcloud is not installed")
def test_gcloud_takes_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    asked = [shlex.join(command) for command in printed(capsys, "tpu", "--spot")]
    lint = ["gcloud", "meta", "lint-gcloud-commands", "--command-string"]
    for text in dict.fromkeys(asked):
        done = subprocess.run([*lint, text], capture_output=True, text=True, check=True)
        (verdict,) = json.loads(done.stdout)
        assert verdict["success"], verdict["error_message"]


def test_xpk_takes_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    core = pytest.importorskip("xpk.parser.core", reason="xpk is not installed")
    parser = argparse.ArgumentParser(prog="xpk")
    core.set_parser(parser=parser)
    (create,) = printed(capsys, "gke")
    found = parser.parse_args(create[1:])
    assert (found.tpu_type, found.restart_on_exit_codes) == ("v5litepod-16", "75")
