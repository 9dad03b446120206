"""`infalign predict`: what reference rewards alone say of Φ, β, and of how many samples are enough.

As JSON: ``prompts``, ``responses``, ``judge`` (whether there is one), ``tied`` (the share of a
prompt's pairs of responses of equal reward), ``procedure``, ``reference_procedure``,
``miscalibration`` (``raw`` and ``calibrated``: a rate, see below), and ``kls``, a list of:

- ``kl`` and ``rows``: ``transformation``, ``beta``, ``converged``, ``theory`` (win rate of a
  perfect solver for K → ∞), ``at_k`` (of one that knows ranks among K) with its
  ``at_k_standard_error``, ``beta_at_k`` (which gives that one the KL), ``kl`` and
  ``kl_standard_error`` as predicted at ``beta``, ``by_reward`` and ``by_judge`` (predicted win
  rates), ``ahead`` (of the first row, prompt by prompt, by the judge where there is one),
  ``effective_sample_size``, ``warning``;
- ``recommended``: ``transformation``, ``beta``, ``beta_at_k``, ``leader`` (best by the judge, or
  null) and ``not_told_apart`` (from the leader);
- ``samples``: of the recommended Φ ``responses`` (K, 2K, 4K), ``lost`` (theory less at_k), and
  ``standard_error``;
- ``judged_half_width``: of its 95 % interval by the judge ``now``, ``twice_responses``,
  ``twice_prompts``; null without a judge or under 8 responses.

A rate is ``mean``, ``standard_error`` and ``interval`` (95 %); all win rates are shares.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from infalign_jax import calibration, evaluation, prediction, sample_size
from infalign_jax.commands import candidates
from infalign_jax.commands.candidates import Candidate, Contest
from infalign_jax.commands.printing import rate
from infalign_jax.evaluation import WinRate
from infalign_jax.prediction import Prediction
from infalign_jax.reward_files import Rewards
from infalign_jax.sample_size import FiniteK

USUAL_KLS = (0.5,)
# Win rates at K that are nearer to one another are not told apart: they are simulated.
EQUAL = 0.001
# From so many ties on, what is recommended goes by the rewards in hand, not by theory without ties.
MANY_TIES = 0.01
# What a prediction that carries a warning was off by, at most: see `prediction.FEWEST_EFFECTIVE`.
BIAS = 0.022


class Row(NamedTuple):
    """All that is known of one Φ at one KL.

    >>> Row._fields
    ('candidate', 'at_k', 'predicted')
    """

    candidate: Candidate
    at_k: FiniteK
    predicted: Prediction


def advise(
    rewards: Rewards,
    procedure: str,
    *,
    reference_procedure: str | None = None,
    transformations: Sequence[str] = (),
    kls: Sequence[float] = USUAL_KLS,
) -> dict[str, Any]:
    """What each Φ promises at each KL, and which to take, as the module describes.

    Recommended is, of the Φ that the judge does not tell from the one it puts first, the one of
    highest win rate at this K by theory; without a judge, that of all. Within 0.1 points the one
    listed first is taken. Two are told apart where the 95 % interval of their paired difference
    over prompts leaves out 0, or 2.2 points where either prediction carries a warning: so large
    its bias may be. Where more than 1 % of pairs tie, the win rate predicted by the reward stands
    for theory, which knows no ties.

    Raises ValueError on unknown names, KLs out of reach, and fewer than 4 responses a prompt.

    >>> drawn = np.random.default_rng(0).normal(size=(64, 32))
    >>> rewards = Rewards(tuple("p" * i for i in range(64)), drawn, None)
    >>> found = advise(rewards, "standard", transformations=["log"])["kls"][0]
    >>> found["recommended"]["transformation"], round(found["recommended"]["beta"], 2)
    ('optimal(standard)', 0.24)
    """
    about = candidates.contest(procedure, reference_procedure)
    names = candidates.names(transformations, about)
    errors = calibration.held_out_errors(rewards.rewards)
    solved = []
    for name in names:
        solved.append(candidates.at_kls(name, about, kls))
        candidates.check_reach(solved[-1], kls)
    tied = _tied(rewards.rewards)
    by_kl = [
        _at_kl(rewards, about, kl, each, tied)
        for kl, each in zip(kls, zip(*solved, strict=True), strict=True)
    ]
    return {
        "prompts": rewards.rewards.shape[0],
        "responses": rewards.rewards.shape[1],
        "judge": rewards.judge is not None,
        "tied": tied,
        **dict(zip(("procedure", "reference_procedure"), about.names, strict=True)),
        "miscalibration": {
            name: rate(WinRate(*evaluation.mean_and_standard_error(each), each))
            for name, each in zip(("raw", "calibrated"), errors, strict=True)
        },
        "kls": by_kl,
    }


def _at_kl(
    rewards: Rewards, about: Contest, kl: float, found: Sequence[Candidate], tied: float
) -> dict[str, Any]:
    rows = [
        Row(one, _finite(one, kl, about, rewards.rewards.shape[1]), _predict(rewards, about, one))
        for one in found
    ]
    leader, kept = _not_told_apart(rows)
    worth = [row.predicted.win_rate.mean if tied > MANY_TIES else row.at_k.win_rate for row in kept]
    chosen = next(row for row, w in zip(kept, worth, strict=True) if w >= max(worth) - EQUAL)
    return {
        "kl": kl,
        "rows": [_plain(row, rows[0]) for row in rows],
        "recommended": {
            "transformation": chosen.candidate.name,
            "beta": chosen.candidate.beta,
            "beta_at_k": chosen.at_k.beta,
            "leader": leader and leader.candidate.name,
            "not_told_apart": [row.candidate.name for row in kept if leader and row is not leader],
        },
        "samples": _samples(chosen, kl, about, rewards.rewards.shape[1]),
        "judged_half_width": _half_widths(rewards, about, chosen),
    }


def _finite(one: Candidate, kl: float, about: Contest, k: int) -> FiniteK:
    laws = about.procedure, about.reference
    return sample_size.at_k(one.transformation, kl, laws[0], k, reference_procedure=laws[1])


def _predict(rewards: Rewards, about: Contest, one: Candidate) -> Prediction:
    return prediction.predict(
        rewards.rewards,
        one.transformation,
        one.beta,
        about.procedure,
        reference_procedure=about.reference,
        judge=rewards.judge,
    )


def _best_known(row: Row) -> WinRate:
    """By the judge where there is one."""
    return row.predicted.judged or row.predicted.win_rate


def _not_told_apart(rows: Sequence[Row]) -> tuple[Row | None, list[Row]]:
    """The best by the judge, and all that may be as good, itself among them, in order."""
    sound = [row for row in rows if row.candidate.converged] or list(rows)
    if rows[0].predicted.judged is None:
        return None, sound
    leader = max(sound, key=lambda row: _best_known(row).mean)

    def behind(row: Row) -> bool:
        lead = evaluation.paired_difference(_best_known(leader), _best_known(row))
        biased = leader.predicted.warning or row.predicted.warning
        return evaluation.confidence_interval(lead)[0] > (BIAS if biased else 0)

    return leader, [row for row in sound if row is leader or not behind(row)]


def _plain(row: Row, first: Row) -> dict[str, Any]:
    one, predicted = row.candidate, row.predicted
    return {
        "transformation": one.name,
        "beta": one.beta,
        "converged": one.converged,
        "theory": one.win_rate,
        "at_k": row.at_k.win_rate,
        "at_k_standard_error": row.at_k.standard_error,
        "beta_at_k": row.at_k.beta,
        "kl": predicted.kl,
        "kl_standard_error": predicted.kl_standard_error,
        "by_reward": rate(predicted.win_rate),
        "by_judge": predicted.judged and rate(predicted.judged),
        "ahead": rate(evaluation.paired_difference(_best_known(row), _best_known(first))),
        "effective_sample_size": predicted.effective_sample_size,
        "warning": predicted.warning,
    }


def _samples(chosen: Row, kl: float, about: Contest, k: int) -> list[dict[str, Any]]:
    """What K, 2K and 4K reference responses lose to infinitely many."""
    found = {k: chosen.at_k} | {n: _finite(chosen.candidate, kl, about, n) for n in (2 * k, 4 * k)}
    return [
        {
            "responses": n,
            "lost": chosen.candidate.win_rate - each.win_rate,
            "standard_error": each.standard_error,
        }
        for n, each in found.items()
    ]


def _half_widths(rewards: Rewards, about: Contest, chosen: Row) -> dict[str, float] | None:
    """Of the 95 % interval by the judge: now, with twice the responses, with twice the prompts."""
    b, k = rewards.rewards.shape
    if rewards.judge is None or chosen.predicted.judged is None or k < 8 or b < 2:
        return None
    figures = [chosen.predicted.judged.per_prompt]
    for half in (slice(0, None, 2), slice(1, None, 2)):
        part = Rewards(rewards.prompts, rewards.rewards[:, half], rewards.judge[:, half])
        judged = _predict(part, about, chosen.candidate).judged
        assert judged is not None  # a judge in, a judge out
        figures.append(judged.per_prompt)
    parts = sample_size.spread(*figures)
    asked = {"now": (b, 1), "twice_responses": (b, 2), "twice_prompts": (2 * b, 1)}
    return {
        name: evaluation.student_quantile(0.95, n - 1) * sample_size.standard_error(parts, n, more)
        for name, (n, more) in asked.items()
    }


def _tied(rewards: np.ndarray) -> float:
    """The share of pairs of a prompt's responses that have one reward."""
    ordered = np.sort(rewards, axis=1)
    new = np.ones(ordered.shape, bool)
    np.not_equal(ordered[:, 1:], ordered[:, :-1], out=new[:, 1:])
    lengths = np.diff(np.flatnonzero(new), append=ordered.size)
    return float(np.sum(lengths * (lengths - 1.0)) / (ordered.size * (ordered.shape[1] - 1)))
