"""What a run keeps on disk: results as directories that are whole or known to be damaged.

A checkpoint is a directory that is whole or absent (see `files`), whenever the process died:
``arrays/`` (Orbax, each leaf under its path in the tree) and ``header.json`` (format, digest,
shapes, the size and CRC-32 of every file, and the caller's info). Nothing is pickled: a
checkpoint from a stranger can be refused or hold wrong numbers, but cannot run code.

One run writes at a time: hold `files.exclusive` on the directory. Every host of it calls this.
"""

import json
import shutil
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from infalign_jax.runtime import arrays, hosts
from infalign_jax.runtime.files import put_in_place
from infalign_jax.runtime.meeting import Meeting

FORMAT = 1
_HEADER = {"format", "digest", "leaves", "files", "info"}
_PIECE = 1 << 24  # bytes read at once


class Damaged(ValueError):
    """A checkpoint that is not whole; `what` says what is amiss."""

    def __init__(self, path: Path, what: str) -> None:
        self.what = what
        super().__init__(
            f"expected a whole checkpoint at {path}, got a damaged one; delete it and run again "
            f"({what})"
        )


def save(path: Path, tree: Any, *, digest: str, info: dict[str, Any]) -> None:
    """Keeps one finished result: a pytree of arrays of any shape, and a JSON dictionary.

    What was at `path` is replaced as a whole, and stays if writing fails.
    Raises OSError when the disk is full, TypeError when `info` is not JSON.

    >>> import tempfile
    >>> import numpy as np
    >>> path = Path(tempfile.mkdtemp()) / "calibration"
    >>> save(path, {"rewards": np.ones((2, 3))}, digest="ab", info={"prompts": 2})
    >>> load(path, {"rewards": jax.ShapeDtypeStruct((2, 3), np.float64)}, digest="ab")[1]
    {'prompts': 2}
    """
    begin(path, tree, digest=digest, info=info).result()


def begin(
    path: Path, tree: Any, *, digest: str, info: dict[str, Any],
    then: Callable[[], None] = lambda: None,
) -> "Future[None]":  # fmt: skip
    """Begins what `save` does, and returns when the arrays are copied to the hosts' memory.

    From then on they may be donated. In a thread every host writes its shards; when all have, the
    first puts the checkpoint in place and calls `then`. The future ends when it has, on all hosts,
    or on all of them with an error where one met it.

    >>> import tempfile
    >>> import numpy as np
    >>> path = Path(tempfile.mkdtemp()) / "sft"
    >>> pending = begin(path, {"w": np.ones(3)}, digest="ab", info={}, then=lambda: print("kept"))
    >>> pending.result(), whole_header(path)["digest"]
    kept
    (None, 'ab')
    """
    path, meeting = Path(path), Meeting()
    temporary = path.with_name(f".{path.name}.tmp")
    leaves = arrays.named(tree)
    header = {"format": FORMAT, "digest": digest, "leaves": _shapes(leaves), "info": info}

    def prepare() -> None:
        _remove(temporary)
        temporary.mkdir(parents=True)

    def put() -> None:
        text = json.dumps(header | {"files": _checksums(temporary)})
        (temporary / "header.json").write_text(text, encoding="utf-8")
        put_in_place(temporary, path)
        then()

    def finish(written: Callable[[], None]) -> None:
        try:
            written()
            meeting.do(put if hosts.first() else lambda: None)
        except BaseException:
            _remove(temporary)
            raise

    hosts.shared(prepare)
    try:
        written = arrays.begin(temporary / "arrays", leaves, meeting)
    except BaseException:
        _remove(temporary)
        raise
    thread = ThreadPoolExecutor(1, "checkpoint")
    pending = thread.submit(finish, written)
    thread.shutdown(wait=False)
    return pending


def load(
    path: Path, like: Any, *, digest: str, header: dict[str, Any] | None = None
) -> tuple[Any, dict[str, Any]]:
    """Reads what `save` kept, in the structure of `like`: (tree, info).

    A leaf of `like` has shape and dtype; where it has a sharding too, the array is put on those
    devices (whatever devices it was saved from), otherwise it comes back as a NumPy array.
    `header`, where `whole_header` has given it, spares another look at every file.
    Raises FileNotFoundError when nothing is there, and ValueError for a checkpoint of another
    configuration, of a newer format, damaged, or of other shapes than `like`.

    >>> load(Path("/nowhere"), {}, digest="ab")
    Traceback (most recent call last):
    FileNotFoundError: expected a checkpoint at /nowhere, got nothing; run its stage first
    """
    header = header or hosts.shared(lambda: whole_header(Path(path)))
    if header["digest"] != digest:
        raise ValueError(
            f"expected a checkpoint of configuration {digest} at {path}, got a checkpoint of "
            f"another configuration ({header['digest']}); delete it or choose another directory"
        )
    return _read_tree(Path(path), header, like), header["info"]


def whole_header(path: Path) -> dict[str, Any]:
    """The header of a checkpoint, all of whose files are as they were written.

    Raises FileNotFoundError where nothing is there, Damaged where it is not whole, and ValueError
    for a newer format.

    >>> whole_header(Path("/nowhere"))
    Traceback (most recent call last):
    FileNotFoundError: expected a checkpoint at /nowhere, got nothing; run its stage first
    """
    if not path.exists():
        raise FileNotFoundError(
            f"expected a checkpoint at {path}, got nothing; run its stage first"
        )
    try:
        header = json.loads((path / "header.json").read_text(encoding="utf-8"))
        version = int(header["format"])
    except FileNotFoundError:
        raise Damaged(path, "header.json is missing") from None
    except (ValueError, KeyError, TypeError):
        raise Damaged(path, "header.json cannot be read") from None
    if version > FORMAT:
        raise ValueError(
            f"expected a checkpoint of format {FORMAT} at {path}, got the newer format {version}; "
            "upgrade infalign-jax or choose another directory"
        )
    if not header.keys() >= _HEADER:
        raise Damaged(path, f"header.json lacks {', '.join(sorted(_HEADER - header.keys()))}")
    if header["files"] != (found := _checksums(path)):
        raise Damaged(path, _difference(header["files"], found))
    return dict(header)


def _read_tree(path: Path, header: dict[str, Any], like: Any) -> Any:
    wanted = arrays.named(like)
    expected, stored = _shapes(wanted), header["leaves"]
    for name in sorted(expected.keys() | stored.keys()):
        if expected.get(name) != stored.get(name):
            raise ValueError(
                f"expected {name} to be {expected.get(name, 'absent')} in {path}, got "
                f"{stored.get(name, 'nothing')}; delete the checkpoint and run its stage again"
            )
    leaves = arrays.read(path / "arrays", wanted)
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in wanted])


def _shapes(leaves: dict[str, Any]) -> dict[str, list[Any]]:
    return {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in leaves.items()}


def _remove(temporary: Path) -> None:
    if hosts.first():
        shutil.rmtree(temporary, ignore_errors=True)


def _checksums(root: Path) -> dict[str, list[int]]:
    """Size in bytes and CRC-32 of every file under `root` but its header."""
    sums = {}
    for path in sorted(root.rglob("*")):
        if path.is_file() and path != root / "header.json":
            sums[path.relative_to(root).as_posix()] = _checksum(path)
    return sums


def _checksum(path: Path) -> list[int]:
    size = crc = 0
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            size, crc = size + len(piece), zlib.crc32(piece, crc)
    return [size, crc]


def _difference(wanted: Any, found: dict[str, list[int]]) -> str:
    """The first file that is not as the header says, and how it differs."""
    if not isinstance(wanted, dict):
        return "header.json cannot be read"
    name = min(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
    if name not in found:
        return f"{name} is missing"
    if name not in wanted:
        return f"{name} is not of it"
    if wanted[name][0] != found[name][0]:
        return f"{name} has {found[name][0]} bytes, not {wanted[name][0]}"
    return f"{name} has other bytes than were written"
