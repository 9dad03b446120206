"""Several processes, one a host, that run one program on all their devices together.

Every host executes the same steps: it reads the data, lays its own rows of each batch on its own
devices and holds its own shards of the parameters. What touches the disk or the screen is done by
the first alone (`shared`, `first`). With one process all of this does nothing.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from infalign_jax.runtime import files
from infalign_jax.runtime.parent import launched

HEARTBEAT = 30  # seconds without a sign of life after which a host counts as lost


def join(
    coordinator: str | None = None, process_id: int | None = None, num_processes: int | None = None
) -> None:
    """Makes this process one of several, where it is told so or a launcher says so.

    Launchers are SLURM, Open MPI and those of Cloud TPU (`jax.distributed.initialize` finds the
    rest). To be called before JAX looks for devices. Raises ValueError where only some of the three
    are given or one is out of range, and RuntimeError where the others cannot be reached.

    >>> join(coordinator="host0:1234")
    Traceback (most recent call last):
    ValueError: expected --coordinator, --process-id and --num-processes together, got only \
--coordinator; give all three, or none where a launcher says them
    """
    given = {
        "--coordinator": coordinator, "--process-id": process_id, "--num-processes": num_processes
    }  # fmt: skip
    named = [name for name, value in given.items() if value is not None]
    if len(named) in (1, 2):
        raise ValueError(
            "expected --coordinator, --process-id and --num-processes together, got only "
            f"{' and '.join(named)}; give all three, or none where a launcher says them"
        )
    if num_processes is not None and process_id not in range(num_processes):
        raise ValueError(
            f"--process-id: expected 0 to {num_processes - 1}, as there are {num_processes} "
            f"processes, got {process_id}; number the processes from 0"
        )
    if num_processes is not None or launched():
        jax.distributed.initialize(
            coordinator, num_processes, process_id,
            heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=HEARTBEAT,
        )  # fmt: skip


def first() -> bool:
    """Whether this is the process that writes and speaks for all.

    >>> first()
    True
    """
    return jax.process_index() == 0


def shared(function: Callable[[], Any]) -> Any:
    """What the function gives on the first host, on every host: JSON, and the others wait for it.

    Its ValueError, OSError or FloatingPointError is raised on every host.

    >>> shared(lambda: {"step": 3})
    {'step': 3}
    """
    if jax.process_count() == 1:
        return function()
    told: dict[str, Any] = {}
    error: Exception | None = None
    if first():
        try:
            told = {"value": function()}
        except Exception as raised:
            error = raised
            told = {"error": str(raised), "kind": type(raised).__name__}
    told = _broadcast(told)
    if error is not None:
        raise error
    if "error" in told:
        kinds = (FileNotFoundError, OSError, FloatingPointError)
        kind = {kind.__name__: kind for kind in kinds}.get(told["kind"], ValueError)
        raise kind(told["error"])
    return told["value"]


def check_shared(directory: Path) -> None:
    """Raises ValueError on every host where one of them does not see what the first writes there.

    >>> check_shared(Path("anywhere"))  # one host
    """
    if jax.process_count() == 1:
        return
    name: str = shared(lambda: files.mark(directory))
    seen = gathered(np.array((directory / name).exists()))
    shared(lambda: files.unmark(directory, name))
    if not seen.all():
        raise ValueError(
            f"--out: expected a directory that all hosts share, got {directory}, which is another "
            f"one on host {int(np.argmin(seen))}; mount one on all (NFS, or a bucket by gcsfuse)"
        )


def gathered(own: np.ndarray) -> np.ndarray:
    """The arrays that every host has of its own, along a first axis.

    >>> gathered(np.arange(2)).tolist()
    [[0, 1]]
    """
    if jax.process_count() == 1:
        return own[None]
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(own))


def whole(tree: Any) -> Any:
    """Arrays that lie divided over all hosts, as NumPy arrays that each host has whole.

    What a host has of its own stays as it is.

    >>> whole({"x": jax.numpy.arange(2)})["x"].tolist()
    [0, 1]
    """
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    def joined(x: Any) -> Any:
        divided = isinstance(x, jax.Array) and not x.is_fully_addressable
        return multihost_utils.process_allgather(x, tiled=True) if divided else jax.device_get(x)

    return jax.tree.map(joined, tree)


def _broadcast(told: dict[str, Any]) -> dict[str, Any]:
    """The first host's dictionary, by way of the devices."""
    from jax.experimental import multihost_utils

    own = np.frombuffer(json.dumps(told).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(own))))
    text = np.resize(own, size) if first() else np.zeros(size, np.uint8)
    return dict(json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(text)))))
