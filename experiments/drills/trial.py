"""One run under trial: its processes, what it has kept, and whether it ended as if undisturbed."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from infalign_jax.runtime import checkpoint, progress

TINY = Path(__file__).with_name("tiny.py")
PATIENCE = 600  # seconds for what should take a few

Process = subprocess.Popen[str]


class End(NamedTuple):
    """How a process ended."""

    code: int
    said: str
    seconds: float

    @property
    def last(self) -> str:
        """Its last line, without places and process numbers."""
        line = (self.said.splitlines() or [""])[-1]
        line = re.sub(r"; to continue, run again: infalign .*", "; to continue, run again: …", line)
        return re.sub(r"(/[\w.\-]+)+/(?=[\w.\-])", "…/", line)


def address() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def arguments(out: Path, *settings: str, stage: str = "align") -> list[str]:
    return ["run", str(TINY), "--out", str(out), "--stage", stage, *settings]


def command(words: list[str], first: str = "") -> list[str]:
    source = f"{first}\nimport sys; from infalign_jax.cli import main; sys.exit(main())"
    return [sys.executable, "-c", source, *words]


def start(
    out: Path, *settings: str, hosts: int = 1, first: str = "", stage: str = "align"
) -> list[Process]:
    """A process for each host, in a group of its own; `first` is run before the command."""
    words, where = arguments(out, *settings, stage=stage), address()
    joined = [
        ["--coordinator", where, "--num-processes", str(hosts), "--process-id", str(i)]
        for i in range(hosts)
    ]
    return [
        subprocess.Popen(
            command(words + (own if hosts > 1 else []), first),
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )
        for own in joined
    ]  # fmt: skip


def ended(process: Process) -> End:
    begun = time.monotonic()
    try:
        said = process.communicate(timeout=PATIENCE)[1]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said = process.communicate()[1] + "\n(killed: it did not end)"
    return End(process.returncode, said, time.monotonic() - begun)


def finish(out: Path, *settings: str, hosts: int = 1, stage: str = "align") -> list[End]:
    return [ended(process) for process in start(out, *settings, hosts=hosts, stage=stage)]


def wait_until(happened: Callable[[], bool], processes: list[Process], pause: float = 0.05) -> bool:
    """Whether it happened before one of the processes ended."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if happened():
            return True
        if any(process.poll() is not None for process in processes):
            return happened()
        time.sleep(pause)
    raise TimeoutError


def lines(out: Path) -> list[dict[str, Any]]:
    """metrics.jsonl of the stage `align`, but for the times and a line being written."""
    path = out / "metrics.jsonl"
    whole = path.read_text().split("\n")[:-1] if path.exists() else []
    found = [json.loads(line) for line in whole]
    return [{k: v for k, v in f.items() if k != "seconds"} for f in found if f["stage"] == "align"]


def last_step(out: Path) -> int:
    return max((line["step"] for line in lines(out)), default=0)


def kept(out: Path) -> Path:
    """Where the checkpoints of the stage under way are."""
    return next(iter((out / "progress").glob("align-*")), out / "progress" / "none")


def newest(out: Path) -> int:
    return progress.latest_step(kept(out)) or 0


def arrays(out: Path) -> dict[str, np.ndarray]:
    """The final parameters."""
    stage = next((out / "stages").glob("align-*"))
    leaves = json.loads((stage / "header.json").read_text())["leaves"]
    like = {name: jax.ShapeDtypeStruct(*leaf) for name, leaf in leaves.items()}
    found, _ = checkpoint.load(stage, like, digest=stage.name.split("-")[1])
    return dict(found)


def difference(out: Path, whole: Path) -> str:
    """What is wrong with a run's results, by those of a run that nothing disturbed; bit by bit."""
    one, other = arrays(out), arrays(whole)
    if one.keys() != other.keys():
        return "other arrays"
    wrong = [name for name in one if one[name].tobytes() != other[name].tobytes()]
    if wrong:
        return f"{len(wrong)} of {len(one)} arrays"
    return "none" if lines(out) == lines(whole) else "the log of metrics"


def copied(source: Path, out: Path) -> Path:
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(source, out)
    return out
