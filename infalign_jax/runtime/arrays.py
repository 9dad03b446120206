"""The arrays of a checkpoint, written and read by Orbax: each host its own shards."""

import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from infalign_jax.runtime.meeting import PATIENCE, Meeting


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by their paths in it.

    Raises ValueError where two leaves have one name.

    >>> named({"layers": [{"w": 1.0}, {"w": 2.0}]})
    {'layers.0.w': 1.0, 'layers.1.w': 2.0}
    """
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    leaves = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}
    if len(leaves) != len(paths):
        raise ValueError("expected distinct names in the tree, got two leaves of one; rename a key")
    return leaves


def begin(path: Path, leaves: dict[str, Any], meeting: Meeting) -> Callable[[], None]:
    """Starts to write arrays by name, and returns when they are copied to the hosts' memory.

    From then on they may be donated. The function returned waits until all hosts, which are at the
    meeting, have written theirs; it may be called in another thread. Both raise OSError when the
    disk is full, the second on every host.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "arrays"
    >>> begin(path, {"w": np.arange(3)}, Meeting())()
    >>> read(path, {"w": jax.ShapeDtypeStruct((3,), "int64")})["w"].tolist()
    [0, 1, 2]
    """
    import orbax.checkpoint as ocp

    if not leaves:
        return lambda: None
    options = ocp.options.AsyncOptions(
        timeout_secs=PATIENCE, create_directories_asynchronously=False,
        barrier_sync_fn=lambda *, key, timeout_ms: meeting.meet(),
    )  # fmt: skip
    checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(), async_options=options)
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        stack.callback(checkpointer.close)
        with _system_errors(path):
            checkpointer.save(path.absolute(), args=ocp.args.PyTreeSave(leaves))
        rest = stack.pop_all()

    def end() -> None:
        with rest, _system_errors(path):
            checkpointer.wait_until_finished()

    return lambda: meeting.do(end)


def read(path: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """The arrays at `path` with the shapes and dtypes of `wanted`.

    Where a leaf has a sharding, the array is put on those devices, whatever devices it was
    written from; otherwise it comes back as a NumPy array.

    >>> read(Path("/nowhere"), {})
    {}
    """
    import orbax.checkpoint as ocp

    if not wanted:
        return {}
    targets = {name: _target(leaf) for name, leaf in wanted.items()}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        arguments = ocp.args.PyTreeRestore(item=wanted, restore_args=targets)
        return dict(checkpointer.restore(path.absolute(), args=arguments))


def _target(leaf: Any) -> Any:
    import orbax.checkpoint as ocp

    if (sharding := getattr(leaf, "sharding", None)) is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape)


@contextmanager
def _quiet() -> Iterator[None]:
    """Orbax logs the tracebacks of what it also raises."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


@contextmanager
def _system_errors(path: Path) -> Iterator[None]:
    """TensorStore reports the system's errors as text."""
    try:
        yield
    except Exception as error:
        if found := re.search(r"os_error_code='(\d+)'", str(error)):
            code = int(found[1])
            raise OSError(code, os.strerror(code), str(path)) from error
        raise
