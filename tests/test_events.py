"""What TensorBoard is told: every number at its step, and which steps come again."""

import resource
from pathlib import Path

import events
import pytest
from tensorboardX.proto.event_pb2 import SessionLog

from infalign_jax.runtime.events import scalars


def test_every_number_is_written_at_its_step(tmp_path: Path) -> None:
    with scalars(tmp_path / "align", first=1) as write:
        write(1, {"loss": 0.5, "kl": 0.0})
        write(2, {"loss": 0.25, "kl": 1.5})
    assert events.numbers(tmp_path / "align") == {
        ("loss", 1): 0.5,
        ("kl", 1): 0.0,
        ("loss", 2): 0.25,
        ("kl", 2): 1.5,
    }


def test_a_resumed_phase_takes_back_the_steps_that_come_again(tmp_path: Path) -> None:
    with scalars(tmp_path, first=7):
        pass
    starts = [event.step for event in events.read(tmp_path) if event.session_log.status]
    assert SessionLog.START == 1
    assert starts == [7]


def test_what_was_written_before_an_error_is_kept(tmp_path: Path) -> None:
    def broken() -> None:
        with scalars(tmp_path, first=1) as write:
            write(1, {"loss": 2.0})
            raise FloatingPointError

    with pytest.raises(FloatingPointError):
        broken()
    assert events.numbers(tmp_path) == {("loss", 1): 2.0}


def write_many(directory: Path, steps: int) -> None:
    with scalars(directory, first=1) as write:
        for step in range(steps):
            write(step, {"loss": 1.0})


def test_a_full_disk_is_told_while_writing(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_many(tmp_path, 2_000)
        write_many(tmp_path / "end", 60)  # which stand in the file's buffer until its end
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
