"""This library on the work of `work.py`: RL steps as the stage `align` takes them, or sampling.

Run by `peers.py`. A step is prompts -> rollouts -> rewards -> ranks among 128 reference rewards of
the prompt -> Φ -> update, with log π_ref of every response. The reference rewards are made once,
before training, so here they are read from a table, as in a run. The end token lies outside the
vocabulary. On a CPU every core is a device of XLA's, as in `infalign run`. Its settings are fields
of `TransformerConfig`, by default those that `infalign bench` would take for the device: on a CPU
unrolled layers, since there the body of a scan does without threads; on a GPU cuDNN's attention.
"""

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from work import Work, even_share, prompt_tokens, read, report

if read().device == "cpu":
    os.environ["JAX_PLATFORMS"] = "cpu"

import flax.linen as nn
import jax
import numpy as np

import infalign_jax
from infalign_jax import frontier, learner, programs, rollout, training, transformations
from infalign_jax import reward as rewards
from infalign_jax.batches import Array, Prompts, Responses
from infalign_jax.lm import transformer
from infalign_jax.lm.transformer import TransformerConfig
from infalign_jax.runtime import mesh as meshes
from infalign_jax.sampling import SamplingConfig

REFERENCE, PHI = 128, transformations.exponential(4.0)

Score = Callable[[Any, Prompts, Responses], Array]


def settings_of(work: Work) -> dict[str, Any]:
    usual: dict[str, Any] = {"unroll": work.layers, "compute": work.compute}
    if work.device == "gpu":
        usual |= {"attention": "cudnn", "logits_at_once": 2**27}
    return usual | work.settings


def model_config(work: Work) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=work.vocab, width=work.width, layers=work.layers, heads=work.heads,
        kv_heads=work.kv_heads, mlp_width=work.mlp_width,
        **settings_of(work),
    )  # fmt: skip


def make_mesh(work: Work) -> jax.sharding.Mesh:
    usual = meshes.MeshConfig()
    return meshes.make(usual, meshes.available(usual, [work.prompts]))


def prompts_of(work: Work, step: int, mesh: jax.sharding.Mesh) -> Prompts:
    tokens = prompt_tokens(work, step)
    index = np.arange(step * work.prompts, (step + 1) * work.prompts, dtype=np.int32)
    return meshes.put_batch(Prompts(tokens, np.ones(tokens.shape, bool), index), mesh)


def make_score(work: Work, config: TransformerConfig, mesh: jax.sharding.Mesh) -> Score:
    """(prompts, responses) -> rewards [B, K]: a model of the policy's size or `even_share`."""
    if work.reward == "function":

        def cheap(prompts: Prompts, responses: Responses) -> np.ndarray:
            rows = np.asarray(responses.tokens)
            shares = even_share(rows.reshape(-1, rows.shape[-1]).tolist())
            return np.asarray(shares, np.float32).reshape(rows.shape[:2])

        return cheap
    trunk = programs.initial_params(mesh, config, jax.random.key(1))
    params = nn.unbox(rewards.with_head(config, trunk))
    head = jax.random.normal(jax.random.key(2), params["head"].shape)
    params["head"] = jax.device_put(head, meshes.replicated(mesh))
    return partial(programs.make_rewards(mesh, config), params)


def steps(work: Work) -> tuple[list[float], int]:
    """When each step has ended, with the beginning before them, and the number of parameters."""
    mesh, config = make_mesh(work), model_config(work)
    boxed = programs.boxed_params(config)
    reference = programs.initial_params(mesh, config, jax.random.key(0))
    law = SamplingConfig(length=work.response, end=work.vocab)
    parts = rollout.Parts(
        programs.make_sample(mesh, config, law, work.responses),
        make_score(work, config, mesh),
        partial(programs.make_log_probs(mesh, config), reference),
        rollout.make_rank(mesh, PHI),
    )
    adam = training.optimiser(training.OptimiserConfig(), work.warm_up + work.updates)
    log_z = float(frontier.log_partition(PHI, work.beta))
    loss = learner.policy_gradient(
        partial(transformer.log_probs, config), work.beta, log_z, "partition"
    )
    update = training.make_update(loss, adam, mesh, boxed)
    state = training.initial_state(mesh, boxed, reference, adam)
    table = np.random.default_rng(1).normal(size=(work.prompts, REFERENCE)).astype(np.float32)
    table.sort(axis=1)
    times, masks = [time.perf_counter()], []
    for step in range(work.warm_up + work.updates):
        prompts = prompts_of(work, step, mesh)
        ranked = meshes.put_batch(table, mesh)
        made = rollout.batch(parts, state.params, prompts, ranked, jax.random.key(step))
        state, metrics = jax.block_until_ready(update(state, made))
        times.append(time.perf_counter())
        masks.append(made.rollouts.responses.mask)
    assert all(mask.all() and mask.size == work.tokens for mask in masks)
    assert np.isfinite(metrics["loss"])
    return times, sum(leaf.size for leaf in jax.tree.leaves(reference))


def calls(work: Work) -> tuple[list[float], int]:
    """When each call of the sampler has ended, with the beginning, and the number of parameters."""
    mesh, config = make_mesh(work), model_config(work)
    law = SamplingConfig(length=work.response, end=work.vocab)
    sample = programs.make_sample(mesh, config, law, work.responses)
    params = programs.initial_params(mesh, config, jax.random.key(0))
    times, masks = [time.perf_counter()], []
    for step in range(work.warm_up + work.updates):
        prompts = prompts_of(work, step, mesh)
        rollouts = jax.block_until_ready(sample(params, prompts, jax.random.key(step)))
        times.append(time.perf_counter())
        masks.append(rollouts.responses.mask)
    assert all(mask.all() and mask.size == work.tokens for mask in masks)
    return times, sum(leaf.size for leaf in jax.tree.leaves(params))


def main() -> None:
    work = read()
    times, parameters = (calls if work.algorithm == "sample" else steps)(work)
    what = "log-probabilities of what is drawn come with it"
    if work.algorithm != "sample":
        what = f"ranks among {REFERENCE} rewards a prompt (made before), partition baseline"
    chosen = ", ".join(f"{name} {value}" for name, value in settings_of(work).items())
    report(
        work, times,
        parameters, {"infalign_jax": infalign_jax.__version__, "jax": jax.__version__},
        f"{work.compute}, {jax.device_count()} × {jax.devices()[0].device_kind}, {what}; {chosen}",
    )  # fmt: skip


if __name__ == "__main__":
    main()
