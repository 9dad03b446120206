"""A parent for a process of several: what it says when JAX ends the child without a word.

Where a host is lost, JAX's client ends the processes on the others from within, and no Python of
theirs runs any more.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

from infalign_jax.runtime.stopping import AGAIN

# Set by launchers: how many processes there are, or the names of a TPU slice's hosts.
COUNTS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES")
NAMES = "TPU_WORKER_HOSTNAMES"
LOST = tuple(f"{status}: " for status in ("UNKNOWN", "UNAVAILABLE", "ABORTED", "CANCELLED"))
CHILD = "INFALIGN_CHILD"  # set in the environment of a child
RUN = "import sys; from infalign_jax.cli import main; sys.exit(main())"


def launched() -> bool:
    """Whether a launcher says that there are several processes.

    >>> launched()
    False
    """
    several = any(int(os.environ.get(name) or 1) > 1 for name in COUNTS)
    return several or "," in os.environ.get(NAMES, "")


def is_child() -> bool:
    """Whether this process has a parent that watches it.

    >>> is_child()
    False
    """
    return CHILD in os.environ


def is_loss(error: Exception) -> bool:
    """Whether what JAX raised is a collective, or a call of the coordinator, that failed.

    >>> is_loss(ValueError("UNKNOWN: Gloo all-reduce failed: Connection reset by peer"))
    True
    >>> is_loss(ValueError("expected a positive KL"))
    False
    """
    return str(error).startswith(LOST)


def watch(arguments: Sequence[str]) -> int:
    """Runs the command in a child and returns its exit code, or AGAIN where it was lost.

    SIGTERM is passed on; the second kills the child.

    >>> watch(["--version"]) == 0
    True
    """
    command = [sys.executable, "-c", RUN, *arguments]
    child = subprocess.Popen(command, env=os.environ | {CHILD: "1"})
    signals = 0

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal signals
        signals += 1
        child.send_signal(signal.SIGTERM if signals == 1 else signal.SIGKILL)

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        code = _ended(child)
    finally:
        signal.signal(signal.SIGTERM, before)
    if code >= 0:
        return code
    name = signal.Signals(-code).name
    what = "stopped at once" if signals > 1 else f"lost a process of the run ({name})"
    print(
        f"infalign: {what}; to go on from the last checkpoint, run the same command again on "
        "every host",
        file=sys.stderr,
    )
    return AGAIN


def _ended(child: "subprocess.Popen[bytes]") -> int:
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:  # Ctrl-C reaches the child too, which ends by itself
            continue
