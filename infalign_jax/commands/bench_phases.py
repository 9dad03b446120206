"""The programs of one RL step, compiled for one batch of random prompts."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from infalign_jax import learner, programs, reward, rollout, training, transformations
from infalign_jax.batches import Array, Prompts, Rollouts
from infalign_jax.drawing import SamplingConfig
from infalign_jax.lm import transformer
from infalign_jax.lm.arithmetic import Shape
from infalign_jax.lm.transformer import Params, TransformerConfig
from infalign_jax.runtime import measure, shards
from infalign_jax.runtime import mesh as meshes

REFERENCE = 128  # stored rewards a prompt, which new ones are ranked among
WHOLE = "whole step"


class Phase(NamedTuple):
    """One compiled program, to be called with what it was compiled for, or with its like."""

    call: Callable[..., Any]
    memory: int  # bytes
    compile_seconds: float


class _Inputs(NamedTuple):
    params: Params
    judge: Params
    prompts: Prompts
    ranked: Array  # float32[B, REFERENCE]
    key: Array


def compiled(model: TransformerConfig, shape: Shape, mesh: Mesh) -> dict[str, Phase]:
    """Every phase by its name: sampling with its prefill, and prefill alone, too.

    The first calls have been made.

    >>> model = TransformerConfig(8, 4, 1, 1, 1, 4)
    >>> mesh = meshes.make(meshes.MeshConfig(), jax.devices()[:1])
    >>> phases = compiled(model, Shape(1, 2, 2, 3), mesh)
    >>> phases["sample"].call().responses.tokens.shape
    (1, 2, 3)
    """
    own = _inputs(model, shape, mesh)
    batch = meshes.batch_sharding(mesh)
    layout = meshes.shardings(mesh, programs.boxed_params(model))
    law = SamplingConfig(length=shape.response, end=model.vocab_size)  # which no draw reaches
    prefill = shards.within(mesh, partial(transformer.prefill, model))
    prefill = jax.jit(prefill, in_shardings=(layout, batch))
    sample = programs.make_sample(mesh, model, law, shape.responses)
    found = {
        "prefill": _compiled(prefill, own.params, own.prompts),
        "sample": _compiled(sample, own.params, own.prompts, own.key),
    }
    rollouts: Rollouts = found["sample"].call()
    log_probs = _compiled(
        programs.make_log_probs(mesh, model), own.params, own.prompts, rollouts.responses
    )
    score = _compiled(
        programs.make_rewards(mesh, model), own.judge, own.prompts, rollouts.responses
    )
    rank = rollout.make_rank(mesh, transformations.exponential(4.0))
    ranking = _compiled(rank, rollouts, score.call(), own.ranked, log_probs.call())
    made = ranking.call()
    learning, learn = _learning(model, mesh, own.params, made)
    parts = rollout.Parts(
        found["sample"].call,
        partial(score.call, own.judge),
        partial(log_probs.call, own.params),
        ranking.call,
    )

    def step() -> Any:
        return learn(rollout.batch(parts, own.params, own.prompts, own.ranked, own.key))

    return found | {
        "reference log-probabilities": log_probs,
        "reward scoring": score,
        "calibration": ranking,
        "update": learning._replace(call=lambda: learn(made)),
        WHOLE: learning._replace(call=step, compile_seconds=0.0),
    }


def _inputs(model: TransformerConfig, shape: Shape, mesh: Mesh) -> _Inputs:
    params = programs.initial_params(mesh, model, jax.random.key(0))
    judge = nn.unbox(reward.with_head(model, params))
    rng, size = np.random.default_rng(0), (shape.prompts, shape.prompt)
    tokens = rng.integers(3, model.vocab_size, size, np.int32)
    index = np.arange(shape.prompts, dtype=np.int32)
    prompts = Prompts(*meshes.put_batch((tokens, np.ones(size, bool), index), mesh))
    rewards = rng.normal(size=(shape.prompts, REFERENCE)).astype(np.float32)
    table = meshes.put_batch(np.sort(rewards, axis=1), mesh)
    layout = meshes.shardings(mesh, reward.with_head(model, programs.boxed_params(model)))
    return _Inputs(params, jax.device_put(judge, layout), prompts, table, jax.random.key(1))


def _learning(
    model: TransformerConfig, mesh: Mesh, params: Params, batch: learner.Batch
) -> tuple[Phase, Callable[[learner.Batch], Any]]:
    """The update, and a function that learns from a batch and keeps the state."""
    boxed = programs.boxed_params(model)
    adam = training.optimiser(training.OptimiserConfig(), 10**6)
    loss = learner.policy_gradient(partial(transformer.log_probs, model), 0.1, 0.0, "partition")
    update = training.make_update(loss, adam, mesh, boxed)
    state = [training.initial_state(mesh, boxed, params, adam)]
    learning = _compiled(update, state[0], batch)

    def learn(batch: learner.Batch) -> Any:
        state[0], metrics = learning.call(state[0], batch)
        return metrics

    return learning, learn


def _compiled(program: Any, *operands: Any) -> Phase:
    begun = time.perf_counter()
    ready = program.lower(*operands).compile()
    seconds = time.perf_counter() - begun

    def call(*others: Any) -> Any:
        return ready(*(others or operands))

    return Phase(call, measure.memory_of(ready), seconds)
