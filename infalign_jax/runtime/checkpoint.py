"""What a run keeps on disk: finished results and the progress within a stage.

A checkpoint is a directory that is whole or absent (see `files`), whenever the process died:
``arrays/`` (Orbax, each leaf under its path in the tree) and ``header.json`` (format, digest,
shapes, the size and CRC-32 of every file, and the caller's info). Nothing is pickled: a
checkpoint from a stranger can be refused or hold wrong numbers, but cannot run code.

One run writes at a time: hold `files.exclusive` on the directory. Every host of it calls this.
"""

import json
import logging
import os
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from infalign_jax.runtime import hosts
from infalign_jax.runtime.files import discard, put_in_place

FORMAT = 1
_HEADER = {"format", "digest", "leaves", "files", "info"}
_STEP = "step-"


def save(path: Path, tree: Any, *, digest: str, info: dict[str, Any]) -> None:
    """Keeps one finished result: a pytree of arrays of any shape, and a JSON dictionary.

    What was at `path` is replaced as a whole, and stays if writing fails.
    Raises OSError when the disk is full, TypeError when `info` is not JSON.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "calibration"
    >>> save(path, {"rewards": np.ones((2, 3))}, digest="ab", info={"prompts": 2})
    >>> load(path, {"rewards": jax.ShapeDtypeStruct((2, 3), np.float64)}, digest="ab")[1]
    {'prompts': 2}
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    leaves = _named(tree)

    def begin() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def finish() -> None:
        header = {"format": FORMAT, "digest": digest, "leaves": _shapes(leaves), "info": info}
        header |= {"files": _checksums(temporary)}
        (temporary / "header.json").write_text(json.dumps(header), encoding="utf-8")
        put_in_place(temporary, path)

    hosts.shared(begin)
    try:
        _write_arrays(temporary / "arrays", leaves)
        hosts.shared(finish)
    except BaseException:
        if hosts.first():
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def load(path: Path, like: Any, *, digest: str) -> tuple[Any, dict[str, Any]]:
    """Reads what `save` kept, in the structure of `like`: (tree, info).

    A leaf of `like` has shape and dtype; where it has a sharding too, the array is put on those
    devices (whatever devices it was saved from), otherwise it comes back as a NumPy array.
    Raises FileNotFoundError when nothing is there, and ValueError for a checkpoint of another
    configuration, of a newer format, damaged, or of other shapes than `like`.

    >>> load(Path("/nowhere"), {}, digest="ab")
    Traceback (most recent call last):
    FileNotFoundError: expected a checkpoint at /nowhere, got nothing; run its stage first
    """
    header = hosts.shared(lambda: _checked_header(Path(path)))
    if header["digest"] != digest:
        raise ValueError(
            f"expected a checkpoint of configuration {digest} at {path}, got a checkpoint of "
            f"another configuration ({header['digest']}); delete it or choose another directory"
        )
    return _read_tree(Path(path), header, like), header["info"]


def finished(path: Path, digest: str) -> bool:
    """Whether `path` holds a whole result of this digest; no for a damaged or another one.

    Raises ValueError for a newer format, which must not be overwritten.

    >>> finished(Path("/nowhere"), "ab")
    False
    """
    header = _header(Path(path))
    return header is not None and header["digest"] == digest


def save_step(
    directory: Path, step: int, tree: Any, info: dict[str, Any], *, keep: int = 2
) -> None:
    """Keeps the progress of a stage after `step` steps, and the `keep` newest checkpoints.

    Checkpoints of later steps go: they are damaged, or of a run that this one replaces. Name the
    directory after the digest of what the stage depends on. Errors as for `save`.

    >>> import tempfile
    >>> directory = Path(tempfile.mkdtemp())
    >>> for step in (10, 20, 30):
    ...     save_step(directory, step, {"w": np.zeros(2)}, {"loss": 0.5})
    >>> latest_step(directory), sorted(path.name for path in directory.iterdir())
    (30, ['step-00000020', 'step-00000030'])
    """
    directory = Path(directory)
    save(_step_path(directory, step), tree, digest="", info=info)
    if not hosts.first():
        return
    steps = _steps(directory)
    kept = [other for other in steps if other <= step][-keep:]
    for other in set(steps) - set(kept):
        discard(_step_path(directory, other))
    for rest in directory.glob(f".{_STEP}*"):  # of a process that died while writing or removing
        shutil.rmtree(rest, ignore_errors=True)


def latest_step(directory: Path) -> int | None:
    """The step of the newest checkpoint that is whole, None without one. Skips damaged ones.

    >>> latest_step(Path("/nowhere")) is None
    True
    """

    def found() -> int | None:
        steps = reversed(_steps(Path(directory)))
        return next((n for n in steps if _header(_step_path(Path(directory), n))), None)

    return hosts.shared(found)  # type: ignore[no-any-return]


def restore_step(directory: Path, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
    """Reads the progress checkpoint of `step` in the structure of `like`: (tree, info).

    Leaves and errors as for `load`.

    >>> restore_step(Path("/nowhere"), 3, {})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    FileNotFoundError: expected a checkpoint at /nowhere/step-00000003, got nothing; run ...
    """
    path = _step_path(Path(directory), step)
    header = hosts.shared(lambda: _checked_header(path))
    return _read_tree(path, header, like), header["info"]


def _named(tree: Any) -> dict[str, Any]:
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    leaves = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}
    if len(leaves) != len(paths):
        raise ValueError("expected distinct names in the tree, got two leaves of one; rename a key")
    return leaves


def _shapes(leaves: dict[str, Any]) -> dict[str, list[Any]]:
    return {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in leaves.items()}


def _write_arrays(path: Path, leaves: dict[str, Any]) -> None:
    import orbax.checkpoint as ocp

    if not leaves:
        return
    log = logging.getLogger("absl")  # Orbax logs the tracebacks of what it also raises
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            checkpointer.save(path.absolute(), args=ocp.args.PyTreeSave(leaves))
    except Exception as error:  # TensorStore reports the system's errors as text
        if found := re.search(r"os_error_code='(\d+)'", str(error)):
            code = int(found[1])
            raise OSError(code, os.strerror(code), str(path)) from error
        raise
    finally:
        log.setLevel(level)


def _read_tree(path: Path, header: dict[str, Any], like: Any) -> Any:
    import orbax.checkpoint as ocp

    wanted = _named(like)
    expected, stored = _shapes(wanted), header["leaves"]
    for name in sorted(expected.keys() | stored.keys()):
        if expected.get(name) != stored.get(name):
            raise ValueError(
                f"expected {name} to be {expected.get(name, 'absent')} in {path}, got "
                f"{stored.get(name, 'nothing')}; delete the checkpoint and run its stage again"
            )
    leaves: dict[str, Any] = {}
    if wanted:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            leaves = checkpointer.restore(
                (path / "arrays").absolute(),
                args=ocp.args.PyTreeRestore(
                    item=wanted, restore_args={name: _target(leaf) for name, leaf in wanted.items()}
                ),
            )
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in wanted])


def _target(leaf: Any) -> Any:
    import orbax.checkpoint as ocp

    if (sharding := getattr(leaf, "sharding", None)) is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape)


def _header(path: Path) -> dict[str, Any] | None:
    """The header of a whole checkpoint, None for a missing or damaged one."""
    try:
        header = json.loads((path / "header.json").read_text(encoding="utf-8"))
        newer = header["format"] > FORMAT
        whole = newer or (header["files"] == _checksums(path) and header.keys() >= _HEADER)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if newer:
        raise ValueError(
            f"expected a checkpoint of format {FORMAT} at {path}, got the newer format "
            f"{header['format']}; upgrade infalign-jax or choose another directory"
        )
    return header if whole else None


def _checked_header(path: Path) -> dict[str, Any]:
    if (header := _header(path)) is not None:
        return header
    if path.exists():
        raise ValueError(
            f"expected a whole checkpoint at {path}, got a damaged one; delete it and run again"
        )
    raise FileNotFoundError(f"expected a checkpoint at {path}, got nothing; run its stage first")


def _checksums(root: Path) -> dict[str, list[int]]:
    """Size in bytes and CRC-32 of every file under `root` but its header."""
    sums = {}
    for path in sorted(root.rglob("*")):
        if path.is_file() and path != root / "header.json":
            data = path.read_bytes()
            sums[path.relative_to(root).as_posix()] = [len(data), zlib.crc32(data)]
    return sums


def _step_path(directory: Path, step: int) -> Path:
    return directory / f"{_STEP}{step:08d}"


def _steps(directory: Path) -> list[int]:
    return sorted(int(path.name.removeprefix(_STEP)) for path in directory.glob(f"{_STEP}[0-9]*"))
