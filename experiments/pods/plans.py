"""Plans of the experiments of pod size, as one table.

Command:   python experiments/pods/plans.py
Cost:      an hour on two cores; each plan is stored once it is done, and not made again
Expected:  experiments/results/plans/README.md: 1B on v5e-64, 8B on v5p-128 and 27B on v6e-256
           fit, 27B on eight H100 does not

For TPUs compiled without one (pip install "infalign-jax[tpu-plan]"), for GPUs by arithmetic alone.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from infalign_jax import cli
from infalign_jax.commands.plan_text import scaled
from infalign_jax.runtime import files

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "experiments/results/plans"
READING = "\n## What it says\n"  # by hand, and kept
GPU = ("model.attention=cudnn", "reward_model.attention=cudnn")


class Plan(NamedTuple):
    """What `infalign plan` is asked."""

    experiment: str
    topology: str
    mesh: str
    changes: tuple[str, ...] = ()

    @property
    def stored(self) -> Path:
        return OUT / f"{self.experiment}-{self.topology.replace(':', '-')}.json"

    @property
    def command(self) -> list[str]:
        path = f"experiments/pods/{self.experiment}.py"
        changes = [word for change in self.changes for word in ("--set", change)]
        return ["plan", path, "--topology", self.topology, "--mesh", self.mesh, *changes]


PLANS = (
    Plan("hh_1b", "v5e-64", "v5e-64"),
    Plan("hh_8b", "v5p-128", "v5p-128"),
    Plan("hh_27b", "v6e-256", "fsdp=32,tensor=8"),
    Plan("hh_1b", "h100:8", "fsdp=8", GPU),
    Plan("hh_8b", "h100:8", "fsdp=8", GPU),
    Plan("hh_27b", "h100:8", "fsdp=8", GPU),
)
HEADER = (
    "experiment",
    "on",
    "mesh",
    "most memory of a chip",
    "of",
    "RL step at least",
    "longest phase",
)
HEADER += ("response tokens/s a chip", "model FLOPs, % of the peak", "chip-hours at least", "how")


def cells(plan: Plan, found: dict[str, Any]) -> list[str]:
    """One row of the table."""
    needed = {
        name: row["memory_bytes"] + row["held_bytes"] for name, row in found["phases"].items()
    }
    most = max(needed, key=lambda name: needed[name])
    told = [f"{scaled(needed[most], 'B')} ({most})", scaled(found["chip"]["memory"], "B")]
    how = "compiled" if found["compiled"] else "by arithmetic"
    about = [plan.experiment, plan.topology, plan.mesh, *told]
    if large := found["first_too_large"]:
        change = large["change"]["set"] if large["change"] else "none found"
        how += f"; {large['phase']} does not fit; smallest change: {change}"
    if found["step"] is None:
        return [*about, *[""] * 5, how]
    step, whole = found["step"], found["experiment_at_least"]
    longest, bound = _longest(found)
    return [
        *about, scaled(step["seconds"], "s"), f"{longest}, {bound}",
        f"{step['tokens_per_second_per_chip']:,.0f}",
        f"{100 * step['model_flop_utilisation']:.0f}", f"{whole['chip_hours']:,.1f}", how,
    ]  # fmt: skip


def _longest(found: dict[str, Any]) -> tuple[str, str]:
    """The phase of an RL step that takes longest, and what binds it."""
    names = ("sampler", "log-probabilities", "rewards", "RL update")
    least = {name: max(found["phases"][name]["seconds_at_least"].values()) for name in names}
    longest = max(least, key=lambda name: least[name])
    return longest, found["phases"][longest]["bound"]


def markdown(rows: dict[Plan, dict[str, Any]]) -> str:
    """The table, and each plan's command."""
    lines = [f"| {' | '.join(HEADER)} |", "|---" * len(HEADER) + "|"]
    lines += [f"| {' | '.join(cells(plan, found))} |" for plan, found in rows.items()]
    compilers = {
        ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        for found in rows.values()
        if found["compiled"]
    }
    commands = [f"infalign {' '.join(plan.command)}" for plan in rows]
    return "\n".join(
        [
            "# Plans of pod size", "", "```", "python experiments/pods/plans.py", "```", "",
            f"TPU: compiled by {' and '.join(sorted(compilers)) or 'none'}, nothing run. GPU: no "
            "compiler is at hand; memory is estimated, all else the least there can be. Responses "
            "count at their full length. [Weak scaling](weak_scaling.md).", "", *lines, "",
            "The rows, in turn:", "", "```", *commands, "```", "",
        ]
    )  # fmt: skip


def with_reading(path: Path, text: str) -> str:
    """A page made anew, with what somebody wrote of it under its last heading before."""
    before = path.read_text() if path.exists() else ""
    return text + "".join(before.partition(READING)[1:])


def main() -> None:
    rows = {}
    for plan in PLANS:
        if not plan.stored.exists():
            cli.main([*plan.command, "--json", str(plan.stored)])
        rows[plan] = json.loads(plan.stored.read_text())
    files.write_text(OUT / "README.md", with_reading(OUT / "README.md", markdown(rows)))


if __name__ == "__main__":
    main()
