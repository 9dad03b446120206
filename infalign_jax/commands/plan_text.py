"""The tables of `infalign plan`."""

from math import floor, log10
from typing import Any

from infalign_jax.commands.printing import table

UNKNOWN = "–"


def text(result: dict[str, Any]) -> str:
    """A plan for a reader: memory, work and least time of each phase, network, totals, what to do.

    >>> row = {"memory_bytes": 2**30, "held_bytes": 2**29, "fits": None, "model_flops": 8e12,
    ...     "flops": 2e12, "bytes": 3e9, "collectives": [], "uncounted_loops": 0,
    ...     "seconds_at_least": None, "bound": None, "compile_seconds": 2.0}
    >>> result = {"experiment": "quick", "topology": "cpu:4", "chips": 4, "chip": None,
    ...     "compiled": True, "reward_parameters": 1000,
    ...     "mesh": {"data": 4, "fsdp": 1, "tensor": 1}, "versions": {"jax": "0.10"},
    ...     "model": {"compute": "float32"}, "parameters": 1000, "phases": {"RL update": row},
    ...     "step": None, "experiment_at_least": None, "first_too_large": None}
    >>> for line in text(result).splitlines()[3:]:
    ...     print(line)
    phase       memory  held beside  model FLOPs    moved  at least  bound  compile
    RL update  1.07 GB       537 MB       8.00 T  3.00 GB         –      –      2 s
    """
    rows = [_row(name, row) for name, row in result["phases"].items()]
    sizes = ",".join(f"{axis}={size}" for axis, size in result["mesh"].items() if size > 1)
    parts = ["\n".join(about(result, sizes or "data=1")), table(HEADER, rows)]
    if network := _network(result["phases"]):
        parts.append(table(["collective", "over", "phase", "calls", "received"], network))
    for totals in (_step, _experiment, _advice):
        parts += totals(result)
    return "\n\n".join(parts)


HEADER = ["phase", "memory", "held beside", "model FLOPs", "moved", "at least", "bound", "compile"]


def scaled(value: float, unit: str) -> str:
    """A number to three digits, with its unit's prefix.

    >>> scaled(2.5e12, "FLOP"), scaled(0.0, "B"), scaled(0.00042, "s")
    ('2.50 TFLOP', '0 B', '420 µs')
    """
    if value == 0:
        return f"0 {unit}"
    power = min(max(floor(log10(abs(value)) / 3), -4), 5)
    short = value / 1000.0**power
    digits = max(2 - floor(log10(abs(short))), 0)
    return f"{short:.{digits}f} {'pnµm kMGTP'[power + 4].strip()}{unit}"


def seconds(value: float) -> str:
    """Seconds to three digits, whole ones from a thousand on.

    >>> seconds(0.0123), seconds(12345.6)
    ('12.3 ms', '12,346 s')
    """
    return f"{value:,.0f} s" if value >= 1000 else scaled(value, "s")


def about(result: dict[str, Any], mesh: str) -> list[str]:
    """What was planned and how, in two lines.

    >>> result = {"experiment": "quick", "topology": "h100:2", "chips": 2, "compiled": False,
    ...     "chip": {"memory": 2e9}, "versions": {"jax": "0.10"}, "model": {"compute": "float32"},
    ...     "parameters": 10, "reward_parameters": 5}
    >>> about(result, "data=2")[0]
    'quick on h100:2, by arithmetic, nothing compiled: 2 chips of 2.00 GB, data=2; 10 parameters, \
reward 5, float32; jax 0.10'
    """
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    own = result["reward_parameters"]
    reward = f", reward {own:,}" if own != result["parameters"] else ""
    model = f"{result['parameters']:,} parameters{reward}, {result['model']['compute']}"
    how = "compiled and not run" if result["compiled"] else "by arithmetic, nothing compiled"
    chip = result["chip"]
    memory = f" of {scaled(chip['memory'], 'B')}" if chip else ""
    return [
        f"{result['experiment']} on {result['topology']}, {how}: {result['chips']} chips{memory}, "
        f"{mesh}; {model}; {versions}",
        f"{'' if result['compiled'] else 'Memory is estimated, all else the least there can be. '}"
        "Memory, bytes moved and received are a chip's; responses count at their full length.",
    ]


def _row(name: str, row: dict[str, Any]) -> list[str]:
    least = row.get("seconds_at_least")
    return [
        name,
        scaled(row["memory_bytes"], "B") if row["memory_bytes"] else "too much",
        scaled(row["held_bytes"], "B"),
        scaled(row["model_flops"], ""),
        scaled(row["bytes"], "B") if "bytes" in row else UNKNOWN,
        seconds(max(least.values())) if least else UNKNOWN,
        row.get("bound") or UNKNOWN,
        UNKNOWN if row["compile_seconds"] is None else f"{row['compile_seconds']:.0f} s",
    ]


def _network(phases: dict[str, Any]) -> list[list[str]]:
    return [
        [
            each["kind"], " × ".join(each["axes"]) or "one device", name,
            f"{each['calls']:,.0f}", scaled(each["bytes"], "B"),
        ]
        for name, row in phases.items()
        for each in row.get("collectives", [])
    ]  # fmt: skip


def _step(result: dict[str, Any]) -> list[str]:
    step = result["step"]
    if step is None:
        return []
    return [
        f"An RL step takes at least {seconds(step['seconds'])}: at most "
        f"{step['tokens_per_second_per_chip']:,.0f} response tokens/s a chip, model FLOPs at "
        f"{100 * step['model_flop_utilisation']:.1f} % of the peak."
    ]


def _experiment(result: dict[str, Any]) -> list[str]:
    whole = result["experiment_at_least"]
    if whole is None:
        return []
    stages = [
        [stage["stage"], f"{stage['steps']:,}", seconds(stage["seconds"])]
        for stage in whole["stages"]
    ]
    total = f"In all at least {whole['chip_hours']:.3g} chip-hours, without compilation and data."
    return [table(["stage", "steps", "at least"], stages), total]


def _advice(result: dict[str, Any]) -> list[str]:
    large = result["first_too_large"]
    if large is None:
        return []
    change = large["change"]
    if change is None:
        return [
            f"{large['phase']} does not fit, and no smaller batch or other mesh helps: take a "
            "larger topology."
        ]
    how = "compiled" if change["compiled"] else "estimated"
    return [
        f"{large['phase']} does not fit; the smallest change with which it would: "
        f"{' '.join('--set ' + part for part in change['set'].split(','))} "
        f"({scaled(change['bytes'], 'B')} a chip, {how})."
    ]
