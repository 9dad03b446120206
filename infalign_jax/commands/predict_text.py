"""What `infalign predict` found, to be read."""

from collections.abc import Mapping
from typing import Any

from infalign_jax.commands.predict import MANY_TIES
from infalign_jax.commands.printing import plus_minus, points, table
from infalign_jax.prediction import FEWEST_EFFECTIVE

Found = Mapping[str, Any]


def text(result: Found, name: str) -> str:
    """What `predict.advise` returned, of the file of that name, as tables and sentences.

    >>> import numpy as np
    >>> from infalign_jax.commands.predict import advise
    >>> from infalign_jax.reward_files import Rewards
    >>> drawn = np.random.default_rng(0).normal(size=(2, 32))
    >>> result = advise(Rewards(("a", "b"), drawn, None), "standard", transformations=["log"])
    >>> print(text(result, "x.csv").splitlines()[0])
    x.csv: 2 prompts, 32 reference responses each, no judge
    """
    judge = "with a judge" if result["judge"] else "no judge"
    raw, calibrated = (plus_minus(result["miscalibration"][n]) for n in ("raw", "calibrated"))
    lines = [
        f"{name}: {result['prompts']} prompts, {result['responses']} reference responses each, "
        f"{judge}",
        f"Miscalibration, mean |û − u| in points: {raw} by the raw reward, {calibrated} calibrated",
        "(on halves that û has not seen, whose noise is in both; ± is half a 95 % interval)",
    ]
    if result["tied"] > MANY_TIES:
        lines.append(
            f"{points(result['tied'])} % of a prompt's pairs tie: theory, which knows no ties, "
            "promises too much; go by the columns `KL` and `by reward`, and see levels.py"
        )
    for found in result["kls"]:
        lines += ["", *_kl(result, found)]
    return "\n".join(lines)


def _kl(result: Found, found: Found) -> list[str]:
    k, rows = result["responses"], found["rows"]
    first = rows[0]["transformation"]
    header = ["Φ", "β", "KL", "theory", f"at K = {k}", "by reward"]
    header += ["by judge"] * result["judge"] + [f"over {first}", "effective samples"]
    cells = []
    for row in rows:
        cell = [row["transformation"], f"{row['beta']:.4g}", f"{row['kl']:.3f}"]
        cell += [points(row["theory"], 2), points(row["at_k"], 2), plus_minus(row["by_reward"])]
        cell += [plus_minus(row["by_judge"])] if result["judge"] else []
        ahead = "" if row is rows[0] else plus_minus(row["ahead"])
        mark = "! " if row["warning"] else ""
        cells.append([*cell, ahead, f"{mark}{row['effective_sample_size']:.1f}"])
    title = f"{result['procedure']}, reference {result['reference_procedure']}"
    lines = [f"{title}, at KL {found['kl']:g}: win rates in %", "", table(header, cells)]
    if any(row["warning"] for row in rows):
        lines.append(
            f"! fewer than {FEWEST_EFFECTIVE:g}: what is predicted by reward and judge may be off "
            "by 2 points and more; sample more responses a prompt, or ask for less KL"
        )
    lines += [
        f"{r['transformation']}: the optimum has not converged; do not trust this row"
        for r in rows
        if not r["converged"]
    ]
    return [*lines, "", *_recommended(result, found)]


def _recommended(result: Found, found: Found) -> list[str]:
    k, chosen = result["responses"], found["recommended"]
    why = f"best by theory at K = {k}" if result["tied"] <= MANY_TIES else "best by the reward"
    why += ", or within 0.1 points of it"
    if leader := chosen["leader"]:
        others = ", ".join(chosen["not_told_apart"])
        told = f"the judge puts {leader} first and does not tell from it {others}; of these {why}"
        why = told if others else "the judge puts it first and tells it from all others"
    lines = [f"Recommended: {chosen['transformation']}, β = {chosen['beta']:.4g}: {why}."]
    if abs(chosen["beta_at_k"] / chosen["beta"] - 1) > 0.05:
        lines.append(
            f"Ranks among {k} leave less KL at that β: β = {chosen['beta_at_k']:.4g} makes it "
            f"{found['kl']:g} on average."
        )
    costs = [
        f"{points(s['lost'], 2)} ± {points(1.96 * s['standard_error'], 2)} at K = {s['responses']}"
        for s in found["samples"]
    ]
    lines.append(f"Lost to finite K, in points: {', '.join(costs)}.")
    if half := found["judged_half_width"]:
        now, responses, prompts = (f"± {points(width)}" for width in half.values())
        lines.append(
            f"By the judge {now}; about {responses} with {2 * k} responses a prompt, {prompts} "
            f"with {2 * result['prompts']} prompts."
        )
    return lines
