"""The reward model: what it sums, what it cannot see, that it learns."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import toy

from infalign_jax import reward, training
from infalign_jax.batches import Preferences, Responses
from infalign_jax.lm import transformer
from infalign_jax.runtime import mesh as meshes

CONFIG = toy.config(layers=1)


def params(seed: int = 0) -> Any:
    head = jnp.asarray(np.random.default_rng(seed).standard_normal(16), jnp.float32)
    return {"trunk": toy.params(CONFIG), "head": head}


def test_the_reward_is_the_mean_score_of_the_tokens(precision: jnp.dtype) -> None:
    assert jnp.zeros(()).dtype == precision
    x, y = toy.prompts(), toy.responses()
    running = jax.jit(partial(reward.running_rewards, CONFIG))(params(), x, y)
    hidden = jax.jit(partial(transformer.hidden_states, CONFIG))(params()["trunk"], x, y)
    scores = np.asarray(hidden)[:, :, 1:] @ np.asarray(params()["head"])
    assert (running.shape, running.dtype) == ((3, 2, 5), jnp.float32)
    for b in range(3):
        for k in range(2):
            length = int(y.mask[b, k].sum())
            so_far = np.cumsum(scores[b, k, :length]) * reward.SCALE / length
            np.testing.assert_allclose(running[b, k, :length], so_far, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(running[b, k, length:], so_far[-1], rtol=1e-4, atol=1e-5)
    whole = jax.jit(partial(reward.rewards, CONFIG))(params(), x, y)
    np.testing.assert_allclose(whole, running[..., -1], rtol=1e-6)


def test_padding_is_not_scored() -> None:
    score, x, y = jax.jit(partial(reward.rewards, CONFIG)), toy.prompts(), toy.responses()
    noise = toy.responses(seed=7).tokens + 1
    assert not y.mask.all()
    other = Responses(jnp.where(y.mask, y.tokens, noise), y.mask)
    assert (other.tokens != y.tokens).any()
    np.testing.assert_array_equal(score(params(), x, other), score(params(), x, y))
    seen = Responses(jnp.where(y.mask, noise, y.tokens), y.mask)
    assert (score(params(), x, seen) != score(params(), x, y)).all()


def test_the_loss_is_bradley_terry() -> None:
    rows = Preferences(toy.prompts(), toy.responses())
    values = jax.jit(partial(reward.rewards, CONFIG))(params(), rows.prompts, rows.responses)
    value, metrics = jax.jit(partial(reward.loss, CONFIG))(params(), rows)
    chance = 1 / (1 + np.exp(-(values[:, 0] - values[:, 1])))
    np.testing.assert_allclose(value, -np.log(chance).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], (chance > 0.5).mean())
    assert 0 < metrics["accuracy"] < 1


def test_a_tie_is_half_correct(precision: jnp.dtype) -> None:
    margin = jnp.array([1e-9, 0.0, -1e-9, 5.0], precision)
    assert reward.correct(margin).tolist() == [1.0, 0.5, 0.0, 1.0]
    assert reward.correct(margin).dtype == jnp.float32


def test_a_preference_is_learnt() -> None:
    """The chosen response is the one that says token 9: chance before, right after 40 steps."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 9, (64, 2, 5))
    tokens[np.arange(64), 0, rng.integers(0, 5, 64)] = 9
    y = Responses(jnp.asarray(tokens, jnp.int32), jnp.ones((64, 2, 5), bool))
    rows = Preferences(toy.prompts((6, 1, 4, 3) * 16), y)
    key = jax.random.key(0)
    boxed = reward.with_head(CONFIG, transformer.initial_params(CONFIG, key))
    assert boxed["head"].names == ("width",)
    mesh = meshes.make(meshes.MeshConfig(), jax.devices()[:1])
    transform = training.optimiser(training.OptimiserConfig(learning_rate=3e-3), 40)
    state = training.initial_state(mesh, boxed, nn.unbox(boxed), transform)
    update = training.make_update(partial(reward.loss, CONFIG), transform, mesh, boxed)
    accuracies = []
    for _ in range(40):
        state, metrics = update(state, rows)
        accuracies.append(float(metrics["accuracy"]))
    assert accuracies[0] == 0.5
    assert accuracies[-1] > 0.95
