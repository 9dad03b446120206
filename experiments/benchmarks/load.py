"""Whether a machine is quiet enough to time something on, from /proc/stat (Linux)."""

import os
import resource
import sys
import time
from pathlib import Path

IDLE, PATIENCE = 0.95, 600  # share of the machine before a process, and seconds to wait for it
OTHERS = 0.05  # cores that others may use during a process


def worked(stat: str) -> tuple[float, float]:
    """Seconds that all cores together have worked and idled since boot, from /proc/stat.

    Time that the host has taken away (steal) counts as work: of others.
    """
    user, nice, system, idle, waiting, interrupts, soft, stolen = map(int, stat.split()[1:9])
    ticks = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + interrupts + soft + stolen) / ticks, (idle + waiting) / ticks


def now() -> tuple[float, float]:
    return worked(Path("/proc/stat").read_text())


def wait_until_idle() -> None:
    """Returns once the machine has idled through a second; gives up after PATIENCE seconds."""
    end = time.monotonic() + PATIENCE
    while True:
        before = now()
        time.sleep(1)
        work, idle = (b - a for a, b in zip(before, now(), strict=True))
        share = idle / (work + idle)
        if share >= IDLE:
            return
        if time.monotonic() > end:
            sys.exit(
                f"machine: expected it {IDLE:.0%} idle, got {share:.0%} after {PATIENCE} s of "
                "waiting; stop what else runs, or give --no-load-check"
            )


def used() -> float:
    """CPU seconds of this process and of the children it has waited for."""
    who = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    return sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, who))


def by_others(all_of_it: float, ours: float, seconds: float) -> float:
    """CPU time of others, in cores, over ``seconds`` in which all cores worked `all_of_it`."""
    return max(0.0, (all_of_it - ours) / seconds)


def too_loaded(others: float, checked: bool) -> bool:
    """Whether a round is to be thrown away, for the cores that others used during it."""
    return checked and others > OTHERS
