"""Four steps of RL on a toy, from the checkpoint in a directory if there is one.

`resume_worker.py OUT data=4,fsdp=2` trains on the devices of this process, or of those that have
joined, and writes OUT/found.npz: final parameters by name, and what each step drew.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  (the guards)
import jax
import numpy as np
import toy

from infalign_jax import learner, programs, training
from infalign_jax.data import minibatches
from infalign_jax.drawing import SamplingConfig
from infalign_jax.experiment import Experiment
from infalign_jax.lm import transformer
from infalign_jax.runtime import hosts, mesh_sizes
from infalign_jax.runtime import mesh as meshes
from infalign_jax.runtime.arrays import named
from infalign_jax.stages.run import Run, fit, put

CONFIG = toy.config()
PROMPTS = toy.prompts((6, 1, 4, 2, 5, 3, 6, 1) * 2)


def train(run: Run) -> dict[str, np.ndarray]:
    boxed, drawn = programs.boxed_params(CONFIG), {}
    transform = training.optimiser(training.OptimiserConfig(0.05, warmup_steps=1), 4)
    state = training.initial_state(run.mesh, boxed, toy.params(CONFIG), transform)
    log_probs = partial(transformer.log_probs, CONFIG)
    loss = learner.policy_gradient(log_probs, 0.3, 0.7, "leave_one_out")
    update = training.make_update(loss, transform, run.mesh, boxed)
    sample = programs.make_sample(run.mesh, CONFIG, SamplingConfig(length=6, end=5), 4)
    batch = meshes.batch_sharding(run.mesh)
    keys = jax.jit(
        lambda step: jax.random.fold_in(run.key(6), step),
        out_shardings=meshes.replicated(run.mesh),
    )

    @partial(jax.jit, in_shardings=batch, out_shardings=batch)
    def assemble(rollouts: Any) -> learner.Batch:
        rewards = (rollouts.responses.tokens % 3 == 0).mean(-1, dtype=np.float32)
        return learner.Batch(rollouts, rewards, rollouts.log_probs, rewards, rewards)

    def prepare(params: Any, rows: np.ndarray, step: int) -> learner.Batch:
        prompts = put(run, jax.tree.map(lambda leaf: np.asarray(leaf)[rows], PROMPTS))
        rollouts = sample(params, prompts, keys(meshes.put_whole(np.uint32(step), run.mesh)))
        drawn[f"drawn/{step}"] = hosts.whole(rollouts.responses.tokens)
        return assemble(rollouts)

    batches = minibatches(np.arange(16), 8, seed=3)
    params, _ = fit(run, "align", "ab12", state, update, batches, 4, 1, prepare)
    return drawn | {name: hosts.whole(leaf) for name, leaf in named(params).items()}


if __name__ == "__main__":
    out = Path(sys.argv[1])
    own = Run(
        Experiment("toy", checkpoint_every=2), out, meshes.make(mesh_sizes.parse(sys.argv[2]))
    )
    found = train(own)
    if hosts.first():
        np.savez(out / "found.npz", **found)
