"""The stage `evaluate`: policies on held-out prompts, against fresh reference samples."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from infalign_jax import (
    calibration,
    divergence,
    evaluation,
    frontier,
    notation,
    programs,
    synthetic,
)
from infalign_jax.batches import Prompts, Responses
from infalign_jax.experiment import Experiment
from infalign_jax.runtime import digests
from infalign_jax.runtime import mesh as meshes
from infalign_jax.stages.language import Model
from infalign_jax.stages.reference import (
    EMPTY,
    check_finite,
    in_chunks,
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


def at_once(experiment: Experiment, mesh: Mesh, count: int) -> int:
    """Prompts whose `count` responses each are drawn side by side: few where these are many.

    >>> mesh = meshes.make(meshes.MeshConfig(), jax.devices()[:1])
    >>> at_once(Experiment("quick"), mesh, 8), at_once(Experiment("quick"), mesh, 512)
    (32, 8)
    """
    size, parts = min(experiment.evaluate.chunk, max(1, 4096 // count)), meshes.batch_parts(mesh)
    return -(-size // parts) * parts


def samples(
    run: Run, text: Text, prompts: tuple[list[str], Prompts], policy: Model, judges: Judges,
    count: int, draw: int, label: str,
) -> Samples:  # fmt: skip
    """`count` responses of a policy to every held-out prompt, with all that is asked of them.

    >>> samples.__name__
    'samples'
    """
    length = run.experiment.sampling.length
    texts, encoded = prompts
    n = len(texts)
    digest = digests.digest(
        "samples", policy.digest, judges.train.digest, judges.judge.digest, n, count, draw,
        run.experiment.seed,
    )  # fmt: skip
    mesh, model = run.mesh, run.experiment.model
    sample = programs.make_sample(mesh, model, run.experiment.sampling, count)
    score = programs.make_rewards(mesh, run.experiment.scorer)
    log_probs = programs.make_log_probs(mesh, model)

    def chunk(part: Prompts) -> Any:
        rollouts = sample(policy.params, part, run.key(7, draw))
        responses = rollouts.responses
        return responses, {
            "log_probs": rollouts.log_probs,
            "reference": log_probs(judges.sft.params, part, responses),
            "train": score(judges.train.params, part, responses),
            "judge": score(judges.judge.params, part, responses),
        }

    known = isinstance(run.experiment.data, SyntheticConfig)

    def make() -> tuple[Any, dict[str, Any]]:
        size = at_once(run.experiment, mesh, count)
        responses, tree = in_chunks(run, label, encoded, size, chunk)
        check_finite(tree["train"], label)
        tree |= {"tokens": responses.tokens, "mask": responses.mask}
        if known:
            tree["true"] = true_rewards(text, texts, responses)
        return tree, {"tokens": int(responses.mask.sum())}

    tree, _ = stored(run, "samples", digest, _stored_samples(n, count, length, known), make)
    rewards = {name: tree[name] for name in ("train", "judge", "true") if name in tree}
    return Samples(
        Responses(tree["tokens"], tree["mask"]), tree["log_probs"], tree["reference"], rewards
    )


def _stored_samples(n: int, count: int, length: int, known: bool) -> dict[str, Any]:
    """Shapes of what is kept of samples; `known` says that there is a true reward."""
    floats = ["log_probs", "reference", "train", "judge"] + ["true"] * known
    like = {name: EMPTY((n, count), jnp.float32) for name in floats}
    each = (n, count, length)
    return like | {"tokens": EMPTY(each, jnp.int32), "mask": EMPTY(each, bool)}


def true_rewards(text: Text, prompts: list[str], responses: Responses) -> np.ndarray:
    """The synthetic task's own reward of every response, float32[B, n].

    >>> from infalign_jax.lm import tokenizer as tokenizers
    >>> model = tokenizers.train(["ab ab"], tokenizers.TokenizerConfig(264, symbols=()))
    >>> text = Text(tokenizers.Tokenizer(model), {}, {}, {}, "")
    >>> nothing = Responses(np.zeros((1, 3, 4), int), np.zeros((1, 3, 4), bool))
    >>> true_rewards(text, ["plan a feast for a proud king in winter"], nothing).shape
    (1, 3)
    """
    rows = [
        [synthetic.true_reward(prompt, y) for y in decoded(text, row)]
        for prompt, row in zip(prompts, responses.tokens, strict=True)
    ]
    return np.array(rows, np.float32)


def decoded(text: Text, tokens: np.ndarray) -> list[str]:
    """Texts of tokens int32[n, T].

    >>> from infalign_jax.lm import tokenizer as tokenizers
    >>> model = tokenizers.train(["ab ab"], tokenizers.TokenizerConfig(264, symbols=()))
    >>> text = Text(tokenizers.Tokenizer(model), {}, {}, {}, "")
    >>> decoded(text, np.array([text.tokenizer.encode("ab") + [2, 0]]))
    ['ab']
    """
    return [text.tokenizer.decode(row) for row in tokens]


def calibration_error(run: Run, reference: Samples) -> dict[str, Any]:
    """mean |û − u| on held-out prompts, before (best global map of the raw reward) and after.

    The first `calibrate.responses` samples of every prompt calibrate a second such set; u comes
    from all the others, which neither of the two has seen.

    >>> from pathlib import Path
    >>> from infalign_jax.experiment import CalibrateConfig, Experiment, ForesightConfig
    >>> run = Run(
    ...     Experiment("few", foresight=ForesightConfig(0), calibrate=CalibrateConfig(responses=8)),
    ...     Path("runs"), None,
    ... )
    >>> rng, tokens = np.random.default_rng(0), np.arange(64).reshape(2, 32, 1)
    >>> rewards = {"train": rng.normal(size=(2, 32)).astype(np.float32)}
    >>> base = Samples(Responses(tokens, tokens >= 0), *[np.zeros((2, 32))] * 2, rewards)
    >>> errors = calibration_error(run, base)
    >>> errors["reference_samples"], errors["quantiles_after"].shape
    (21, (6,))
    """
    rewards, k = reference.rewards["train"], run.experiment.calibrate.responses
    scored = min(64, max(1, (rewards.shape[1] - k) // 8))
    table, new, rest = np.split(rewards, [k, k + scored], axis=1)
    rank = jax.jit(calibration.calibrate)
    truth = np.asarray(rank(new, calibration.sorted_reference(rest)))
    after = np.asarray(rank(new, calibration.sorted_reference(table)))
    before = calibration.global_map(new, truth)(new)
    return {
        "absolute_error_before": calibration.absolute_error(before, truth),
        "absolute_error_after": calibration.absolute_error(after, truth),
        "reference_samples": int(rest.shape[1]),
        "quantiles_before": before.astype(np.float32).ravel(),
        "quantiles_after": after.ravel(),
    }


def measure(
    run: Run, policy: Model, name: str, transformation: str, own: Samples, reference: Samples
) -> dict[str, Any]:
    """What results.json says of one policy.

    >>> from pathlib import Path
    >>> from infalign_jax.experiment import EvaluateConfig, Experiment
    >>> few = EvaluateConfig(procedures=("standard",))
    >>> run = Run(Experiment("few", procedure="standard", evaluate=few), Path("runs"), None)
    >>> model = Model({}, "", {"beta": 0.5, "target_kl": 0.1, "seconds": 1.0, "steps": 9})
    >>> rng, tokens = np.random.default_rng(0), np.arange(64).reshape(2, 32, 1)
    >>> rewards = {"train": rng.normal(size=(2, 32)).astype(np.float32)}
    >>> base = Samples(Responses(tokens, tokens >= 0), *[np.zeros((2, 32))] * 2, rewards)
    >>> row = measure(run, model, "mine", "identity", base, base)
    >>> row["kl"], row["win_rates"]["standard"]["train"]["mean"], row["distinct"]
    (0.0, 0.5, 1.0)
    """
    ratio = divergence.log_ratio(own.log_probs, own.reference_log_probs)
    kl, kl_error = evaluation.mean_and_standard_error(ratio.mean(axis=1))
    rates: dict[str, Any] = {}
    bounds = {}
    for procedure in run.experiment.evaluate.procedures:
        rates[procedure] = win_rates(own, reference, procedure)
        bounds[procedure] = float(frontier.frontier_win_rate(notation.procedure(procedure), kl))
    gaps = {p: bounds[p] - rates[p]["train"]["mean"] for p in bounds}
    return {
        "name": name, "transformation": notation.canonical(transformation),
        "beta": policy.info["beta"], "target_kl": policy.info["target_kl"],
        "kl": kl, "kl_standard_error": kl_error, "win_rates": rates,
        "frontier_win_rate": bounds, "frontier_gap": gaps,
        **variety(own),
        "seconds": policy.info["seconds"], "steps": policy.info["steps"],
    }  # fmt: skip


def variety(own: Samples) -> dict[str, float]:
    """Entropy in nats a response, share of distinct responses a prompt, mean length in tokens.

    >>> same = Responses(np.ones((2, 4, 3), int), np.ones((2, 4, 3), bool))
    >>> variety(Samples(same, np.full((2, 4), -2.0), np.zeros((2, 4)), {}))
    {'entropy': 2.0, 'distinct': 0.25, 'length': 3.0}
    """
    rows = own.responses.tokens
    return {
        "entropy": float(-own.log_probs.mean()),
        "distinct": float(np.mean([len(np.unique(row, axis=0)) / len(row) for row in rows])),
        "length": float(own.responses.mask.sum(axis=-1).mean()),
    }


def win_rates(own: Samples, reference: Samples, procedure: str) -> dict[str, Any]:
    """By scorer: selected by the training reward, compared by the scorer.

    >>> rng, tokens = np.random.default_rng(0), np.arange(64).reshape(2, 32, 1)
    >>> rewards = {"train": rng.normal(size=(2, 32)).astype(np.float32)}
    >>> base = Samples(Responses(tokens, tokens >= 0), *[np.zeros((2, 32))] * 2, rewards)
    >>> win_rates(base, base, "standard")["train"]["mean"]
    0.5
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
