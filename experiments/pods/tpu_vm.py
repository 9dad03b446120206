"""Runs an experiment on Cloud TPU: a queued resource, and the same command on all of its workers.

Command:   python experiments/pods/tpu_vm.py experiments/quickstart.py --name quick \
               --accelerator v5litepod-16 --zone us-west4-a --out gs://BUCKET/quick --spot
Expected:  README.md beside this file; with --dry-run the commands alone

It stays in front until the run has ended, and starts it again after a preemption, on a new
resource of the same name where the old one is gone. The same command again goes on.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import launch
from launch import Job, Step

RUNTIMES = {  # the TPU software versions that Cloud TPU's documentation gives for JAX
    "v6e": "v2-alpha-tpuv6e",
    "v5p": "v2-alpha-tpuv5",
    "v5litepod": "v2-alpha-tpuv5-lite",
    **dict.fromkeys(("v4", "v3", "v2"), "tpu-ubuntu2204-base"),
}
GONE = ("SUSPENDED", "FAILED")  # states that a queued resource does not leave again
SCOPE = "https://www.googleapis.com/auth/cloud-platform"  # with which a worker writes to buckets
LOST = 255  # of ssh itself
PAUSE = 30  # seconds between two looks at the queue
UNANSWERED = 10  # looks in a row at a queue that had answered before


class Commands(NamedTuple):
    """What is said to gcloud."""

    state: tuple[str, ...]
    create: tuple[str, ...]
    delete: tuple[str, ...]
    run: tuple[str, ...]


def _told(command: Sequence[str]) -> str | None:
    """What gcloud prints: nothing where it finds nothing, None where it cannot ask."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0 or "NOT_FOUND" in done.stderr:
        return done.stdout.strip()
    print(done.stderr, end="", file=sys.stderr)
    return None


class Shell(NamedTuple):
    """How commands are carried out, so that a test can do it without a cloud."""

    call: Callable[[Sequence[str]], int] = launch.call
    ask: Callable[[Sequence[str]], str | None] = _told
    sleep: Callable[[float], None] = time.sleep


def commands(job: Job, options: argparse.Namespace) -> Commands:
    """The commands for a job; raises ValueError for an accelerator of unknown software version."""
    kind = options.accelerator.split("-")[0]
    runtime = options.runtime_version or RUNTIMES.get(kind)
    if runtime is None:
        raise ValueError(
            f"expected --accelerator of {', '.join(RUNTIMES)}, got {options.accelerator}: "
            "give --runtime-version too"
        )
    where = [f"--zone={options.zone}"]
    where += [f"--project={options.project}"] if options.project else []
    tier = [f"--{name}" for name in ("spot", "reserved") if getattr(options, name)]
    resources = ("gcloud", "compute", "tpus", "queued-resources")
    clone = f"infalign-pods/{job.name}"
    return Commands(
        (*resources, "describe", job.name, *where, "--format=value(state.state)"),
        (
            *resources, "create", job.name, *where, f"--node-id={job.name}",
            f"--accelerator-type={options.accelerator}", f"--runtime-version={runtime}",
            f"--scopes={SCOPE}", *tier,
        ),
        (*resources, "delete", job.name, *where, "--force", "--quiet"),
        (
            "gcloud", "compute", "tpus", "tpu-vm", "ssh", job.name, *where, "--worker=all",
            f"--command={launch.on_host(job, clone, 'tpu')}",
        ),
    )  # fmt: skip


def steps(those: Commands, keep: bool) -> list[Step]:
    """The commands in order, for a dry run."""
    found = [
        Step(those.state, f"what there is: ACTIVE is used, {' and '.join(GONE)} are deleted first"),
        Step(those.create, "where there is none"),
        Step(those.state, f"every {PAUSE} s, until it says ACTIVE"),
        Step(those.run, "again from the top where this ends with 75 or 143, or is cut off"),
    ]
    return found if keep else [*found, Step(those.delete, "when it has ended with 0")]


def ready(those: Commands, shell: Shell, answered: bool) -> bool:
    """Waits until the resource is there; False where it could not be had.

    What has `answered` before may fail to for a while.
    """
    unanswered, created = 0, False
    while (state := shell.ask(those.state)) != "ACTIVE":
        unanswered = unanswered + 1 if state is None else 0
        if unanswered == (UNANSWERED if answered else 1):
            return False
        if state in ("", *GONE):
            if created:
                return False
            if state:
                shell.call(those.delete)
            if shell.call(those.create):
                return False
            created = True
        answered = True
        shell.sleep(PAUSE)
    return True


def carry_out(those: Commands, restarts: int, keep: bool, shell: Shell) -> int:
    """Runs the job to its end and returns its exit code, or 1 where no TPU could be had."""
    code = 1
    for attempt in range(restarts + 1):
        if not ready(those, shell, answered=attempt > 0):
            return 1
        code = shell.call(those.run)
        if code == 0:
            return 0 if keep else shell.call(those.delete)
        again = code in (*launch.AGAIN, LOST) or shell.ask(those.state) != "ACTIVE"
        if not again:
            break
        shell.sleep(PAUSE)  # a preempted resource takes a while to say so
    return code


def main(arguments: Sequence[str], shell: Shell | None = None) -> int:
    """Reads the arguments, and prints or carries out the commands."""
    own = launch.parser("Runs an experiment on Cloud TPU, on a queued resource.")
    own.add_argument("--accelerator", required=True, metavar="TYPE", help="such as v5litepod-16")
    own.add_argument("--zone", required=True)
    own.add_argument("--project", help="default: that of gcloud's configuration")
    own.add_argument("--runtime-version", metavar="VERSION", help="default: by accelerator")
    tier = own.add_mutually_exclusive_group()
    tier.add_argument("--spot", action="store_true", help="cheaper, may be taken away")
    tier.add_argument("--reserved", action="store_true", help="from a reservation")
    own.add_argument("--keep", action="store_true", help="leave the TPU there when done")
    words, further = launch.split(arguments)
    options = own.parse_args(words)
    launch.check_label(options.name, 63)
    launch.check_shared(options.out)
    job = launch.job(options, further)
    those = commands(job, options)
    if options.dry_run:
        print(launch.shown(steps(those, options.keep)))
        return 0
    return carry_out(those, job.restarts, options.keep, shell or Shell())


if __name__ == "__main__":
    sys.exit(launch.answer(main, sys.argv[1:]))
