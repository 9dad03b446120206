"""Runs an experiment on GKE through XPK: one workload, which JobSet starts again by itself.

Command:   python experiments/pods/gke_xpk.py experiments/quickstart.py --name quick \
               --cluster CLUSTER --accelerator v5litepod-16 --zone us-west4-a --out gs://BUCKET/quick
Expected:  README.md beside this file; with --dry-run the commands alone
"""

import argparse
import sys
from collections.abc import Sequence

import launch
from launch import Job, Step

IMAGE = "gcr.io/google.com/cloudsdktool/google-cloud-cli:stable"  # Debian, with gcloud
GRACE = 120  # seconds from SIGTERM to SIGKILL: a checkpoint is written in them
# XPK starts again after 42 and 127 to 255 anyway: 143, and JAX's end after a lost host, among them.
AGAIN = ",".join(str(code) for code in launch.AGAIN if code < 127)
NEEDED = (
    "{ command -v git && command -v curl || { apt-get update && apt-get install -y git curl; }; }"
)


def commands(job: Job, options: argparse.Namespace) -> list[Step]:
    """The one command that hands the job to XPK."""
    clone = f"infalign-pods/{job.name}"
    create = [
        "xpk", "workload", "create", f"--workload={job.name}", f"--cluster={options.cluster}",
        f"--tpu-type={options.accelerator}", f"--num-slices={options.slices}",
        f"--docker-image={options.image}", f"--max-restarts={job.restarts}",
        f"--restart-on-exit-codes={AGAIN}", f"--termination-grace-period-seconds={GRACE}",
        f"--command={NEEDED} && {launch.on_host(job, clone, 'tpu')}",
    ]  # fmt: skip
    place = [f"--zone={options.zone}"] if options.zone else []
    place += [f"--project={options.project}"] if options.project else []
    return [Step((*create, *place))]


def main(arguments: Sequence[str]) -> int:
    """Reads the arguments, and prints or carries out the commands."""
    own = launch.parser("Runs an experiment on GKE through XPK.")
    own.add_argument("--accelerator", required=True, metavar="TYPE", help="such as v5litepod-16")
    own.add_argument("--cluster", required=True, help="made by xpk cluster create")
    own.add_argument("--slices", type=int, default=1, metavar="N", help="default: 1")
    own.add_argument("--zone", help="default: that of gcloud's configuration")
    own.add_argument("--project", help="default: that of gcloud's configuration")
    own.add_argument("--image", default=IMAGE, help="with gcloud and apt-get, or git and curl")
    words, further = launch.split(arguments)
    options = own.parse_args(words)
    launch.check_label(options.name, 40)
    launch.check_shared(options.out)
    if options.slices < 1:
        raise ValueError(f"expected --slices from 1 on, got {options.slices}")
    found = commands(launch.job(options, further), options)
    if options.dry_run:
        print(launch.shown(found))
        return 0
    return launch.call(found[0].command)


if __name__ == "__main__":
    sys.exit(launch.answer(main, sys.argv[1:]))
