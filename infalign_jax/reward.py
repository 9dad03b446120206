"""Bradley–Terry reward model on the transformer's trunk: Rollouts -> r[B, K].

Every response token gets a score from its hidden state, and the reward is their mean: with the
gradient reaching each token directly, a small trunk learns what the reward hangs on in a third of
the steps that a score of the last token alone takes.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from infalign_jax.batches import Array, Preferences, Prompts, Responses
from infalign_jax.lm import transformer
from infalign_jax.lm.transformer import Params, TransformerConfig


def with_head(config: TransformerConfig, trunk: Params) -> dict[str, Any]:
    """Reward-model parameters on a language model's trunk (boxed or not); the head starts at 0.

    >>> config = TransformerConfig()
    >>> with_head(config, {})["head"].value.shape
    (64,)
    """
    head = nn.LogicallyPartitioned(jnp.zeros((config.width,), jnp.float32), ("width",))
    return {"trunk": trunk, "head": head}


def running_rewards(
    config: TransformerConfig, params: Params, prompts: Prompts, responses: Responses
) -> Array:
    """What each response has earned after every token, [B, K, T] in `config.wide`.

    The running sum of the scores of the tokens so far over the length of the whole response: the
    last entry is the reward.

    >>> config, key = TransformerConfig(), jax.random.key(0)
    >>> trunk = jax.eval_shape(lambda: transformer.initial_params(config, key))
    >>> params = nn.unbox(with_head(config, trunk))
    >>> x = Prompts(jnp.ones((1, 3), int), jnp.ones((1, 3), bool), jnp.arange(1))
    >>> y = Responses(jnp.array([[[7, 2], [8, 2]]]), jnp.ones((1, 2, 2), bool))
    >>> jax.eval_shape(lambda p: running_rewards(config, p, x, y), params).shape
    (1, 2, 2)
    """
    hidden = transformer.hidden_states(config, params["trunk"], prompts, responses)[:, :, 1:]
    head = params["head"].astype(config.wide)
    scores = jnp.einsum("bktd,d->bkt", hidden.astype(config.wide), head)
    length = jnp.maximum(responses.mask.sum(axis=-1, keepdims=True, dtype=config.wide), 1.0)
    return jnp.cumsum(jnp.where(responses.mask, scores, 0.0), axis=-1) * SCALE / length


def rewards(
    config: TransformerConfig, params: Params, prompts: Prompts, responses: Responses
) -> Array:
    """Rewards [B, K] of whole responses, in `config.wide`.

    With its head at 0 the model tells nothing apart:

    >>> config, key = TransformerConfig(), jax.random.key(0)
    >>> trunk = jax.eval_shape(lambda: transformer.initial_params(config, key))
    >>> params = with_head(config, jax.tree.map(lambda leaf: jnp.ones(leaf.shape), trunk))
    >>> x = Prompts(jnp.ones((1, 3), int), jnp.ones((1, 3), bool), jnp.arange(1))
    >>> y = Responses(jnp.array([[[7, 2], [8, 2]]]), jnp.ones((1, 2, 2), bool))
    >>> jax.jit(rewards, static_argnums=0)(config, nn.unbox(params), x, y).tolist()
    [[0.0, 0.0]]
    """
    return running_rewards(config, params, prompts, responses)[..., -1]


SCALE = 4.0  # Adam moves every weight alike: this sets how fast the head grows


def loss(
    config: TransformerConfig, params: Params, batch: Preferences
) -> tuple[Array, dict[str, Array]]:
    """−log σ(r(chosen) − r(rejected)), averaged, and the accuracy (Bradley & Terry, 1952).

    >>> config, key = TransformerConfig(), jax.random.key(0)
    >>> trunk = jax.eval_shape(lambda: transformer.initial_params(config, key))
    >>> params = with_head(config, jax.tree.map(lambda leaf: jnp.ones(leaf.shape), trunk))
    >>> x = Prompts(jnp.ones((1, 3), int), jnp.ones((1, 3), bool), jnp.arange(1))
    >>> y = Responses(jnp.array([[[7, 2], [8, 2]]]), jnp.ones((1, 2, 2), bool))
    >>> measured = jax.jit(loss, static_argnums=0)
    >>> value, metrics = measured(config, nn.unbox(params), Preferences(x, y))
    >>> round(float(value), 3), float(metrics["accuracy"])  # a coin's: log 2 and a half
    (0.693, 0.5)
    """
    values = rewards(config, params, batch.prompts, batch.responses)
    margin = values[:, 0] - values[:, 1]
    return -jax.nn.log_sigmoid(margin).mean(), {"accuracy": correct(margin).mean()}


def correct(margin: Array) -> Array:
    """1 where the chosen response scores higher, ½ where both score the same: float32, as given.

    >>> correct(jnp.array([0.3, 0.0, -2.0])).tolist()
    [1.0, 0.5, 0.0]
    """
    return (jnp.sign(margin).astype(jnp.float32) + 1.0) / 2.0
