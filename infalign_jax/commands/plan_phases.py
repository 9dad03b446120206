"""An experiment's programs, to be compiled from shapes alone for devices that need not be there.

What a program holds is its operands and its buffers. A run keeps more beside them: parameters of
the other models, the optimiser's moments, policies trained before. That is `held`, in float32 and
divided over `fsdp` and `tensor`.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from infalign_jax import foresight, learner, phases, programs, reward, sampling, training
from infalign_jax.batches import Preferences, Prompts, Responses, Rollouts
from infalign_jax.drawing import SamplingConfig
from infalign_jax.experiment import Experiment
from infalign_jax.lm import arithmetic, transformer
from infalign_jax.lm.arithmetic import Cost, Shape
from infalign_jax.lm.transformer import TransformerConfig
from infalign_jax.phases import (
    DRAWS,
    FORESIGHT,
    LOG_PROBS,
    PREFILL,
    REWARD,
    SAMPLER,
    SCORES,
    SFT,
    TRUNK,
    UPDATE,
)
from infalign_jax.programs import boxed_params
from infalign_jax.runtime import mesh as meshes
from infalign_jax.runtime import shards
from infalign_jax.stages import align, language
from infalign_jax.stages.run import Run


class Phase(NamedTuple):
    """A program that has not been lowered yet, and what is known of it beforehand."""

    lower: Callable[[], Any]
    shape: Shape
    cost: Callable[[Shape, int], Cost]  # the model's, where its state has so many shards
    held: float = 0.0  # numbers that a run keeps beside those that the program takes
    trips: tuple[tuple[int, int], ...] = ()  # of loops that end when the responses do

    @property
    def flops(self) -> float:
        """The model's, on all devices together."""
        return self.cost(self.shape, 1).flops


def stateless(cost: Callable[[Shape], Cost]) -> Callable[[Shape, int], Cost]:
    """The cost of a phase that has no state to be divided.

    >>> stateless(lambda shape: Cost(8.0, 0.0))(Shape(1, 2, 3, 4), 2).flops
    8.0
    """
    return lambda shape, shards: cost(shape)


def of_experiment(experiment: Experiment, mesh: Mesh) -> dict[str, Phase]:
    """Every phase by its name, in the order in which a run comes to it.

    >>> mesh = meshes.make(meshes.MeshConfig(), jax.devices()[:1])
    >>> list(of_experiment(Experiment("quick"), mesh))[:4]
    ['SFT step', 'reward step', 'reference sampler', 'foresight step']
    """
    e, model, law = experiment, experiment.model, experiment.sampling
    sizes = phases.shapes(experiment)
    each, n, m = sizes[UPDATE], *map(arithmetic.parameters, (e.model, e.scorer))
    own = e.reward_model is not None  # so that the reward has a trunk of its own
    trained = n + m * (1 + own)  # π_ref and the reward while the judge is trained
    kept = n * (1 + bool(e.foresight.steps) + len(e.policies) - 1) + 2 * m
    learnt = kept + 2 * n  # while the policy, whose moments are kept too, is the operand
    scores = forward(programs.make_rewards(mesh, e.scorer), mesh, e.scorer, each, head=True)
    found = {
        SFT: _sft(mesh, e, model, sizes[SFT])._replace(held=0.0 if own else trained),
        TRUNK: _sft(mesh, e, e.scorer, sizes[TRUNK])._replace(held=trained),
        REWARD: _reward(mesh, e, sizes[REWARD])._replace(held=trained + m),
        DRAWS: sampler(mesh, model, law, sizes[DRAWS])._replace(held=2 * m),
        FORESIGHT: _foresight(mesh, e, sizes[FORESIGHT])._replace(held=2 * m),
        PREFILL: prefill(mesh, model, each)._replace(held=learnt),
        SAMPLER: sampler(mesh, model, law, each)._replace(held=learnt),
        LOG_PROBS: log_probs(mesh, model, each)._replace(held=learnt),
        SCORES: scores._replace(held=learnt + n - m),
        UPDATE: _rl_update(mesh, e, each)._replace(held=kept),
    }
    return {name: found[name] for name in phases.of(experiment)}


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
    boxed, batch = boxed_params(model), meshes.batch_sharding(mesh)
    program = jax.jit(
        shards.within(mesh, partial(transformer.prefill, model)),
        in_shardings=(meshes.shardings(mesh, boxed), batch),
    )
    cost = stateless(partial(arithmetic.prefill, model))
    return Phase(lambda: program.lower(nn.unbox(boxed), rows(shape)[0]), shape, cost)


def sampler(mesh: Mesh, model: TransformerConfig, law: SamplingConfig, shape: Shape) -> Phase:
    """Prompts and all their responses, each as long as can be.

    >>> mesh = meshes.make(meshes.MeshConfig(), jax.devices()[:1])
    >>> sampler(mesh, TransformerConfig(), SamplingConfig(5), Shape(2, 3, 4, 5)).trips
    ((1, 5),)
    """
    params = nn.unbox(boxed_params(model))
    program: Any = programs.make_sample(mesh, model, law, shape.responses)
    trips = sampling.longest(law, -(-shape.prompts // meshes.batch_parts(mesh)), shape.responses)

    def lower() -> Any:
        return program.lower(params, rows(shape)[0], jax.eval_shape(lambda: jax.random.key(0)))

    return Phase(lower, shape, stateless(partial(arithmetic.sampling, model)), trips=trips)


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
    boxed = boxed_params(model)
    params = nn.unbox(reward.with_head(model, boxed) if head else boxed)
    cost = stateless(partial(arithmetic.forward, model, logits=not head))
    return Phase(lambda: program.lower(params, *rows(shape)), shape, cost)


def update(
    mesh: Mesh, loss: training.Loss, boxed: Any, config: training.OptimiserConfig, batch: Any,
    shape: Shape, cost: Callable[[Shape, int], Cost], layout: Any = None,
) -> Phase:  # fmt: skip
    """One step of Adam on a loss, from the shapes of boxed parameters and of a batch.

    `layout` is the batch's, as of `training.make_update`.

    >>> mesh = meshes.make(meshes.MeshConfig(), jax.devices()[:1])
    >>> boxed, loss = {"w": jax.ShapeDtypeStruct((), "float32")}, lambda p, batch: (p["w"], {})
    >>> shape, adam = Shape(1, 1, 1, 1), training.OptimiserConfig()
    >>> type(update(mesh, loss, boxed, adam, jnp.zeros(1), shape, None).lower()).__name__
    'Lowered'
    """
    params, adam = nn.unbox(boxed), training.optimiser(config, 10**6)
    state = jax.eval_shape(
        lambda own: training.TrainState(own, adam.init(own), jnp.zeros((), jnp.int32)), params
    )
    program: Any = training.make_update(loss, adam, mesh, boxed, layout)
    return Phase(lambda: program.lower(state, batch), shape, cost)


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
    boxed, adam = boxed_params(model), experiment.align.optimiser
    cost = partial(arithmetic.update, model)
    return update(mesh, loss, boxed, adam, rl_batch(shape), shape, cost)


def _sft(mesh: Mesh, experiment: Experiment, model: TransformerConfig, shape: Shape) -> Phase:
    boxed, adam, cost = (
        boxed_params(model),
        experiment.sft.optimiser,
        partial(arithmetic.update, model),
    )
    loss, pairs = partial(language.sft_loss, model), Preferences(*rows(shape._replace(responses=2)))
    return update(mesh, loss, boxed, adam, pairs, shape, cost)


def _reward(mesh: Mesh, experiment: Experiment, shape: Shape) -> Phase:
    model, adam = experiment.scorer, experiment.reward.optimiser
    cost = partial(arithmetic.update, model, logits=False)
    boxed = reward.with_head(model, boxed_params(model))
    loss, pairs = partial(reward.loss, model), Preferences(*rows(shape))
    return update(mesh, loss, boxed, adam, pairs, shape, cost)


def _foresight(mesh: Mesh, experiment: Experiment, shape: Shape) -> Phase:
    model, options, trunk = experiment.model, experiment.foresight, boxed_params(experiment.model)
    own: Any = jax.ShapeDtypeStruct((shape.prompts, shape.responses), jnp.float32)
    running: Any = jax.ShapeDtypeStruct((*own.shape, shape.response), jnp.float32)
    batch = nn.unbox(trunk), foresight.Batch(*rows(shape), own, running)
    layout = meshes.shardings(mesh, trunk), meshes.batch_sharding(mesh)
    loss = partial(foresight.loss, model, options.hold)

    def cost(shape: Shape, shards: int) -> Cost:
        both = arithmetic.update(model, shape, shards), arithmetic.forward(model, shape)
        return Cost(sum(each.flops for each in both), sum(each.bytes for each in both))

    boxed = foresight.with_head(model, trunk)
    return update(mesh, loss, boxed, options.optimiser, batch, shape, cost, layout)
