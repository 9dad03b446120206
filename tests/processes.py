"""Processes of a test's own: heard to their end, and none left behind when one hangs."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PATIENCE = 1800  # seconds: the slowest machine seen needed more than 600 for the longest of them

# For programs that are small and run a few times: to compile them well takes longer than they do.
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}

FOLDER = Path(__file__).parent
Process = subprocess.Popen[str]

JOINED = """
import runpy, sys
from infalign_jax.runtime import hosts
hosts.join(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
sys.argv = sys.argv[4:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def free_address() -> str:
    """Where processes can meet."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def start(*words: object, **environment: str) -> Process:
    """Python with these words, in a group of its own, so that it can be lost whole."""
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
    )


def command(*arguments: object, first: str = "", **environment: str) -> Process:
    """`infalign run` of `toy_run.py`; the source `first` is run before it."""
    source = f"{first}\nimport sys; from infalign_jax.cli import main; sys.exit(main())"
    return start("-c", source, "run", FOLDER / "toy_run.py", *arguments, **environment)


@contextlib.contextmanager
def together(started: list[Process]) -> Iterator[list[Process]]:
    """Leaves none of them running."""
    try:
        yield started
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def ended(*started: Process, within: float = PATIENCE) -> list[str]:
    """What each said on standard error; in so many seconds all must have ended."""
    with together([*started]), ThreadPoolExecutor() as pool:
        return [
            said for _, said in pool.map(lambda each: each.communicate(timeout=within), started)
        ]


def well(*started: Process) -> list[str]:
    """What each said on standard error; all must have ended well."""
    said = ended(*started)
    for process, text in zip(started, said, strict=True):
        assert process.returncode == 0, text[-2000:]
    return said


def work(worker: str, *arguments: object, devices: int, processes: int = 1) -> None:
    """Runs a script beside this one on so many simulated devices, shared among processes."""
    where = free_address()
    count = f"--xla_force_host_platform_device_count={devices // processes}"
    paths = os.pathsep.join([str(FOLDER), str(FOLDER.parent), os.environ.get("PYTHONPATH", "")])
    flags = f"{count} --xla_cpu_multi_thread_eigen=false"
    environment = QUICK | {"XLA_FLAGS": flags, "PYTHONPATH": paths}
    joined = [("-c", JOINED, where, i, processes) for i in range(processes)]
    starts = joined if processes > 1 else [()]
    well(*(start(*first, FOLDER / worker, *arguments, **environment) for first in starts))
