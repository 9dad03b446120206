"""What is told of a run beside its figures: the reference, SFT's floor, responses to look at."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from infalign_jax import (
    calibration,
    evaluation,
    frontier,
    notation,
    procedures,
    synthetic,
    transformations,
)
from infalign_jax.runtime import shards
from infalign_jax.stages.evaluate import Samples, decoded, variety
from infalign_jax.stages.language import Model, parts, sft_loss
from infalign_jax.stages.run import Run
from infalign_jax.stages.text import Text
from infalign_jax.synthetic import SyntheticConfig


def reference_facts(reference: Samples) -> dict[str, Any]:
    """Of the untrained reference: entropy, best of 128 against one sample, the largest atom.

    >>> from infalign_jax.batches import Responses
    >>> rng, tokens = np.random.default_rng(0), np.arange(64).reshape(2, 32, 1)
    >>> rewards = {"train": rng.normal(size=(2, 32)).astype(np.float32)}
    >>> base = Samples(Responses(tokens, tokens >= 0), *[np.zeros((2, 32))] * 2, rewards)
    >>> facts = reference_facts(base)
    >>> facts["largest_atom"], facts["distinct"], list(facts["best_of_16"])
    (0.03125, 1.0, ['train'])
    """
    rewards = reference.rewards["train"]
    half = rewards.shape[1] // 2  # independent samples on both sides
    best = min(128, half)
    atoms = [np.unique(row, return_counts=True)[1].max() / row.size for row in rewards]
    facts: dict[str, Any] = variety(reference) | {"largest_atom": float(max(atoms))}
    facts[f"best_of_{best}"] = {
        scorer: evaluation.win_rate(
            rewards[:, :half], rewards[:, half:], procedures.best_of_n(best),
            reference_procedure=procedures.standard(),
            policy_judge=judged[:, :half], reference_judge=judged[:, half:],
        ).mean
        for scorer, judged in reference.rewards.items()
    }  # fmt: skip
    return facts


def sft_facts(run: Run, text: Text, sft: Model) -> dict[str, float]:
    """SFT loss on the validation pairs, in nats a response, beside its floor where it is known.

    >>> sft_facts.__name__
    'sft_facts'
    """
    loss = jax.jit(shards.within(run.mesh, partial(sft_loss, run.experiment.model)))
    nats, counts = [], []
    for part in parts(text.rows["validation"]):
        nats.append(float(loss(sft.params, part)[1]["nats"]))
        counts.append(len(part.prompts.index))
    facts = {"sft_loss": float(np.average(nats, weights=counts))}
    match run.experiment.data:
        case SyntheticConfig() as config:
            floor = synthetic.chosen_nats(config, text.pairs["validation"])
            facts["sft_loss_floor"] = floor
    return facts


def above_identity(policies: list[dict[str, Any]]) -> list[dict[str, float]]:
    """What each policy's win rates, by procedure, gain over the trained identity's at equal KL.

    The identity policy nearest in KL is moved to the policy's KL along identity's analytic curve.
    Without one there is nothing to compare: empty.

    >>> rates = lambda w: {"win_rates": {"standard": {"train": {"mean": w}}}}
    >>> rows = [{"transformation": "identity", "kl": 0.5} | rates(0.75)]
    >>> rows += [{"transformation": "log", "kl": 0.5} | rates(0.7)]
    >>> [round(row["standard"], 3) for row in above_identity(rows)]
    [0.0, -0.05]
    """
    ours = [n for n, policy in enumerate(policies) if policy["transformation"] == "identity"]
    if not ours:
        return [{} for _ in policies]
    kls = np.array([policy["kl"] for policy in policies], np.float32)
    nearest = [min(ours, key=lambda n: abs(kls[n] - kl)) for kl in kls]
    betas = notation.beta_for_kl("identity", jnp.asarray(kls))
    found: list[dict[str, float]] = [{} for _ in policies]
    for procedure in policies[0]["win_rates"]:
        rates = np.array([policy["win_rates"][procedure]["train"]["mean"] for policy in policies])
        rule = notation.procedure(procedure)
        _, curve = frontier.curve(transformations.identity, rule, betas)
        gains = rates - np.asarray(curve)
        for row, gain, near in zip(found, gains, nearest, strict=True):
            row[procedure] = float(gain - gains[near])
    return found


def quantiles(own: Samples, table: np.ndarray) -> np.ndarray:
    """û float32[B, n] of a policy's samples among the sorted reference rewards `table`.

    >>> from infalign_jax.batches import Responses
    >>> rng, tokens = np.random.default_rng(0), np.arange(64).reshape(2, 32, 1)
    >>> rewards = {"train": rng.normal(size=(2, 32)).astype(np.float32)}
    >>> base = Samples(Responses(tokens, tokens >= 0), *[np.zeros((2, 32))] * 2, rewards)
    >>> ranks = quantiles(base, np.sort(rewards["train"], axis=1))
    >>> ranks.shape, bool(((0 < ranks) & (ranks < 1)).all())
    ((2, 32), True)
    """
    return np.asarray(jax.jit(calibration.calibrate)(own.rewards["train"], table))


def side_by_side(
    text: Text, prompts: list[str], base: Samples, table: np.ndarray, names: list[str],
    policies: list[Samples],
) -> list[dict[str, Any]]:  # fmt: skip
    """Four responses of the reference and of every policy to each prompt, for samples.json.

    >>> side_by_side(None, [], None, None, [], [])
    []
    """

    def four(own: Samples, ranks: np.ndarray, row: int) -> list[dict[str, Any]]:
        texts = decoded(text, np.asarray(own.responses.tokens[row, :4]))
        numbers = zip(texts, own.rewards["train"][row, :4], ranks[row, :4], strict=True)
        return [{"text": y, "reward": float(r), "quantile": float(u)} for y, r, u in numbers]

    ranks = [quantiles(own, table) for own in (base, *policies) if prompts]
    return [
        {
            "prompt": prompt,
            "reference": four(base, ranks[0], row),
            "policies": [
                {
                    "name": name,
                    "responses": four(own, us, row),
                    "best": int(np.argmax(own.rewards["train"][row, :4])),
                }
                for name, own, us in zip(names, policies, ranks[1:], strict=True)
            ],
        }
        for row, prompt in enumerate(prompts)
    ]
