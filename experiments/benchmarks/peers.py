"""The race with the peers: the same work by TRL, HF `generate`, Tunix and this library, in turn.

Command:   python -m venv peers/trl
           peers/trl/bin/pip install trl==1.16.0 transformers==5.23.0 torch==2.13.0 (for the CPU)
           peers/trl/bin/pip install datasets==5.2.0 tokenizers==0.23.3 accelerate==1.15.0
           python -m venv peers/tunix
           peers/tunix/bin/pip install google-tunix==0.1.7 jax==0.10.2
           python experiments/benchmarks/peers.py --venvs peers
           (with --try: each side's settings beside one another instead)
Cost:      40 minutes on two idle cores for the rows of the README
Expected:  experiments/results/benchmarks/peers.md: ratios above 1 where this library is faster

Same architecture and number of parameters, from scratch; same vocabulary and prompts; every
response exactly T tokens; same number of updates; KL on; float32; the same two threads. A row is
rounds of two processes, each in its own environment, one straight after the other, in an order that
changes from round to round. A process says seconds a step after warm-up (compilation), from one
step's end to the next one's: drawing, log π_ref, reward, update. Its median counts, and a round's
ratio is the peer's over ours. Before each process the machine is waited for until it is idle, and a
round in which others used more than a twentieth of a core is thrown away and run again: PyTorch
falls tenfold behind where something else has one of its cores. Every process keeps freed memory,
which glibc by default does not (`KEEP_FREED_MEMORY`). Linux only, for /proc/stat.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import load
from racers.work import Work

ROOT, RACERS = Path(__file__).parents[2], Path(__file__).parent / "racers"
THROWN = 20  # rounds in a row, after which the machine is too busy to race on
SIDES = ("ours", "peer")
LARGE = {"width": 256, "layers": 6, "mlp_width": 768}
ON_GPU = {
    "device": "gpu", "compute": "bfloat16", "prompt": 256, "response": 256, "prompts": 16,
    "vocab": 32_000, "width": 768, "layers": 12, "heads": 12, "kv_heads": 4, "mlp_width": 3072,
}  # fmt: skip
COMPILED = {"prefill": "repeated", "cache": "static", "compile": True}

REWARDS = (
    "Rewards, the same on both sides: a model of the policy's size with random weights, or a "
    "function, the share of even tokens, counted in Python."
)

# glibc's settings of `runtime.allocator.keep_freed_memory`, for every racer: they speed the peers
# up too (TRL by a third), who leave them to their users.
KEEP_FREED_MEMORY = {
    "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40),
}  # fmt: skip

Answer = dict[str, Any]


@dataclass(frozen=True)
class Race:
    """One row: a peer, the script that runs it, the environment it needs, and the work."""

    peer: str
    racer: str
    venv: str
    work: Work
    settings: dict[str, Any] = field(default_factory=dict)  # of the peer, over its defaults


RACES = {
    "grpo-1m": Race("TRL GRPO", "trl", "trl", Work("grpo")),
    "grpo-1m-function": Race("TRL GRPO", "trl", "trl", Work("grpo", reward="function")),
    "grpo-5m": Race("TRL GRPO", "trl", "trl", Work("grpo", **LARGE)),
    "grpo-1m-long": Race("TRL GRPO", "trl", "trl", Work("grpo", prompt=256)),
    "rloo-1m": Race("TRL RLOO", "trl", "trl", Work("rloo")),
    # TRL's Online-DPO draws two responses a prompt: as many in all from more prompts.
    "online-dpo-1m": Race(
        "TRL Online-DPO", "trl", "trl", Work("online_dpo", prompts=32, responses=2)
    ),
    "tunix-1m": Race("Tunix GRPO", "tunix", "tunix", Work("grpo", reward="function")),
    "tunix-5m": Race("Tunix GRPO", "tunix", "tunix", Work("grpo", reward="function", **LARGE)),
    "sample-1m-k8": Race("HF generate", "hf", "trl", Work("sample")),
    "sample-1m-k32": Race("HF generate", "hf", "trl", Work("sample", responses=32)),
    "gpu-grpo-125m": Race("TRL GRPO", "trl", "trl", Work("grpo", **ON_GPU)),
    "gpu-sample-125m": Race("HF generate", "hf", "trl", Work("sample", **ON_GPU)),
    "gpu-sample-125m-compiled": Race(
        "HF generate", "hf", "trl", Work("sample", **ON_GPU), COMPILED
    ),
}

ON_CPU = [name for name, race in RACES.items() if race.work.device == "cpu"]

CANDIDATES: dict[str, list[dict[str, Any]]] = {  # what --try compares, beside the defaults
    "our": [{"unroll": 1}],
    "trl": [
        {"attention": "eager"}, {"cache": "static"}, {"torch_compile": True}, {"micro_batch": 16},
    ],
    "hf": [
        {"attention": "eager"}, {"prefill": "repeated"}, {"prefill": "repeated", "cache": "static"},
        COMPILED,
    ],
    "tunix": [
        {"devices": 2}, {"max_inflight_computations": 1},
        {
            "mini_batch_size": 8, "train_micro_batch_size": 2,
            "compute_logps_micro_batch_size": 2, "rollout_micro_batch_size": 8,
        },
    ],
}  # fmt: skip


def ask(python: str, racer: str, work: Work) -> tuple[Answer, float]:
    """A racer's answer, and how many cores others used meanwhile."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
    kept |= KEEP_FREED_MEMORY
    # torch.compile's own processes would count as others.
    env = kept | {"OMP_NUM_THREADS": str(work.threads), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    env |= {"PYTHONPATH": str(ROOT)} if racer == "our" else {}
    command = [python, str(RACERS / f"{racer}_racer.py"), json.dumps(asdict(work))]
    begun, before, own = time.monotonic(), load.now()[0], load.used()
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    others = load.by_others(load.now()[0] - before, load.used() - own, time.monotonic() - begun)
    if done.returncode != 0:
        sys.exit(f"{racer}_racer.py: {(done.stderr.strip() or 'no error').splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1]), others


def python_of(options: argparse.Namespace, race: Race, side: str) -> str:
    return sys.executable if side == "ours" else str(options.venvs / race.venv / "bin" / "python")


def one_side(options: argparse.Namespace, race: Race, side: str) -> tuple[Answer, bool]:
    """A side's answer, and whether others disturbed it."""
    if options.load_check:
        load.wait_until_idle()
    racer = "our" if side == "ours" else race.racer
    own = {} if side == "ours" else race.settings
    settings = own | options.settings.get(racer, {})
    work = replace(race.work, **options.work, settings=settings)
    answer, others = ask(python_of(options, race, side), racer, work)
    print(f"  {side}: {statistics.median(answer['seconds']):.3f} s, others {others:.2f} cores")
    return answer, load.too_loaded(others, options.load_check)


def run(options: argparse.Namespace, race: Race) -> tuple[list[dict[str, Answer]], int]:
    """The undisturbed rounds, and how many others were thrown away."""
    rounds: list[dict[str, Answer]] = []
    thrown = in_a_row = 0
    while len(rounds) < options.rounds:
        answers, disturbed = {}, False
        for side in SIDES if len(rounds) % 2 == 0 else SIDES[::-1]:
            answers[side], disturbed = one_side(options, race, side)
            if disturbed:
                break
        thrown, in_a_row = thrown + disturbed, (in_a_row + 1) * disturbed
        if in_a_row > THROWN:
            sys.exit(
                f"machine: expected a round undisturbed, got {in_a_row} thrown away in a row; "
                "stop what else runs, or give --no-load-check"
            )
        if not disturbed:
            rounds.append(answers)
    return rounds, thrown


def summary(rounds: Sequence[dict[str, Answer]]) -> Answer:
    """Of rounds with each side's answer: medians, and the ratios peer/ours with their spread."""
    found: Answer = {}
    for side in SIDES:
        of_rounds = [statistics.median(answers[side]["seconds"]) for answers in rounds]
        middle, last = statistics.median(of_rounds), rounds[-1][side]
        found[side] = {"seconds": middle, "tokens_per_second": last["tokens"] / middle}
        found[side] |= {"rounds": of_rounds} | {
            name: last[name] for name in ("parameters", "versions", "settings")
        }
    pairs = zip(found["peer"]["rounds"], found["ours"]["rounds"], strict=True)
    ratios = [peer / ours for peer, ours in pairs]
    spread = {"least": min(ratios), "ratio": statistics.median(ratios), "most": max(ratios)}
    return found | spread | {"ratios": ratios}


def described(work: Work) -> str:
    what = "sampling" if work.algorithm == "sample" else f"RL step, reward {work.reward}"
    return (
        f"{what}, {work.parameters / 1e6:.2f}M, P={work.prompt}, T={work.response}, "
        f"{work.prompts} × {work.responses}"
    )


def markdown(rows: Sequence[Answer], machine: str) -> str:
    """The table, then what each side ran, in Markdown."""
    header = ["row", "peer", "work", "peer, s", "ours, s", "peer/ours (least to most)"]
    header += ["peer, tokens/s", "ours, tokens/s", "rounds", "thrown away"]
    lines = ["# Peers", "", machine, "", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    notes: dict[str, list[str]] = {}  # what ran -> the rows it ran in
    for row in rows:
        cells = [row["name"], row["against"], row["work"]]
        if "skipped" in row:
            lines.append(f"| {' | '.join([*cells, row['skipped']])} |" + " |" * 6)
            continue
        sides = [row[side] for side in ("peer", "ours")]
        cells += [f"{side['seconds']:.3f}" for side in sides]
        cells.append(f"**{row['ratio']:.2f}** ({row['least']:.2f} to {row['most']:.2f})")
        cells += [f"{side['tokens_per_second']:,.0f}" for side in sides]
        thrown = str(row["thrown_away"]) if row["load_checked"] else "LOAD NOT CHECKED"
        lines.append(f"| {' | '.join([*cells, str(len(row['ratios'])), thrown])} |")
        for name, side in zip((row["against"], "ours"), sides, strict=True):
            versions = ", ".join(f"{package} {v}" for package, v in side["versions"].items())
            size = f"{side['parameters']:,} parameters"
            note = f"{name}: {versions}; {size}; {side['settings']}"
            notes.setdefault(note, []).append(row["name"])
    ran = [f"- {', '.join(names)}: {note}" for note, names in notes.items()]
    return "\n".join([*lines, "", REWARDS, "", "## What ran", "", *ran, ""])


def described_machine(threads: int) -> str:
    about = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":")[1].strip() for line in about if line.startswith("model name")]
    name = models[0] if models else platform.machine()
    return f"{name}, {os.cpu_count()} cores, {threads} threads a process"


def race_all(options: argparse.Namespace) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    threads, rows = len(os.sched_getaffinity(0)), []
    for name in options.rows:
        race = RACES[name]
        work = described(replace(race.work, **options.work))
        row: Answer = {"name": name, "against": race.peer, "work": work}
        print(f"{name}: {race.peer}, {work}", flush=True)
        if Path(python_of(options, race, "peer")).exists():
            rounds, thrown = run(options, race)
            row |= summary(rounds) | {"thrown_away": thrown, "load_checked": options.load_check}
        else:
            row["skipped"] = f"skipped: no environment {race.venv}"
        rows.append(row)
        machine = described_machine(threads)
        stored = {"machine": machine, "python": platform.python_version(), "rows": rows}
        (options.out / "peers.json").write_text(json.dumps(stored, indent=1) + "\n")
        (options.out / "peers.md").write_text(markdown(rows, machine))
    print(markdown(rows, machine))


def try_settings(options: argparse.Namespace) -> None:
    """Seconds of each side of each row by its settings, one undisturbed process each."""
    for name in options.rows:
        race = RACES[name]
        for side in SIDES:
            racer = "our" if side == "ours" else race.racer
            for settings in [{}, *CANDIDATES[racer]]:
                print(f"{name}, {racer}, {settings or 'defaults'}", flush=True)
                options.settings = {racer: settings}
                while one_side(options, race, side)[1]:
                    print("  thrown away")


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--venvs", type=Path, default=Path("peers"), help="holds trl and tunix")
    parser.add_argument("--out", type=Path, default=ROOT / "experiments/results/benchmarks")
    parser.add_argument("--rows", nargs="+", choices=RACES, default=ON_CPU)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--try", action="store_true", dest="trial", help="compare settings instead")
    parser.add_argument("--settings", type=json.loads, default={}, help='{"hf": {"cache": …}}')
    parser.add_argument("--work", type=json.loads, default={}, help="fields of Work to change")
    parser.add_argument("--no-load-check", action="store_false", dest="load_check")
    return parser.parse_args(arguments)


def main() -> None:
    options = parsed(sys.argv[1:])
    threads = options.work.get("threads", Work("grpo").threads)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])  # XLA's threads are as many
    (try_settings if options.trial else race_all)(options)


if __name__ == "__main__":
    main()
