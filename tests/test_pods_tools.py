"""What the launchers ask of the tools they call, and what they make of the answers."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from launchers import COMMON, OWN, printed, tpu_vm

Only = Callable[[dict[str, str]], Path]


@pytest.fixture
def only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Only:
    """Leaves on PATH git and shell scripts of these names, which say in a log what was asked."""
    path, log = tmp_path / "only", tmp_path / "log"

    def leave(programs: dict[str, str]) -> Path:
        path.mkdir()
        log.touch()
        (path / "real-git").symlink_to(str(shutil.which("git")))
        for name, text in {"git": 'exec real-git "$@"', **programs}.items():
            noting = f'echo "{name} $*" >> "{log}"\n' if name in programs else ""
            (path / name).write_text(f"#!/bin/sh\n{noting}{text}\n")
            (path / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(path))
        return log

    return leave


def asked(log: Path) -> str:
    """The programs that were asked for something, in order."""
    return " ".join(line.split()[0] for line in log.read_text().splitlines())


@pytest.mark.parametrize("which", OWN)
def test_a_dry_run_runs_nothing(only: Only, which: str) -> None:
    log = only(dict.fromkeys(("bash", "gcloud", "sbatch", "xpk"), ""))
    module, own = OWN[which]
    assert module.main([*COMMON, *own]) == 0
    assert asked(log) == ""


@pytest.mark.parametrize(
    ("which", "programs", "code", "said"),
    [
        ("gke", {"xpk": "exit 3"}, 3, "xpk"),
        ("gke", {}, 127, ""),
        ("slurm", {"bash": "exit 4", "sbatch": ""}, 4, "bash"),
        ("slurm", {"bash": "", "sbatch": "exit 5"}, 5, "bash sbatch"),
    ],
)
def test_what_the_tool_ends_with_is_handed_on(
    only: Only, which: str, programs: dict[str, str], code: int, said: str
) -> None:
    log = only(programs)
    module, own = OWN[which]
    assert module.main([*COMMON[:-1], *own]) == code
    assert asked(log) == said


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        ([], 0, ["describe", "ssh", "delete"]),
        (["--keep"], 0, ["describe", "ssh"]),
        (["--max-restarts", "1"], 143, ["describe", "ssh"] * 2),
    ],
)
def test_a_tpu_is_asked_for_through_gcloud(
    only: Only, more: list[str], code: int, said: list[str]
) -> None:
    gcloud = f'case "$*" in *" describe "*) echo ACTIVE ;; *" ssh "*) exit {code} ;; esac'
    log = only({"gcloud": gcloud})
    naps = iter(range(2))
    shell = tpu_vm.Shell(sleep=lambda _: next(naps))
    assert tpu_vm.main([*COMMON[:-1], *OWN["tpu"][1], *more], shell) == code
    verbs = [word for word in log.read_text().split() if word in ("describe", "ssh", "delete")]
    assert verbs == said


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("echo 'ERROR: NOT_FOUND: Resource was not found' >&2; exit 1", ["describe", "create"]),
        ("echo 'ERROR: UNAVAILABLE' >&2; exit 1", ["describe"]),
    ],
)
def test_a_tpu_is_made_where_there_is_none_and_not_where_that_is_unknown(
    only: Only, capfd: pytest.CaptureFixture[str], answer: str, said: list[str]
) -> None:
    log = only({"gcloud": f'case "$*" in *" describe "*) {answer} ;; *) exit 3 ;; esac'})
    assert tpu_vm.main([*COMMON[:-1], *OWN["tpu"][1]]) == 1
    assert [w for w in log.read_text().split() if w in ("describe", "create")] == said
    assert ("UNAVAILABLE" in capfd.readouterr().err) == (said == ["describe"])


@pytest.mark.parametrize(
    ("programs", "said"),
    [
        ({"curl": ""}, "git git git bash bash"),
        ({}, "apt-get apt-get git git git bash bash"),
        ({"curl": "", "bash": "exit 1"}, "git git git bash"),
        ({"curl": "", "git": "exit 1"}, "git"),
    ],
)
def test_a_pod_gets_what_it_lacks_and_runs_only_what_it_could_install(
    capsys: pytest.CaptureFixture[str], only: Only, tmp_path: Path, programs: dict[str, str],
    said: str,
) -> None:  # fmt: skip
    (create,) = printed(capsys, "gke")
    (text,) = (word for word in create if word.startswith("--command="))
    log = only(dict.fromkeys(("apt-get", "bash", "git"), "") | programs)
    subprocess.run(["/bin/sh", "-c", text.partition("=")[2]], cwd=tmp_path, check=False)
    assert asked(log) == said
