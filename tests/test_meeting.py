"""Hosts that meet in threads hear of each other's errors, wherever these come."""

import errno
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import pytest
from jax._src import distributed

from infalign_jax.runtime.meeting import Elsewhere, Meeting

HOSTS = 3
HERE = threading.local()


class Coordinator:
    """What JAX's client does for a meeting, among threads in place of hosts."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.barriers: dict[str, threading.Barrier] = {}
        self.lock = threading.Lock()

    def key_value_set(self, key: str, value: str) -> None:
        self.values[key] = value

    def key_value_dir_get(self, directory: str) -> list[tuple[str, str]]:
        return [item for item in self.values.items() if item[0].startswith(directory)]

    def wait_at_barrier(self, place: str, timeout: int) -> None:
        with self.lock:
            barrier = self.barriers.setdefault(place, threading.Barrier(HOSTS))
        barrier.wait(timeout=10)


@pytest.fixture(autouse=True)
def coordinator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed.global_state, "client", Coordinator())
    monkeypatch.setattr(jax, "process_count", lambda: HOSTS)
    monkeypatch.setattr(jax, "process_index", lambda: HERE.host)


def outcomes(work: Callable[[int, Meeting], None]) -> list[Any]:
    """What each host's work comes to: None, or what it raises."""

    def host(number: int) -> Any:
        HERE.host = number
        try:
            meeting = Meeting(number=7)
            meeting.do(lambda: work(number, meeting))
        except Exception as error:
            return error
        return None

    with ThreadPoolExecutor(HOSTS) as pool:
        return list(pool.map(host, range(HOSTS)))


def test_without_an_error_all_go_on() -> None:
    assert outcomes(lambda host, meeting: meeting.meet()) == [None] * HOSTS


@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_error_between_any_two_meetings_reaches_all(place: int) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "/x")

    def work(host: int, meeting: Meeting) -> None:
        for number in range(3):
            if (host, number) == (1, place):
                raise full
            meeting.meet()

    found = outcomes(work)
    assert found[1] is full
    for other in (found[0], found[2]):
        assert isinstance(other, Elsewhere)
        assert str(other) == "host 1: No space left on device"


def test_two_errors_at_once_are_each_hosts_own() -> None:
    def work(host: int, meeting: Meeting) -> None:
        if host:
            raise ValueError(host)
        meeting.meet()

    found = outcomes(work)
    assert [str(error) for error in found] == ["host 1: ValueError: 1", "1", "2"]


def test_what_goes_wrong_after_another_hosts_error_is_waited_for_by_nobody() -> None:
    """A library that tidies up on the way out may put an error of its own in its place."""

    def work(host: int, meeting: Meeting) -> None:
        if host == 1:
            raise ValueError("first")
        try:
            meeting.meet()
        finally:
            if host == 0:
                raise OSError("second")

    found = outcomes(work)
    assert [str(error) for error in found] == ["second", "first", "host 1: ValueError: first"]
