"""What the three launchers share: their arguments, what a host is told to do, dry runs.

A host clones the repository, installs it (`install.sh`) and runs `infalign run` (`on_host.sh`).
Exit codes of that: 0, done; 75 and 143, start again; anything else, an error.
"""

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parents[2]
AGAIN = (75, 143)  # EX_TEMPFAIL, and stopped by SIGTERM
LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")  # what Google Cloud and Kubernetes call things


class Job(NamedTuple):
    """What is to run, wherever it runs."""

    experiment: str  # its file, from the repository's root
    name: str
    out: str
    repository: str  # a git URL
    revision: str  # a commit or a tag
    options: tuple[str, ...]  # of infalign run
    restarts: int  # at most


class Step(NamedTuple):
    """A command, and in a dry run the words above it."""

    command: tuple[str, ...]
    about: str = ""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with the arguments that every launcher takes.

    >>> parser("Runs it.").parse_args(["e.py", "--name", "a", "--out", "gs://b/a"]).max_restarts
    100
    """
    own = _Parser(
        description=description,
        epilog="After -- follow options of infalign run, such as -- --set align.steps=800",
        allow_abbrev=False,
    )
    own.add_argument("experiment", metavar="EXPERIMENT", help="its file, in the repository")
    own.add_argument("--name", required=True, help="of the job")
    own.add_argument("--out", required=True, help="a bucket (gs://…) or a path all hosts share")
    own.add_argument("--repository", metavar="URL", help="default: this clone's origin")
    own.add_argument("--revision", help="a commit or a tag (default: this clone's HEAD)")
    own.add_argument("--max-restarts", type=int, default=100, metavar="N", help="default: 100")
    own.add_argument("--dry-run", action="store_true", help="print the commands, run none")
    return own


def split(arguments: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """The launcher's own arguments, and those of infalign run, which follow `--`.

    >>> split(["e.py", "--name", "a", "--", "--seed", "1"])
    (['e.py', '--name', 'a'], ('--seed', '1'))
    """
    own = list(arguments)
    place = own.index("--") if "--" in own else len(own)
    return own[:place], tuple(own[place + 1 :])


def job(options: argparse.Namespace, further: tuple[str, ...], root: Path = ROOT) -> Job:
    """What the arguments ask for, made whole from the clone at `root`.

    Raises ValueError where the repository has no such experiment or revision, and where `further`
    says what the launcher says itself.
    """
    if "--out" in {word.partition("=")[0] for word in further}:
        raise ValueError("expected --out before --, got it after: the launcher hands it on")
    if options.max_restarts < 0:
        raise ValueError(f"expected --max-restarts from 0 on, got {options.max_restarts}")
    repository = options.repository or _git(root, "remote", "get-url", "origin")
    if not repository:
        raise ValueError("expected a remote named origin, got none: give --repository URL")
    revision = options.revision or _pushed_head(root, own=options.repository is None)
    return Job(
        _in_repository(options.experiment, revision, root), options.name, options.out.rstrip("/"),
        repository, revision, further, options.max_restarts,
    )  # fmt: skip


def _git(root: Path, *arguments: str) -> str:
    """What git answers; nothing where it fails."""
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _pushed_head(root: Path, own: bool) -> str:
    head = _git(root, "rev-parse", "HEAD")
    if not head:
        raise ValueError(f"expected a clone of git in {root}, got none: give --revision")
    if own and not _git(root, "branch", "--remotes", "--contains", head):
        raise ValueError(
            f"expected a commit that origin has, got {head[:12]}: push it, or give --revision"
        )
    return head


def _in_repository(experiment: str, revision: str, root: Path) -> str:
    """The file's path from the root; it must be there, and in the revision where git knows that."""
    for place in (Path(experiment), root / experiment):
        path = place.resolve()
        if path.is_file() and path.is_relative_to(root):
            break
    else:
        raise ValueError(
            f"expected an experiment file in {root}, got {experiment}: hosts take it from there"
        )
    inside = path.relative_to(root).as_posix()
    known = _git(root, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    if known and not _git(root, "rev-parse", "--verify", "--quiet", f"{revision}:{inside}"):
        raise ValueError(f"expected {inside} in {revision[:12]}, got none: commit and push it")
    return inside


def check_label(name: str, most: int) -> None:
    """Raises ValueError where Google Cloud or Kubernetes would refuse the name.

    >>> check_label("My run", 40)
    Traceback (most recent call last):
    ValueError: expected --name of a-z, 0-9 and -, at most 40, got 'My run': such as my-run
    """
    if not LABEL.fullmatch(name) or len(name) > most:
        better = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")[:most]
        better = better if LABEL.fullmatch(better) else "my-run"
        raise ValueError(
            f"expected --name of a-z, 0-9 and -, at most {most}, got {name!r}: such as {better}"
        )


def check_shared(out: str) -> None:
    """Raises ValueError where hosts would each have an output directory of their own.

    >>> check_shared("runs/a")
    Traceback (most recent call last):
    ValueError: expected --out to be a bucket or a mounted path, got runs/a: such as gs://b/runs/a
    """
    if not (re.match(r"gs://[^/]+", out) or Path(out).is_absolute()):
        raise ValueError(
            f"expected --out to be a bucket or a mounted path, got {out}: such as gs://b/{out}"
        )


def installing(about: Job, clone: str, extra: str) -> str:
    """The shell command that leaves a host with the revision in `clone`, installed.

    >>> about = Job("e.py", "a", "gs://b/a", "https://host/it.git", "v1", (), 9)
    >>> print(installing(about, "it", "tpu").replace(" && ", "\\n"))
    { test -d it/.git || git clone --quiet https://host/it.git it; }
    git -C it fetch --quiet --tags origin
    git -C it checkout --quiet --detach v1
    bash it/experiments/pods/install.sh tpu
    """
    cloning = shlex.join(["git", "clone", "--quiet", about.repository, clone])
    return " && ".join(
        [
            f"{{ test -d {shlex.quote(f'{clone}/.git')} || {cloning}; }}",
            shlex.join(["git", "-C", clone, "fetch", "--quiet", "--tags", "origin"]),
            shlex.join(["git", "-C", clone, "checkout", "--quiet", "--detach", about.revision]),
            shlex.join(["bash", f"{clone}/experiments/pods/install.sh", extra]),
        ]
    )


def running(about: Job, clone: str) -> tuple[str, ...]:
    """The command that runs the job from an installed clone.

    >>> running(Job("e.py", "a", "gs://b/a", "", "", ("--seed", "1"), 9), "it")
    ('bash', 'it/experiments/pods/on_host.sh', 'a', 'gs://b/a', 'e.py', '--seed', '1')
    """
    script = f"{clone}/experiments/pods/on_host.sh"
    return ("bash", script, about.name, about.out, about.experiment, *about.options)


def on_host(about: Job, clone: str, extra: str) -> str:
    """The shell command that installs and runs the job, in place of the shell at the end.

    What stops the shell (XPK sends it SIGTERM) then stops the run.
    """
    return f"{installing(about, clone, extra)} && exec {shlex.join(running(about, clone))}"


def shown(steps: Sequence[Step]) -> str:
    """The commands as one types them, their words above as comments.

    >>> print(shown([Step(("echo", "a b"), "says so")]))
    # says so
    echo 'a b'
    """
    lines = []
    for step in steps:
        lines += [f"# {step.about}"] if step.about else []
        lines.append(shlex.join(step.command))
    return "\n".join(lines)


def call(command: Sequence[str]) -> int:
    """Runs a command as it stands and returns its exit code, 127 where there is no such program.

    >>> call(["true"])
    0
    """
    try:
        return subprocess.run(command, check=False).returncode
    except FileNotFoundError:
        print(f"expected {command[0]} on PATH, got none: install it", file=sys.stderr)
        return 127


def answer(main: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """What `main` returns; 2, after one line, for a user's mistake, and 130 for Ctrl-C.

    >>> answer(lambda words: len(words), ["a"])
    1
    """
    try:
        return main(arguments)
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command again goes on", file=sys.stderr)
        return 130
