"""What happens on the hosts, with programs that stand in for gcloud, srun and infalign."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launchers import launch
from sources import ROOT

PODS = ROOT / "experiments" / "pods"

# A bucket is a folder; hidden files are left out as the pattern that is handed over says.
# It cannot be copied from where FAILS, a pattern, says so.
GCLOUD = r"""#!/bin/sh
echo "gcloud $*" >> "$LOG"
test "$2" = cp && { mkdir -p "$BUCKET"; cat > "$BUCKET/launched.txt"; exit; }
case $5 in $FAILS) exit 8 ;; esac
from=$5 to=$(realpath -m "$6")
case $from in gs:*) from=$BUCKET ;; *) to=$BUCKET ;; esac
test "$4" = '--exclude=(^|.*/)\..*' || exit 9
test "$7" = --skip-if-dest-has-newer-mtime && newer=--update
cd "$from" && find . -type f -not -path '*/.*' -exec cp $newer -p --parents {} "$to" ';'
"""
INFALIGN = r"""#!/bin/bash
echo "infalign $# $*" >> "$LOG"  # the number shows that spaces are kept
out=$4
echo "$(cat "$out/steps" 2> /dev/null)x" > "$out/steps"
touch "$out/.lock"
trap 'sleep 0.1; touch "$out/kept"; exit 75' TERM
test "$CODE" = wait && { touch "$out/ready"; for _ in {1..1000}; do sleep 0.02; done; }
exit "$CODE"
"""
# Ten minutes, which a host sleeps between two copies, are over at once.
SLEEP = """#!/bin/sh
test "$1" = 600 && set 0.05
exec /bin/sleep "$1"
"""
NOTED = '#!/bin/sh\necho "NAME $*" >> "$LOG"\n'


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


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
        program(tmp_path / name, text)
    (tmp_path / "it/experiments/pods").mkdir(parents=True)
    for script in ("on_host.sh", "in_slurm.sh"):
        (tmp_path / "it/experiments/pods" / script).write_bytes((PODS / script).read_bytes())
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    places = {"LOG": tmp_path / "log", "BUCKET": tmp_path / "bucket", "TMPDIR": tmp_path}
    return {"PATH": path} | {name: str(place) for name, place in places.items()}


def command(tmp_path: Path, out: str) -> list[str]:
    job = launch.Job("e.py", "a run", out, "", "", ("--set", "a=b c"), 1)
    return list(launch.running(job, str(tmp_path / "it")))


def wait_for(there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not there():
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
    assert restored.endswith(" gs://b/x runs/a run --skip-if-dest-has-newer-mtime")
    assert ran == "infalign 6 run e.py --out runs/a run --set a=b c"
    assert kept.endswith(" runs/a run gs://b/x")
    held = {path.name for path in (tmp_path / "bucket").iterdir()}
    assert held == {"launched.txt", "steps"}, "no lock"


def test_a_new_host_goes_on_from_the_bucket(host: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket/steps").write_text("xx")
    subprocess.run(command(tmp_path, "gs://b/x"), env=host | {"CODE": "0"}, check=True)
    assert (tmp_path / "bucket/steps").read_text() == "xxx\n"


@pytest.mark.parametrize(("age", "steps"), [(-60, "xxx\n"), (60, "xxxx\n")])
def test_what_a_killed_run_left_here_stays_where_it_is_newer(
    host: dict[str, str], tmp_path: Path, age: int, steps: str
) -> None:
    here, there = tmp_path / "it/runs/a run/steps", tmp_path / "bucket/steps"
    for path, content, seconds in ((there, "xx", 10**9), (here, "xxx", 10**9 + age)):
        path.parent.mkdir(parents=True)
        path.write_text(content)
        os.utime(path, (seconds, seconds))
    subprocess.run(command(tmp_path, "gs://b/x"), env=host | {"CODE": "0"}, check=True)
    assert there.read_text() == steps


def test_progress_is_copied_again_and_again(host: dict[str, str], tmp_path: Path) -> None:
    program(tmp_path / "bin/sleep", SLEEP)
    with subprocess.Popen(command(tmp_path, "gs://b/x"), env=host | {"CODE": "wait"}) as process:
        wait_for((tmp_path / "bucket/steps").exists)
        process.terminate()
    assert process.returncode == 75


def test_a_copy_that_failed_is_tried_again(host: dict[str, str], tmp_path: Path) -> None:
    state = host | {"CODE": "wait", "COPY_EVERY": "0.05", "FAILS": "runs/*"}
    with subprocess.Popen(command(tmp_path, "gs://b/x"), env=state) as process:
        wait_for(lambda: (tmp_path / "log").exists() and len(log(tmp_path)) > 5)
        process.terminate()
    assert process.returncode == 75


@pytest.mark.parametrize(
    ("fails", "code", "expected", "runs"),
    [("runs/*", 0, 1, True), ("runs/*", 75, 75, True), ("gs:*", 0, 8, False)],
)
def test_a_host_that_cannot_copy_does_not_end_with_0(
    host: dict[str, str], tmp_path: Path, fails: str, code: int, expected: int, runs: bool
) -> None:
    state = host | {"CODE": str(code), "FAILS": fails}
    done = subprocess.run(command(tmp_path, "gs://b/x"), env=state, check=False)
    assert done.returncode == expected
    assert any(line.startswith("infalign") for line in log(tmp_path)) == runs


def test_a_shared_directory_is_used_as_it_is(host: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    subprocess.run(command(tmp_path, str(tmp_path / "out")), env=host | {"CODE": "0"}, check=True)
    assert log(tmp_path) == [f"infalign 6 run e.py --out {tmp_path}/out --set a=b c"]


def test_sigterm_reaches_the_run_whose_progress_is_copied(
    host: dict[str, str], tmp_path: Path
) -> None:
    with subprocess.Popen(command(tmp_path, "gs://b/x"), env=host | {"CODE": "wait"}) as process:
        wait_for((tmp_path / "it/runs/a run/ready").exists)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 75
    assert (tmp_path / "bucket/kept").exists(), "what the run keeps before it ends"


SPEAKS = r"""#!/bin/bash
touch "$4/ready"
while ! test -e "$4/deaf"; do sleep 0.02; done
echo one; echo two >&2; echo three
touch "$4/kept"
exit 75
"""


def test_a_broken_connection_stops_nobody_who_speaks(host: dict[str, str], tmp_path: Path) -> None:
    program(tmp_path / "it/.venv/bin/infalign", SPEAKS)
    asked, here = command(tmp_path, "gs://b/x"), tmp_path / "it/runs/a run"
    with subprocess.Popen(asked, env=host, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as on:
        wait_for((here / "ready").exists)
        assert on.stdout is not None
        on.stdout.close()
        (here / "deaf").touch()
        assert on.wait(timeout=30) == 75
    assert (tmp_path / "bucket/kept").exists()
    assert (tmp_path / "it/runs/a run.log").read_text() == "one\ntwo\nthree\n"


def test_slurm_may_run_two_of_a_name(host: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "other").mkdir()
    one, other = (command(tmp_path, str(tmp_path / name)) for name in ("out", "other"))
    environment = host | {"CODE": "wait", "RUNNER": "srun -x"}
    with subprocess.Popen(one, env=environment) as first:
        wait_for((tmp_path / "out/ready").exists)
        subprocess.run(other, env=environment | {"CODE": "0"}, check=True, timeout=60)
        assert first.poll() is None
        first.terminate()


@pytest.mark.parametrize("killed", [False, True], ids=["ssh", "script"])
def test_what_a_broken_connection_left_running_ends_before_it_is_run_again(
    host: dict[str, str], tmp_path: Path, killed: bool
) -> None:
    (tmp_path / "out").mkdir()
    asked = command(tmp_path, str(tmp_path / "out"))
    with subprocess.Popen(asked, env=host | {"CODE": "wait"}) as left:
        wait_for((tmp_path / "out/ready").exists)
        if killed:
            left.kill()
        # Infalign's stand-in writes `kept` as it ends.
        program(tmp_path / "it/.venv/bin/infalign", f'#!/bin/sh\ntest -e "{tmp_path}/out/kept"\n')
        assert subprocess.run(asked, env=host, check=False, timeout=60).returncode == 0
        assert left.wait(timeout=30) == (-signal.SIGKILL if killed else 75)
    assert "waiting for the run of a run" in (tmp_path / "it/runs/a run.log").read_text()


@pytest.mark.parametrize(
    ("code", "restarted", "queued"),
    [
        (0, None, False),
        (1, None, False),
        (143, None, True),
        (143, 3, False),
        (75, 2, True),
        (75, 3, False),
    ],
)
def test_slurm_queues_the_job_again(
    host: dict[str, str], tmp_path: Path, code: int, restarted: int | None, queued: bool
) -> None:
    (tmp_path / "out").mkdir()
    state = {"CODE": str(code), "SLURM_JOB_ID": "17"}
    if restarted is not None:  # SLURM says nothing of it to a job that it starts for the first time
        state["SLURM_RESTART_COUNT"] = str(restarted)
    script = [tmp_path / "it/experiments/pods/in_slurm.sh", "3"]
    wanted = ["bash", *script, *command(tmp_path, str(tmp_path / "out"))]
    assert subprocess.run(wanted, env=host | state, check=False).returncode == code
    said = log(tmp_path)
    assert said[0].startswith("srun --kill-on-bad-exit=1 .venv/bin/infalign run e.py ")
    assert said[2:] == (["scontrol requeue 17"] if queued else [])


@pytest.mark.parametrize(("there", "code"), [(True, 0), (False, 0), (True, 3)])
def test_a_clone_is_installed_by_uv_which_is_had_first(
    tmp_path: Path, there: bool, code: int
) -> None:
    few, own, clone = tmp_path / "few", tmp_path / "home/.local/bin", tmp_path / "it"
    program(tmp_path / "uv", NOTED.replace("NAME", "uv in $PWD:") + f"exit {code}\n")
    program(few / "curl", NOTED.replace("NAME", "curl") + f"echo \"cp '{tmp_path}/uv' '{own}'\"\n")
    program(clone / "experiments/pods/install.sh", (PODS / "install.sh").read_text())
    own.mkdir(parents=True)
    for name in ("bash", "cp", "dirname", "sh"):
        (few / name).symlink_to(str(shutil.which(name)))
    if there:
        (tmp_path / "uv").rename(few / "uv")
    environment = {"PATH": str(few), "HOME": str(tmp_path / "home"), "LOG": str(tmp_path / "log")}
    script = ["bash", str(clone / "experiments/pods/install.sh"), "tpu"]
    assert subprocess.run(script, env=environment, cwd=tmp_path, check=False).returncode == code
    got = [] if there else ["curl -LsSf https://astral.sh/uv/install.sh"]
    made = f"uv in {clone}: venv --quiet --allow-existing --python 3.12 .venv"
    filled = f"uv in {clone}: pip install --quiet --python .venv/bin/python --editable .[tpu]"
    assert log(tmp_path) == [*got, made] + ([] if code else [filled])
