"""Every line of the log is whole, and the display says little, rightly and cheaply."""

import json
import os
import pty
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from infalign_jax.runtime import metrics
from infalign_jax.runtime.metrics import Advance, MetricsLog, phase


def lines(log: MetricsLog) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.path.read_text().splitlines()]


def test_numbers_of_every_kind_are_written(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "run" / "metrics.jsonl")
    log.append("sft", 1, loss=jnp.float32(0.5), tokens=np.int64(7), rate=0.1)
    log.append("align", 2, policy="log", kl=float("nan"), a=np.float32("inf"), b=-np.inf)
    assert lines(log) == [
        {"stage": "sft", "step": 1, "loss": 0.5, "tokens": 7, "rate": 0.1},
        {"stage": "align", "policy": "log", "step": 2, "kl": "nan", "a": "inf", "b": "-inf"},
    ]


def test_rewinding_takes_back_one_policy_of_one_stage(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.rewind("sft", None, 0)
    for stage, policy in (("sft", None), ("align", "log"), ("align", "identity")):
        for step in (1, 2, 3):
            log.append(stage, step, policy=policy)
    log.rewind("align", "log", 2)
    log.rewind("sft", None, 3)
    told = [(line["stage"], line.get("policy"), line["step"]) for line in lines(log)]
    assert told == [
        ("sft", None, 1),
        ("sft", None, 2),
        ("align", "log", 1),
        ("align", "identity", 1),
        ("align", "identity", 2),
        ("align", "identity", 3),
    ]


@pytest.mark.parametrize("broken", ['{"stage": "s', '{"stage": "sft", "step": 1, "loss": 1.0}'])
def test_a_line_left_unfinished_goes(tmp_path: Path, broken: str) -> None:
    whole = '{"stage": "sft", "step": 0}\n'
    for change in (lambda log: log.append("sft", 1), lambda log: log.rewind("sft", None, 1)):
        log = MetricsLog(tmp_path / "metrics.jsonl")
        log.path.write_text(whole + broken)
        change(log)
        assert log.path.read_text() in (whole, whole + '{"stage": "sft", "step": 1}\n')
    log.path.write_text(broken)
    log.append("sft", 1)
    assert log.path.read_text() == '{"stage": "sft", "step": 1}\n'


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append("sft", 1)
    kept = log.path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(kept) + 5, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            log.append("sft", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert log.path.read_bytes() == kept


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    return now


def test_plain_lines_come_at_most_every_ten_seconds(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with phase("sft", 100) as advance:
        for step in range(1, 101):
            clock[0] += 0.5
            advance(step, loss=1 / step)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 6
    assert told[0] == "sft  20/100  2 steps/s  0:40 left  loss 0.05"
    assert told[-1] == "sft  100/100  0:50  loss 0.01"


def test_a_resumed_phase_counts_only_its_own_steps(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with phase("sft", 10_000) as advance:
        for step in range(9000, 9030):
            advance(step)
            clock[0] += 0.5
    assert capsys.readouterr().err.splitlines()[0] == "sft  9020/10000  2 steps/s  8:10 left"


def test_numbers_not_shown_are_not_read(capsys: pytest.CaptureFixture[str]) -> None:
    class Unready:
        def __float__(self) -> float:
            raise AssertionError("waited for a number that nobody sees")

    with phase("sft", 2) as advance:
        advance(1, loss=Unready())
        advance(2, loss=3.0)
    assert capsys.readouterr().err == "sft  2/2  0:00  loss 3\n"


def fail_after_one_step(advance: Advance) -> None:
    advance(1)
    raise FloatingPointError


def test_a_phase_that_fails_or_has_nothing_to_do_does_not_say_that_it_ended(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(FloatingPointError), phase("sft", 2) as advance:
        fail_after_one_step(advance)
    with phase("sft", 2):
        pass
    assert capsys.readouterr().err == ""


LIVE = """
import time
from infalign_jax.runtime.metrics import phase
with phase("align exponential(10) [/x]", 30) as advance:
    for step in range(1, 31):
        time.sleep(0.02)
        advance(step, kl=step / 100)
"""


def test_a_terminal_gets_one_live_line() -> None:
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    done = subprocess.run([sys.executable, "-c", LIVE], stderr=theirs, env=environment, check=False)
    os.close(theirs)
    told = os.read(ours, 100_000).decode()
    os.close(ours)
    assert done.returncode == 0, told
    assert told.count("\n") == 1  # every update overwrites the line before
    assert told.count("align exponential(10) [/x]") > 1
    assert re.search(r"\d+/30  [\d.]+ steps/s  0:00 left  kl 0\.", told)
    assert re.search(r"30/30  0:0\d  kl 0\.3", told)
