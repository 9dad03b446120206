"""The stage `calibrate`: the reference policy's responses, scored, ranked once and stored."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from infalign_jax import calibration, foresight, programs
from infalign_jax.batches import Prompts, Responses
from infalign_jax.runtime import digests, hosts
from infalign_jax.runtime import mesh as meshes
from infalign_jax.runtime.metrics import phase
from infalign_jax.stages.run import Run, put, stored

EMPTY = jax.ShapeDtypeStruct


class Reference(NamedTuple):
    """K responses of π_ref to each of n prompts, as NumPy arrays, with what they are worth.

    >>> Reference._fields[:3]
    ('prompts', 'responses', 'log_probs')
    """

    prompts: Prompts  # B = n
    responses: Responses  # [n, K, T]
    log_probs: np.ndarray  # float32[n, K], log π_ref(y | x)
    rewards: np.ndarray  # float32[n, K], by the training reward
    running: np.ndarray  # float32[n, K, T], rewards so far, standardised for foresight
    sorted_rewards: np.ndarray  # float32[n, K], ascending: what new responses are ranked among
    quantiles: np.ndarray  # float32[n, K], leave-one-out
    digest: str
    info: dict[str, Any]


def pick(
    reference: Reference, rows: np.ndarray, responses: int, seed: list[int]
) -> tuple[Prompts, tuple[np.ndarray, np.ndarray]]:
    """Some prompts, by number, and where `responses` of each one's stored responses lie.

    Which ones hangs on `seed` alone, without replacement.

    >>> prompts = Prompts(np.ones((5, 3)), np.ones((5, 3)), np.arange(5))
    >>> tokens = Responses(np.ones((5, 8, 4)), np.ones((5, 8, 4), bool))
    >>> ranks = np.arange(40).reshape(5, 8)
    >>> reference = Reference(prompts, tokens, *[ranks] * 5, "", {})
    >>> prompts, at = pick(reference, np.array([1, 4]), 8, [0, 4])
    >>> prompts.index.tolist(), np.sort(ranks[at], axis=1)[:, 0].tolist()
    ([1, 4], [8, 32])
    """
    k = reference.rewards.shape[1]
    rng = np.random.default_rng(seed)
    picked = rng.permuted(np.tile(np.arange(k), (len(rows), 1)), axis=1)[:, :responses]
    return jax.tree.map(lambda leaf: leaf[rows], reference.prompts), (rows[:, None], picked)


def in_chunks(
    run: Run, what: str, prompts: Prompts, chunk: int, function: Callable[[Prompts], Any]
) -> Any:
    """A function of prompts, chunk by chunk: NumPy results joined along their first axis.

    The last chunk is filled up with repeated prompts, so that nothing recompiles.

    >>> from pathlib import Path
    >>> import flax.linen as nn
    >>> from infalign_jax.experiment import Experiment
    >>> mesh = meshes.make(meshes.MeshConfig(), jax.devices()[:1])
    >>> run = Run(Experiment("quick"), Path("runs"), mesh)
    >>> prompts = Prompts(np.ones((5, 3)), np.ones((5, 3)), np.arange(5))
    >>> in_chunks(run, "count", prompts, 2, lambda part: 10 * part.index).tolist()
    [0, 10, 20, 30, 40]
    """
    total = len(prompts.index)
    meshes.check_batch(f"{what} chunk", chunk, run.mesh)
    parts = []
    with phase(what, total) as advance:
        for begin in range(0, total, chunk):
            index = np.minimum(np.arange(begin, begin + chunk), total - 1)
            part = put(run, jax.tree.map(lambda leaf: leaf[index], prompts))  # noqa: B023
            parts.append(hosts.whole(function(part)))
            advance(min(begin + chunk, total))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:total], *parts)


def calibrate(run: Run, prompts: Prompts, policy: Any, scorer: Any) -> Reference:
    """K responses of π_ref for each training prompt: drawn, scored and ranked, once.

    Raises FloatingPointError where the reward is not finite.

    >>> calibrate.__name__
    'calibrate'
    """
    options, length = run.experiment.calibrate, run.experiment.sampling.length
    n, k = len(prompts.index), options.responses
    digest = digests.digest(
        "calibrate", policy.digest, scorer.digest, options, n, run.experiment.seed
    )
    sample = programs.make_sample(run.mesh, run.experiment.model, run.experiment.sampling, k)
    score = programs.make_rewards(run.mesh, run.experiment.scorer, running=True)

    def chunk(part: Prompts) -> Any:
        rollouts = sample(policy.params, part, run.key(5))
        responses = rollouts.responses
        return responses, rollouts.log_probs, score(scorer.params, part, responses)

    def make() -> tuple[Any, dict[str, Any]]:
        responses, log_probs, earned = in_chunks(run, "calibrate", prompts, options.chunk, chunk)
        rewards = earned[..., -1]
        check_finite(rewards, "calibrate")
        order = calibration.sorted_reference(rewards)
        own = jax.jit(partial(calibration.calibrate, leave_one_out=True))(rewards, order)
        tree = {
            "tokens": responses.tokens, "mask": responses.mask, "log_probs": log_probs,
            "rewards": rewards, "sorted": order, "quantiles": np.asarray(own),
            "running": foresight.standardise(earned, responses.mask),
        }  # fmt: skip
        return tree, {"tokens": int(responses.mask.sum())}

    like = {"tokens": EMPTY((n, k, length), jnp.int32), "mask": EMPTY((n, k, length), bool)}
    floats = ("log_probs", "rewards", "sorted", "quantiles")
    like |= {name: EMPTY((n, k), jnp.float32) for name in floats}
    like["running"] = EMPTY((n, k, length), jnp.float32)
    tree, info = stored(run, "calibrate", digest, like, make)
    return Reference(
        prompts, Responses(tree["tokens"], tree["mask"]), tree["log_probs"], tree["rewards"],
        tree["running"], tree["sorted"], tree["quantiles"], digest, info,
    )  # fmt: skip


def check_finite(rewards: np.ndarray, where: str) -> None:
    """Raises FloatingPointError where a reward is not finite.

    >>> check_finite(np.array([[1.0, np.inf]]), "calibrate")
    Traceback (most recent call last):
    FloatingPointError: calibrate: expected finite rewards, got inf at prompt 0, response 1; \
train the reward model at a lower learning rate
    """
    if not np.isfinite(rewards).all():
        prompt, response = np.argwhere(~np.isfinite(rewards))[0]
        raise FloatingPointError(
            f"{where}: expected finite rewards, got {rewards[prompt, response]} at prompt "
            f"{prompt}, response {response}; train the reward model at a lower learning rate"
        )
