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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from infalign_jax.runtime import checkpoint, goodput, progress

TINY = Path(__file__).with_name("tiny.py")
PATIENCE = 600  # seconds for what should take a few

# What a host runs first, that is to find no room: for a file above 2 kB, for a line of the log.
FULL_DISK = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, -1))"
FULL_LOG = """
import errno, os
os.environ["INFALIGN_CHILD"] = "1"  # no process of its own, which would not have what follows
from infalign_jax.runtime.metrics import MetricsLog
append = MetricsLog.append
def full(log, stage, step, **numbers):
    if (stage, step) == ("align", {step}):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(log.path))
    append(log, stage, step, **numbers)
MetricsLog.append = full
"""

Process = subprocess.Popen[str]


class End(NamedTuple):
    """How a process ended."""

    code: int
    said: str
    seconds: float

    @property
    def last(self) -> str:
        """Its own words, or the last line where there are none, without places."""
        lines = self.said.splitlines() or [""]
        line = " / ".join([line for line in lines if line.startswith("infalign: ")] or lines[-1:])
        line = re.sub(r"; to continue, run again: infalign .*", "; to continue, run again: …", line)
        return re.sub(r"(?<![\w.])(/[\w.\-]+)+/(?=[\w.\-])", "…/", line)


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
    out: Path, *settings: str, hosts: int = 1, stage: str = "align",
    first: Sequence[str] = ("", ""), own: Sequence[Sequence[str]] = ((), ()),
) -> list[Process]:  # fmt: skip
    """A process for each host, in a group of its own.

    A host has a program that runs `first` in its process, and settings of its `own`.
    """
    where, started = address(), []
    for host in range(hosts):
        words = arguments(out, *settings, *own[host], stage=stage)
        if hosts > 1:
            joined = {"--coordinator": where, "--num-processes": hosts, "--process-id": host}
            words += [str(word) for pair in joined.items() for word in pair]
        started.append(
            subprocess.Popen(
                command(words, first[host]), text=True, start_new_session=True,
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            )
        )  # fmt: skip
    return started


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
    timed = {"seconds", *goodput.OF_A_STEP}
    return [
        {name: value for name, value in line.items() if name not in timed}
        for line in found
        if line["stage"] == "align"
    ]


def last_step(out: Path) -> int:
    return max((line["step"] for line in lines(out)), default=0)


def trained(out: Path, moment: float, good: int) -> bool:
    """Whether since a moment a run has gone beyond the checkpoint that it went on from."""
    path = out / "metrics.jsonl"
    return path.exists() and path.stat().st_mtime > moment and last_step(out) > good


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


class Row(NamedTuple):
    """One drill."""

    drill: str
    happened: str
    code: str
    lost: str  # steps
    wrong: str  # results


class Base(NamedTuple):
    """Where all runs are, and one that has all that comes before `align`, to start from."""

    root: Path
    prepared: Path

    def fresh(self, name: str) -> Path:
        return copied(self.prepared, self.root / name)

    def whole(self, hosts: int) -> Path:
        """What comes of it undisturbed."""
        out = self.root / f"whole-{hosts}"
        if not list((out / "stages").glob("align-*")):
            copied(self.prepared, out)
            check(finish(out, hosts=hosts))
        return out


def base(root: Path) -> Base:
    found = Base(root, root / "prepared")
    check(finish(found.prepared, stage="foresight"))
    return found


def check(ends: list[End]) -> None:
    for end in ends:
        if end.code:
            raise RuntimeError(f"expected a run to end well, got {end.code}: {end.said[-2000:]}")


def again(drill: str, out: Path, found: Base, happened: str, code: object, hosts: int = 1) -> Row:
    """The row of a run that was disturbed, after it has been started again and has ended."""
    step, good = last_step(out), newest(out)
    ends = finish(out, hosts=hosts)
    check(ends)
    told = [line for line in ends[0].said.splitlines() if "damaged" in line]
    if told:
        happened += "; then: " + End(0, told[0], 0).last
    wrong = difference(out, found.whole(hosts))
    return Row(drill, happened, str(code), str(max(0, step - good)), wrong)
