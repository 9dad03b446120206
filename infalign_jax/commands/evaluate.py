"""`infalign evaluate`: win rates of scored policies over a scored reference, with intervals.

As JSON: ``prompts``, ``responses`` (a prompt, by file: ``policy``, ``reference``, ``against``),
``judge`` (whether all files have one), and ``rows``, each of ``procedure``,
``reference_procedure``, ``by`` ("reward" or "judge": who compares; the reward always selects),
``policy``, ``against`` and ``difference`` (the last two null without a third file), each of
``mean``, ``standard_error`` and ``interval`` (95 %), and ``bias`` (a bound on what too few samples
move ``policy`` by, 0 but for best of Poisson); win rates are shares.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from infalign_jax import evaluation, notation
from infalign_jax.commands.printing import interval, plus_minus, points, rate, table
from infalign_jax.evaluation import WinRate
from infalign_jax.reward_files import Rewards

Files = Mapping[str, tuple[str, Rewards]]  # "policy", "reference", "against" -> name, rewards


def measure(
    files: Files, procedures: Sequence[str], *, reference_procedure: str | None = None
) -> dict[str, Any]:
    """Win rates on the policy's prompts under each procedure, as the module describes.

    ``files`` has "policy", "reference" and maybe "against", each a file's name, for messages, and
    its rewards. Prompts are matched by their text, whatever their order. Where one file holds
    single-precision numbers, all are rounded to these: or equal rewards would differ.

    Raises ValueError on unknown names, a prompt that one of the files lacks, and fewer responses
    than a procedure takes.

    >>> policy = Rewards(("a", "b"), np.array([[2.0, 3.0], [1.0, 1.5]]), None)
    >>> reference = Rewards(("b", "a"), np.array([[1.0, 2.0], [0.0, 1.0]]), None)
    >>> files = {"policy": ("p.csv", policy), "reference": ("r.csv", reference)}
    >>> measure(files, ["standard"])["rows"][0]["policy"]["mean"]
    0.6875
    """
    for procedure in procedures:
        _check_counts(files, procedure, reference_procedure)
    aligned = _aligned(files)
    judge = all(rewards.judge is not None for rewards in aligned.values())
    rows = []
    for procedure in dict.fromkeys(procedures):
        for by in ("reward", "judge")[: 1 + judge]:
            rates = {
                name: _win_rate(rewards, aligned["reference"], procedure, reference_procedure, by)
                for name, rewards in aligned.items()
                if name != "reference"
            }
            rows.append(_row(rates, files, procedure, reference_procedure or procedure, by))
    return {
        "prompts": len(aligned["policy"].prompts),
        "responses": {name: rewards.rewards.shape[1] for name, rewards in aligned.items()},
        "judge": judge,
        "rows": rows,
    }


def _row(
    rates: Mapping[str, WinRate], files: Files, procedure: str, other: str, by: str
) -> dict[str, Any]:
    policy, against = rates["policy"], rates.get("against")
    counts = (files[name][1].rewards.shape[1] for name in ("policy", "reference"))
    biases = (
        notation.procedure(n).bias(k) for n, k in zip((procedure, other), counts, strict=True)
    )
    difference = against and evaluation.paired_difference(policy, against)
    return {
        "procedure": procedure,
        "reference_procedure": other,
        "by": by,
        "policy": rate(policy),
        "against": against and rate(against),
        "difference": difference and rate(difference),
        "bias": float(sum(biases)),
    }


def _win_rate(
    policy: Rewards, reference: Rewards, procedure: str, other: str | None, by: str
) -> WinRate:
    judged = by == "judge"
    return evaluation.win_rate(
        policy.rewards,
        reference.rewards,
        notation.procedure(procedure),
        reference_procedure=None if other is None else notation.procedure(other),
        policy_judge=policy.judge if judged else None,
        reference_judge=reference.judge if judged else None,
    )


def _check_counts(files: Files, procedure: str, reference_procedure: str | None) -> None:
    for role, (name, rewards) in files.items():
        served = reference_procedure if role == "reference" and reference_procedure else procedure
        needed, there = notation.samples_needed(served), rewards.rewards.shape[1]
        if there < needed:
            raise ValueError(
                f"{name}: expected at least {needed} responses a prompt for {served}, got {there}: "
                "sample more, or ask for a procedure of fewer"
            )


def _aligned(files: Files) -> dict[str, Rewards]:
    """Each file's rewards in the order of the policy's prompts, in one precision."""
    prompts = files["policy"][1].prompts
    single = {
        kind: any(_is_single(values) for values in _of_kind(files, kind))
        for kind in ("rewards", "judge")
    }

    def ordered(values: np.ndarray | None, rows: list[int], kind: str) -> np.ndarray | None:
        if values is None or not single[kind]:
            return None if values is None else values[rows]
        return values[rows].astype(np.float32).astype(np.float64)

    found = {}
    for role, (name, rewards) in files.items():
        place = {prompt: row for row, prompt in enumerate(rewards.prompts)}
        _check_same(files["policy"][0], prompts, name, rewards.prompts)
        rows = [place[prompt] for prompt in prompts]
        mine, judge = (
            ordered(rewards.rewards, rows, "rewards"),
            ordered(rewards.judge, rows, "judge"),
        )
        assert mine is not None
        found[role] = Rewards(prompts, mine, judge)
    return found


def _of_kind(files: Files, kind: str) -> list[np.ndarray]:
    found = [getattr(rewards, kind) for _, rewards in files.values()]
    return [values for values in found if values is not None]


def _is_single(values: np.ndarray) -> bool:
    """Whether float32 holds them all."""
    with np.errstate(over="ignore"):
        return bool(np.all(values.astype(np.float32) == values))


def _check_same(name: str, prompts: Sequence[str], other: str, others: Sequence[str]) -> None:
    for lacking, has, lacks in (
        (set(prompts) - set(others), name, other),
        (set(others) - set(prompts), other, name),
    ):
        if lacking:
            first = next(p for p in (*prompts, *others) if p in lacking)
            raise ValueError(
                f"{lacks}: expected the prompts of {has}, got none of {first!r:.60} (it lacks "
                f"{len(lacking)} of them): score responses to these, or leave them out of the other"
            )


def text(result: Mapping[str, Any], files: Files) -> str:
    """What `measure` returned, as a table.

    >>> one = Rewards(("a", "b"), np.array([[2.0, 3.0], [1.0, 1.5]]), None)
    >>> files = {"policy": ("p.csv", one), "reference": ("r.csv", one)}
    >>> print(text(measure(files, ["standard"]), files))
    p.csv over r.csv: 2 prompts, 2 and 2 responses each
    <BLANKLINE>
    procedure      by  win rate %  95 % interval
    standard   reward        50.0   50.0 to 50.0
    """
    counts = " and ".join(str(result["responses"][role]) for role in ("policy", "reference"))
    lines = [
        f"{files['policy'][0]} over {files['reference'][0]}: {result['prompts']} prompts, "
        f"{counts} responses each",
        "",
    ]
    header = ["procedure", "by", "win rate %", "95 % interval"]
    paired = "against" in files
    rows = []
    for row in result["rows"]:
        name, other = row["procedure"], row["reference_procedure"]
        label = name if other == name else f"{name}, reference {other}"
        cells = [
            label,
            row["by"],
            points(row["policy"]["mean"]),
            interval(row["policy"]["interval"]),
        ]
        cells += [plus_minus(row[part]) for part in ("against", "difference") if paired]
        rows.append(cells)
    header += [files["against"][0], "difference"] if paired else []
    lines.append(table(header, rows))
    return "\n".join(lines + _notes(result, files))


def _notes(result: Mapping[str, Any], files: Files) -> list[str]:
    notes = [
        f"{row['procedure']}: too few samples may move the rate by {points(row['bias'], 2)} points"
        for row in result["rows"]
        if row["bias"] > 5e-5 and row["by"] == "reward"
    ]
    without = [name for name, rewards in files.values() if rewards.judge is None]
    if not result["judge"] and len(without) < len(files):
        notes.append(
            f"By the judge nothing can be said: {', '.join(without)} has no judge's rewards"
        )
    if "against" in files:
        notes.append("± is half a 95 % interval; differences are paired, prompt by prompt")
    return notes
