"""Several processes over loopback do what one does, and say in a line what they cannot do."""

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import processes
import pytest
import toy_run
from sources import ROOT

from infalign_jax import cli
from infalign_jax.cli import main
from infalign_jax.runtime import goodput, parent, progress, stopping

sys.path.insert(0, str(ROOT / "experiments" / "drills"))
trial = importlib.import_module("trial")


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "1"}, False),
        ({"SLURM_NTASKS": "4"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"}, True),
        ({"MEGASCALE_NUM_SLICES": "2"}, True),
    ],
)
def test_launchers_are_heard(
    environment: dict[str, str], several: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*parent.COUNTS, parent.NAMES):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert parent.launched() == several


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--process-id", "0"], "got only --process-id; give all three"),
        (["--coordinator", "x:1", "--process-id", "2", "--num-processes", "2"], "expected 0 to 1"),
    ],
)
def test_mistakes_are_answered(
    arguments: list[str], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", toy_run.__file__, *arguments]) == 2
    error = capfd.readouterr().err
    assert words in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("kind", "child", "code"),
    [
        (ValueError, True, stopping.AGAIN),
        (RuntimeError, True, stopping.AGAIN),
        (ValueError, False, 2),
    ],
)
def test_a_collective_that_fails_is_a_host_lost(
    kind: type[Exception], child: bool, code: int, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def fail(options: object) -> None:
        raise kind("UNKNOWN: Gloo all-reduce failed: Connection reset by peer")

    monkeypatch.setitem(cli.ANSWERED_BY, "run", fail)
    if child:
        monkeypatch.setenv(parent.CHILD, "1")
    assert main(["run", toy_run.__file__]) == code
    assert capsys.readouterr().err.startswith("infalign: UNKNOWN: Gloo")


def two(
    out: Path, *arguments: object, own: dict[int, str] | None = None
) -> list[subprocess.Popen[str]]:
    """The processes of two hosts; a host's `own` source runs in its process before the command."""
    where = ["--coordinator", processes.free_address(), "--num-processes", 2, "--out", out]
    return [
        processes.command(
            *where, *arguments, "--process-id", i, JAX_NUM_CPU_DEVICES="1",
            first=(own or {}).get(i, ""), **processes.QUICK,
        )
        for i in range(2)
    ]  # fmt: skip


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
def test_two_hosts_run_what_one_does(tmp_path: Path) -> None:
    """From the data to the report, with the same draws; then both find everything there."""
    alone = processes.command("--out", tmp_path / "one", JAX_NUM_CPU_DEVICES="2", **processes.QUICK)
    processes.well(alone)
    for again in (False, True):
        first, second = processes.well(*two(tmp_path / "two"))
        assert ("reused from" in first) == again
        assert not [line for line in second.splitlines() if line.startswith(("sft", "report"))]
    told = [lines(tmp_path / name) for name in ("one", "two")]
    assert len(told[0]) > 20
    for alone, together in zip(*told, strict=True):
        assert alone.keys() == together.keys()
        for name in alone.keys() - {"seconds", *goodput.OF_A_STEP}:
            if isinstance(alone[name], float):
                assert together[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-6), name
            else:
                assert together[name] == alone[name]
    results = [json.loads((tmp_path / n / "results.json").read_text()) for n in ("one", "two")]
    for alone, together in zip(*(found["policies"] for found in results), strict=True):
        assert together["kl"] == pytest.approx(alone["kl"], rel=1e-4)
        rates = [found["win_rates"]["best_of_4"]["train"]["mean"] for found in (alone, together)]
        assert rates[1] == pytest.approx(rates[0], rel=1e-6)


@pytest.mark.slow
def test_hosts_without_a_directory_in_common_are_refused(tmp_path: Path) -> None:
    where = ["--coordinator", processes.free_address(), "--num-processes", 2]
    both = [
        processes.command(*where, "--process-id", i, "--out", tmp_path / f"{i}") for i in range(2)
    ]
    for process, said in zip(both, processes.ended(*both), strict=True):
        assert process.returncode == 2, said
        assert "expected a directory that all hosts share" in said
        assert "another one on host 1; mount one" in said


@pytest.mark.slow
def test_a_host_with_another_configuration_is_refused(tmp_path: Path) -> None:
    where = ["--coordinator", processes.free_address(), "--num-processes", 2, "--out", tmp_path]
    both = [processes.command(*where, "--process-id", i, "--seed", i) for i in range(2)]
    for process, said in zip(both, processes.ended(*both), strict=True):
        assert process.returncode == 2, said
        assert re.search("configuration (.{16}) on host 0 and (?!\\1).{16} on host 1;", said), said
    assert not (tmp_path / "stages").exists()


@pytest.mark.slow
def test_more_hosts_than_rows_are_refused(tmp_path: Path) -> None:
    both = two(tmp_path, "--set", "align.batch_size=3")
    for process, said in zip(both, processes.ended(*both), strict=True):
        assert process.returncode == 2, said
        assert (
            "mesh: expected replica × data × fsdp to divide 3 (align.batch_size; 2 would do), got "
            "data=2; use tensor=2" in said
        )


LONG = ("--set", "align.steps=400", "--stage", "align")


def wait_for_step(out: Path, step: int, running: list[subprocess.Popen[str]]) -> None:
    """Until a policy has come so far."""
    until = time.monotonic() + processes.PATIENCE
    while time.monotonic() < until and all(process.poll() is None for process in running):
        if (out / "metrics.jsonl").exists():
            last = lines(out)[-1]
            if last["stage"] == "align" and last["step"] >= step:
                return
        time.sleep(0.5)
    raise AssertionError("expected the run to come so far")


DISK, LOG = trial.FULL_DISK, trial.FULL_LOG.format(step=3)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, compiled: None) -> Path:
    """A run of two hosts that has all that comes before `align`."""
    out = tmp_path_factory.mktemp("prepared") / "run"
    processes.well(*two(out, "--stage", "foresight"))
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("host", "first", "said"),
    [(1, DISK, "File too large"), (0, DISK, "File too large"), (0, LOG, "No space left on device")],
    ids=["disk-of-1", "disk-of-0", "log-of-0"],
)
def test_what_one_hosts_disk_refuses_ends_all_with_a_line(
    host: int, first: str, said: str, prepared: Path, tmp_path: Path
) -> None:
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    both = two(tmp_path, *LONG, own={host: first})
    told = processes.ended(*both)
    assert [process.returncode for process in both] == [2, 2], told
    for number, text in enumerate(told):
        *_, last = (line for line in text.splitlines() if line.startswith("infalign: "))
        assert said in last, text  # after which asyncio may speak of what Orbax left
        assert ("host 1:" in last) == (host == 1 and number == 0), text
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.slow
def test_a_lost_host_is_told_and_a_terminated_one_stops_all_at_one_step(
    prepared: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(prepared, out)
    with processes.together(two(out, *LONG)) as both:
        wait_for_step(out, 5, both)
        os.killpg(both[1].pid, signal.SIGKILL)
        (said,) = processes.ended(both[0], within=60)
    assert both[0].returncode == stopping.AGAIN
    assert said.splitlines()[-1].startswith("infalign: lost a process of the run")
    before = progress.latest_step(next((out / "progress").glob("align-*")))
    with processes.together(two(out, *LONG)) as both:
        assert both[0].stderr is not None
        assert f"align  goes on from step {before}\n" in both[0].stderr
        both[1].send_signal(signal.SIGTERM)
        told = processes.ended(*both)
    assert [process.returncode for process in both] == [stopping.AGAIN] * 2
    for text in told:
        assert text.splitlines()[-1].startswith("infalign: stopped; to continue, run again")
    kept = progress.latest_step(next((out / "progress").glob("align-*")))
    assert kept == lines(out)[-1]["step"]
