"""The stage `evaluate`: policies on held-out prompts, against fresh reference samples."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from infalign_jax import calibration, evaluation, frontier, notation, procedures, synthetic
from infalign_jax.batches import Prompts, Responses
from infalign_jax.runtime import checkpoint
from infalign_jax.stages.language import Model, sft_loss
from infalign_jax.stages.reference import (
    EMPTY,
    check_finite,
    in_chunks,
    make_log_probs,
    make_reward,
    make_sample,
)
from infalign_jax.stages.run import Run, stored
from infalign_jax.stages.text import Text
from infalign_jax.synthetic import SyntheticConfig


class Samples(NamedTuple):
    """n samples of one policy for each of B held-out prompts, as NumPy arrays.

    >>> Samples._fields
    ('responses', 'log_probs', 'reference_log_probs', 'rewards')
    """

    responses: Responses  # [B, n, T]
    log_probs: np.ndarray  # float32[B, n], of the policy
    reference_log_probs: np.ndarray  # float32[B, n]
    rewards: dict[str, np.ndarray]  # float32[B, n] by train, judge and, where known, true


class Judges(NamedTuple):
    """Who scores: the training reward, the judge, and the reference that KL is measured to.

    >>> Judges._fields
    ('train', 'judge', 'sft')
    """

    train: Model
    judge: Model
    sft: Model


def samples(
    run: Run, text: Text, prompts: tuple[list[str], Prompts], policy: Model, judges: Judges,
    count: int, draw: int, label: str,
) -> Samples:  # fmt: skip
    """`count` responses of a policy to every held-out prompt, with all that is asked of them.

    >>> samples.__name__
    'samples'
    """
    options, length = run.experiment.evaluate, run.experiment.sampling.length
    texts, encoded = prompts
    n = len(texts)
    digest = checkpoint.digest(
        "samples", policy.digest, judges.train.digest, judges.judge.digest, n, count, draw,
        run.experiment.seed,
    )  # fmt: skip
    sample, score, log_probs = make_sample(run, count), make_reward(run), make_log_probs(run)

    def chunk(part: Prompts) -> Any:
        rollouts = sample(policy.params, part, run.key(7, draw))
        responses = rollouts.responses
        return responses, {
            "log_probs": rollouts.log_probs,
            "reference": log_probs(judges.sft.params, part, responses),
            "train": score(judges.train.params, part, responses),
            "judge": score(judges.judge.params, part, responses),
        }

    floats = ["log_probs", "reference", "train", "judge"]
    known = isinstance(run.experiment.data, SyntheticConfig)

    def make() -> tuple[Any, dict[str, Any]]:
        size = min(options.chunk, max(1, 4096 // count))
        parts = run.mesh.shape["data"] * run.mesh.shape["fsdp"]
        responses, tree = in_chunks(run, label, encoded, -(-size // parts) * parts, chunk)
        check_finite(tree["train"], label)
        tree |= {"tokens": responses.tokens, "mask": responses.mask}
        if known:
            tree["true"] = true_rewards(text, texts, responses)
        return tree, {"tokens": int(responses.mask.sum())}

    shape = (n, count)
    like = {name: EMPTY(shape, jnp.float32) for name in floats + ["true"] * known}
    like |= {"tokens": EMPTY((*shape, length), jnp.int32), "mask": EMPTY((*shape, length), bool)}
    tree, _ = stored(run, "samples", digest, like, make)
    rewards = {name: tree[name] for name in ("train", "judge", "true") if name in tree}
    return Samples(
        Responses(tree["tokens"], tree["mask"]), tree["log_probs"], tree["reference"], rewards
    )


def true_rewards(text: Text, prompts: list[str], responses: Responses) -> np.ndarray:
    """The synthetic task's own reward of every response, float32[B, n].

    >>> true_rewards.__name__
    'true_rewards'
    """
    rows = [
        [synthetic.true_reward(prompt, y) for y in decoded(text, row)]
        for prompt, row in zip(prompts, responses.tokens, strict=True)
    ]
    return np.array(rows, np.float32)


def decoded(text: Text, tokens: np.ndarray) -> list[str]:
    """Texts of tokens int32[n, T].

    >>> decoded.__name__
    'decoded'
    """
    return [text.tokenizer.decode(row) for row in tokens]


def calibration_error(run: Run, reference: Samples) -> dict[str, Any]:
    """mean |û − u| on held-out prompts, before (best global map of the raw reward) and after.

    The first `calibrate.responses` samples of every prompt calibrate a second such set; u comes
    from all the others, which neither of the two has seen.

    >>> calibration_error.__name__
    'calibration_error'
    """
    rewards, k = reference.rewards["train"], run.experiment.calibrate.responses
    scored = min(64, max(1, (rewards.shape[1] - k) // 8))
    table, new, rest = np.split(rewards, [k, k + scored], axis=1)
    rank = jax.jit(calibration.calibrate)
    truth = np.asarray(rank(new, np.sort(rest, axis=1)))
    after = np.asarray(rank(new, np.sort(table, axis=1)))
    before = calibration.global_map(new, truth)(new)
    return {
        "absolute_error_before": calibration.absolute_error(before, truth),
        "absolute_error_after": calibration.absolute_error(after, truth),
        "reference_samples": int(rest.shape[1]),
        "quantiles_before": before.astype(np.float32).ravel(),
        "quantiles_after": after.ravel(),
    }


def measure(run: Run, policy: Model, name: str, transformation: str, own: Samples, reference: Samples) -> dict[str, Any]:
    """What results.json says of one policy.

    >>> measure.__name__
    'measure'
    """
    ratio = own.log_probs - own.reference_log_probs
    kl, kl_error = evaluation.mean_and_standard_error(ratio.astype(np.float64).mean(axis=1))
    rates: dict[str, Any] = {}
    bounds = {}
    for procedure in run.experiment.evaluate.procedures:
        rates[procedure] = win_rates(own, reference, procedure)
        bounds[procedure] = float(frontier.frontier_win_rate(notation.procedure(procedure), kl))
    gaps = {p: bounds[p] - rates[p]["train"]["mean"] for p in bounds}
    rows = own.responses.tokens
    distinct = [len(np.unique(row, axis=0)) / len(row) for row in rows]
    return {
        "name": name, "transformation": notation.canonical(transformation),
        "beta": policy.info["beta"], "target_kl": policy.info["target_kl"],
        "kl": kl, "kl_standard_error": kl_error, "win_rates": rates,
        "frontier_win_rate": bounds, "frontier_gap": gaps,
        "entropy": float(-own.log_probs.mean()), "distinct": float(np.mean(distinct)),
        "length": float(own.responses.mask.sum(axis=-1).mean()),
        "seconds": policy.info["seconds"], "steps": policy.info["steps"],
    }  # fmt: skip


def win_rates(own: Samples, reference: Samples, procedure: str) -> dict[str, Any]:
    """By scorer: selected by the training reward, compared by the scorer.

    >>> win_rates.__name__
    'win_rates'
    """
    rule = notation.procedure(procedure)
    found = {}
    for scorer, judged in own.rewards.items():
        rate = evaluation.win_rate(
            own.rewards["train"], reference.rewards["train"], rule,
            policy_judge=judged, reference_judge=reference.rewards[scorer],
        )  # fmt: skip
        found[scorer] = {"mean": rate.mean, "standard_error": rate.standard_error}
    return found


def reference_facts(sft: Model, reference: Samples) -> dict[str, Any]:
    """Of the untrained reference: entropy, best of 128 against one sample, the largest atom.

    >>> reference_facts.__name__
    'reference_facts'
    """
    rewards = reference.rewards["train"]
    half = rewards.shape[1] // 2  # independent samples on both sides
    best = min(128, half)
    atoms = [np.unique(row, return_counts=True)[1].max() / row.size for row in rewards]
    rows = reference.responses.tokens
    facts: dict[str, Any] = {
        "entropy": float(-reference.log_probs.mean()),
        "length": float(reference.responses.mask.sum(axis=-1).mean()),
        "distinct": float(np.mean([len(np.unique(row, axis=0)) / len(row) for row in rows])),
        "largest_atom": float(max(atoms)),
    }
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
    rows = text.rows["validation"]
    loss = jax.jit(partial(sft_loss, run.experiment.model))
    nats, counts = [], []
    for begin in range(0, len(rows.prompts.index), 64):
        part = jax.tree.map(lambda leaf: leaf[begin : begin + 64], rows)  # noqa: B023
        nats.append(float(loss(sft.params, part)[1]["nats"]))
        counts.append(len(part.prompts.index))
    facts = {"sft_loss": float(np.average(nats, weights=counts))}
    match run.experiment.data:
        case SyntheticConfig() as config:
            floor = synthetic.chosen_nats(config, text.pairs["validation"])
            facts["sft_loss_floor"] = floor
    return facts


def quantiles(own: Samples, table: np.ndarray) -> np.ndarray:
    """û float32[B, n] of a policy's samples among the sorted reference rewards `table`.

    >>> quantiles.__name__
    'quantiles'
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

    def four(own: Samples, row: int) -> list[dict[str, Any]]:
        scores = own.rewards["train"][row, :4]
        ranks = quantiles(own, table)[row, :4]
        texts = decoded(text, own.responses.tokens[row, :4])
        return [
            {"text": y, "reward": float(r), "quantile": float(u)}
            for y, r, u in zip(texts, scores, ranks, strict=True)
        ]

    return [
        {
            "prompt": prompt,
            "reference": four(base, row),
            "policies": [
                {
                    "name": name,
                    "responses": four(own, row),
                    "best": int(np.argmax(own.rewards["train"][row, :4])),
                }
                for name, own in zip(names, policies, strict=True)
            ],
        }
        for row, prompt in enumerate(prompts)
    ]
