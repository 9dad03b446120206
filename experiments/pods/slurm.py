"""Runs an experiment on GPUs under SLURM: installs it on this host, and hands sbatch a job.

Command:   python experiments/pods/slurm.py experiments/quickstart.py --name quick \
               --nodes 2 --gpus-per-node 8 --out runs/quick
Expected:  README.md beside this file; with --dry-run the commands alone

To be called on a login node, in a directory that the nodes share.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence

import launch
from launch import Job, Step

GRACE = 120  # seconds before the time limit at which the run is told to stop


def commands(job: Job, options: argparse.Namespace) -> list[Step]:
    """Installation, and the job: as many tasks a node as GPUs, each of which drives one."""
    clone = os.path.abspath(options.directory or os.path.join("infalign-pods", job.name))
    if not job.out.startswith("gs://"):
        job = job._replace(out=os.path.abspath(job.out))
    given = {name: getattr(options, name) for name in ("partition", "account", "time")}
    submit = [
        "sbatch", f"--job-name={job.name}", f"--nodes={options.nodes}",
        f"--ntasks-per-node={options.gpus_per_node}", f"--gpus-per-node={options.gpus_per_node}",
        "--requeue", "--open-mode=append", f"--signal=TERM@{GRACE}", f"--output={clone}/%j.log",
        *(f"--{name}={value}" for name, value in given.items() if value), *options.sbatch,
    ]  # fmt: skip
    script = (f"{clone}/experiments/pods/in_slurm.sh", str(job.restarts))
    return [
        Step(("bash", "-c", launch.installing(job, clone, "cuda")), "on this host"),
        Step((*submit, *script, *launch.running(job, clone))),
    ]


def main(arguments: Sequence[str]) -> int:
    """Reads the arguments, and prints or carries out the commands."""
    own = launch.parser("Runs an experiment on GPUs under SLURM.")
    own.add_argument("--nodes", type=int, required=True, metavar="N")
    own.add_argument("--gpus-per-node", type=int, required=True, metavar="N")
    own.add_argument("--directory", help="for the clone (default: infalign-pods/NAME)")
    for name in ("partition", "account", "time"):
        own.add_argument(f"--{name}", help="as of sbatch")
    own.add_argument(
        "--sbatch", action="append", default=[], metavar="=OPTION", help="any other of sbatch"
    )
    words, further = launch.split(arguments)
    options = own.parse_args(words)
    if not re.fullmatch(r"[^/\x00-\x1f]+", options.name):
        raise ValueError(f"expected --name without / and line breaks, got {options.name!r}")
    for name in ("nodes", "gpus_per_node"):
        if getattr(options, name) < 1:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"expected {option} from 1 on, got {getattr(options, name)}")
    found = commands(launch.job(options, further), options)
    if options.dry_run:
        print(launch.shown(found))
        return 0
    for step in found:
        if code := launch.call(step.command):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(launch.answer(main, sys.argv[1:]))
