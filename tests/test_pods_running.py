"""What happens on the hosts, with programs that stand in for gcloud, srun and infalign."""

import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from sources import ROOT

PODS = ROOT / "experiments" / "pods"
sys.path.insert(0, str(PODS))
launch, tpu_vm = map(importlib.import_module, ("launch", "tpu_vm"))
THOSE = tpu_vm.Commands(("state",), ("create",), ("delete",), ("run",))

# A bucket is a folder; hidden files are left out as the pattern that is handed over says.
GCLOUD = r"""#!/bin/sh
echo "gcloud $*" >> "$LOG"
test "$2" = cp && { mkdir -p "$BUCKET"; cat > "$BUCKET/launched.txt"; exit; }
from=$5 to=$(realpath -m "$6")
case $from in gs:*) from=$BUCKET ;; *) to=$BUCKET ;; esac
test "$4" = '--exclude=(^|.*/)\..*' || exit 9
cd "$from" && find . -type f -not -path '*/.*' -exec cp --parents {} "$to" ';'
"""
INFALIGN = r"""#!/bin/bash
echo "infalign $*" >> "$LOG"
out=$4
echo "$(cat "$out/steps" 2> /dev/null)x" > "$out/steps"
touch "$out/.lock"
trap 'exit 143' TERM
test "$CODE" = wait && { touch "$out/ready"; while :; do sleep 0.02; done; }
exit "$CODE"
"""
NOTED = '#!/bin/sh\necho "NAME $*" >> "$LOG"\n'


@pytest.fixture
def host(tmp_path: Path) -> dict[str, str]:
    """The environment of a host with a clone in tmp_path/it, whose programs write a log."""
    programs = {
        "bin/gcloud": GCLOUD,
        "bin/srun": NOTED.replace("NAME", "srun") + 'shift; exec "$@"\n',
        "bin/scontrol": NOTED.replace("NAME", "scontrol"),
        "it/.venv/bin/infalign": INFALIGN,
    }
    for name, text in programs.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "it/experiments/pods").mkdir(parents=True)
    for script in ("on_host.sh", "in_slurm.sh"):
        (tmp_path / "it/experiments/pods" / script).write_bytes((PODS / script).read_bytes())
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    return {"PATH": path, "LOG": str(tmp_path / "log"), "BUCKET": str(tmp_path / "bucket")}


def command(tmp_path: Path, out: str) -> list[str]:
    job = launch.Job("e.py", "a run", out, "", "", ("--seed", "1"), 1)
    return list(launch.running(job, str(tmp_path / "it")))


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def log(tmp_path: Path) -> list[str]:
    return (tmp_path / "log").read_text().splitlines()


@pytest.mark.parametrize("code", [0, 2, 75])
def test_a_host_runs_and_copies_and_says_how_it_ended(
    host: dict[str, str], tmp_path: Path, code: int
) -> None:
    asked, environment = command(tmp_path, "gs://b/x"), host | {"CODE": str(code)}
    # Until nothing holds its output any more, as ssh waits.
    done = subprocess.run(asked, env=environment, check=False, capture_output=True, timeout=60)
    assert done.returncode == code
    first, restored, ran, kept = log(tmp_path)
    assert first == "gcloud storage cp - gs://b/x/launched.txt"
    assert restored.endswith(" gs://b/x runs/a run")
    assert ran == "infalign run e.py --out runs/a run --seed 1"
    assert kept.endswith(" runs/a run gs://b/x")
    held = {path.name for path in (tmp_path / "bucket").iterdir()}
    assert held == {"launched.txt", "steps"}, "no lock"


def test_a_new_host_goes_on_from_the_bucket(host: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket/steps").write_text("xx")
    subprocess.run(command(tmp_path, "gs://b/x"), env=host | {"CODE": "0"}, check=True)
    assert (tmp_path / "bucket/steps").read_text() == "xxx\n"


def test_progress_is_copied_again_and_again(host: dict[str, str], tmp_path: Path) -> None:
    state = host | {"CODE": "wait", "COPY_EVERY": "0.05"}
    with subprocess.Popen(command(tmp_path, "gs://b/x"), env=state) as process:
        wait_for(tmp_path / "bucket/steps")
        process.terminate()
    assert process.returncode == 143


def test_a_shared_directory_is_used_as_it_is(host: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    subprocess.run(command(tmp_path, str(tmp_path / "out")), env=host | {"CODE": "0"}, check=True)
    assert log(tmp_path) == [f"infalign run e.py --out {tmp_path}/out --seed 1"]


def test_sigterm_reaches_the_run_whose_progress_is_copied(
    host: dict[str, str], tmp_path: Path
) -> None:
    with subprocess.Popen(command(tmp_path, "gs://b/x"), env=host | {"CODE": "wait"}) as process:
        wait_for(tmp_path / "it/runs/a run/ready")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 143
    assert (tmp_path / "bucket/steps").exists()


@pytest.mark.parametrize(
    ("code", "restarted", "queued"), [(0, 0, False), (1, 0, False), (143, 0, True), (75, 3, False)]
)
def test_slurm_queues_the_job_again(
    host: dict[str, str], tmp_path: Path, code: int, restarted: int, queued: bool
) -> None:
    (tmp_path / "out").mkdir()
    state = {"CODE": str(code), "SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": str(restarted)}
    script = [tmp_path / "it/experiments/pods/in_slurm.sh", "3"]
    wanted = ["bash", *script, *command(tmp_path, str(tmp_path / "out"))]
    assert subprocess.run(wanted, env=host | state, check=False).returncode == code
    said = log(tmp_path)
    assert said[0].startswith("srun --kill-on-bad-exit=1 .venv/bin/infalign run e.py ")
    assert said[2:] == (["scontrol requeue 17"] if queued else [])


def carried_out(states: list[str], codes: list[int], keep: bool = False) -> tuple[int, list[str]]:
    """The exit code and the commands said, of a cloud that answers so."""
    said: list[str] = []

    def call(those: Sequence[str]) -> int:
        said.append(those[0])
        return codes.pop(0) if those == THOSE.run else 0

    shell = tpu_vm.Shell(call, lambda _: states.pop(0), lambda _: None)
    return tpu_vm.carry_out(THOSE, 2, keep, shell), said


@pytest.mark.parametrize(
    ("states", "codes", "expected"),
    [
        (["", "PROVISIONING", "ACTIVE"], [0], (0, "create run delete")),
        (["ACTIVE"], [0], (0, "run delete")),
        (["SUSPENDED", "ACTIVE"], [0], (0, "delete create run delete")),
        (["", "FAILED"], [], (1, "create")),
        (["ACTIVE"] * 2, [143, 0], (0, "run run delete")),
        (["ACTIVE"] * 2, [75, 0], (0, "run run delete")),
        (["ACTIVE"] * 3, [143, 143, 143], (143, "run run run")),
        (["ACTIVE"] * 2, [2], (2, "run")),
        (["ACTIVE", "SUSPENDING", "SUSPENDED", "ACTIVE"], [1, 0],
         (0, "run delete create run delete")),
    ],
)  # fmt: skip
def test_a_tpu_is_had_and_had_again(
    states: list[str], codes: list[int], expected: tuple[int, str]
) -> None:
    code, said = carried_out(states, codes)
    assert (code, " ".join(said)) == expected


def test_a_tpu_is_kept_where_asked() -> None:
    assert carried_out(["ACTIVE"], [0], keep=True) == (0, ["run"])
