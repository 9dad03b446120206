"""Scalars for TensorBoard, in event files beside metrics.jsonl."""

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FLUSHED_EVERY = 10.0  # seconds

Write = Callable[[int, dict[str, float]], None]  # (step, numbers)


@contextmanager
def scalars(directory: Path, first: int) -> Iterator[Write]:
    """Writes numbers by step into an event file of its own in `directory`.

    TensorBoard forgets what earlier files of the directory say of step `first` and later: a
    resumed phase takes its steps again. What is written is on disk when the block ends, and every
    few seconds before. Writing raises OSError when the disk is full, the end of the block does not:
    metrics.jsonl has the same.

    >>> import tempfile
    >>> directory = Path(tempfile.mkdtemp()) / "sft"
    >>> with scalars(directory, first=1) as write:
    ...     write(1, {"loss": 0.5})
    >>> [path.name.split(".")[2] for path in directory.iterdir()]
    ['tfevents']
    """
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.record_writer import RecordWriter  # in no thread: errors are raised here
    from tensorboardX.summary import scalar

    directory.mkdir(parents=True, exist_ok=True)
    name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
    writer = RecordWriter(str(directory / name))
    begun = Event(wall_time=time.time(), file_version="brain.Event:2")
    again = Event(step=first, session_log=SessionLog(status=SessionLog.START))
    for event in (begun, again):
        writer.write(event.SerializeToString())
    flushed = time.monotonic()

    def write(step: int, numbers: dict[str, float]) -> None:
        nonlocal flushed
        for name, number in numbers.items():
            event = Event(wall_time=time.time(), step=step, summary=scalar(name, number))
            writer.write(event.SerializeToString())
        if time.monotonic() - flushed > FLUSHED_EVERY:
            writer.flush()
            flushed = time.monotonic()

    try:
        yield write
    finally:
        with suppress(OSError):
            writer.close()
