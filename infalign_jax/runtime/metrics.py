"""What a run tells while it runs: a line a step in metrics.jsonl, a line a phase on the screen."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from infalign_jax.runtime import hosts
from infalign_jax.runtime.files import write_bytes

PLAIN_EVERY = 10.0  # seconds between lines where there is no terminal
LIVE_EVERY = 0.1  # seconds between updates on a terminal

Show = Callable[[int, str], None]  # (step, what to say of it)


class Advance(Protocol):
    """Called with the steps done so far and the two or three numbers that matter."""

    def __call__(self, step: int, **numbers: Any) -> None:
        """Numbers are read only when shown, so arrays still being computed cost nothing."""


@dataclass(frozen=True)
class MetricsLog:
    """A file with one JSON object a line; every line in it is whole.

    >>> import tempfile
    >>> log = MetricsLog(Path(tempfile.mkdtemp()) / "metrics.jsonl")
    >>> for step in (1, 2, 3):
    ...     log.append("align", step, policy="log", loss=0.5 / step)
    >>> log.rewind("align", "log", 2)["step"]
    3
    >>> log.path.read_text()
    '{"stage": "align", "policy": "log", "step": 1, "loss": 0.5}\\n'
    """

    path: Path

    def append(self, stage: str, step: int, *, policy: str | None = None, **numbers: Any) -> None:
        """Adds a line. Non-finite numbers become "nan", "inf" and "-inf", which JSON lacks.

        A line that a dead process left unfinished goes first. Raises OSError when the disk is
        full, and takes back what it wrote of the line.
        """
        record = {"stage": stage} | ({} if policy is None else {"policy": policy}) | {"step": step}
        record |= {name: _plain(number) for name, number in numbers.items()}
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
                size = self.path.read_bytes().rfind(b"\n") + 1
                file.truncate(size)
            try:
                while line:
                    line = line[file.write(line) :]
            except BaseException:
                file.truncate(size)
                raise

    def rewind(self, stage: str, policy: str | None, step: int) -> dict[str, Any]:
        """Drops the stage's lines (the policy's, if any) from `step` on, which come again.

        Returns the last of them, empty where there is none. The file is replaced as a whole.
        """
        kept: list[bytes] = []
        last: dict[str, Any] = {}
        if not self.path.exists():
            return last
        for line in self.path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                continue
            record = json.loads(line)
            same = (record["stage"], record.get("policy")) == (stage, policy)
            if same and record["step"] >= step:
                last = record
            else:
                kept.append(line)
        write_bytes(self.path, b"".join(kept))
        return last


def _plain(number: Any) -> Any:
    """A number, or array of one, as JSON can hold it."""
    value = number.item() if hasattr(number, "item") else number
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def phase(name: str, total: int) -> Iterator[Advance]:
    """Shows the progress of one phase of `total` steps on standard error.

    On a terminal one live line, elsewhere a plain line at most every ten seconds and one at the
    end: steps done, steps a second and the time left (both without the first call, which
    compiles), and the numbers given to `advance`. A resumed phase starts at any step.

    >>> with phase("sft", 200) as advance:
    ...     for step in range(200):
    ...         advance(step + 1, loss=1.0)
    """
    live = sys.stderr.isatty() and hosts.first()
    every = LIVE_EVERY if live else PLAIN_EVERY
    began = shown = time.monotonic()
    first: tuple[int, float] | None = None  # step and time of the first call
    last: tuple[int, dict[str, Any]] | None = None
    with _live_line(name, total) if live else _plain_lines(name) as show:

        def advance(step: int, **numbers: Any) -> None:
            nonlocal first, last, shown
            now = time.monotonic()
            last = step, numbers
            if first is None:
                first = step, now
            if now - shown >= every:
                shown = now
                pace = _pace(step - first[0], now - first[1], total - step)
                show(step, f"{step}/{total}{pace}{_told(numbers)}")

        yield advance
        if last is not None:
            step, numbers = last
            taken = _duration(time.monotonic() - began)
            show(step, f"{step}/{total}  {taken}{_told(numbers)}")


def _pace(steps: int, seconds: float, left: int) -> str:
    if not steps or not seconds:
        return ""
    return f"  {steps / seconds:.3g} steps/s  {_duration(left * seconds / steps)} left"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _told(numbers: dict[str, Any]) -> str:
    return "".join(f"  {name} {float(number):.4g}" for name, number in numbers.items())


@contextmanager
def _plain_lines(name: str) -> Iterator[Show]:
    def show(step: int, text: str) -> None:
        if hosts.first():
            print(f"{name}  {text}", file=sys.stderr, flush=True)

    yield show


@contextmanager
def _live_line(name: str, total: int) -> Iterator[Show]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[text]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=4) as progress:
        task = progress.add_task(name, total=total, text="")
        yield lambda step, text: progress.update(task, completed=step, text=text)
