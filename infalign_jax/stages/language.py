"""The stages that train on text: `sft`, `reward` and `judge`, and `foresight`."""

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from infalign_jax import foresight, programs, reward, training
from infalign_jax.batches import Array, Preferences, Responses
from infalign_jax.data import minibatches
from infalign_jax.experiment import FitConfig
from infalign_jax.lm import arithmetic, transformer
from infalign_jax.lm.arithmetic import Shape
from infalign_jax.runtime import digests, shards
from infalign_jax.runtime import mesh as meshes
from infalign_jax.stages.reference import Reference, pick
from infalign_jax.stages.run import Params, Run, abstract, fit, put, stored
from infalign_jax.stages.text import Text

Trunk = Literal["sft", "reward_sft", "judge_sft"]
SEEDS: dict[Trunk, tuple[int, int]] = {  # of initial parameters, of the order of batches
    "sft": (0, 0), "reward_sft": (10, 6), "judge_sft": (8, 5),
}  # fmt: skip


class Model(NamedTuple):
    """Trained parameters on the mesh, the digest of all they depend on, and what was measured.

    >>> Model._fields
    ('params', 'digest', 'info')
    """

    params: Params
    digest: str
    info: dict[str, Any]


def sft_loss(config: Any, params: Params, batch: Preferences) -> tuple[Array, dict[str, Array]]:
    """−log π(chosen | prompt), averaged over tokens; `nats` is its mean over responses.

    >>> import flax.linen as nn
    >>> from infalign_jax.batches import Prompts
    >>> config = transformer.TransformerConfig()
    >>> start = partial(transformer.initial_params, config)
    >>> params = jax.eval_shape(start, jax.random.key(0))
    >>> prompts = Prompts(jnp.ones((2, 3), int), jnp.ones((2, 3), bool), jnp.arange(2))
    >>> pairs = Preferences(prompts, Responses(jnp.ones((2, 2, 5), int), jnp.ones((2, 2, 5), bool)))
    >>> loss, numbers = jax.eval_shape(partial(sft_loss, config), nn.unbox(params), pairs)
    >>> loss.shape, list(numbers)
    ((), ['nats'])
    """
    tokens, mask = batch.responses.tokens[:, :1], batch.responses.mask[:, :1]
    log_probs = transformer.log_probs(config, params, batch.prompts, Responses(tokens, mask))
    return -log_probs.sum() / mask.sum(dtype=jnp.float32), {"nats": -log_probs.mean()}


def sft(run: Run, text: Text, stage: Trunk = "sft") -> Model:
    """The reference policy π_ref: the transformer trained on the chosen responses.

    `judge_sft` is the trunk that the judge starts from, with another seed and on its own split;
    `reward_sft` the training reward's, where that has a size of its own.

    >>> sft.__name__
    'sft'
    """
    experiment = run.experiment
    config = experiment.model if stage == "sft" else experiment.scorer
    split = "judge" if stage == "judge_sft" else "train"
    boxed, (key, offset) = programs.boxed_params(config), SEEDS[stage]
    digest = digests.digest(stage, text.digest, config, experiment.sft, experiment.seed)
    loss = partial(sft_loss, config)

    def start() -> Params:
        return programs.initial_params(run.mesh, config, run.key(key))

    return _supervised(run, stage, digest, boxed, start, loss, experiment.sft, text, split, offset)


def reward_trunk(run: Run, text: Text, policy: Model) -> Model:
    """What the training reward starts from: π_ref, or a trunk of the reward's own size.

    >>> from pathlib import Path
    >>> from infalign_jax.experiment import Experiment
    >>> run = Run(Experiment("quick"), Path("runs"), None)
    >>> reward_trunk(run, None, Model({}, "ab", {})).digest
    'ab'
    """
    return policy if run.experiment.reward_model is None else sft(run, text, "reward_sft")


def reward_model(run: Run, text: Text, trunk: Model, judge: bool) -> Model:
    """The training reward, or the judge, which shares nothing with it but the tokenizer.

    The training reward starts from the reference policy, or from a trunk of its own size, and sees
    its split; the judge starts from a trunk of its own and sees another split, in its own order.

    >>> reward_model.__name__
    'reward_model'
    """
    experiment, config = run.experiment, run.experiment.scorer
    stage, split = ("judge", "judge") if judge else ("reward", "train")
    digest = digests.digest(stage, trunk.digest, config, experiment.reward, experiment.seed + judge)
    loss = partial(reward.loss, config)
    boxed = reward.with_head(config, programs.boxed_params(config))

    def start() -> Params:
        return reward.with_head(config, trunk.params)

    model = _supervised(
        run, stage, digest, boxed, start, loss, experiment.reward, text, split, offset=1 + judge
    )
    return model._replace(info=model.info | held_out_accuracy(run, model.params, text))


def parts(rows: Preferences) -> Iterator[Preferences]:
    """Rows in their order, 64 at a time.

    >>> from infalign_jax.batches import Prompts
    >>> rows = Preferences(Prompts(*[np.zeros(99)] * 3), Responses(*[np.zeros(99)] * 2))
    >>> [len(part.prompts.index) for part in parts(rows)]
    [64, 35]
    """
    for begin in range(0, len(rows.prompts.index), 64):
        yield jax.tree.map(lambda leaf: leaf[begin : begin + 64], rows)  # noqa: B023


def held_out_accuracy(run: Run, params: Params, text: Text) -> dict[str, float]:
    """Accuracy on the pairs of validation and test, its standard error, and a length-only baseline.

    >>> held_out_accuracy.__name__
    'held_out_accuracy'
    """
    score = jax.jit(
        shards.within(run.mesh, partial(reward.rewards, run.experiment.scorer)),
        out_shardings=meshes.replicated(run.mesh),
    )
    right, longer = [], []
    for split in ("validation", "test"):
        for part in parts(text.rows[split]):
            values = np.asarray(score(params, part.prompts, part.responses))
            lengths = part.responses.mask.sum(axis=-1)
            right.append(np.asarray(reward.correct(jnp.asarray(values[:, 0] - values[:, 1]))))
            longer.append((np.sign(lengths[:, 0] - lengths[:, 1]) + 1) / 2)
    correct, by_length = np.concatenate(right), np.concatenate(longer)
    return {
        "accuracy": float(correct.mean()),
        "standard_error": float(correct.std(ddof=1) / len(correct) ** 0.5),
        "pairs": len(correct),
        "length_only_accuracy": float(by_length.mean()),
    }


def _supervised(
    run: Run, stage: str, digest: str, boxed: Params, start: Any, loss: training.Loss,
    config: FitConfig, text: Text, split: str, offset: int,
) -> Model:  # fmt: skip
    transform = training.optimiser(config.optimiser, config.steps)
    layout = meshes.shardings(run.mesh, boxed)

    def make() -> tuple[Params, dict[str, Any]]:
        rows = text.rows[split]
        state = training.initial_state(run.mesh, boxed, start(), transform)
        update = training.make_update(loss, transform, run.mesh, boxed)
        own = meshes.own_rows(run.mesh, config.batch_size)
        batches = minibatches(rows, config.batch_size, run.experiment.seed * 10 + offset, own)
        language = stage.endswith("sft")
        shape = Shape(
            config.batch_size, rows.prompts.tokens.shape[-1], 1 if language else 2,
            rows.responses.tokens.shape[-1],
        )  # fmt: skip
        model = run.experiment.model if stage == "sft" else run.experiment.scorer
        once = arithmetic.forward(model, shape, logits=language)
        return fit(
            run, stage, digest, state, update, batches, config.steps, shape.tokens,
            lambda _, rows, step: meshes.put_own(rows, run.mesh), flops=3 * once.flops,
        )  # fmt: skip

    params, info = stored(run, stage, digest, abstract(boxed, layout), make)
    return Model(params, digest, info)


def anticipate(run: Run, policy: Model, reference: Reference) -> Model:
    """The stage `foresight`: the policy's trunk, which has learnt to foresee the quantile.

    With `foresight.steps = 0` the reference policy itself.

    >>> anticipate.__name__
    'anticipate'
    """
    experiment, config, options = run.experiment, run.experiment.model, run.experiment.foresight
    if options.steps == 0:
        return policy
    digest = digests.digest("foresight", reference.digest, options, experiment.seed)
    boxed = foresight.with_head(config, run.boxed)
    layout = meshes.shardings(run.mesh, boxed)
    loss = partial(foresight.loss, config, options.hold)
    given = meshes.shardings(run.mesh, run.boxed), meshes.batch_sharding(run.mesh)
    transform = training.optimiser(options.optimiser, options.steps)

    def make() -> tuple[Params, dict[str, Any]]:
        start = foresight.with_head(config, policy.params)
        state = training.initial_state(run.mesh, boxed, start, transform)
        update = training.make_update(loss, transform, run.mesh, boxed, given)
        rows = np.arange(len(reference.rewards))
        batches = minibatches(rows, options.batch_size, experiment.seed * 10 + 3)
        shape = Shape(
            options.batch_size, experiment.prompt_length, options.responses,
            experiment.sampling.length,
        )  # fmt: skip
        once = arithmetic.forward(config, shape)  # of which the reference takes one, and no update

        def prepare(_: Params, rows: np.ndarray, step: int) -> tuple[Params, foresight.Batch]:
            return policy.params, stored_batch(run, reference, rows, step, options.responses)

        return fit(
            run, "foresight", digest, state, update, batches, options.steps, shape.tokens, prepare,
            flops=4 * once.flops,
        )  # fmt: skip

    params, info = stored(run, "foresight", digest, abstract(boxed, layout), make)
    return Model(params["trunk"], digest, info)


def stored_batch(
    run: Run, reference: Reference, rows: np.ndarray, step: int, responses: int
) -> foresight.Batch:
    """Some stored responses of some prompts, with their quantiles, on the mesh.

    Which ones depends on (seed, step) alone.

    >>> from pathlib import Path
    >>> from infalign_jax.batches import Prompts
    >>> from infalign_jax.experiment import Experiment
    >>> mesh = meshes.make(meshes.MeshConfig(), jax.devices()[:1])
    >>> prompts = Prompts(np.ones((5, 3)), np.ones((5, 3)), np.arange(5))
    >>> tokens = Responses(np.ones((5, 8, 4)), np.ones((5, 8, 4), bool))
    >>> reference = Reference(prompts, tokens, *[np.ones((5, 8))] * 2, np.ones((5, 8, 4)),
    ...     *[np.ones((5, 8))] * 2, "", {})
    >>> run = Run(Experiment("quick"), Path("runs"), mesh)
    >>> batch = stored_batch(run, reference, np.array([1, 4]), step=0, responses=3)
    >>> batch.responses.tokens.shape, batch.prompts.index.tolist()
    ((2, 3, 4), [1, 4])
    """
    prompts, at = pick(reference, rows, responses, [run.experiment.seed, 4, step])
    picked = jax.tree.map(lambda leaf: leaf[at], reference.responses)
    batch = foresight.Batch(prompts, picked, reference.quantiles[at], reference.running[at])
    return put(run, batch)
