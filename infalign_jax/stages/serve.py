"""A finished run's policies, asked for responses to prompts of one's own."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from infalign_jax import data, programs
from infalign_jax.experiment import Experiment
from infalign_jax.runtime import hosts, mesh_sizes
from infalign_jax.runtime import mesh as meshes
from infalign_jax.runtime.files import exclusive
from infalign_jax.stages import align, evaluate, language, reference, text
from infalign_jax.stages.language import Model
from infalign_jax.stages.run import Run, put

REFERENCE = "reference"


class Served(NamedTuple):
    """What answers: policies by name, π_ref as `reference`, and the reward that chooses.

    >>> Served._fields
    ('run', 'words', 'policies', 'scorer')
    """

    run: Run
    words: text.Text
    policies: dict[str, Model]
    scorer: Model


class Response(NamedTuple):
    """A response with its reward by the training reward.

    >>> max([Response("a", 0.5), Response("b", 2.0)], key=lambda y: y.reward).text  # best of 2
    'b'
    """

    text: str
    reward: float


def load(experiment: Experiment, out: Path) -> Served:
    """The policies that `infalign run` has left in `out`; a stage that is not there is run first.

    Raises ValueError where a run uses `out`, or the devices do not fit the experiment.

    >>> load.__name__
    'load'
    """
    mesh = mesh_sizes.fitted(experiment.mesh, experiment.models, experiment.batch_sizes)
    run = Run(experiment, out, mesh)
    with exclusive(out):
        return _loaded(run)


def _loaded(run: Run) -> Served:
    experiment, words = run.experiment, text.load(run)
    prompts = text.prompts_of(words, experiment, "train", experiment.calibrate.prompts)[1]
    sft = language.sft(run, words)
    trunk = language.reward_trunk(run, words, sft)
    scorer = language.reward_model(run, words, trunk, judge=False)
    stored = reference.calibrate(run, prompts, sft, scorer)
    start = language.anticipate(run, sft, stored)
    policies = {
        policy.name: align.align(run, policy, start, sft, scorer, stored)
        for policy in experiment.policies
    }
    return Served(run, words, {REFERENCE: sft} | policies, scorer)


def respond(
    served: Served, policy: str, prompts: Sequence[str], count: int, seed: int = 0
) -> dict[str, list[Response]]:
    """`count` responses of a policy to each prompt, in the order drawn.

    Best-of-N serves the one with the highest reward among the first N. Raises ValueError for a
    policy that there is not, and for prompts that are empty or longer than `prompt_length`.

    >>> from infalign_jax.lm import tokenizer, transformer
    >>> from infalign_jax.sampling import SamplingConfig
    >>> pieces = tokenizer.TokenizerConfig(264, symbols=())
    >>> words = tokenizer.Tokenizer(tokenizer.train(["ab ab"], pieces))
    >>> small = transformer.TransformerConfig(264, 4, 1, 1, 1, 4)
    >>> law, mesh = SamplingConfig(2), meshes.make(meshes.MeshConfig(), jax.devices()[:1])
    >>> few = Experiment("few", tokenizer=pieces, model=small, sampling=law, prompt_length=4)
    >>> run = Run(few, Path("runs"), mesh)
    >>> params = programs.initial_params(mesh, small, jax.random.key(0))
    >>> scorer = {"trunk": params, "head": np.zeros(4, np.float32)}
    >>> words = text.Text(words, {}, {}, {}, "")
    >>> served = Served(run, words, {"mine": Model(params, "", {})}, Model(scorer, "", {}))
    >>> drawn = respond(served, "mine", ["ab"], count=3)
    >>> [response.reward for response in drawn["ab"]]
    [0.0, 0.0, 0.0]
    """
    if policy not in served.policies:
        raise ValueError(f"expected a policy among {', '.join(served.policies)}, got {policy}")
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError("expected prompts with some text, got an empty one; leave it out")
    run, model = served.run, served.run.experiment.model
    distinct = list(dict.fromkeys(prompts))
    length = run.experiment.prompt_length
    encoded, _ = data.encode_prompts(distinct, served.words.tokenizer, length, "error")
    parts = meshes.batch_parts(run.mesh)
    filled = np.arange(-(-len(distinct) // parts) * parts) % len(distinct)
    rows = put(run, jax.tree.map(lambda leaf: leaf[filled], encoded))
    sample = programs.make_sample(run.mesh, model, run.experiment.sampling, count)
    rollouts = sample(served.policies[policy].params, rows, run.key(9, seed))
    score = programs.make_rewards(run.mesh, run.experiment.scorer)
    rewards = hosts.whole(score(served.scorer.params, rows, rollouts.responses))
    tokens = hosts.whole(rollouts.responses.tokens)
    return {
        prompt: [
            Response(y, float(r))
            for y, r in zip(evaluate.decoded(served.words, tokens[i]), rewards[i], strict=True)
        ]
        for i, prompt in enumerate(distinct)
    }
