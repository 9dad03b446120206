"""Stopped at any moment and run again, a run ends as if nothing had happened."""

import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import processes
import pytest

from infalign_jax.runtime import checkpoint, goodput

SETTINGS = ("--set", "align.steps=8")

STOPS = """
import os
from infalign_jax.runtime.metrics import MetricsLog
append = MetricsLog.append
def stopping(log, stage, step, **numbers):
    append(log, stage, step, **numbers)
    if (stage, step) == ("align", 5):
        os.kill(os.getpid(), %d)
MetricsLog.append = stopping
"""


def finish(out: Path, *arguments: str) -> str:
    return processes.well(processes.command("--out", out, *arguments))[0]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, compiled: None) -> Path:
    """A run up to the stage before `align`."""
    out = tmp_path_factory.mktemp("prepared") / "run"
    finish(out, *SETTINGS, "--stage", "foresight")
    return out


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Path:
    """That run, finished without a stop."""
    out = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(prepared, out)
    finish(out, *SETTINGS)
    return out


def stop_while_aligning(prepared: Path, out: Path, number: signal.Signals) -> tuple[int, str]:
    """Goes on from `prepared` in `out` until the signal comes: (code, said).

    It comes at a step between two checkpoints of `align`.
    """
    shutil.copytree(prepared, out)
    process = processes.command("--out", out, *SETTINGS, first=STOPS % number)
    (said,) = processes.ended(process)
    return process.returncode, said


def parameters(out: Path) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of every aligned policy, by stage and name."""
    found = {}
    for stage in sorted((out / "stages").glob("align-*")):
        leaves = json.loads((stage / "header.json").read_text())["leaves"]
        like = {name: jax.ShapeDtypeStruct(*leaf) for name, leaf in leaves.items()}
        found[stage.name], _ = checkpoint.load(stage, like, digest=stage.name.split("-")[1])
    return found


def figures(out: Path) -> dict[str, Any]:
    """results.json but for the times, and for which checkpoints stay."""
    results = json.loads((out / "results.json").read_text())
    for policy in results["policies"]:
        del policy["seconds"]
    del results["configuration"]["keep"]
    timed = ("seconds", "tokens_per_second", "goodput")
    return {name: value for name, value in results.items() if name not in timed}


def steps(out: Path) -> list[dict[str, Any]]:
    """metrics.jsonl but for the times."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timed = {"seconds", *goodput.OF_A_STEP}
    return [{k: v for k, v in line.items() if k not in timed} for line in lines]


def check_same(out: Path, whole: Path) -> None:
    one, other = parameters(out), parameters(whole)
    assert one.keys() == other.keys()
    assert len(one) == 2
    for stage, leaves in one.items():
        assert leaves.keys() == other[stage].keys()
        for name, leaf in leaves.items():
            np.testing.assert_array_equal(leaf, other[stage][name], err_msg=f"{stage} {name}")
    assert figures(out) == figures(whole)
    assert steps(out) == steps(whole)


@pytest.mark.slow
def test_killed_while_aligning_it_ends_the_same(
    prepared: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    code, _ = stop_while_aligning(prepared, out, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert not (out / "results.json").exists()
    said = finish(out, *SETTINGS, "--set", "keep.newest=1", "--set", "keep.every=4")
    assert said.count("reused from") > 5  # no digest depends on what is kept
    for progress in (out / "progress").glob("align-*"):
        assert [path.name for path in progress.iterdir()] == ["step-00000004"]
    assert re.search("align  goes on from step [24]\n", said)  # that of 4 was being written
    check_same(out, whole)


@pytest.mark.slow
def test_terminated_while_aligning_it_keeps_the_step_and_says_how_to_go_on(
    prepared: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    code, said = stop_while_aligning(prepared, out, signal.SIGTERM)
    assert code == 75
    assert said.splitlines()[-1].startswith("infalign: stopped; to continue, run again: infalign")
    said = finish(out, *SETTINGS)
    assert "align  goes on from step 6\n" in said  # the one that was under way, kept for that
    check_same(out, whole)


def work(out: Path, mesh: str, devices: int, count: int = 1) -> dict[str, np.ndarray]:
    """What `resume_worker.py` finds on so many devices, shared among processes."""
    processes.work("resume_worker.py", out, mesh, devices=devices, processes=count)
    with np.load(out / "found.npz", allow_pickle=False) as found:
        return dict(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "others"),
    [
        (("data=4,fsdp=2", 8), [("data=2,fsdp=2", 4), ("data=1", 1)]),
        (("data=1,fsdp=2", 2, 2), [("data=1", 1)]),
    ],
    ids=["eight devices", "two processes"],
)
def test_it_goes_on_over_another_mesh_with_the_same_draws_and_parameters(
    before: tuple[Any, ...], others: list[tuple[Any, ...]], compiled: None, tmp_path: Path
) -> None:
    (tmp_path / "before").mkdir()
    expected = work(tmp_path / "before", *before)
    for number, other in enumerate(others):
        out = tmp_path / str(number)
        shutil.copytree(tmp_path / "before" / "progress", out / "progress")
        found = work(out, *other)
        assert expected.keys() - found.keys() == {"drawn/0", "drawn/1"}
        for name, leaf in found.items():
            if name.startswith("drawn/"):
                np.testing.assert_array_equal(leaf, expected[name], err_msg=name)
            else:
                np.testing.assert_allclose(leaf, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
