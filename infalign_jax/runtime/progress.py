"""The progress of a stage under way: checkpoints by step, written while training goes on."""

import shutil
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infalign_jax.runtime import checkpoint, hosts
from infalign_jax.runtime.files import discard

_STEP = "step-"


@dataclass(frozen=True)
class KeepConfig:
    """Which checkpoints stay: the newest until their stage is finished, and some for good.

    >>> KeepConfig(newest=0)
    Traceback (most recent call last):
    ValueError: keep.newest: expected at least 1, got 0; raise it
    """

    newest: int = 2
    every: int = 0  # for good those of every so many steps, 0 for none

    def __post_init__(self) -> None:
        for name, value, least in (("newest", self.newest, 1), ("every", self.every, 0)):
            if value < least:
                raise ValueError(f"keep.{name}: expected at least {least}, got {value}; raise it")

    def for_good(self, steps: list[int]) -> list[int]:
        return [step for step in steps if self.every and step % self.every == 0]


@dataclass
class Saver:
    """Keeps checkpoints in one directory; at most one is being written."""

    directory: Path
    digest: str  # of what the stage depends on
    keep: KeepConfig
    pending: "futures.Future[None] | None" = None

    def save(self, step: int, tree: Any, info: dict[str, Any]) -> None:
        """Begins to keep a state, once the one before is kept; the state may then be donated.

        Raises what `checkpoint.save` does, that of the one before included.
        """
        self.join()
        self.pending = checkpoint.begin(
            _path(self.directory, step), tree, digest=self.digest, info=info,
            then=lambda: self._sweep(step),
        )  # fmt: skip

    def join(self) -> None:
        """Waits until what was begun is kept; all hosts together."""
        pending, self.pending = self.pending, None
        if pending:
            pending.result()

    def newest(self) -> int | None:
        """The step of the newest checkpoint that is whole."""
        self.join()
        return latest_step(self.directory)

    def _sweep(self, step: int) -> None:
        """Removes what need not be kept, and later steps: of a run that this one replaces."""
        steps = _steps(self.directory)
        earlier = [other for other in steps if other <= step]
        kept = earlier[-self.keep.newest :] + self.keep.for_good(earlier)
        for other in set(steps) - set(kept):
            discard(_path(self.directory, other))
        for rest in self.directory.glob(f".{_STEP}*"):  # of a process that died meanwhile
            shutil.rmtree(rest, ignore_errors=True)


@contextmanager
def saving(directory: Path, digest: str, keep: KeepConfig = KeepConfig()) -> Iterator[Saver]:
    """A saver of a stage's progress; at the end what it began is kept.

    >>> import tempfile
    >>> import numpy as np
    >>> directory = Path(tempfile.mkdtemp())
    >>> with saving(directory, "ab", KeepConfig(newest=1, every=20)) as saver:
    ...     for step in (10, 20, 30, 40, 50):
    ...         saver.save(step, {"w": np.zeros(2)}, {"loss": 0.5})
    >>> sorted(path.name for path in directory.iterdir())
    ['step-00000020', 'step-00000040', 'step-00000050']
    """
    saver = Saver(Path(directory), digest, keep)
    try:
        yield saver
    except BaseException:  # not by all hosts perhaps, so this one waits for itself alone
        if saver.pending:
            futures.wait([saver.pending])
        raise
    saver.join()


def latest_step(directory: Path) -> int | None:
    """The step of the newest checkpoint that is whole, None without one.

    Raises ValueError for a newer format.

    >>> latest_step(Path("/nowhere")) is None
    True
    """
    found = _newest(directory)
    return found[0] if found else None


def resumed(
    directory: Path, like: Any, digest: str, tell: Callable[[str], None] = lambda _: None
) -> tuple[int, Any, dict[str, Any]] | None:
    """The newest checkpoint that is whole: (step, tree, info), None without one.

    Damaged ones are skipped, each with a line to `tell`. Leaves and errors as for
    `checkpoint.load`.

    >>> resumed(Path("/nowhere"), {}, "ab") is None
    True
    """
    found = _newest(directory, tell)
    if found is None:
        return None
    step, header = found
    path = _path(Path(directory), step)
    return step, *checkpoint.load(path, like, digest=digest, header=header)


def clear(directory: Path, keep: KeepConfig) -> None:
    """Removes the progress of a finished stage, but for what is kept for good.

    >>> clear(Path("/nowhere"), KeepConfig())
    """
    steps = _steps(directory)
    kept = keep.for_good(steps)
    if not kept:
        discard(directory)
    for step in set(steps) - set(kept):
        discard(_path(directory, step))


def _newest(
    directory: Path, tell: Callable[[str], None] = lambda _: None
) -> tuple[int, dict[str, Any]] | None:
    """The step and the header of the newest checkpoint that is whole, on every host."""

    def found() -> tuple[int, dict[str, Any]] | None:
        for step in reversed(_steps(Path(directory))):
            path = _path(Path(directory), step)
            try:
                return step, checkpoint.whole_header(path)
            except checkpoint.Damaged as damaged:
                tell(f"skips the damaged checkpoint {path} ({damaged.what})")
        return None

    return hosts.shared(found)  # type: ignore[no-any-return]


def _path(directory: Path, step: int) -> Path:
    return directory / f"{_STEP}{step:08d}"


def _steps(directory: Path) -> list[int]:
    return sorted(int(path.name.removeprefix(_STEP)) for path in directory.glob(f"{_STEP}[0-9]*"))
