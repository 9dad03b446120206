"""SIGTERM, which launchers send before they take a machine away: keep the step, then end.

In a training loop the step that is under way is ended and kept first, on several hosts the same
step on all of them (`jax.experimental.multihost_utils`). Elsewhere the run ends at once, as it does
at a second signal.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

AGAIN = 75  # EX_TEMPFAIL: stopped from outside; the same command, run again, goes on


class Stopped(KeyboardInterrupt):
    """SIGTERM, which ends a run as Ctrl-C does."""


@dataclass
class _Heard:
    """A signal comes to a process, not to a function: its state is the process's."""

    in_loop: bool = False
    asked: bool = False
    steps: int = 0  # of all loops


_HEARD = _Heard()


@contextmanager
def heard() -> Iterator[None]:
    """Within, SIGTERM raises Stopped; within a `loop` only the second does.

    >>> with heard(), loop():
    ...     signal.raise_signal(signal.SIGTERM)
    ...     asked()
    True
    """
    before = signal.signal(signal.SIGTERM, _hear)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        _HEARD.in_loop = _HEARD.asked = False


@contextmanager
def loop() -> Iterator[None]:
    """A loop that asks after every step whether it must end.

    >>> with loop():
    ...     asked()
    False
    """
    _HEARD.in_loop = True
    try:
        yield
    finally:
        _HEARD.in_loop = False


def asked() -> bool:
    """Whether to keep the step just taken and raise Stopped: the same on all hosts.

    >>> asked()
    False
    """
    import jax  # here: the command line hears signals before it is known whether JAX is needed

    _HEARD.steps += 1
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        _HEARD.asked |= multihost_utils.reached_preemption_sync_point(_HEARD.steps)
    return _HEARD.asked


def _hear(number: int, frame: FrameType | None) -> None:
    if not _HEARD.in_loop or _HEARD.asked:
        raise Stopped
    _HEARD.asked = True
