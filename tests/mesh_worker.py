"""Run with 8 simulated devices: one update of every stage, and some sampling, on every mesh.

Writes an .npz of gradients "STAGE/MESH/leaf", tokens "tokens/MESH", and how arrays lie.
With names of meshes only those; the devices may be those of several processes that have joined.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import conftest  # noqa: F401  (the guards)
import jax
import jax.numpy as jnp
import numpy as np
import optax
import toy

from infalign_jax import foresight, learner, programs, reward, training
from infalign_jax.batches import Preferences, Rollouts
from infalign_jax.commands import plan_phases
from infalign_jax.data import minibatches
from infalign_jax.drawing import SamplingConfig
from infalign_jax.lm import transformer, vocabulary
from infalign_jax.lm.arithmetic import Shape
from infalign_jax.lm.transformer import TransformerConfig
from infalign_jax.runtime import accounts, hlo, hosts, shards
from infalign_jax.runtime import mesh as meshes
from infalign_jax.runtime.mesh import MeshConfig
from infalign_jax.stages.language import sft_loss

MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=2, fsdp=2, replica=2),
    "data×tensor": MeshConfig(data=4, tensor=2),
    "fsdp×tensor": MeshConfig(data=2, fsdp=2, tensor=2),
}
COLLECTIVE = r" (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
CONFIG = toy.config()
PROMPTS = toy.prompts((6, 1, 4, 2, 5, 3, 6, 1))
REFERENCE = toy.params(CONFIG)

# Leaves the parameters where they are and keeps the gradient as its state.
KEEP = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda gradient, state, params: (jax.tree.map(jnp.zeros_like, gradient), gradient),
)


def boxed() -> Any:
    return jax.eval_shape(lambda: transformer.initial_params(CONFIG, jax.random.key(0)))


def stages() -> dict[str, tuple[Any, Any, Any, Any]]:
    """By stage: parameters as shapes with axes, parameters, loss, batch."""
    pair, four = toy.responses(8, 2), toy.responses(8, 4)
    rng = np.random.default_rng(5)
    u, log_ref = rng.uniform(0, 1, (8, 4)), rng.normal(-9, 1, (8, 4))
    u, log_ref = jnp.asarray(u, jnp.float32), jnp.asarray(log_ref, jnp.float32)
    running = jnp.asarray(rng.standard_normal((8, 4, 5)), jnp.float32)
    start, pairs = toy.params(CONFIG, 1), Preferences(PROMPTS, pair)
    head = jnp.asarray(rng.standard_normal((16, 2)), jnp.float32)
    rollouts = learner.Batch(Rollouts(PROMPTS, four, log_ref), 2 * u, log_ref, u, u)
    policy = partial(transformer.log_probs, CONFIG)
    return {
        "sft": (boxed(), start, partial(sft_loss, CONFIG), pairs),
        "reward": (
            reward.with_head(CONFIG, boxed()),
            {"trunk": start, "head": head[:, 0]},
            partial(reward.loss, CONFIG),
            pairs,
        ),
        "foresight": (
            foresight.with_head(CONFIG, boxed()),
            {"trunk": start, "head": head},
            lambda params, batch: foresight.loss(CONFIG, 4.0, params, (REFERENCE, batch)),
            foresight.Batch(PROMPTS, four, u, running),
        ),
        "align": (
            boxed(), start, learner.policy_gradient(policy, 0.3, 0.7, "leave_one_out"), rollouts,
        ),
    }  # fmt: skip


def one_update(mesh: Any, stage: tuple[Any, Any, Any, Any]) -> tuple[Any, Any]:
    shapes, params, loss, batch = stage
    state = training.initial_state(mesh, shapes, params, KEEP)
    update = training.make_update(loss, KEEP, mesh, shapes)
    return update(state, meshes.put_batch(batch, mesh))


def tokens(mesh: Any, law: SamplingConfig) -> tuple[jax.Array, int]:
    """What is drawn, and how many collectives the compiled loops over tokens hold."""
    config = toy.config(compute="float64")
    sample = programs.make_sample(mesh, config, law, 4)
    params = jax.device_put(REFERENCE, meshes.shardings(mesh, boxed()))
    operands = params, meshes.put_batch(PROMPTS, mesh), jax.random.key(3)
    program = sample.lower(*operands).compile()
    return program(*operands).responses.tokens, collectives_in_loops(program.as_text())


def chunks(mesh: Any) -> int:
    """Collectives in the loops over chunks of the vocabulary's logits, forward and backward."""
    some, batch = jax.ShapeDtypeStruct, meshes.batch_sharding(mesh)

    def total(hidden: Any, table: Any, own: Any) -> jax.Array:
        return vocabulary.log_probs(hidden, table, own, jnp.dtype("float32"), 24).sum()

    layout = batch, meshes.shardings(mesh, boxed()["embedding"]), batch
    program = shards.within(mesh, jax.grad(total, argnums=(0, 1)))
    program = jax.jit(program, in_shardings=layout, out_shardings=layout[:2])
    hidden, own = some((8, 4, 5, 16), jnp.float32), some((8, 4, 5), jnp.int32)
    text = program.lower(hidden, some((12, 16), jnp.float32), own).compile().as_text()
    assert " while(" in text
    return collectives_in_loops(text)


def received(mesh: Any, prompts: int) -> float:
    """Bytes that a device receives in one pass over the responses to so many prompts."""
    model, shape = TransformerConfig(), Shape(prompts, 16, 4, 32)
    program = plan_phases.log_probs(mesh, model, shape).lower().compile()
    account = accounts.account(hlo.parse(program.as_text()), dict(mesh.shape))
    return sum(each.bytes for each in account.collectives)


def told(mesh: Any, responses: int) -> float:
    """Bytes that a device receives from other shards of the batch while it draws."""
    model, law = TransformerConfig(), SamplingConfig(32)
    phase = plan_phases.sampler(mesh, model, law, Shape(8, 16, responses, 32))
    module = hlo.parse(phase.lower().compile().as_text())
    found = accounts.account(module, dict(mesh.shape), phase.trips).collectives
    return sum(each.bytes for each in found if each.axes != ("tensor",))


def collectives_in_loops(text: str) -> int:
    """Collectives in computations that are the body or the condition of a while."""
    looped = set(re.findall(r"(?:body|condition)=%([\w.\-]+)", text))
    parts = re.split(r"^(?:ENTRY )?%([\w.\-]+) .*\{$", text, flags=re.MULTILINE)
    bodies = [body for name, body in zip(parts[1::2], parts[2::2], strict=True) if name in looped]
    return sum(len(re.findall(COLLECTIVE, body)) for body in bodies)


def laid(rows: np.ndarray, mesh: Any) -> np.ndarray:
    """A batch of which this process has only its own rows, whole again."""
    return np.asarray(hosts.whole(meshes.put_own(rows, mesh)))


def found() -> Iterator[tuple[str, Any]]:
    wanted = sys.argv[2:] or ["one", *MESHES]
    made = {name: meshes.make(MESHES[name]) for name in wanted if name in MESHES}
    if "one" in wanted:
        made = {"one": meshes.make(MeshConfig(), jax.devices()[:1])} | made
    for name, mesh in made.items():
        for stage, parts in stages().items():
            state, metrics = one_update(mesh, parts)
            yield f"{stage}/{name}/loss", metrics["loss"]
            for path, leaf in jax.tree_util.tree_leaves_with_path(state.optimiser):
                yield f"{stage}/{name}/{jax.tree_util.keystr(path)}", leaf
        query = state.params["blocks"]["query"]
        yield f"lies/{name}", np.array(query.sharding.shard_shape(query.shape))
        plain = SamplingConfig(length=6, end=5)
        law = plain if name == "one" else replace(plain, in_hand=1, lanes=3)
        with jax.enable_x64(True):
            drawn, collectives = tokens(mesh, law)
        yield f"tokens/{name}", drawn
        yield f"collectives/{name}", collectives
        yield f"chunks/{name}", chunks(mesh)
        yield f"received/{name}", np.array([received(mesh, n) for n in (8, 32)])
        yield f"told/{name}", np.array([told(mesh, n) for n in (2, 16)])
        rows = np.arange(20, dtype=np.float32).reshape(10, 2)
        batches = minibatches(rows, 8, 3, meshes.own_rows(mesh, 8))
        yield f"batches/{name}", np.stack([laid(next(batches), mesh) for _ in range(3)])


if __name__ == "__main__":
    assert jax.device_count() == 8
    figures = {name: np.asarray(hosts.whole(value)) for name, value in found()}
    if hosts.first():
        np.savez(sys.argv[1], **figures)
