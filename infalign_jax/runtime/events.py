"""Scalars for TensorBoard, in event files beside metrics.jsonl."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Write = Callable[[int, dict[str, float]], None]  # (step, numbers)


@contextmanager
def scalars(directory: Path, first: int) -> Iterator[Write]:
    """Writes numbers by step into an event file of its own in `directory`.

    TensorBoard forgets what earlier files of the directory say of step `first` and later: a
    resumed phase takes its steps again. What is written is on disk when the block ends, and every
    few seconds before.

    >>> import tempfile
    >>> directory = Path(tempfile.mkdtemp()) / "sft"
    >>> with scalars(directory, first=1) as write:
    ...     write(1, {"loss": 0.5})
    >>> [path.name.split(".")[2] for path in directory.iterdir()]
    ['tfevents']
    """
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(directory), purge_step=first, flush_secs=10)

    def write(step: int, numbers: dict[str, float]) -> None:
        for name, number in numbers.items():
            writer.add_scalar(name, number, step)

    try:
        yield write
    finally:
        writer.close()
