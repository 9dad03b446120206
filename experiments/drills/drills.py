"""Failures made on purpose, to real processes: what a run says, how it ends, and what is lost.

Command:   python experiments/drills/drills.py --out runs/drills
           (with --only kill_hosts disk …: those alone; --kills 20: hosts killed)
Cost:      half an hour on two idle cores, most of it waiting for lost hosts to be missed
Expected:  experiments/results/drills/README.md: every run that is started again ends with the
           parameters and the log of a run that nothing disturbed, bit by bit

Full and read-only disks are mounts in a namespace of their own (`unshare -rm`, Linux); where that
is not allowed their rows say so. Compiled programs are kept in --out for all processes.
"""

import argparse
import os
import random
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}

import trial
from trial import Base, Row, again, base

import infalign_jax


def kill_hosts(found: Base, kills: int) -> Iterator[Row]:
    """kill -9 of one of two hosts at random moments, the same run again and again until it ends."""
    found.whole(2)  # its programs are compiled by then
    draw, out, number = random.Random(kills), found.fresh("kill_hosts"), 0
    while number < kills:
        begun, good = time.time(), trial.newest(out)
        both = trial.start(out, hosts=2)
        going = trial.wait_until(lambda: trial.trained(out, begun, good), both)  # noqa: B023
        time.sleep(draw.uniform(0, 3))
        lost = draw.randrange(2)
        if not going or both[1 - lost].poll() is not None:
            if any(trial.ended(process).code for process in both):
                continue  # lost otherwise: a machine that stood still, say
            wrong = trial.difference(out, found.whole(2))
            yield Row("(the run came to its end)", "", "0", "0", wrong)
            out = found.fresh("kill_hosts")
            continue
        os.killpg(both[lost].pid, signal.SIGKILL)
        survivor = trial.ended(both[1 - lost])
        trial.ended(both[lost])
        number += 1
        step = trial.last_step(out)
        good = trial.newest(out) if survivor.code else step  # else it had come to its end
        yield Row(
            f"kill -9 of host {lost} at step {step}", f"{survivor.seconds:.0f} s: {survivor.last}",
            str(survivor.code), str(max(0, step - good)), "see its end",
        )  # fmt: skip
    yield again("(the run was let go to its end)", out, found, "", 0, hosts=2)


AT_RENAME = """
import os, signal, sys
def hook(event, arguments):
    if event == "os.rename" and str(arguments[{which}]).endswith("{name}"):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
"""


def kill_while_saving(found: Base, _: int) -> Iterator[Row]:
    """kill -9 while arrays are being written, before the rename, and while an old one goes."""
    out = found.fresh("mid_array")
    [process] = trial.start(out)
    temporary = ".step-00000050.tmp/arrays*"
    trial.wait_until(lambda: any(trial.kept(out).glob(temporary)), [process], pause=0.0005)
    process.kill()
    end = trial.ended(process)
    left = "; ".join(sorted(path.name for path in trial.kept(out).glob(".step-*"))) or "nothing"
    happened = f"left behind: {left}"
    yield again("kill -9 while arrays are written", out, found, happened, end.code)
    for drill, which, name in (
        ("kill -9 before the rename", 0, "step-00000050.tmp"),
        ("kill -9 before an old one is set aside", 1, "step-00000030.old"),
    ):
        out = found.fresh("mid_rename")
        first = AT_RENAME.format(which=which, name=name)
        [process] = trial.start(out, first=[first])
        end = trial.ended(process)
        left = "; ".join(sorted(path.name for path in trial.kept(out).glob("*step-*")))
        yield again(drill, out, found, f"left behind: {left}", end.code)


def damage(found: Base, _: int) -> Iterator[Row]:
    """A file of the newest checkpoint cut, with a bit flipped, or gone."""
    for how in ("cut", "flipped", "missing"):
        out = found.fresh("damage")
        [process] = trial.start(out)
        trial.wait_until(lambda: trial.last_step(out) >= 45, [process])  # noqa: B023
        process.kill()
        end = trial.ended(process)
        step = trial.newest(out)
        newest = trial.kept(out) / f"step-{step:08d}"
        file = max((f for f in newest.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
        content = file.read_bytes()
        if how == "missing":
            file.unlink()
        elif how == "cut":
            file.write_bytes(content[:-1])
        else:
            at = len(content) // 2
            file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        yield again(f"kill -9, then a file {how}", out, found, f"step {step} damaged", end.code)


def disk_of_one(found: Base, _: int) -> Iterator[Row]:
    """One of two hosts can write no file above 2 kB, which its part of a checkpoint is; and the
    first finds no room for the log's line of step 33."""
    log = trial.FULL_LOG.format(step=33)
    for full, first, what in (
        (1, trial.FULL_DISK, "disk"), (0, trial.FULL_DISK, "disk"), (0, log, "log's disk"),
    ):  # fmt: skip
        out = found.fresh("disk_of_one")
        firsts = [first if host == full else "" for host in range(2)]
        both = trial.start(out, hosts=2, first=firsts)
        with ThreadPoolExecutor() as pool:  # so that both are waited for from now on
            ends = list(pool.map(trial.ended, both))
        codes = ", ".join(str(end.code) for end in ends)
        apart = ends[1 - full].seconds - ends[full].seconds
        happened = f"{ends[full].last}; the other {apart:+.1f} s: "
        yield again(
            f"full {what} on host {full} of two", out, found,
            happened + ends[1 - full].last, codes, 2,
        )  # fmt: skip


DISK = """
mount {mount} || exit 97
cp -r {prepared}/. {out}/
{run} 2> {said}; echo $? > {code}
ls -A {out}/progress/*/ > {left}
{after}
"""


def in_namespace(script: str) -> bool:
    """Whether a shell script with mounts of its own could be run."""
    return subprocess.run(["unshare", "-rm", "sh", "-c", script], check=False).returncode != 97


def disk(found: Base, _: int) -> Iterator[Row]:
    """A disk that fills up, then has room again; and one that is read-only, then writable."""
    out, notes = found.root / "disk", found.root / "disk-notes"
    for place in (out, notes):
        place.mkdir(exist_ok=True)
    run = shlex.join(trial.command(trial.arguments(out)))
    used = sum(-(-f.stat().st_size // 4096) * 4 for f in found.prepared.rglob("*") if f.is_file())
    size = used + 560  # kB: two checkpoints, and a half
    names = {name: shlex.quote(str(notes / name)) for name in ("said", "code", "left")}
    after = (
        f"mount -o remount,size=1g {out} && {run} 2> {notes}/then && rm -rf {notes}/run "
        f"&& cp -r {out} {notes}/run"
    )
    script = DISK.format(
        mount=f"-t tmpfs -o size={size}k none {out}", prepared=found.prepared, out=out, run=run,
        after=after, **names,
    )  # fmt: skip
    if not in_namespace(script):
        yield Row("full disk", "not tried: no namespace for its mount", "", "", "")
        return
    end = trial.End(int((notes / "code").read_text()), (notes / "said").read_text(), 0)
    left = ", ".join((notes / "left").read_text().split())
    wrong = trial.difference(notes / "run", found.whole(1))
    yield Row("full disk, then room again", f"{end.last}; kept: {left}", str(end.code), "", wrong)
    out = found.fresh("read_only")
    run = shlex.join(trial.command(trial.arguments(out)))
    mount = f"mount --bind {out} {out} && mount -o remount,ro,bind {out}"
    in_namespace(f"{mount} || exit 97; {run} 2> {names['said']}; echo $? > {names['code']}")
    end = trial.End(int((notes / "code").read_text()), (notes / "said").read_text(), 0)
    yield again("read-only output directory, then writable", out, found, end.last, end.code)


def others(found: Base, _: int) -> Iterator[Row]:
    """Two hosts with other code, or with another configuration."""
    other, package = found.root / "other", Path(infalign_jax.__file__).parent
    trial.copied(package, other / package.name)
    with open(other / package.name / "__init__.py", "a") as file:
        file.write("# of another revision\n")
    first = f"import os; os.chdir({str(other)!r})"  # where the child that runs finds its code
    tries: dict[str, tuple[list[str], str]] = {
        "other code on host 1": ([], first),
        "another configuration on host 1": (["--set=seed=1"], ""),
    }
    for drill, (settings, first) in tries.items():
        out = found.fresh("others")
        both = trial.start(out, hosts=2, first=["", first], own=[[], settings])
        ends = [trial.ended(process) for process in both]
        codes = ", ".join(str(end.code) for end in ends)
        yield again(drill, out, found, ends[1].last, codes, 2)


def numbers(found: Base, _: int) -> Iterator[Row]:
    """A loss that is not finite."""
    absurd = [f"--set={x}" for x in ("align.optimiser.learning_rate=1e38", "checkpoint_every=1")]
    out = found.fresh("numbers")
    [end] = trial.finish(out, *absurd)
    left = ", ".join(path.name for path in (out / "stages").glob("align-*")) or "no result"
    yield Row("learning rate 1e38", f"{end.last}; kept: {left}", str(end.code), "", "")


def signals(found: Base, _: int) -> Iterator[Row]:
    """SIGTERM once and twice, to one host and to one of two."""
    for hosts, count in ((1, 1), (1, 2), (2, 1)):
        out = found.fresh("signals")
        processes = trial.start(out, hosts=hosts)
        trial.wait_until(lambda: trial.last_step(out) >= 33, processes)  # noqa: B023
        for _ in range(count):
            processes[-1].send_signal(signal.SIGTERM)
            time.sleep(0.02)
        ends = [trial.ended(process) for process in processes]
        codes = ", ".join(str(end.code) for end in ends)
        happened = f"{max(end.seconds for end in ends):.1f} s: {ends[-1].last}"
        whom = "one host" if hosts == 1 else "one of two hosts"
        drill = f"SIGTERM {'twice' if count == 2 else 'once'} to {whom}"
        yield again(drill, out, found, happened, codes, hosts)


DRILLS = {
    drill.__name__: drill
    for drill in (
        signals,
        kill_while_saving,
        damage,
        disk,
        disk_of_one,
        others,
        numbers,
        kill_hosts,
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs", "drills"))
    parser.add_argument("--only", nargs="+", choices=DRILLS, default=list(DRILLS))
    parser.add_argument("--kills", type=int, default=20)
    options = parser.parse_args()
    root = options.out.absolute()
    root.mkdir(parents=True, exist_ok=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(root / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    found = base(root)
    print(
        "| drill | what happened | exit code | steps lost | wrong results |\n|---|---|---|---|---|"
    )
    for name in options.only:
        for row in DRILLS[name](found, options.kills):
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
