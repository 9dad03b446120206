"""Where a training loop's seconds go: to its steps, or lost to data, checkpoints, compilation and
to steps that a failure made it take again.

All of it is read off the host's clock: nothing is asked of a device.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import jax
from jax.profiler import TraceAnnotation

from infalign_jax.runtime import chips, measure

CAUSES = ("data", "checkpoints", "compilation", "failures")
OF_A_STEP = (  # what metrics.jsonl says beside a step's own metrics
    "tokens_per_second_per_chip",
    "utilisation",
    "device_memory_peak_bytes",
    "process_peak_rss_bytes",
    *(f"seconds_lost_to_{cause}" for cause in CAUSES),
)

WINDOW = 10  # steps

_COMPILING: list[tuple[float, float]] = []  # from when to when, none within another


def compilation_seconds() -> float:
    """Seconds that this process has traced, lowered and compiled since this was first asked.

    >>> before = compilation_seconds()
    >>> _ = jax.jit(lambda x: x * 3.0)(2.0)
    >>> compilation_seconds() > before
    True
    """
    _listen()
    return sum(end - begin for begin, end in _COMPILING)


@lru_cache
def _listen() -> None:
    jax.monitoring.register_event_duration_secs_listener(_heard)


def _heard(event: str, duration_secs: float, **_: str | int) -> None:
    """JAX tells of what has ended; a function traced within another has ended before it."""
    if event.startswith("/jax/core/compile/"):
        end = time.monotonic()
        begin = end - duration_secs
        while _COMPILING and _COMPILING[-1][0] >= begin:
            _COMPILING.pop()
        _COMPILING.append((begin, end))


def shares(seconds: float, lost: dict[str, float]) -> dict[str, float]:
    """What share of a stage's seconds was not lost, and the seconds lost to each cause.

    >>> shares(20.0, {"data": 1.0, "compilation": 4.0})
    {'productive': 0.75, 'data': 1.0, 'compilation': 4.0}
    """
    left = max(seconds - sum(lost.values()), 0.0)
    return {"productive": left / max(seconds, 1e-9)} | lost


@dataclass
class Account:
    """The seconds of one training loop, carried on from process to process.

    >>> account = Account(jax.devices()[:1], tokens=64)
    >>> with account.losing("data"):
    ...     time.sleep(0.01)
    >>> account.info()["lost"]["data"] >= 0.01, account.step()["seconds_lost_to_checkpoints"]
    (True, 0.0)
    """

    devices: Sequence[jax.Device]
    tokens: int  # of a step, on all devices
    flops: float | None = None  # the model's in a step, on all devices, where it is known
    seconds: float = 0.0  # of earlier processes
    lost: dict[str, float] = field(default_factory=dict)  # seconds by cause, likewise

    def __post_init__(self) -> None:
        self.began = self.first = time.monotonic()
        self.lost = dict.fromkeys(CAUSES, 0.0) | self.lost
        self.before = self.lost["compilation"] - compilation_seconds()
        self.told = self._lost()
        self.ends = deque([self._worked(self.told)], WINDOW + 1)

    @contextmanager
    def losing(self, cause: str) -> Iterator[None]:
        """Counts what is done within as lost to a cause, and names it in a trace."""
        began = time.monotonic()
        with TraceAnnotation(cause):
            yield
        self.lost[cause] += time.monotonic() - began

    def again(self, seconds: float) -> None:
        """Counts steps that an earlier process took after the state from which this one goes on."""
        self.seconds += seconds
        self.lost["failures"] += seconds

    @property
    def taken(self) -> float:
        """Seconds of this process and the earlier ones."""
        return self.seconds + time.monotonic() - self.began

    def info(self) -> dict[str, Any]:
        """What a checkpoint keeps: `seconds`, and which of them were `lost`, by cause."""
        return {"seconds": self.taken, "lost": self._lost()}

    def compiled(self) -> None:
        """The first step, which compiles, has ended: the next one begins."""
        self.first = time.monotonic()

    def rate(self, steps: int) -> dict[str, float]:
        """Tokens a second over the steps since the first, where there are any."""
        taken = time.monotonic() - self.first
        return {"tokens_per_second": self.tokens * steps / taken} if steps > 0 else {}

    def step(self) -> dict[str, float]:
        """What metrics.jsonl says of the step that has just ended, by the names of OF_A_STEP.

        Speed is that of the last steps together, WINDOW at most, as the host learns of their ends
        late and unevenly; of what is lost it leaves out what a device surely waits for: all but
        data. Model FLOPs are held against the chip's published bfloat16 peak.
        """
        lost = self._lost()
        self.ends.append(self._worked(lost))
        seconds = max(self.ends[-1] - self.ends[0], 1e-9) / (len(self.ends) - 1)
        each = seconds * len(self.devices)
        chip = chips.of(self.devices[0].device_kind)
        found: dict[str, float] = {"tokens_per_second_per_chip": self.tokens / each}
        if chip is not None and self.flops is not None:
            found["utilisation"] = self.flops / each / chip.flops
        found |= measure.memory_peak(self.devices)
        found |= {f"seconds_lost_to_{cause}": lost[cause] - self.told[cause] for cause in CAUSES}
        self.told = lost
        return found

    def _worked(self, lost: dict[str, float]) -> float:
        return self.taken - sum(lost[cause] for cause in CAUSES if cause != "data")

    def _lost(self) -> dict[str, float]:
        return self.lost | {"compilation": self.before + compilation_seconds()}
