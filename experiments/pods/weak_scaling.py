"""Weak scaling on paper: an RL step on 8 to 4,096 chips, a batch that grows with them, compiled.

Command:   python experiments/pods/weak_scaling.py
Cost:      an hour on two cores; each size is stored once it is done, and not done again
Expected:  experiments/results/plans/weak_scaling.md: what a chip receives, by collective and axis,
           and the phase whose least time grows first

No TPU is needed: libtpu compiles from shapes (pip install "infalign-jax[tpu-plan]"). Beyond 256
chips of v5e there are several slices, joined along `replica` by the data centre's network.
"""

import argparse
import json
import os
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

from plans import with_reading

from infalign_jax import config as configs
from infalign_jax.commands import plan_rows
from infalign_jax.commands.plan_text import scaled
from infalign_jax.phases import LOG_PROBS, SAMPLER, SCORES, UPDATE
from infalign_jax.runtime import files, slices, topology

ROOT = Path(__file__).resolve().parents[2]
SIZES = ("v5e-8", "v5e-16", "v5e-32", "v5e-64", "v5e-128", "v5e-256")
SEVERAL = ("2xv5e-256", "4xv5e-256", "8xv5e-256", "16xv5e-256")
PHASES = (SAMPLER, LOG_PROBS, SCORES, UPDATE)
GROWN = 1.1  # over the smallest size: a phase that no longer scales

Rows = dict[str, dict[str, Any]]  # by phase, as `infalign plan --json` has them


def planned(experiment: Any, name: str, prompts: int) -> Rows:
    """The phases of an RL step on slices of that name, with so many prompts a chip."""
    found = slices.named(name)
    assert found is not None  # those above are all names
    chips = found.mesh.size
    align = replace(experiment.align, batch_size=prompts * chips)
    calibrate = replace(experiment.calibrate, prompts=max(8192, prompts * chips))
    own = replace(experiment, align=align, calibrate=calibrate, mesh=found.mesh)
    return plan_rows.planned(own, topology.described(name), found.mesh, PHASES).rows


def least(row: dict[str, Any]) -> float:
    return max(row["seconds_at_least"].values())


def stopped(stored: dict[str, Rows]) -> dict[str, str]:
    """By phase: the first size at which a call takes longer than it may."""
    first, *_ = stored.values()
    found: dict[str, str] = {}
    for name, rows in stored.items():
        for phase in PHASES:
            if least(rows[phase]) > GROWN * least(first[phase]):
                found.setdefault(phase, name)
    return found


def times(stored: dict[str, Rows]) -> list[str]:
    header = ["slices", "chips", *(f"{phase}, bound" for phase in PHASES), "memory of the update"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for name, rows in stored.items():
        found = slices.named(name)
        cells = [name, f"{found.mesh.size:,}" if found else ""]
        cells += [f"{scaled(least(rows[p]), 's')}, {rows[p]['bound']}" for p in PHASES]
        cells += [scaled(rows[UPDATE]["memory_bytes"] + rows[UPDATE]["held_bytes"], "B")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def received(stored: dict[str, Rows]) -> list[str]:
    """What a chip receives in one call, by phase, collective and axes."""
    amounts: dict[tuple[str, str, str], dict[str, float]] = {}
    for name, rows in stored.items():
        for phase in PHASES:
            for each in rows[phase]["collectives"]:
                key = phase, each["kind"], " × ".join(each["axes"])
                amounts.setdefault(key, {})[name] = each["bytes"]
    lines = [f"| phase | collective | over | {' | '.join(stored)} |"]
    lines += ["|---" * (3 + len(stored)) + "|"]
    for key, own in sorted(amounts.items(), key=lambda item: PHASES.index(item[0][0])):
        if max(own.values()) >= 1e6:
            cells = [scaled(own[name], "B") if name in own else "" for name in stored]
            lines.append(f"| {' | '.join([*key, *cells])} |")
    return lines


def markdown(stored: dict[str, Rows], about: str) -> str:
    ends = [f"- {phase}: from {name} on" for phase, name in stopped(stored).items()]
    return "\n".join(
        [
            "# Weak scaling on paper", "", "```", "python experiments/pods/weak_scaling.py", "```",
            "", about, "", "## Least seconds of a call", "", *times(stored), "",
            f"## Phases that take over {GROWN} times as long as on the fewest chips", "",
            *(ends or ["- none"]), "", "## What a chip receives in a call", "",
            "Collectives of a megabyte or more.", "", *received(stored), "",
        ]
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--experiment", type=Path, default=ROOT / "experiments/pods/hh_1b.py")
    parser.add_argument("--sizes", nargs="+", default=[*SIZES, *SEVERAL])
    parser.add_argument("--prompts", type=int, default=2, help="of a chip")
    parser.add_argument("--out", type=Path, default=ROOT / "experiments/results/plans")
    chosen = parser.parse_args()
    kept = chosen.out / "weak_scaling.json"
    stored = json.loads(kept.read_text()) if kept.exists() else {}
    experiment = configs.load(chosen.experiment)
    for name in chosen.sizes:
        if name not in stored:
            stored[name] = planned(experiment, name, chosen.prompts)
            files.write_text(kept, json.dumps(stored, indent=1) + "\n")
            print(name, file=sys.stderr, flush=True)
    stored = {name: stored[name] for name in chosen.sizes}
    tokens = experiment.prompt_length, experiment.sampling.length
    each = experiment.align.responses
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "libtpu"))
    about = (
        f"{experiment.name}, {chosen.prompts} prompts a chip, {each} responses each, prompts of "
        f"{tokens[0]} tokens and responses of {tokens[1]}; compiled ({versions}), not run."
    )
    page = chosen.out / "weak_scaling.md"
    files.write_text(page, with_reading(page, markdown(stored, about)))


if __name__ == "__main__":
    main()
