"""Files and directories that are whole or absent, and the lock of an output directory.

Everything is written under a temporary name beside its place, flushed to the disk and renamed:
whatever carries its final name is whole, whenever the process died.
"""

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_bytes(path: Path, *parts: bytes | memoryview) -> None:
    """Writes a file, of one part after another, as a whole or not at all.

    Raises OSError when the disk is full.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "tokenizer.model"
    >>> write_bytes(path, b"proto"); path.read_bytes()
    b'proto'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file as a whole or not at all. Raises OSError when the disk is full.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "results.json"
    >>> write_text(path, "{}"); path.read_text()
    '{}'
    """
    write_bytes(path, text.encode("utf-8"))


def bucket(path: Path) -> str | None:
    """The address of a bucket for which a path was made; None for a path of the disk.

    >>> bucket(Path("gs://runs/one")), bucket(Path("runs/one"))
    ('gs://runs/one', None)
    """
    found = re.match(r"([a-z][a-z0-9]+):/(.+)", str(path))
    return f"{found[1]}://{found[2]}" if found else None


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Holds an output directory (made if missing) for this process; let go even by kill -9.

    Raises ValueError when another run holds it, with that run's process number, and for a bucket,
    where nothing can be locked or renamed.

    >>> import tempfile
    >>> directory = tempfile.mkdtemp()
    >>> with exclusive(directory), exclusive(directory):  # doctest: +ELLIPSIS
    ...     pass
    Traceback (most recent call last):
    ValueError: expected ... to be free, got a directory in use by another run (process ...); ...
    """
    directory = Path(directory)
    if address := bucket(directory):
        raise ValueError(
            f"--out: expected a directory, got the bucket {address}; give a local "
            "one, which experiments/pods/ copies to the bucket, or one where gcsfuse mounts it"
        )
    directory.mkdir(parents=True, exist_ok=True)
    lock = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(lock, 20).decode(errors="replace").strip()
            raise ValueError(
                f"expected {directory} to be free, got a directory in use by another run "
                f"(process {holder}); wait for it to end or choose another --out"
            ) from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, b"%d\n" % os.getpid(), 0)
        yield
    finally:
        os.close(lock)


def mark(directory: Path) -> str:
    """Puts an empty file into a directory, by whose name others can tell that they see it.

    >>> import tempfile
    >>> directory = Path(tempfile.mkdtemp()); name = mark(directory)
    >>> (directory / name).exists(), unmark(directory, name), (directory / name).exists()
    (True, None, False)
    """
    handle, path = tempfile.mkstemp(prefix=".mark-", dir=directory)
    os.close(handle)
    return Path(path).name


def unmark(directory: Path, name: str) -> None:
    """Takes away what `mark` put there.

    >>> unmark(Path("/nowhere"), ".mark-1")
    """
    (directory / name).unlink(missing_ok=True)


def put_in_place(temporary: Path, path: Path) -> None:
    """Flushes a finished directory and gives it its final name, in place of what was there.

    >>> import tempfile
    >>> root = Path(tempfile.mkdtemp())
    >>> (root / "new").mkdir(); put_in_place(root / "new", root / "result")
    >>> [path.name for path in root.iterdir()]
    ['result']
    """
    for inner in [*temporary.rglob("*"), temporary]:
        _sync(inner)
    old = _set_aside(path)
    os.rename(temporary, path)
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def discard(path: Path) -> None:
    """Removes a directory, if it is there, without ever leaving half of it under its name.

    >>> discard(Path("/nowhere"))
    """
    shutil.rmtree(_set_aside(path), ignore_errors=True)


def _set_aside(path: Path) -> Path:
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.rename(path, old)
    return old


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
