"""An experiment's programs, to be compiled from shapes alone for devices that need not be there.

What a program holds is its operands and its buffers. A run keeps more beside them:
parameters of the other models, the optimiser's moments, policies trained before. That is `held`, in
copies of the float32 parameters, each divided over `fsdp` and `tensor`.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from infalign_jax import learner, programs, reward, sampling, training
from infalign_jax.batches import Preferences, Prompts, Responses, Rollouts
from infalign_jax.drawing import SamplingConfig
from infalign_jax.experiment import Experiment
from infalign_jax.lm import arithmetic, transformer
from infalign_jax.lm.arithmetic import Shape
from infalign_jax.lm.transformer import TransformerConfig
from infalign_jax.runtime import mesh as meshes
from infalign_jax.stages import align, language
from infalign_jax.stages.run import Run

SFT, REWARD, DRAWS, PREFILL = "SFT step", "reward step", "reference sampler", "prefill"
SAMPLER, LOG_PROBS, SCORES, UPDATE = "sampler", "log-probabilities", "rewards", "RL update"


_boxed = lru_cache(maxsize=4)(programs.boxed_params)


class Phase(NamedTuple):
    """A program that has not been lowered yet, and what is known of it beforehand."""

    lower: Callable[[], Any]
    shape: Shape
    flops: float  # the model's, on all devices together
    held: float = 0.0  # copies of the parameters beside those that the program takes
    trips: tuple[tuple[int, int], ...] = ()  # of loops that end when the responses do


def of_experiment(experiment: Experiment, mesh: Mesh) -> dict[str, Phase]:
    """Every phase by its name, in the order in which a run comes to it.

    >>> mesh = meshes.make(meshes.MeshConfig(), jax.devices()[:1])
    >>> list(of_experiment(Experiment("quick"), mesh))[:4]
    ['SFT step', 'reward step', 'reference sampler', 'prefill']
    """
    e, model, law, sizes = experiment, experiment.model, experiment.sampling, shapes(experiment)
    each = sizes[UPDATE]
    # π_ref, the reward, the judge and its trunk; the trunk with foresight; policies trained before.
    kept = 4.0 + bool(e.foresight.steps) + len(e.policies) - 1
    scored = kept - 1 + 3  # of which one is an operand; and the policy with two moments
    scores = forward(programs.make_rewards(mesh, model), mesh, model, each, head=True)
    return {
        SFT: _sft(mesh, e, sizes[SFT]),
        REWARD: _reward(mesh, e, sizes[REWARD]),
        DRAWS: sampler(mesh, model, law, sizes[DRAWS])._replace(held=3.0),
        PREFILL: prefill(mesh, model, each)._replace(held=kept + 2),
        SAMPLER: sampler(mesh, model, law, each)._replace(held=kept + 2),
        LOG_PROBS: log_probs(mesh, model, each)._replace(held=scored),
        SCORES: scores._replace(held=scored),
        UPDATE: _rl_update(mesh, e, each)._replace(held=kept),
    }


def shapes(experiment: Experiment) -> dict[str, Shape]:
    """The batch of every phase, on all devices together.

    >>> shapes(Experiment("quick"))["SFT step"]
    Shape(prompts=128, prompt=12, responses=1, response=16)
    """
    e, length, longest = experiment, experiment.sampling.length, experiment.prompt_length
    found = {
        SFT: Shape(e.sft.batch_size, longest, 1, length),
        REWARD: Shape(e.reward.batch_size, longest, 2, length),
        DRAWS: Shape(e.calibrate.chunk, longest, e.calibrate.responses, length),
    }
    each = Shape(e.align.batch_size, longest, e.align.responses, length)
    return found | dict.fromkeys([PREFILL, SAMPLER, LOG_PROBS, SCORES, UPDATE], each)


def rows(shape: Shape) -> tuple[Prompts, Responses]:
    """A batch as shapes.

    >>> rows(Shape(2, 3, 4, 5))[1].tokens.shape
    (2, 4, 5)
    """
    b, p, k, t = shape
    some: Any = jax.ShapeDtypeStruct
    return (
        Prompts(some((b, p), jnp.int32), some((b, p), bool), some((b,), jnp.int32)),
        Responses(some((b, k, t), jnp.int32), some((b, k, t), bool)),
    )


def prefill(mesh: Mesh, model: TransformerConfig, shape: Shape) -> Phase:
    """The prompts alone.

    >>> mesh = meshes.make(meshes.MeshConfig(), jax.devices()[:1])
    >>> prefill(mesh, TransformerConfig(), Shape(2, 3, 4, 5)).flops
    1188864.0
    """
    boxed, batch = _boxed(model), meshes.batch_sharding(mesh)
    program = jax.jit(
        meshes.within(mesh, partial(transformer.prefill, model)),
        in_shardings=(meshes.shardings(mesh, boxed), batch),
    )
    flops = arithmetic.prefill(model, shape).flops
    return Phase(lambda: program.lower(nn.unbox(boxed), rows(shape)[0]), shape, flops)


def sampler(mesh: Mesh, model: TransformerConfig, law: SamplingConfig, shape: Shape) -> Phase:
    """Prompts and all their responses, each as long as can be.

    >>> mesh = meshes.make(meshes.MeshConfig(), jax.devices()[:1])
    >>> sampler(mesh, TransformerConfig(), SamplingConfig(5), Shape(2, 3, 4, 5)).trips
    ((1, 5),)
    """
    params = nn.unbox(_boxed(model))
    program: Any = programs.make_sample(mesh, model, law, shape.responses)
    cost = arithmetic.prefill(model, shape), arithmetic.decode(model, shape)
    parts = meshes.batch_parts(mesh) if mesh.shape["tensor"] == 1 else 1
    trips = sampling.longest(law, -(-shape.prompts // parts), shape.responses)

    def lower() -> Any:
        return program.lower(params, rows(shape)[0], jax.eval_shape(lambda: jax.random.key(0)))

    return Phase(lower, shape, sum(part.flops for part in cost), trips=trips)


def log_probs(mesh: Mesh, model: TransformerConfig, shape: Shape) -> Phase:
    """log π(y | x) of given responses.

    >>> mesh = meshes.make(meshes.MeshConfig(), jax.devices()[:1])
    >>> log_probs(mesh, TransformerConfig(), Shape(2, 3, 4, 5)).trips
    ()
    """
    return forward(programs.make_log_probs(mesh, model), mesh, model, shape)


def forward(
    program: Any, mesh: Mesh, model: TransformerConfig, shape: Shape, head: bool = False
) -> Phase:
    """A pass over given responses by `programs.make_log_probs`, or with a `head` by `make_rewards`.

    >>> mesh, shape = meshes.make(meshes.MeshConfig(), jax.devices()[:1]), Shape(2, 3, 4, 5)
    >>> program = programs.make_rewards(mesh, TransformerConfig())
    >>> forward(program, mesh, TransformerConfig(), shape, head=True).flops
    9217024.0
    """
    boxed = _boxed(model)
    params = nn.unbox(reward.with_head(model, boxed) if head else boxed)
    flops = arithmetic.forward(model, shape, logits=not head).flops
    return Phase(lambda: program.lower(params, *rows(shape)), shape, flops)


def update(
    mesh: Mesh, loss: training.Loss, boxed: Any, config: training.OptimiserConfig, batch: Any,
    shape: Shape, flops: float,
) -> Phase:  # fmt: skip
    """One step of Adam on a loss, from the shapes of boxed parameters and of a batch.

    >>> mesh = meshes.make(meshes.MeshConfig(), jax.devices()[:1])
    >>> boxed, loss = {"w": jax.ShapeDtypeStruct((), "float32")}, lambda p, batch: (p["w"], {})
    >>> shape, adam = Shape(1, 1, 1, 1), training.OptimiserConfig()
    >>> type(update(mesh, loss, boxed, adam, jnp.zeros(1), shape, 1.0).lower()).__name__
    'Lowered'
    """
    params, adam = nn.unbox(boxed), training.optimiser(config, 10**6)
    state = jax.eval_shape(
        lambda own: training.TrainState(own, adam.init(own), jnp.zeros((), jnp.int32)), params
    )
    program: Any = training.make_update(loss, adam, mesh, boxed)
    return Phase(lambda: program.lower(state, batch), shape, flops)


def rl_batch(shape: Shape) -> learner.Batch:
    """What the RL update takes, as shapes.

    >>> rl_batch(Shape(2, 3, 4, 5)).rewards.shape
    (2, 4)
    """
    number: Any = jax.ShapeDtypeStruct((shape.prompts, shape.responses), jnp.float32)
    return learner.Batch(Rollouts(*rows(shape), number), number, number, number, number)


def _rl_update(mesh: Mesh, experiment: Experiment, shape: Shape) -> Phase:
    model = experiment.model
    goal = align.Target(lambda u: u, 0.1, 0.0, 0.5)  # whose numbers change nothing but numbers
    loss = align.loss_of(Run(experiment, Path(), mesh), goal)
    boxed, adam = _boxed(model), experiment.align.optimiser
    flops = arithmetic.update(model, shape).flops
    return update(mesh, loss, boxed, adam, rl_batch(shape), shape, flops)


def _sft(mesh: Mesh, experiment: Experiment, shape: Shape) -> Phase:
    """The judge's trunk is trained while π_ref and the reward are kept."""
    model, boxed = experiment.model, _boxed(experiment.model)
    flops, adam = arithmetic.update(model, shape).flops, experiment.sft.optimiser
    loss, pairs = partial(language.sft_loss, model), Preferences(*rows(shape._replace(responses=2)))
    return update(mesh, loss, boxed, adam, pairs, shape, flops)._replace(held=2.0)


def _reward(mesh: Mesh, experiment: Experiment, shape: Shape) -> Phase:
    """The judge is trained while π_ref, the reward and the judge's trunk are kept."""
    model, adam = experiment.model, experiment.reward.optimiser
    flops = 3 * arithmetic.forward(model, shape, logits=False).flops
    boxed = reward.with_head(model, _boxed(model))
    loss, pairs = partial(reward.loss, model), Preferences(*rows(shape))
    return update(mesh, loss, boxed, adam, pairs, shape, flops)._replace(held=3.0)
